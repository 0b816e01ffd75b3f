"""Norm and rotary embedding of queries or keys in one Pallas kernel for TPUs.

XLA reads and writes the array two or three times for this. It also folds the split into heads into the preceding
product, and therefore copies the product's weights to another layout; and splash attention expects heads before time.
This kernel reads the product's own layout and writes splash's; a second kernel computes the derivative. `heads_gpu` is
for GPUs.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from acestep_jax.models.kernels.platform import platform
from acestep_jax.models.layers import apply_rotary, rms_norm

Rope = tuple[jax.Array, jax.Array]

ROWS = range(256, 63, -16)  # candidates for the tokens of a tile; the first that divides T is used
TILE_BYTES = 4 << 20  # limit for a tile's arrays: a chip holds two of each, in 16 MB


def normalise(x: jax.Array, scale: jax.Array, rope: Rope | None = None, *, eps: float) -> jax.Array:
    """Compute rope(rms_norm(x)) of each head.

    Args:
        x: [B, T, N, H].
        scale: [H], scale of the norm.
        rope: tables [T, H / 2] each; None: no rotation.
        eps: epsilon of the norm.
    """
    if not suits(x.shape[-1]) or _tile_rows(x, 3) is None:
        return _plain(x, scale, rope, eps)
    return _fused(x, scale, rope, eps, False)


def suits(h: int) -> bool:
    """Return whether the kernel supports head dim h on the current platform, provided that tokens fill tiles."""
    return platform() == "tpu" and h % 128 == 0


def keep_layout(product: jax.Array) -> jax.Array:
    """Return a product [B, T, N * H] unchanged, but keep XLA for TPU from computing it with heads first: that needs
    another layout of the weights, which it would copy in each layer."""
    return jax.lax.optimization_barrier(product) if platform() == "tpu" else product


def _plain(x: jax.Array, scale: jax.Array, rope: Rope | None, eps: float) -> jax.Array:
    x = rms_norm(x, scale, eps)
    return x if rope is None else apply_rotary(x, rope)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _fused(x: jax.Array, scale: jax.Array, rope: Rope | None, eps: float, interpret: bool) -> jax.Array:
    """Compute `_plain` with a kernel. Like splash attention, which takes the result, it supports only reverse-mode
    differentiation; the tables have no derivative. interpret: run step by step in JAX, on any backend."""
    b, t, n, h = x.shape
    rows = _tile_rows(x, 2)
    assert rows
    tables, specs = _tables(rope, rows)
    y = pl.pallas_call(
        functools.partial(_kernel, eps=eps, heads=n),
        grid=(b, t // rows),
        in_specs=[*_specs(rows, n, h)[:2], *specs],
        out_specs=_specs(rows, n, h)[2],
        out_shape=jax.ShapeDtypeStruct((b, n, t, h), x.dtype),
        interpret=interpret,
        name="normalise_heads",
    )(x.reshape(b, t, n * h), scale.astype(x.dtype)[None], *tables)
    return y.swapaxes(1, 2)


def _fused_forward(x, scale, rope, eps, interpret):
    return _fused(x, scale, rope, eps, interpret), (x, scale, rope)


def _fused_backward(eps, interpret, kept, slope):
    """Compute, with u = x r, r = 1 / rms(x), and g the gradient rotated back: dscale = sum u g and
    dx = r (scale g - u mean(u scale g))."""
    x, scale, rope = kept
    b, t, n, h = x.shape
    rows = _tile_rows(x, 3)
    assert rows
    tables, specs = _tables(rope, rows)
    products, scales, heads_first = _specs(rows, n, h)
    dx, dscale = pl.pallas_call(
        functools.partial(_backward_kernel, eps=eps, heads=n),
        grid=(b, t // rows),
        in_specs=[products, scales, heads_first, *specs],
        out_specs=[products, scales],
        out_shape=[jax.ShapeDtypeStruct((b, t, n * h), x.dtype), jax.ShapeDtypeStruct((1, h), jnp.float32)],
        interpret=interpret,
        name="normalise_heads_backward",
    )(x.reshape(b, t, n * h), scale.astype(x.dtype)[None], slope.swapaxes(1, 2), *tables)
    return dx.reshape(x.shape), dscale[0].astype(scale.dtype), jax.tree.map(jnp.zeros_like, rope)


_fused.defvjp(_fused_forward, _fused_backward)


def _tile_rows(x: jax.Array, arrays: int) -> int | None:
    """Return the number of tokens of x [B, T, N, H] in a tile, for a kernel that holds `arrays` arrays of them; None if
    no tile size fits."""
    _, t, n, h = x.shape
    size = n * h * x.dtype.itemsize * arrays
    return next((rows for rows in ROWS if t % rows == 0 and rows * size <= TILE_BYTES), None)


def _specs(rows: int, n: int, h: int) -> tuple[pl.BlockSpec, ...]:
    """Return the block specs of a product [B, T, N * H], a scale [1, H] and heads [B, N, T, H]."""
    return (
        pl.BlockSpec((None, rows, n * h), lambda batch, i: (batch, i, 0)),
        pl.BlockSpec((1, h), lambda batch, i: (0, 0)),
        pl.BlockSpec((None, n, rows, h), lambda batch, i: (batch, 0, i, 0)),
    )


def _tables(rope: Rope | None, rows: int) -> tuple[tuple[jax.Array, ...], list[pl.BlockSpec]]:
    """Return tables [T, H] and their block specs: y = x * cos + turned(x) * sin, where turned(x) is x with its halves
    swapped."""
    if rope is None:
        return (), []
    cos, sin = rope
    tables = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
    return tables, [pl.BlockSpec((rows, tables[0].shape[-1]), lambda batch, i: (i, 0))] * 2


def _rotate_half(x: jax.Array) -> jax.Array:
    # The import takes a second, which only TPU users should pay.
    from jax.experimental.pallas import tpu

    return tpu.roll(x, x.shape[-1] // 2, 1)


def _kernel(x_ref, scale_ref, *refs, eps: float, heads: int):
    *tables, y_ref = refs
    h = scale_ref.shape[-1]
    for head in range(heads):
        y = _rounded_norm(x_ref[:, head * h : (head + 1) * h], scale_ref[...], eps)
        if tables:
            cos_ref, sin_ref = tables
            y = y * cos_ref[...] + _rotate_half(y) * sin_ref[...]
        y_ref[head] = y.astype(y_ref.dtype)


def _backward_kernel(x_ref, scale_ref, slope_ref, *refs, eps: float, heads: int):
    """Compute dx for a tile, and add the tile's contribution to dscale, which all tiles share."""
    *tables, dx_ref, dscale_ref = refs
    h = scale_ref.shape[-1]
    scale = scale_ref[...].astype(jnp.float32)
    dscale = jnp.zeros((1, h), jnp.float32)
    for head in range(heads):
        x = x_ref[:, head * h : (head + 1) * h].astype(jnp.float32)
        g = slope_ref[head].astype(jnp.float32)
        if tables:
            cos_ref, sin_ref = tables
            g = g * cos_ref[...] + _rotate_half(g * sin_ref[...])
        r = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
        u = x * r
        dscale += jnp.sum(u * g, 0, keepdims=True)
        g = g * scale
        dx = r * (g - u * jnp.mean(u * g, -1, keepdims=True))
        dx_ref[:, head * h : (head + 1) * h] = dx.astype(dx_ref.dtype)

    first = (pl.program_id(0) == 0) & (pl.program_id(1) == 0)

    @pl.when(first)
    def _():
        dscale_ref[...] = jnp.zeros_like(dscale)

    dscale_ref[...] += dscale


def _rounded_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Compute `rms_norm` of rows in float32, rounded to x's dtype where `rms_norm` rounds."""
    f = x.astype(jnp.float32)
    f = f * jax.lax.rsqrt(jnp.mean(f * f, -1, keepdims=True) + eps)
    return _round(_round(f, x.dtype) * scale.astype(jnp.float32), x.dtype)


def _round(f: jax.Array, dtype) -> jax.Array:
    return f.astype(dtype).astype(jnp.float32)
