"""The ways to compute attention, on the arrays of one device. `attention.attention` chooses among them and shards.

All take q [B, T, N, H] and k, v [B, S, K, H] with N a multiple of K, read query head n with key head n // (N / K),
never repeat a key head in memory, and return [B, T, N, H] in q's dtype with the softmax in float32. `key_lengths`, [B]
int32: keys from there on are seen by nobody. A query that sees no key gets some finite value.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from acestep_jax.models.layers import KEPT

# Queries that share one pass over the keys in full attention: no array of [T, T] scores is ever made.
QUERY_BLOCK = 256

# Scores held at once on a CPU, so that they stay in its cache: 4 MiB of float32.
CPU_SCORES = 1 << 20

# Largest tile of Pallas' splash attention, tokens.
SPLASH_BLOCK = 1024

# Keeps a block's masks and scores out of memory until the backward pass, but for what it would need them all to make.
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
    platform: str = "cpu",
) -> jax.Array:
    """All keys, a block of queries at a time, in plain JAX. `first_query`: position of q[:, 0], for `causal`."""
    b, t, n, h = q.shape
    s, groups = k.shape[1], k.shape[2]
    num_blocks = -(-t // QUERY_BLOCK)
    size = -(-t // num_blocks)

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

    y = _over_rows(head, (jnp.arange(b * groups), q, k, v, lengths), n // groups * size * s, platform)
    y = y.reshape(b, groups, num_blocks, n // groups, size, h).transpose(0, 2, 4, 1, 3, 5)
    return y.reshape(b, num_blocks * size, n, h)[:, :t]


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
    platform: str = "cpu",
) -> jax.Array:
    """Keys with |i - j| <= window, in O(T * window): blocks of `window` queries, each against three of keys.

    k, v: [B, window + T + window, K, H], with `window` keys before the first query and after the last.
    first_query: position of q[:, 0]; keys at negative positions are seen by nobody.
    """
    b, t, n, h = q.shape
    groups = k.shape[2]
    num_blocks = -(-t // window)
    tail = num_blocks * window - t
    rows = b * groups * num_blocks

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
    y = _over_rows(block, xs, 3 * n // groups * window**2, platform)
    y = y.reshape(b, groups, num_blocks, n // groups, window, h).transpose(0, 2, 4, 1, 3, 5)
    return y.reshape(b, num_blocks * window, n, h)[:, :t]


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, key_lengths: jax.Array | None = None) -> jax.Array:
    """cuDNN's fused attention: bfloat16 or float16, compute capability 8.0 or more."""
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=key_lengths, implementation="cudnn")


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, *, key_lengths: jax.Array | None = None, interpret: bool = False
) -> jax.Array:
    """Pallas' splash attention for TPU. T and S are padded to multiples of 128, and padded keys masked.

    interpret: runs the kernel step by step in JAX, on any backend.
    """
    # Importing it takes a second, which only a TPU's users should pay.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    b, t, n, h = q.shape
    s = k.shape[1]
    q, k, v = pad_time(q, 0, -t % 128), pad_time(k, 0, -s % 128), pad_time(v, 0, -s % 128)
    rows, columns = q.shape[1], k.shape[1]
    block_q, block_kv = _tile(rows), _tile(columns)
    kernel = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([masks.FullMask((rows, columns))] * n),
        block_sizes=kernels.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name=KEPT,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q * jnp.asarray(h**-0.5, q.dtype), k, v))  # [B, N, T, H]
    segments = None
    if key_lengths is not None or columns != s:
        lengths = jnp.full((b,), s) if key_lengths is None else key_lengths
        # A token sees those of its own segment: all queries are in segment 1, the keys that count as well.
        segments = kernels.SegmentIds(
            q=jnp.ones((b, rows), jnp.int32), kv=(jnp.arange(columns) < lengths[:, None]).astype(jnp.int32)
        )
    return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)[:, :t]


@jax.custom_vjp
def _attend(q, k, v, visible, dropout_key, dropout):
    """q: [G, T, H]; k, v: [S, H]; visible: bool, [S] or [T, S]. One matrix product each way, on rows G * T."""
    return _attend_forward(q, k, v, visible, dropout_key, dropout)[0]


def _attend_forward(q, k, v, visible, dropout_key, dropout):
    scores = _scores(q, k)
    if visible is not None:
        # The lowest finite score, not -inf: a row without any visible key gives the mean, not NaN.
        scores = _where(visible, scores, jnp.finfo(jnp.float32).min)
    highest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    norm = highest + jnp.log(total)
    if dropout_key is not None:
        weights = weights * _kept(dropout_key, dropout, weights.shape)
    y = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    y = checkpoint_name(y.astype(q.dtype).reshape(q.shape), KEPT)
    return y, (q, k, v, visible, dropout_key, dropout, y, checkpoint_name(norm, KEPT))


def _attend_backward(residuals, dy):
    """From the result and each row's log of the sum of exponentials: five products instead of six, and no reduction
    over the scores. A row that sees nothing has no gradient."""
    q, k, v, visible, dropout_key, dropout, y, norm = residuals
    rows = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    weights = jnp.exp(_scores(q, k) - norm)
    if visible is not None:
        weights = _where(visible, weights, 0.0)
    inner = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1).reshape(-1, 1)
    dy = rows(dy).astype(v.dtype)
    d_weights = jnp.dot(dy, v.T, preferred_element_type=jnp.float32)
    dropped = weights
    if dropout_key is not None:
        kept = _kept(dropout_key, dropout, weights.shape)
        dropped, d_weights = weights * kept, d_weights * kept
    dv = jnp.dot(dropped.T.astype(dy.dtype), dy, preferred_element_type=jnp.float32).astype(v.dtype)
    d_scores = (weights * (d_weights - inner) * q.shape[-1] ** -0.5).astype(k.dtype)
    dq = jnp.dot(d_scores, k, preferred_element_type=jnp.float32).astype(q.dtype).reshape(q.shape)
    dk = jnp.dot(d_scores.T, rows(q).astype(k.dtype), preferred_element_type=jnp.float32).astype(k.dtype)
    return dq, dk, dv, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(q, k):
    return jnp.dot(q.reshape(-1, q.shape[-1]), k.T, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5


def _where(visible, x, otherwise):
    """x: [G * T, S]; visible: [S] or [T, S]."""
    rows = visible.shape[0] if visible.ndim == 2 else x.shape[0]
    return jnp.where(visible, x.reshape(-1, rows, x.shape[-1]), otherwise).reshape(x.shape)


def _kept(key, dropout, shape):
    """What a weight counts under dropout: nothing, or so much more that the mean stays."""
    return jax.random.bernoulli(key, 1.0 - dropout, shape) / (1.0 - dropout)


def _over_rows(function: Callable, xs, scores: int, platform: str):
    """`function` over the leading axis of xs. An accelerator takes all rows at once. A CPU takes one row after the
    other, or as many as together make `CPU_SCORES`: XLA's matrix product uses all cores anyway, and a row's scores are
    then read from cache."""
    if platform != "cpu":
        return jax.vmap(function)(xs)
    rows = xs[0].shape[0]
    at_once = max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * scores <= CPU_SCORES))
    return jax.lax.map(function, xs, batch_size=None if at_once == 1 else at_once)


def _tile(length: int) -> int:
    """The largest multiple of 128 up to SPLASH_BLOCK that divides `length`, itself one."""
    return max(n for n in range(128, SPLASH_BLOCK + 1, 128) if length % n == 0)


def pad_time(x: jax.Array, before: int, after: int) -> jax.Array:
    """Zeros before and after along axis 1."""
    return jnp.pad(x, ((0, 0), (before, after)) + ((0, 0),) * (x.ndim - 2))
