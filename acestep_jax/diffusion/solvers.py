"""Solvers: pure functions of (velocity function, x, t), in float32 throughout.

Flow: x_t = t * noise + (1 - t) * x0, velocity v = noise - x0, from t = 1 (noise) to t = 0 (music).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# (x, i, memory) -> (v, memory) at times[i]. A memory of None: a further evaluation within a step, after which the
# memory must be what it was.
Velocity = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class Step(NamedTuple):
    """Where a solver stands: at x, [B, T, C], on the way from times[i] to times[i + 1].

    v: the velocity there; past: that of the step before and of the one before that, arbitrary where there was none.
    keys: [B], of each song's noise in step i; None for solvers that need none.
    """

    x: jax.Array
    v: jax.Array
    past: tuple[jax.Array, jax.Array]
    i: jax.Array
    times: jax.Array  # [N + 1]
    velocity: Velocity
    keys: jax.Array | None

    def length(self, back: int = 0) -> jax.Array:
        """Of this step, or of the one so many before it, in t."""
        return self.times[self.i - back] - self.times[self.i - back + 1]


def euler(s: Step) -> jax.Array:
    """x - h v."""
    return s.x - s.length() * s.v


def heun(s: Step) -> jax.Array:
    """The mean of the velocities here and where Euler would go: second order, two evaluations in each step."""
    ahead, _ = s.velocity(euler(s), s.i + 1, None)
    return s.x - s.length() * (s.v + ahead.astype(s.v.dtype)) / 2


def ab2(s: Step) -> jax.Array:
    """Adams-Bashforth of second order for steps of any length: a line through the last two velocities, integrated."""
    h, h1 = s.length(), s.length(1)
    second = s.x - h * s.v - h**2 / (2 * h1) * (s.v - s.past[0])
    return jnp.where(s.i == 0, euler(s), second)


def ab3(s: Step) -> jax.Array:
    """Adams-Bashforth of third order: a parabola through the last three velocities. The first step is Heun's, the
    second `ab2`, so that the start does not lower the order."""
    h, h1, h2 = s.length(), s.length(1), s.length(2)
    w1 = h**2 * (h / 3 + (h1 + h2) / 2) / (h1 * h2)
    w2 = h**2 * (h / 3 + h1 / 2) / ((h1 + h2) * h2)
    third = s.x - h * s.v - w1 * (s.v - s.past[0]) + w2 * (s.v - s.past[1])
    return jax.lax.cond(s.i == 0, lambda: heun(s), lambda: jnp.where(s.i == 1, ab2(s), third))


def sde(s: Step) -> jax.Array:
    """To the predicted x0 and back to the next time with fresh noise. Source: ACE-Step 1.5, turbo."""
    return _renoise(s, s.times[s.i + 1])


def sde_linear(s: Step) -> jax.Array:
    """As `sde`, back to 1 - (i + 1) / N whatever the schedule. Source: ACE-Step 1.5, base."""
    steps = s.times.shape[0] - 1
    return _renoise(s, (steps - 1.0 - s.i) / steps)


def _renoise(s: Step, t: jax.Array) -> jax.Array:
    x0 = s.x - s.times[s.i] * s.v
    noise = jax.vmap(lambda key: jax.random.normal(key, s.x.shape[1:]))(s.keys)
    return t * noise + (1 - t) * x0


SOLVERS: dict[str, Callable[[Step], jax.Array]] = dict(
    euler=euler, heun=heun, ab2=ab2, ab3=ab3, sde=sde, sde_linear=sde_linear
)


def integrate(
    velocity: Velocity,
    x: jax.Array,
    times: jax.Array,
    *,
    solver: str = "euler",
    memory: Any = None,
    keys: jax.Array | None = None,
    after_step: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Integrates dx/dt = v from times[0] to times[-1], as one scan.

    Args:
        velocity: (x, i, memory) -> (v, memory) at time times[i]; the memory is what guidance carries along.
        x: at times[0], [B, T, C]; taken to float32 at least.
        times: [N + 1] float32, falling.
        solver: one of `SOLVERS`.
        keys: [B], one for each song, where the solver draws noise. That of a frame does not depend on T.
        after_step: (x, i) -> x, applied after each step.

    Returns:
        x at times[-1], [B, T, C].
    """

    def step(carry, i):
        x, memory, past = carry
        v, memory = velocity(x, i, memory)
        v = v.astype(x.dtype)
        step_keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        x = SOLVERS[solver](Step(x, v, past, i, times, velocity, step_keys))
        if after_step is not None:
            x = after_step(x, i)
        return (x, memory, (v, past[0])), None

    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    start = (x, memory, (jnp.zeros_like(x), jnp.zeros_like(x)))
    (x, _, _), _ = jax.lax.scan(step, start, jnp.arange(times.shape[0] - 1))
    return x
