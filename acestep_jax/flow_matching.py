"""Schedules, guidance and solvers: pure functions of (velocity function, x, t), in float32 throughout.

Flow: x_t = t * noise + (1 - t) * x0, velocity v = noise - x0, from t = 1 (noise) to t = 0 (music).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.errors import InputError

APG_MOMENTUM = -0.75
APG_NORM_THRESHOLD = 2.5
ADG_MIN_WEIGHT = 1e-3
ADG_MAX_ANGLE = 3.14 / 6
ADG_MIN_ANGLE = float(np.arccos(1 - 1e-6))


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


def late_start(times: np.ndarray, noise_level: float) -> np.ndarray:
    """The schedule from its time nearest to `noise_level` on, the earlier of two; the final 0 is none to start from.

    Raises:
        InputError: if the noise level is not within [0, 1].
    """
    if not 0 <= noise_level <= 1:
        raise InputError(f"cover_noise_strength: expected 0 to 1, found {1 - noise_level:g}")
    return times[np.argmin(np.abs(times[:-1] - noise_level)) :]


class Guided(NamedTuple):
    """What guidance works on: the velocities with the condition and without, at x and t; all [B, T, C] but t, a scalar.

    memory: of the earlier steps, [B, T, C], zeros before the first.
    """

    cond: jax.Array
    null: jax.Array
    x: jax.Array
    t: jax.Array
    memory: jax.Array


def cfg(g: Guided, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Classifier-free guidance: null + scale * (cond - null). Source: Ho and Salimans, arXiv 2207.12598."""
    return g.null + scale * (g.cond - g.null), g.memory


def apg(g: Guided, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adaptive projected guidance: (velocity, new momentum), both [B, T, C].

    d = cond - null, m <- d - 0.75 m, clipped to a norm of 2.5; what of it is orthogonal to cond, times (scale - 1), is
    added to cond. Norms and projections are over time, for each batch item and channel.
    Source: Sadat et al., arXiv 2410.02416, as ACE-Step 1.5 uses it.
    """
    momentum = (g.cond - g.null) + APG_MOMENTUM * g.memory
    norm = jnp.linalg.norm(momentum, axis=1, keepdims=True)
    update = momentum * jnp.minimum(1.0, APG_NORM_THRESHOLD / jnp.maximum(norm, 1e-30))
    direction = g.cond / jnp.maximum(jnp.linalg.norm(g.cond, axis=1, keepdims=True), 1e-12)
    orthogonal = update - jnp.sum(update * direction, axis=1, keepdims=True) * direction
    return g.cond + (scale - 1.0) * orthogonal, momentum


def adg(g: Guided, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Angle-based guidance: turns the predicted x0 of each frame away from that without condition.

    The angle between both, times w = max(scale - 1, 0) + 0.001 and at most 30 degrees, is the one that x0 is turned by.
    Source: ACE-Step 1.5.
    """
    inner = lambda a, b: jnp.sum(a * b, axis=-1, keepdims=True)  # noqa: E731  over channels, for each frame
    with_condition, without = g.x - g.t * g.cond, g.x - g.t * g.null
    weight = jnp.maximum(scale - 1.0, 0.0) + ADG_MIN_WEIGHT
    away = with_condition - without
    away = away - inner(away, without) / (inner(without, without) + 1e-8) * without
    # The arc cosine of the original, in a form that does not lose small angles to rounding.
    along = inner(with_condition, without) / jnp.sqrt(jnp.maximum(inner(without, without), 1e-30))
    angle = jnp.arctan2(jnp.sqrt(inner(away, away)), along)
    angle = jnp.clip(angle, ADG_MIN_ANGLE, np.pi - ADG_MIN_ANGLE)
    turned = jnp.clip(weight * angle, -ADG_MAX_ANGLE, ADG_MAX_ANGLE)
    sine = jnp.sin(angle)
    factor = jnp.where(sine > 1e-3, jnp.sin(turned) / jnp.maximum(sine, 1e-3), weight)
    x0 = jnp.cos(turned) * with_condition + factor * away
    return (g.x - x0) / g.t, g.memory


GUIDANCE: dict[str, Callable[[Guided, jax.Array], tuple[jax.Array, jax.Array]]] = {"apg": apg, "adg": adg, "cfg": cfg}

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
