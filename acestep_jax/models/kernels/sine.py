"""A cheap sine for when only its square matters."""

import jax
import jax.numpy as jnp
import numpy as np


def sine(x: jax.Array) -> jax.Array:
    """Compute sin(x) up to the sign, float32, within 2e-7 for |x| < 1e5: subtract the nearest multiple of pi, then use
    the Taylor series.

    XLA's sine, which is accurate for any x, takes half the time of the whole decoder on a CPU.
    """
    n = jnp.round(x * np.float32(1 / np.pi))
    # Three parts of pi; the first two have few enough bits that their products with n are exact.
    x = ((x - n * 3.140625) - n * 9.67502593994140625e-4) - n * 1.509957990978376432e-7
    u = x * x
    series = 1.0 / 120 + u * (-1.0 / 5040 + u * (1.0 / 362880 + u * (-1.0 / 39916800)))
    return x + x * u * (-1.0 / 6 + u * series)
