"""Attention in plain JAX, a block of queries at a time: no array of [T, S] scores, on any backend.

Functions take q [B, T, N, H] and k, v [B, S, K, H], see `kernels.attention`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from acestep_jax.models.kernels.platform import platform
from acestep_jax.models.kernels.products import dot_general, operand
from acestep_jax.models.scan import KEPT

# Queries that share one pass over the keys in full attention, so that no [T, T] array of scores is ever allocated.
QUERY_BLOCK = 256

# Number of scores held at once on a CPU, so that they stay in its cache: 4 MiB in float32.
CPU_SCORES = 1 << 20

# Recomputes a block's masks and scores in the backward pass instead of storing them, except for results named KEPT.
_recomputed = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(KEPT))


def chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    first_query: int | jax.Array = 0,
    key_lengths: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Attend to all keys, a block of queries at a time. `first_query`: position of q[:, 0], for `causal`."""
    b, t, n, h = q.shape
    s, groups = k.shape[1], k.shape[2]
    num_blocks = -(-t // QUERY_BLOCK)
    size = -(-t // num_blocks)
    dtype = q.dtype
    q, k, v = operand(q), operand(k), operand(v)

    q = pad_time(q, 0, num_blocks * size - t).reshape(b, num_blocks, size, groups, n // groups, h)
    q = q.transpose(0, 3, 1, 4, 2, 5).reshape(b * groups, num_blocks, n // groups, size, h)
    k, v = (x.swapaxes(1, 2).reshape(b * groups, s, h) for x in (k, v))
    lengths = None if key_lengths is None else jnp.repeat(key_lengths, groups)

    def head(row):  # one key head of one batch item with its query heads
        i, q, k, v, length = row

        @_recomputed
        def block(args):
            j, q = args  # q: [N / K, size, H]
            visible = None if length is None else jnp.arange(s) < length
            if causal:
                earlier = jnp.arange(s) <= first_query + j * size + jnp.arange(size)[:, None]
                visible = earlier if visible is None else visible & earlier
            key = None if dropout_key is None else jax.random.fold_in(jax.random.fold_in(dropout_key, i), j)
            return _attend(q, k, v, visible, key, dropout)

        return jax.lax.map(block, (jnp.arange(num_blocks), q))

    y = _over_rows(head, (jnp.arange(b * groups), q, k, v, lengths), n // groups * size * s)
    y = y.reshape(b, groups, num_blocks, n // groups, size, h).transpose(0, 2, 4, 1, 3, 5)
    return y.reshape(b, num_blocks * size, n, h)[:, :t].astype(dtype)


def banded(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int,
    *,
    first_query: int | jax.Array = 0,
    key_lengths: jax.Array,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Attend to keys with |i - j| <= window, in O(T * window): each block of `window` queries reads three of keys.

    k, v: [B, window + T + window, K, H], with `window` keys before the first query and after the last.
    first_query: position of q[:, 0]; keys at negative positions are masked.
    """
    b, t, n, h = q.shape
    groups = k.shape[2]
    num_blocks = -(-t // window)
    tail = num_blocks * window - t
    rows = b * groups * num_blocks
    dtype = q.dtype
    q, k, v = operand(q), operand(k), operand(v)

    q = pad_time(q, 0, tail).reshape(b, num_blocks, window, groups, n // groups, h)
    q = q.transpose(0, 3, 1, 4, 2, 5).reshape(rows, n // groups, window, h)

    def neighbourhood(x):  # -> [rows, 3 * window, H]
        x = pad_time(x, 0, tail).swapaxes(1, 2).reshape(b, groups, num_blocks + 2, window, h)
        x = jnp.concatenate([x[:, :, :-2], x[:, :, 1:-1], x[:, :, 2:]], axis=3)
        return x.reshape(rows, 3 * window, h)

    @_recomputed
    def block(row):
        i, q, k, v, length = row
        begin = first_query + i % num_blocks * window
        query = begin + jnp.arange(window)[:, None]
        key = begin + jnp.arange(-window, 2 * window)
        visible = (abs(query - key) <= window) & (key >= 0) & (key < length)
        drop = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
        return _attend(q, k, v, visible, drop, dropout)

    lengths = jnp.repeat(key_lengths, groups * num_blocks)
    xs = jnp.arange(rows), q, neighbourhood(k), neighbourhood(v), lengths
    y = _over_rows(block, xs, 3 * n // groups * window**2)
    y = y.reshape(b, groups, num_blocks, n // groups, window, h).transpose(0, 2, 4, 1, 3, 5)
    return y.reshape(b, num_blocks * window, n, h)[:, :t].astype(dtype)


@jax.custom_jvp
def _attend(q, k, v, visible, dropout_key, dropout):
    """Compute y = softmax(q k^T / sqrt(H)) v for q [G, T, H] and k, v [S, H], as one product each over rows G * T.

    visible: bool, [S] or [T, S].
    """
    return _weighted_mean(q, k, v, visible, dropout_key, dropout)[0]


def _weighted_mean(q, k, v, visible, dropout_key, dropout):
    """Return y and each row's norm, the log-sum-exp of its scores, [G * T, 1]."""
    scores = _scores(q, k)
    if visible is not None:
        # The lowest finite score, not -inf, so that a row with no visible key gives the mean instead of NaN.
        scores = _where(visible, scores, jnp.finfo(jnp.float32).min)
    highest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    norm = highest + jnp.log(total)
    if dropout_key is not None:
        weights = weights * _kept(dropout_key, dropout, weights.shape)
    y = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return checkpoint_name(y.astype(q.dtype).reshape(q.shape), KEPT), checkpoint_name(norm, KEPT)


@functools.partial(_attend.defjvp, symbolic_zeros=True)
def _attend_jvp(primals, tangents):
    """Differentiate y_i = sum_j w_ij v_j, with w the softmax of the scores s: y' = (w s') v - rowsum(w s') y + w v'.

    Reverse mode is the transpose of this, and stores only y and the norm for the backward pass:
    dv = w^T dy,  ds = w (dy v^T - rowsum(dy y)),  dq = ds k / sqrt(H),  dk = ds^T q / sqrt(H). That is five products
    including the recomputed scores, instead of six, and no reduction over the scores. A row with no visible key has a
    derivative of zero.
    """
    q, k, v, visible, dropout_key, dropout = primals
    q_slope, k_slope, v_slope = tangents[:3]
    y, norm = _weighted_mean(*primals)
    exponents = _scores(q, k) - norm
    if visible is not None:
        # Mask before the exponential, which is infinite in a row with no visible key, and its derivative NaN.
        exponents = _where(visible, exponents, -jnp.inf)
    weights = jnp.exp(exponents)
    kept = None if dropout_key is None else _kept(dropout_key, dropout, weights.shape)
    drop = lambda x: x if kept is None else x * kept  # noqa: E731
    moving = lambda slope: not isinstance(slope, SymbolicZero)  # noqa: E731

    changes = []  # of y, [G * T, H] each
    if moving(v_slope):
        changes.append(_product(drop(weights), v_slope))
    scores = []  # their changes, [G * T, S] each
    if moving(q_slope):
        scores.append(_product(q_slope.reshape(-1, q.shape[-1]), k.T))
    if moving(k_slope):
        scores.append(_product(q.reshape(-1, q.shape[-1]), k_slope.T))
    if scores:
        weighted = weights * functools.reduce(jnp.add, scores) * q.shape[-1] ** -0.5
        inner = weighted.sum(-1, keepdims=True)
        changes.append(_product(drop(weighted), v) - inner * y.reshape(-1, y.shape[-1]).astype(jnp.float32))
    if not changes:
        return y, SymbolicZero.from_primal_value(y)
    return y, functools.reduce(jnp.add, changes).reshape(q.shape).astype(y.dtype)


def _product(x, y):
    """Compute x y, float32 [M, N], in the lower dtype of the two, so that its transposes use that dtype as well."""
    dtype = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
    return dot_general(x.astype(dtype), y.astype(dtype), (((1,), (0,)), ((), ()))).astype(jnp.float32)


def _scores(q, k):
    return jnp.dot(q.reshape(-1, q.shape[-1]), k.T, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5


def _where(visible, x, otherwise):
    """Choose x [G * T, S] where visible, [S] or [T, S]."""
    rows = visible.shape[0] if visible.ndim == 2 else x.shape[0]
    return jnp.where(visible, x.reshape(-1, rows, x.shape[-1]), otherwise).reshape(x.shape)


def _kept(key, dropout, shape):
    """Draw the factor of each weight under dropout: 0, or 1 / (1 - rate)."""
    return jax.random.bernoulli(key, 1.0 - dropout, shape) / (1.0 - dropout)


def _over_rows(function: Callable, xs, scores: int):
    """Map `function` over the leading axis of xs. An accelerator computes all rows at once. A CPU computes as many rows
    at a time as have `CPU_SCORES` scores together, or one: XLA's matrix product uses all cores anyway, and the scores
    are then read from cache."""
    if platform() != "cpu":
        return jax.vmap(function)(xs)
    rows = xs[0].shape[0]
    at_once = max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * scores <= CPU_SCORES))
    return jax.lax.map(function, xs, batch_size=None if at_once == 1 else at_once)


def pad_time(x: jax.Array, before: int, after: int) -> jax.Array:
    """Pad axis 1 with zeros before and after."""
    return jnp.pad(x, ((0, 0), (before, after)) + ((0, 0),) * (x.ndim - 2))
