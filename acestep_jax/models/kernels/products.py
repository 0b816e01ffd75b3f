"""Matrix products."""

import jax
import jax.numpy as jnp

from acestep_jax.models.kernels.platform import platform


def dot_general(x: jax.Array, w: jax.Array, dimensions, **options) -> jax.Array:
    """Compute `jax.lax.dot_general`, the result in x's dtype.

    On a CPU, half-precision products are told to give float32 and then rounded: the same result, but only so does XLA
    use the processor's own bfloat16 products, at more than twice the rate.
    """
    if x.dtype == jnp.float32 or platform() != "cpu":
        return jax.lax.dot_general(x, w, dimensions, **options)
    options["preferred_element_type"] = jnp.float32
    return jax.lax.dot_general(x, w, dimensions, **options).astype(x.dtype)
