"""Attention on the arrays of one device, and the choice of its kernel.

All kernels take q [B, T, N, H] and k, v [B, S, K, H] with N a multiple of K, pair query head n with key head
n // (N / K), never repeat a key head in memory, and return [B, T, N, H] in q's dtype, with the softmax in float32.
`key_lengths`, [B] int32: later keys are masked. The result for a query with no visible key is arbitrary, but finite.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from acestep_jax.errors import InputError
from acestep_jax.models.kernels import blockwise, fused
from acestep_jax.models.kernels.platform import compute_capability, platform, runs_triton
from acestep_jax.models.kernels.windowed import HEAD_DIMS, windowed
from acestep_jax.models.runtime import ATTENTION_KERNELS


def choose_kernel(kernel: str, q: jax.Array, k: jax.Array) -> str:
    """Return the attention kernel for these shapes and dtypes on the current backend; raise InputError if the given one
    is unknown or not supported."""
    if kernel not in ATTENTION_KERNELS:
        raise InputError(f"attention: expected one of {', '.join(ATTENTION_KERNELS)}, found {kernel!r}")
    found = platform()
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if kernel == "auto":
        # Below a tile or two, a fused kernel saves nothing.
        if min(q.shape[1], k.shape[1]) < 128:
            return "xla"
        if found == "gpu" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and compute_capability() >= 8:
            return "cudnn"
        return "splash" if found == "tpu" and q.shape[-1] % 128 == 0 else "xla"
    wanted = {"cudnn": "gpu", "splash": "tpu"}.get(kernel, found)
    if found != wanted:
        raise InputError(f'attention: "{kernel}" runs on {wanted} only, found {found}; use "auto"')
    if kernel == "cudnn" and not half:
        raise InputError(f'attention: "cudnn" takes bfloat16 or float16, found {q.dtype}; use "auto" or cast')
    return kernel


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_lengths: jax.Array | None,
    *,
    window: int | None,
    causal: bool,
    dropout: float,
    dropout_key: jax.Array | None,
    kernel: str,
    halo: Callable[[jax.Array], jax.Array] | None = None,
    first_query: int | jax.Array = 0,
) -> jax.Array:
    """Compute attention as `models.attention.attention` describes it, on one device.

    Args:
        kernel: a result of `choose_kernel`; causal attention and dropout always use plain JAX.
        halo: function that adds `window` keys before and after those of this device; None: zeros.
        first_query: position of q[:, 0].
    """
    if window is not None:
        if key_lengths is None:
            key_lengths = jnp.full((k.shape[0],), k.shape[1])
        if not dropout and (kernel == "splash" or kernel == "cudnn" and q.shape[-1] in HEAD_DIMS and runs_triton()):
            if halo is not None:
                k, v = halo(k), halo(v)
            if kernel == "splash":
                return fused.splash(q, k, v, window=window, first_query=first_query, key_lengths=key_lengths)
            return windowed(q, k, v, jnp.asarray(first_query, jnp.int32), key_lengths, window)
        if halo is None:
            halo = functools.partial(blockwise.pad_time, before=window, after=window)
        return blockwise.banded(
            q,
            halo(k),
            halo(v),
            window,
            first_query=first_query,
            key_lengths=key_lengths,
            dropout=dropout,
            dropout_key=dropout_key,
        )
    if kernel == "xla" or causal or dropout:
        return blockwise.chunked(
            q,
            k,
            v,
            causal=causal,
            first_query=first_query,
            key_lengths=key_lengths,
            dropout=dropout,
            dropout_key=dropout_key,
        )
    return (fused.cudnn if kernel == "cudnn" else fused.splash)(q, k, v, key_lengths=key_lengths)
