"""Matrix products for linear layers and attention, with operands in the dtype that a device multiplies fast."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from acestep_jax.models.kernels.platform import cpu_favours_bfloat16, platform

FEW = 16  # up to this many vectors, a product is bound by reading the matrix

_TINY = 2.0**-100  # divisor of a row of zeros


def dot_general(x: jax.Array, w: jax.Array, dimensions, **options) -> jax.Array:
    """Compute `jax.lax.dot_general` with the result in x's dtype.

    On a CPU, half-precision products request a float32 result, which is then rounded: the result is the same, but only
    then does XLA use the processor's bfloat16 products, at more than twice the rate. Where these are no faster than
    float32 products, see `operand`, the weights are widened as they are used.
    """
    if x.dtype == jnp.float32 or platform() != "cpu":
        return multiply(x, w, dimensions, **options)
    return accumulated(x, w, dimensions, **options).astype(x.dtype)


def accumulated(x: jax.Array, w: jax.Array, dimensions, **options) -> jax.Array:
    """Return the product of `dot_general` in float32, before it is rounded."""
    options["preferred_element_type"] = jnp.float32
    if x.size > FEW * x.shape[-1]:  # fewer vectors are multiplied faster than a matrix is widened
        x, w = operand(x), operand(w)
    return multiply(x, w, dimensions, **options)


def multiply(x: jax.Array, w: jax.Array, dimensions, **options) -> jax.Array:
    """Compute `jax.lax.dot_general`, on a CPU with vectors [..., D] as one matrix [rows, D].

    It is the same product. But for the gradient of w, a sum over several axes, XLA for CPUs would first write the
    gradient of the result in another order, which takes a fifth of the product's time. On a mesh, axes may be split
    over devices and stay apart.
    """
    (summed, of_w), batch = dimensions
    joins = not any(map(len, batch)) and w.ndim == 2 and tuple(summed) == (x.ndim - 1,)
    if not joins or platform() != "cpu" or not jax.sharding.get_abstract_mesh().empty:
        return jax.lax.dot_general(x, w, dimensions, **options)
    product = lambda vectors: jax.lax.dot_general(vectors, w, (((1,), of_w), batch), **options)  # noqa: E731
    y = _not_alone(product, x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _not_alone(product: Callable[[jax.Array], jax.Array], vectors: jax.Array) -> jax.Array:
    """Return product(vectors), of [n, D] with a matrix. On a CPU, a single vector in bfloat16 is multiplied twice, and
    one result is used: for a product with one vector, XLA widens the whole matrix, which takes two to seven times as
    long."""
    if len(vectors) != 1 or vectors.dtype != jnp.bfloat16 or platform() != "cpu":
        return product(vectors)
    return product(jnp.concatenate([vectors, vectors]))[:1]


def operand(x: jax.Array) -> jax.Array:
    """Return x; on a CPU that multiplies bfloat16 no faster than float32, convert bfloat16 to float32. The product is
    the same except for the order of its sums, and avoids the packing in pairs that the bfloat16 instruction needs."""
    widens = x.dtype == jnp.bfloat16 and platform() == "cpu" and not is_fast(x.dtype)
    return x.astype(jnp.float32) if widens else x


def is_fast(dtype: jnp.dtype) -> bool:
    """Return whether a CPU multiplies this dtype faster than float32."""
    return dtype == jnp.bfloat16 and cpu_favours_bfloat16()


def to_float16(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Return y float16 and s float32 with x = s y, where s is a power of two for each slice along `axes` of x, and
    |y| < 2.

    So no value overflows float16, and only values below about 2^-24 of the largest in their slice underflow.
    """
    highest = jnp.maximum(jnp.max(jnp.abs(x), axes, keepdims=True), _TINY).astype(jnp.float32)
    # Take the exponent from the bits: a logarithm may be off by one, and an inexact power of two would round.
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(highest), jnp.uint32)
    scale = jax.lax.bitcast_convert_type(bits & jnp.uint32(0x7F800000), jnp.float32)
    return (x / scale).astype(jnp.float16), scale


def float16_dot_general(x: jax.Array, w: jax.Array, dimensions, **options) -> jax.Array:
    """Compute `dot_general` of x float32, contracted over its last axis, with float16 operands.

    Returns:
        float32, in which the products are also accumulated.
    """
    ((summed, _), _) = dimensions
    options["preferred_element_type"] = jnp.float32
    half, scale = to_float16(x, tuple(summed))
    return jax.lax.dot_general(half, w.astype(jnp.float16), dimensions, **options) * scale


def product_of(dtype: str | None):
    """Return the `dot_general` for linear layers, see `Runtime.products`."""
    return dot_general if dtype is None else float16_dot_general
