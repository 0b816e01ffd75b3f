"""Schedules, guidance and the sampler: pure functions of (velocity function, x, t), in float32 throughout.

Flow: x_t = t * noise + (1 - t) * x0, velocity v = noise - x0, from t = 1 (noise) to t = 0 (music).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.errors import InputError

APG_MOMENTUM = -0.75
APG_NORM_THRESHOLD = 2.5


def schedule(num_steps: int, shift: float = 1.0) -> np.ndarray:
    """[num_steps + 1] float32 from 1 to 0: t = s u / (1 + (s - 1) u) for u = 1, 1 - 1/N, ..., 0.

    A shift s above one spends more of the steps near the noise. Source: ACE-Step 1.5; Esser et al., arXiv 2403.03206.

    Raises:
        InputError: if num_steps < 1 or shift <= 0.
    """
    if num_steps < 1:
        raise InputError(f"num_inference_steps: expected at least 1, found {num_steps}")
    if not (shift > 0 and np.isfinite(shift)):
        raise InputError(f"shift: expected a number above 0, found {shift}")
    u = np.linspace(1.0, 0.0, num_steps + 1, dtype=np.float32)
    return np.float32(shift) * u / (1 + (np.float32(shift) - 1) * u)


def custom_schedule(timesteps: Sequence[float]) -> np.ndarray:
    """[N + 1] float32: the given times and the final 0.

    Raises:
        InputError: if there are none, or they do not fall within (0, 1].
    """
    t = np.asarray(timesteps, np.float32).reshape(-1)
    if t.size and t[-1] == 0.0:
        t = t[:-1]
    if not t.size or not ((t > 0) & (t <= 1)).all() or (np.diff(t) >= 0).any():
        raise InputError(f"timesteps: expected falling numbers within (0, 1], found {list(timesteps)}")
    return np.append(t, np.float32(0.0))


def apg(cond: jax.Array, null: jax.Array, scale: jax.Array, momentum: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adaptive projected guidance: (velocity, new momentum), all [B, T, C].

    d = cond - null, m <- d - 0.75 m, clipped to a norm of 2.5; what of it is orthogonal to cond, times (scale - 1), is
    added to cond. Norms and projections are over time, for each batch item and channel.
    Source: Sadat et al., arXiv 2410.02416, as ACE-Step 1.5 uses it.
    """
    momentum = (cond - null) + APG_MOMENTUM * momentum
    norm = jnp.linalg.norm(momentum, axis=1, keepdims=True)
    update = momentum * jnp.minimum(1.0, APG_NORM_THRESHOLD / jnp.maximum(norm, 1e-30))
    direction = cond / jnp.maximum(jnp.linalg.norm(cond, axis=1, keepdims=True), 1e-12)
    orthogonal = update - jnp.sum(update * direction, axis=1, keepdims=True) * direction
    return cond + (scale - 1.0) * orthogonal, momentum


def euler(
    velocity: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
    noise: jax.Array,
    times: jax.Array,
    state: Any = None,
    on_step: Callable[[jax.Array, jax.Array, jax.Array], None] | None = None,
) -> jax.Array:
    """Integrates dx/dt = v from times[0] to times[-1] by x <- x - v * (t_i - t_(i+1)), as one scan.

    Args:
        velocity: (x, i, state) -> (v, state) at time times[i]; the state is what guidance carries along.
        noise: x at times[0], [B, T, C] float32.
        times: [N + 1] float32, falling.
        on_step: called within the program after each step with i, t_i and x.

    Returns:
        x at times[-1], [B, T, C] float32.
    """

    def step(carry, i):
        x, state = carry
        v, state = velocity(x, i, state)
        x = x - v.astype(jnp.float32) * (times[i] - times[i + 1])
        if on_step is not None:
            on_step(i, times[i], x)
        return (x, state), None

    (x, _), _ = jax.lax.scan(step, (noise.astype(jnp.float32), state), jnp.arange(times.shape[0] - 1))
    return x
