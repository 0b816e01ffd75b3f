"""The whole ODE or SDE in one call, as tests of solvers need it; the library solves it within its denoising loop."""

from typing import Any

import jax

from acestep_jax.diffusion.solvers import Velocity, advance, start


def integrate(velocity: Velocity, x: jax.Array, times: jax.Array, *, momentum: Any = None, **options: Any) -> jax.Array:
    """Integrate dx/dt = v from times[0] to times[-1]; return x there, [B, T, C].

    Args:
        options: see `advance`.
    """
    return advance(velocity, start(x, momentum), times, 0, times.shape[0] - 1, **options).x
