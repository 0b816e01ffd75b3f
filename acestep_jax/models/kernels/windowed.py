"""Sliding-window attention as one Pallas kernel for GPUs (with the Triton backend): it needs no gathered keys, masks or
scores in memory. Its derivatives, in both modes, are those of the plain form, `blockwise.banded`.

    block i of queries, positions i Q to i Q + Q - 1, reads keys from i Q - window to i Q + Q - 1 + window
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from acestep_jax.models.kernels import blockwise
from acestep_jax.models.kernels.blockwise import pad_time
from acestep_jax.models.kernels.platform import triton_options

QUERIES, KEYS = 128, 64  # tile sizes
HEAD_DIMS = (32, 64, 128)  # supported
_LOG2_E = 1.4426950408889634


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def windowed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first_query: jax.Array,
    key_lengths: jax.Array,
    window: int,
    interpret: bool = False,
) -> jax.Array:
    """Attend to keys with |i - j| <= window.

    Args:
        q: [B, T, N, H], bfloat16 or float16; H is a power of two.
        k, v: [B, T, K, H]; or [B, window + T + window, K, H], with keys before the first query and after the last.
        first_query: scalar int32, position of q[:, 0]; keys at negative positions are masked.
        key_lengths: [B] int32, number of valid keys; later ones are padding.
        window: static.
        interpret: run the kernel step by step in JAX, on any backend.
    """
    b, t, n, h = q.shape
    groups = n // k.shape[2]
    halo = (k.shape[1] - t) // 2  # offset of the key at a query's own position
    begin = jnp.broadcast_to(jnp.maximum(halo - first_query, 0), (b,)).astype(jnp.int32)
    end = jnp.minimum(key_lengths - first_query + halo, k.shape[1]).astype(jnp.int32)
    span = -(-(QUERIES + 2 * window) // KEYS) * KEYS
    q = pad_time(q, 0, -t % QUERIES)
    k, v = (pad_time(x, 0, max(0, span - x.shape[1])) for x in (k, v))
    keys = k.shape[1]
    rows = lambda i, batch, head: (batch, i, head, 0)  # noqa: E731
    whole = lambda i, batch, head: (batch, 0, head // groups, 0)  # noqa: E731
    kernel = functools.partial(_kernel, window=window, halo=halo, span=span, keys=keys)
    y = pl.pallas_call(
        kernel,
        grid=(q.shape[1] // QUERIES, b, n),
        in_specs=[
            pl.BlockSpec((None, QUERIES, None, h), rows),
            pl.BlockSpec((None, keys, None, h), whole),
            pl.BlockSpec((None, keys, None, h), whole),
            pl.BlockSpec((1,), lambda i, batch, head: (batch,)),
            pl.BlockSpec((1,), lambda i, batch, head: (batch,)),
        ],
        out_specs=pl.BlockSpec((None, QUERIES, None, h), rows),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="windowed_attention",
        metadata={"flops": str(4 * b * n * q.shape[1] * span * h)},  # for analyses of the compiled program
        **triton_options(interpret, num_warps=4, num_stages=2),
    )(q, k, v, begin, end)
    return y[:, :t]


def _kernel(q_ref, k_ref, v_ref, begin_ref, end_ref, out_ref, *, window: int, halo: int, span: int, keys: int):
    """Compute one tile of queries of one head: softmax(q k^T / sqrt(H)) v, one tile of keys after another."""
    size, h = q_ref.shape
    q = q_ref[...]
    row = pl.program_id(0) * size + halo + jax.lax.broadcasted_iota(jnp.int32, (size, KEYS), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (size, KEYS), 1)
    # Tiles start and end within the keys, so that nothing is read beyond them.
    first = jnp.clip(pl.program_id(0) * size + halo - window, 0, keys - span)
    begin, end = begin_ref[0], end_ref[0]
    lowest = jnp.finfo(jnp.float32).min

    def tile(j, carry):
        y, highest, total = carry
        at = first + j * KEYS
        scores = jnp.dot(q, k_ref[pl.ds(at, KEYS), :].T, preferred_element_type=jnp.float32)
        key = at + column
        visible = (jnp.abs(row - key) <= window) & (key >= begin) & (key < end)
        # The lowest finite score, not -inf, so that a row with no visible key gives some mean instead of NaN.
        scores = jnp.where(visible, scores * (h**-0.5 * _LOG2_E), lowest)
        top = jnp.maximum(highest, scores.max(-1))
        weights = jnp.exp2(scores - top[:, None])
        shrink = jnp.exp2(highest - top)
        product = jnp.dot(weights.astype(v_ref.dtype), v_ref[pl.ds(at, KEYS), :], preferred_element_type=jnp.float32)
        return y * shrink[:, None] + product, top, total * shrink + weights.sum(-1)

    start = jnp.zeros((size, h), jnp.float32), jnp.full((size,), lowest), jnp.zeros((size,), jnp.float32)
    y, _, total = jax.lax.fori_loop(0, span // KEYS, tile, start)
    out_ref[...] = (y / total[:, None]).astype(out_ref.dtype)


@windowed.defjvp
def _windowed_jvp(window, interpret, primals, tangents):
    q, k, v, first_query, key_lengths = primals

    def plain(q, k, v):
        before = window if k.shape[1] == q.shape[1] else 0
        k, v = (pad_time(x, before, before) for x in (k, v))
        return blockwise.banded(q, k, v, window, first_query=first_query, key_lengths=key_lengths)

    return jax.jvp(plain, (q, k, v), tangents[:3])
