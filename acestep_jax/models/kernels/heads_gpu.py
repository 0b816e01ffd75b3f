"""Queries, keys and values from one fused product, in one Pallas kernel for GPUs (with the Triton backend).

    x [B, T, (N + 2 K) H] -> q [B, T, N, H], k [B, T, K, H], normalised and rotated, and v [B, T, K, H]

XLA generates four kernels for this, and copies their results, because attention needs separate arrays.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from acestep_jax.models.kernels.platform import runs_triton, triton_options
from acestep_jax.models.layers import apply_rotary, rms_norm

ROWS = 32  # tokens of a tile

Parts = tuple[jax.Array, jax.Array, jax.Array]


def split(
    x: jax.Array,
    q_scale: jax.Array,
    k_scale: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    *,
    ends: tuple[int, ...],
    eps: float,
    plain: bool = False,
) -> Parts:
    """Return rope(rms_norm(q)), rope(rms_norm(k)) and v, by head.

    Args:
        x: [B, T, (N + 2 K) * H], queries, keys and values side by side.
        q_scale, k_scale: [H], scales of the norms.
        rope: cos and sin, [T, H / 2] each.
        ends: where queries and keys end along the last axis of x.
        eps: epsilon of the norms.
        plain: whether to compute it without the kernel.
    """
    h = q_scale.shape[0]
    suits = x.shape[1] >= ROWS and h in (32, 64, 128) and runs_triton()
    return (_fused if suits and not plain else _plain)(x, q_scale, k_scale, rope, ends, eps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6))
def _fused(x, q_scale, k_scale, rope, ends, eps, interpret=False) -> Parts:
    """Compute `split` with a kernel. interpret: run step by step in JAX, on any backend."""
    b, t, size = x.shape
    h = q_scale.shape[0]
    n, groups = ends[0] // h, (ends[1] - ends[0]) // h
    # Each head is written to one of the results; the other two are not touched.
    out = lambda first, count: pl.BlockSpec(  # noqa: E731
        (None, t, h), lambda i, batch, head: (batch, 0, jnp.clip(head - first, 0, count - 1))
    )
    whole = lambda *shape: pl.BlockSpec(shape, lambda i, batch, head: (0, 0))  # noqa: E731
    parts = pl.pallas_call(
        functools.partial(_kernel, eps=eps, n=n, groups=groups),
        grid=(-(-t // ROWS), b, size // h),
        in_specs=[
            pl.BlockSpec((None, t, h), lambda i, batch, head: (batch, 0, head)),
            whole(1, h),
            whole(1, h),
            whole(t, h // 2),
            whole(t, h // 2),
        ],
        out_specs=[out(0, n), out(n, groups), out(n + groups, groups)],
        out_shape=[jax.ShapeDtypeStruct((b, t, count * h), x.dtype) for count in (n, groups, groups)],
        name="split_heads",
        **triton_options(interpret, num_warps=4),
    )(x, q_scale.astype(x.dtype)[None], k_scale.astype(x.dtype)[None], *rope)
    q, k, v = (part.reshape(b, t, -1, h) for part in parts)
    return q, k, v


def _kernel(x_ref, q_scale_ref, k_scale_ref, cos_ref, sin_ref, q_ref, k_ref, v_ref, *, eps: float, n: int, groups: int):
    head = pl.program_id(2)
    t, h = x_ref.shape
    # The last tile ends with the last token; tokens that it shares with the tile before are computed by both.
    rows = pl.ds(jnp.minimum(pl.program_id(0) * ROWS, t - ROWS), ROWS)
    halves = pl.ds(0, h // 2), pl.ds(h // 2, h // 2)

    def rotate(scale_ref, out_ref):
        parts = [x_ref[rows, half] for half in halves]
        scales = [scale_ref[0, half][None] for half in halves]
        for half, part in zip(halves, turned(parts, scales, (cos_ref[rows, :], sin_ref[rows, :]), eps), strict=True):
            out_ref[rows, half] = part

    pl.when(head < n)(lambda: rotate(q_scale_ref, q_ref))
    pl.when((head >= n) & (head < n + groups))(lambda: rotate(k_scale_ref, k_ref))

    @pl.when(head >= n + groups)
    def _():
        v_ref[rows, :] = x_ref[rows, :]


def turned(
    parts: Sequence[jax.Array], scales: Sequence[jax.Array], rope: tuple[jax.Array, jax.Array], eps: float
) -> tuple[jax.Array, jax.Array]:
    """Return both halves of heads, [..., H / 2] each, normalised and rotated, within a kernel. Rounded where `rms_norm`
    and `apply_rotary` round."""
    dtype, (cos, sin) = parts[0].dtype, rope
    low, high = (part.astype(jnp.float32) for part in parts)
    mean = ((low * low).sum(-1) + (high * high).sum(-1)) / (2 * low.shape[-1])
    factor = jax.lax.rsqrt(mean + eps)[..., None]
    low, high = (
        ((part * factor).astype(dtype) * scale).astype(jnp.float32)
        for part, scale in zip((low, high), scales, strict=True)
    )
    return (low * cos - high * sin).astype(dtype), (high * cos + low * sin).astype(dtype)


@_fused.defjvp
def _fused_jvp(ends, eps, interpret, primals, tangents):
    return jax.jvp(functools.partial(_plain, ends=ends, eps=eps), primals, tangents)


def _plain(x, q_scale, k_scale, rope, ends, eps) -> Parts:
    """Compute `split` in plain JAX."""
    h = q_scale.shape[0]
    q, k, v = (part.reshape(*part.shape[:2], -1, h) for part in jnp.split(x, ends, -1))
    return apply_rotary(rms_norm(q, q_scale, eps), rope), apply_rotary(rms_norm(k, k_scale, eps), rope), v
