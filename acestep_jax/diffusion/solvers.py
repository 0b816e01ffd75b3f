"""Solvers: pure functions of (velocity function, x, t), in float32 throughout.

Flow: x_t = t * noise + (1 - t) * x0, velocity v = noise - x0, from t = 1 (noise) to t = 0 (music).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# (x, i, momentum) -> (v, momentum) at times[i]. A momentum of None means an additional evaluation within a step, which
# does not update the momentum.
Velocity = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class Step(NamedTuple):
    """A solver's inputs for one step, from x at times[i] to times[i + 1].

    x, v: the state and its velocity, [B, T, C]; past: see `State`.
    keys: [B], keys of each song's noise in step i; None for solvers that draw no noise.
    ema: fraction of the previous step's velocity in each velocity; None: 0.
    euler_end: whether the last step is Euler's, so that the velocity is not evaluated at t = 0.
    """

    x: jax.Array
    v: jax.Array
    past: tuple[jax.Array, jax.Array]
    i: jax.Array
    times: jax.Array  # [N + 1]
    velocity: Velocity
    keys: jax.Array | None
    ema: jax.Array | None = None
    euler_end: bool = False

    def length(self, back: int = 0) -> jax.Array:
        """Return the length in t of this step, or of the one `back` steps before."""
        return self.times[self.i - back] - self.times[self.i - back + 1]

    def ahead(self, x: jax.Array) -> jax.Array:
        """Evaluate the velocity once more, at x and the end of the step."""
        v, _ = self.velocity(x, self.i + 1, None)
        return blend(v.astype(self.v.dtype), self.v, self.ema)


def blend(v: jax.Array, before: jax.Array, fraction: jax.Array | None) -> jax.Array:
    """Return (1 - fraction) v + fraction before; None: v."""
    return v if fraction is None else (1 - fraction) * v + fraction * before


def euler(s: Step) -> jax.Array:
    """Return x - h v, first order."""
    return s.x - s.length() * s.v


def heun(s: Step) -> jax.Array:
    """Use the mean of the velocities at x and at Euler's result: second order, two evaluations per step."""

    def mean() -> jax.Array:
        return s.x - s.length() * (s.v + s.ahead(euler(s))) / 2

    if not s.euler_end:
        return mean()
    return jax.lax.cond(s.i == s.times.shape[0] - 2, lambda: euler(s), mean)


def ab2(s: Step) -> jax.Array:
    """Integrate the line through the last two velocities: second-order Adams-Bashforth for variable step sizes."""
    h, h1 = s.length(), s.length(1)
    second = s.x - h * s.v - h**2 / (2 * h1) * (s.v - s.past[0])
    return jnp.where(s.i == 0, euler(s), second)


def ab3(s: Step) -> jax.Array:
    """Integrate the parabola through the last three velocities: third-order Adams-Bashforth.

    The first step is Heun's and the second `ab2`, so that the start does not lower the order.
    """
    h, h1, h2 = s.length(), s.length(1), s.length(2)
    w1 = h**2 * (h / 3 + (h1 + h2) / 2) / (h1 * h2)
    w2 = h**2 * (h / 3 + h1 / 2) / ((h1 + h2) * h2)
    third = s.x - h * s.v - w1 * (s.v - s.past[0]) + w2 * (s.v - s.past[1])
    return jax.lax.cond(s.i == 0, lambda: heun(s), lambda: jnp.where(s.i == 1, ab2(s), third))


def sde(s: Step) -> jax.Array:
    """Predict x0, and add new noise at the level of the next time. Source: ACE-Step 1.5, turbo."""
    return _renoise(s, reached("sde", s.times, s.i))


def sde_linear(s: Step) -> jax.Array:
    """Like `sde`, but add noise at the level 1 - (i + 1) / N for any schedule. Source: ACE-Step 1.5, base."""
    return _renoise(s, reached("sde_linear", s.times, s.i))


def _renoise(s: Step, t: jax.Array) -> jax.Array:
    x0 = s.x - s.times[s.i] * s.v
    noise = jax.vmap(lambda key: jax.random.normal(key, s.x.shape[1:], jnp.float32))(s.keys)
    return t * noise + (1 - t) * x0


def reached(solver: str, times: jax.Array, i: jax.Array) -> jax.Array:
    """Return the noise level at the end of step i."""
    steps = times.shape[0] - 1
    return (steps - 1.0 - i) / steps if solver == "sde_linear" else times[i + 1]


SOLVERS: dict[str, Callable[[Step], jax.Array]] = dict(
    euler=euler, heun=heun, ab2=ab2, ab3=ab3, sde=sde, sde_linear=sde_linear
)
STOCHASTIC = ("sde", "sde_linear")  # solvers that draw noise, from a key for each song


class State(NamedTuple):
    """The state that is passed from step to step.

    x: [B, T, C], float32 or wider; momentum: guidance momentum, a pytree.
    past: the velocities of the last two steps, the latest first, [B, T, C] each; arbitrary before the first steps.
    """

    x: jax.Array
    momentum: Any
    past: tuple[jax.Array, jax.Array]


def start(x: jax.Array, momentum: Any = None) -> State:
    """Return the state before the first step, with x in float32 or wider."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return State(x, momentum, (jnp.zeros_like(x), jnp.zeros_like(x)))


def advance(
    velocity: Velocity,
    state: State,
    times: jax.Array,
    i: jax.Array | int,
    n: int,
    *,
    solver: str = "euler",
    keys: jax.Array | None = None,
    after_step: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    correct: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
    ema: jax.Array | None = None,
    euler_end: bool = False,
) -> State:
    """Integrate dx/dt = v from times[i] to times[i + n], as one scan.

    Args:
        velocity: (x, i, momentum) -> (v, momentum) at times[i]; the momentum is the state of guidance.
        state: the state at times[i].
        times: [N + 1] float32, strictly decreasing.
        i: first step; may be traced.
        n: number of steps, static.
        solver: one of `SOLVERS`.
        keys: [B], one for each song, if the solver draws noise. The noise of a frame does not depend on T.
        after_step: (x, i) -> x, applied at the end of each step.
        correct: (x, x0, i) -> x, applied before `after_step`; x0 is predicted by the velocity at the step's beginning.
        ema, euler_end: see `Step`.
    """

    def step(state: State, i: jax.Array) -> tuple[State, None]:
        x, momentum, past = state
        v, momentum = velocity(x, i, momentum)
        v = v.astype(x.dtype)
        if ema is not None:
            v = jnp.where(i == 0, v, blend(v, past[0], ema))
        step_keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        s = Step(x, v, past, i, times, velocity, step_keys, ema, euler_end)
        made = SOLVERS[solver](s)
        if ema is not None and solver == "heun":
            v = (x - made) / s.length()  # the next step blends with the mean of both evaluations
        if correct is not None:
            made = correct(made, x - times[i] * s.v, i)
        if after_step is not None:
            made = after_step(made, i)
        return State(made, momentum, (v, past[0])), None

    return jax.lax.scan(step, state, i + jnp.arange(n))[0]
