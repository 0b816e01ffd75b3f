"""Fused attention kernels of accelerators. They have derivatives in reverse mode only: in forward mode (`jax.jvp`,
`jax.jacfwd`) JAX raises a TypeError; `Runtime(attention="xla")` computes attention in plain JAX, which has both.

Functions take q [B, T, N, H] and k, v [B, S, K, H] as `kernels.attention` says.
"""

from typing import Any

import jax
import jax.numpy as jnp

from acestep_jax.models.kernels.blockwise import pad_time
from acestep_jax.models.scan import KEPT

# Largest tile of Pallas' splash attention, tokens.
SPLASH_BLOCK = 1024


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, key_lengths: jax.Array | None = None) -> jax.Array:
    """Compute attention by cuDNN's fused kernel: bfloat16 or float16, compute capability 8.0 or more."""
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=key_lengths, implementation="cudnn")


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, *, key_lengths: jax.Array | None = None, interpret: bool = False
) -> jax.Array:
    """Compute attention by Pallas' splash kernel for TPU; T and S are padded to multiples of 128, the keys masked.

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
    out: Any = jax.vmap(kernel)(q, k, v, segments)
    return out.swapaxes(1, 2)[:, :t]


def _tile(length: int) -> int:
    """Return the largest multiple of 128 up to SPLASH_BLOCK that divides `length`, itself one."""
    return max(n for n in range(128, SPLASH_BLOCK + 1, 128) if length % n == 0)
