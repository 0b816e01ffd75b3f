"""Matrix products, with the operands of linear layers and attention in the dtype that a device multiplies fast."""

import jax
import jax.numpy as jnp

from acestep_jax.models.kernels.platform import platform

_TINY = 2.0**-100  # what a row of zeros is divided by


def dot_general(x: jax.Array, w: jax.Array, dimensions, **options) -> jax.Array:
    """Compute `jax.lax.dot_general`, the result in x's dtype.

    On a CPU, half-precision products are told to give float32 and then rounded: the same result, but only so does XLA
    use the processor's own bfloat16 products, at more than twice the rate.
    """
    if x.dtype == jnp.float32 or platform() != "cpu":
        return jax.lax.dot_general(x, w, dimensions, **options)
    options["preferred_element_type"] = jnp.float32
    return jax.lax.dot_general(x, w, dimensions, **options).astype(x.dtype)


def to_float16(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Return y float16 and s float32 with x = s y: s is a power of two, and y below 2, along `axes` of x.

    So no value of x is out of float16's range, and those that are below it by then are 2^-24 of the largest beside.
    """
    highest = jnp.maximum(jnp.max(jnp.abs(x), axes, keepdims=True), _TINY).astype(jnp.float32)
    # The exponent alone, from the bits: a logarithm may err by one, and a power of two that is not exact rounds.
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(highest), jnp.uint32)
    scale = jax.lax.bitcast_convert_type(bits & jnp.uint32(0x7F800000), jnp.float32)
    return (x / scale).astype(jnp.float16), scale


def float16_dot_general(x: jax.Array, w: jax.Array, dimensions, **options) -> jax.Array:
    """Compute what `dot_general` does of x float32, whose last axis is summed over, by float16 operands.

    Returns:
        float32, which is also what the products are summed in.
    """
    ((summed, _), _) = dimensions
    options["preferred_element_type"] = jnp.float32
    half, scale = to_float16(x, tuple(summed))
    return jax.lax.dot_general(half, w.astype(jnp.float16), dimensions, **options) * scale


def product_of(dtype: str | None):
    """Return the `dot_general` of linear layers, see `Runtime.products`."""
    return dot_general if dtype is None else float16_dot_general
