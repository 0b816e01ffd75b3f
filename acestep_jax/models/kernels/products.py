"""Matrix products, with the operands of linear layers and attention in the dtype that a device multiplies fast."""

import jax
import jax.numpy as jnp

from acestep_jax.models.kernels.platform import cpu_favours_bfloat16, platform

FEW = 16  # vectors at most, whose product is bound by reading the matrix

_TINY = 2.0**-100  # what a row of zeros is divided by


def dot_general(x: jax.Array, w: jax.Array, dimensions, **options) -> jax.Array:
    """Compute `jax.lax.dot_general`, the result in x's dtype.

    On a CPU, half-precision products are told to give float32 and then rounded: the same result, but only so does XLA
    use the processor's own bfloat16 products, at more than twice the rate. Where these are no faster than those of
    float32, see `operand`, the weights are widened as they are used.
    """
    if x.dtype == jnp.float32 or platform() != "cpu":
        return jax.lax.dot_general(x, w, dimensions, **options)
    return accumulated(x, w, dimensions, **options).astype(x.dtype)


def accumulated(x: jax.Array, w: jax.Array, dimensions, **options) -> jax.Array:
    """Return the product that `dot_general` rounds, in float32."""
    options["preferred_element_type"] = jnp.float32
    if x.size > FEW * x.shape[-1]:  # fewer vectors are multiplied faster than a matrix is widened
        x, w = operand(x), operand(w)
    return jax.lax.dot_general(x, w, dimensions, **options)


def operand(x: jax.Array) -> jax.Array:
    """Return x, or on a CPU that multiplies bfloat16 no faster than float32, bfloat16 as float32: the same product but
    for the order of its sums, without the packing in pairs that the processor's instruction wants."""
    widens = x.dtype == jnp.bfloat16 and platform() == "cpu" and not cpu_favours_bfloat16()
    return x.astype(jnp.float32) if widens else x


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
