"""The norm of queries or keys and their rotation in one kernel, in Pallas, for TPUs.

XLA reads and writes the array two or three times for it. It also folds the split into heads into the product before,
whose weights it therefore copies in another layout; and splash attention wants heads before time. This kernel takes the
product's own layout, and gives splash's. On GPUs such a kernel was tried: no fewer kernels, and more copies of weights.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from acestep_jax.models.kernels.platform import platform
from acestep_jax.models.layers import apply_rotary, rms_norm

Rope = tuple[jax.Array, jax.Array]

ROWS = (256, 128)  # tokens of a tile, the first that divides them
TILE_BYTES = 2 << 20  # at most, of more than the fewest tokens: a chip holds two tiles of input and two of output


def normalise(x: jax.Array, scale: jax.Array, rope: Rope | None = None, *, eps: float) -> jax.Array:
    """Compute rope(rms_norm(x)) of each head.

    Args:
        x: [B, T, N, H].
        scale: [H], of the norm.
        rope: tables [T, H / 2] each; None: no rotation.
        eps: of the norm.
    """
    if not suits(x.shape[-1]) or x.shape[1] % ROWS[-1]:
        return _plain(x, scale, rope, eps)
    return _fused(x, scale, rope, eps, False)


def suits(h: int) -> bool:
    """Return whether the kernel is for heads of h on the platform in use, if their tokens fill tiles."""
    return platform() == "tpu" and h % 128 == 0


def as_it_comes(product: jax.Array) -> jax.Array:
    """Return a product [B, T, N * H] that XLA for TPU does not compute heads first, and so in another layout of its
    weights, which it would copy in each layer."""
    return jax.lax.optimization_barrier(product) if platform() == "tpu" else product


def _plain(x: jax.Array, scale: jax.Array, rope: Rope | None, eps: float) -> jax.Array:
    x = rms_norm(x, scale, eps)
    return x if rope is None else apply_rotary(x, rope)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _fused(x: jax.Array, scale: jax.Array, rope: Rope | None, eps: float, interpret: bool) -> jax.Array:
    """Compute `_plain` by a kernel, with its derivatives. interpret: step by step in JAX, on any backend."""
    return _call(x, scale.astype(x.dtype)[None], rope, eps, interpret)


@_fused.defjvp
def _fused_jvp(eps, interpret, primals, tangents):
    return jax.jvp(lambda x, scale, rope: _plain(x, scale, rope, eps), primals, tangents)


def _call(x, scale, rope, eps, interpret):
    b, t, n, h = x.shape
    fit = (
        size for size in ROWS if t % size == 0 and (size == ROWS[-1] or size * n * h * x.dtype.itemsize <= TILE_BYTES)
    )
    rows = next(fit)
    tables, specs = (), []
    if rope is not None:
        cos, sin = rope
        # y = x * cos + turned(x) * sin, where turned(x) has the halves of x in each other's place.
        tables = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
        specs = [pl.BlockSpec((rows, h), lambda batch, i: (i, 0))] * 2
    y = pl.pallas_call(
        functools.partial(_kernel, eps=eps, heads=n),
        grid=(b, t // rows),
        in_specs=[
            pl.BlockSpec((None, rows, n * h), lambda batch, i: (batch, i, 0)),
            pl.BlockSpec((1, h), lambda batch, i: (0, 0)),
            *specs,
        ],
        out_specs=pl.BlockSpec((None, n, rows, h), lambda batch, i: (batch, 0, i, 0)),
        out_shape=jax.ShapeDtypeStruct((b, n, t, h), x.dtype),
        interpret=interpret,
        name="normalise_heads",
    )(x.reshape(b, t, n * h), scale, *tables)
    return y.swapaxes(1, 2)


def _kernel(x_ref, scale_ref, *refs, eps: float, heads: int):
    # Importing it takes a second, which only a TPU's users should pay.
    from jax.experimental.pallas import tpu

    *tables, y_ref = refs
    h = scale_ref.shape[-1]
    for head in range(heads):
        y = _rounded_norm(x_ref[:, head * h : (head + 1) * h], scale_ref[...], eps)
        if tables:
            cos_ref, sin_ref = tables
            y = y * cos_ref[...] + tpu.roll(y, h // 2, 1) * sin_ref[...]
        y_ref[head] = y.astype(y_ref.dtype)


def _rounded_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Compute `rms_norm` of rows, rounded to x's dtype where it rounds, in float32."""
    f = x.astype(jnp.float32)
    f = f * jax.lax.rsqrt(jnp.mean(f * f, -1, keepdims=True) + eps)
    return _round(_round(f, x.dtype) * scale.astype(jnp.float32), x.dtype)


def _round(f: jax.Array, dtype) -> jax.Array:
    return f.astype(dtype).astype(jnp.float32)
