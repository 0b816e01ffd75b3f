"""Products with 8-bit weights, int8 or float8_e4m3fn, whose scales are applied to the result.

Both kinds are exact in bfloat16 and float16, so a product with only the weights in 8 bits rounds no more than a plain
one. Where a device multiplies 8 bits by 8 bits, at twice the rate of bfloat16, the activations are rounded to 8 bits as
well, with a scale for each row: int8 on TPUs, float8 on NVIDIA GPUs with compute capability 8.9 or higher.
"""

import functools

import jax
import jax.numpy as jnp

from acestep_jax.models.kernels.platform import compute_capability, platform

# Dtype of the values and the largest value used, by `runtime.QUANTIZATIONS`.
KINDS = {"int8": (jnp.dtype(jnp.int8), 127.0), "fp8": (jnp.dtype(jnp.float8_e4m3fn), 448.0)}
FLOAT8_CAPABILITY = 8.9


def quantize(x: jax.Array, kind: str, axis: int) -> tuple[jax.Array, jax.Array]:
    """Return q and s float32 with x ~ q s: the values of a kind of `KINDS`, and s = max |x| / top along `axis`, which
    s keeps with size 1. Where all values are zero, s is 1."""
    dtype, top = KINDS[kind]
    x = x.astype(jnp.float32)
    highest = jnp.max(jnp.abs(x), axis, keepdims=True)
    scale = jnp.where(highest == 0, 1.0, highest / top)
    values = jnp.clip(x / scale, -top, top)
    return (jnp.round(values) if dtype == jnp.int8 else values).astype(dtype), scale


def kind_of(dtype: jnp.dtype) -> str:
    """Return the kind of `KINDS` whose values have this dtype."""
    return next(kind for kind, (values, _) in KINDS.items() if values == dtype)


def native(kind: str) -> bool:
    """Return whether the device that a program is compiled for has native products of this kind of `KINDS`."""
    if kind == "int8":
        return platform() == "tpu"
    return platform() == "gpu" and compute_capability() >= FLOAT8_CAPABILITY


def weight_only(x: jax.Array, w: jax.Array, dimensions, **options) -> jax.Array:
    """Compute `jax.lax.dot_general` of x and 8-bit values w in x's dtype; the result is float32."""
    options["preferred_element_type"] = jnp.float32
    return jax.lax.dot_general(x, w.astype(x.dtype), dimensions, **options)


def both(x: jax.Array, w: jax.Array, dimensions, **options) -> jax.Array:
    """Compute `weight_only` with x, contracted over its last axis, rounded to w's kind as well. Its derivative is that
    of `weight_only`, since rounding has none."""
    return _both(x, w, dimensions, tuple(options.items()))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _both(x, w, dimensions, options):
    kind = kind_of(w.dtype)
    # Sums of int8 products are exact in int32 up to an inner axis of 133,000.
    wanted = dict(options) | {"preferred_element_type": jnp.int32 if kind == "int8" else jnp.float32}
    rows, scale = quantize(x, kind, -1)
    return jax.lax.dot_general(rows, w, dimensions, **wanted).astype(jnp.float32) * scale


@_both.defjvp
def _both_jvp(dimensions, options, primals, tangents):
    (x, w), (dx, _) = primals, tangents
    return _both(x, w, dimensions, options), weight_only(dx, w, dimensions, **dict(options))


def suited(x: jax.Array, w: jax.Array, dimensions, **options) -> jax.Array:
    """Compute `both` if the device has native products of w's kind, or else `weight_only`."""
    return (both if native(kind_of(w.dtype)) else weight_only)(x, w, dimensions, **options)
