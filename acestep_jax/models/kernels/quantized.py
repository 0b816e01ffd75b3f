"""Products with weights of 8 bits, int8 or float8_e4m3fn, whose scales are applied to the result.

Both kinds are exact in bfloat16 and float16, so a product with the weights alone in 8 bits rounds nothing more than
a plain one does. Where a device multiplies 8 bits by 8 bits, at twice the rate of bfloat16, the activations are rounded
to them as well, each row with a scale of its own: int8 on TPUs, float8 on NVIDIA GPUs from compute capability 8.9 on.
"""

import functools

import jax
import jax.numpy as jnp

from acestep_jax.models.kernels.platform import compute_capability, platform

# Dtype of the values and the largest of them that is used, by `runtime.QUANTIZATIONS`.
KINDS = {"int8": (jnp.dtype(jnp.int8), 127.0), "fp8": (jnp.dtype(jnp.float8_e4m3fn), 448.0)}
FLOAT8_CAPABILITY = 8.9


def quantize(x: jax.Array, kind: str, axis: int) -> tuple[jax.Array, jax.Array]:
    """Return q and s float32 with x ~ q s: the values of a kind of `KINDS`, and max |x| / top along `axis`, which s
    keeps with size 1. Where all are zero, s is 1."""
    dtype, top = KINDS[kind]
    x = x.astype(jnp.float32)
    highest = jnp.max(jnp.abs(x), axis, keepdims=True)
    scale = jnp.where(highest == 0, 1.0, highest / top)
    values = jnp.clip(x / scale, -top, top)
    return (jnp.round(values) if dtype == jnp.int8 else values).astype(dtype), scale


def kind_of(dtype: jnp.dtype) -> str:
    """Return which of `KINDS` has values of this dtype."""
    return next(kind for kind, (values, _) in KINDS.items() if values == dtype)


def native(kind: str) -> bool:
    """Return whether the device that a program is compiled for multiplies this kind of `KINDS` by itself."""
    if kind == "int8":
        return platform() == "tpu"
    return platform() == "gpu" and compute_capability() >= FLOAT8_CAPABILITY


def weight_only(x: jax.Array, w: jax.Array, dimensions, **options) -> jax.Array:
    """Compute `jax.lax.dot_general` of x and values w of `KINDS` in x's dtype; the result is float32."""
    options["preferred_element_type"] = jnp.float32
    return jax.lax.dot_general(x, w.astype(x.dtype), dimensions, **options)


def both(x: jax.Array, w: jax.Array, dimensions, **options) -> jax.Array:
    """Compute what `weight_only` does with x, whose last axis is summed over, rounded to w's kind as well. Its
    derivative is that of `weight_only`: rounding has none."""
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
    """Compute `both` where the device multiplies w's kind by itself, or else `weight_only`."""
    return (both if native(kind_of(w.dtype)) else weight_only)(x, w, dimensions, **options)
