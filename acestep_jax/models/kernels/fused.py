"""Fused attention kernels for accelerators. They support only reverse-mode differentiation: in forward mode (`jax.jvp`,
`jax.jacfwd`) JAX raises a TypeError. `Runtime(attention="xla")` computes attention in plain JAX, which supports both.

Functions take q [B, T, N, H] and k, v [B, S, K, H], see `kernels.attention`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from acestep_jax.models.kernels.blockwise import pad_time
from acestep_jax.models.scan import KEPT

# Largest tile of Pallas' splash attention, tokens.
SPLASH_BLOCK = 1024
# Largest tiles of queries and keys with a window; more of larger tiles would be masked.
WINDOW_BLOCKS = (256, 128)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, key_lengths: jax.Array | None = None) -> jax.Array:
    """Compute attention with cuDNN's fused kernel: bfloat16 or float16, compute capability 8.0 or higher."""
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=key_lengths, implementation="cudnn")


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None = None,
    first_query: int | jax.Array = 0,
    key_lengths: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Compute attention with Pallas' splash kernel for TPU; T and S are padded to multiples of 128, with keys masked.

    window: only keys with |i - j| <= window are visible, and only their blocks are visited. Then S is T, or window +
        T + window, with keys before the first query and after the last.
    first_query: position of q[:, 0], for `window`; keys at negative positions are masked.
    interpret: run the kernel step by step in JAX, on any backend.
    """
    # The import takes a second, which only TPU users should pay.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    b, t, n, h = q.shape
    s = k.shape[1]
    q, k, v = pad_time(q, 0, -t % 128), pad_time(k, 0, -s % 128), pad_time(v, 0, -s % 128)
    rows, columns = q.shape[1], k.shape[1]
    block_q, block_kv = _tile(rows, SPLASH_BLOCK), _tile(columns, SPLASH_BLOCK)
    halo = 0
    backward: dict[str, Any] = dict(use_fused_bwd_kernel=True)
    if window is None:
        mask = masks.FullMask((rows, columns))
    else:
        halo = (s - t) // 2  # offset of the key at a query's own position
        mask = masks.LocalMask((rows, columns), (window, window), halo)
        block_q, block_kv = _tile(rows, WINDOW_BLOCKS[0]), _tile(columns, WINDOW_BLOCKS[1])
        # The fused backward pass writes the gradient of the queries once per block of keys, visited or not.
        backward = dict(use_fused_bwd_kernel=False, block_q_dq=block_q, block_kv_dq=block_kv)
    kernel = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * n),
        block_sizes=kernels.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            **backward,
        ),
        residual_checkpoint_name=KEPT,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    scale = jnp.asarray(h**-0.5, q.dtype)
    q, k = (q, k * scale) if k.size < q.size else (q * scale, k)  # scale the smaller array
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, N, T, H]
    segments = None
    if key_lengths is not None or columns != s:
        lengths = jnp.full((b,), s) if key_lengths is None else key_lengths
        at = jnp.arange(columns)
        begin, end = halo - first_query, lengths - first_query + halo
        # Tokens attend within their segment: all queries and valid keys are in segment 1.
        segments = kernels.SegmentIds(
            q=jnp.ones((b, rows), jnp.int32), kv=((at >= begin) & (at < end[:, None])).astype(jnp.int32)
        )
    out: Any = jax.vmap(kernel)(q, k, v, segments)
    return out.swapaxes(1, 2)[:, :t]


def _tile(length: int, most: int) -> int:
    """Return the largest multiple of 128 up to `most` that divides `length`, a multiple of 128."""
    return max(n for n in range(128, most + 1, 128) if length % n == 0)
