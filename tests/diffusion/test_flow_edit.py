"""Editing by flow against its equations, written out in NumPy in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax.diffusion import flow_edit
from acestep_jax.diffusion.schedule import schedule
from acestep_jax.diffusion.solvers import State, start
from tests.parity import assert_close, normal

pytestmark = pytest.mark.unit

STEPS, FRAMES = 6, 5
TIMES = schedule(STEPS, 2.0)
WEIGHTS = {name: normal(3, 3, seed=i) / 2 for i, name in enumerate(("source", "wanted"))}
KEYS = jax.random.split(jax.random.key(1), 2)


def velocity(name):
    """A velocity that guidance's momentum has a part in: the last ones of its own."""

    def v(x, i, momentum):
        found = jnp.sin(4 * jnp.asarray(TIMES)[i]) * (x @ WEIGHTS[name]) + 0.1 * momentum
        return found, found - 0.75 * momentum

    return v


def program(clean, window, n, **options):
    """Return the compiled function of a state and a step that makes n steps."""
    run = lambda state, i: flow_edit.advance(  # noqa: E731
        *(velocity(name) for name in ("source", "wanted")),
        state,
        jnp.asarray(TIMES),
        i,
        n,
        clean=clean,
        window=jnp.int32(window),
        keys=KEYS,
        **options,
    )
    return jax.jit(run)


def advance(state, clean, window, **options):
    return program(clean, window, STEPS, **options)(state, 0)


def begun(clean):
    return start(jnp.asarray(clean), (jnp.zeros_like(clean), jnp.zeros_like(clean)))


def expected(clean, low, high, draws=1, ema=0.0):
    """From the description in the module, one draw after the other."""
    s, z, x = clean.astype(np.float64), clean.astype(np.float64), None
    momentum, past = {name: np.zeros_like(z) for name in WEIGHTS}, {}

    def v(name, at, t):
        return np.sin(4 * t) * (at @ WEIGHTS[name].astype(np.float64)) + 0.1 * momentum[name]

    def noise(i, draw):
        keys = [jax.random.fold_in(jax.random.fold_in(key, i), draw) for key in KEYS]
        return np.stack([np.asarray(jax.random.normal(key, clean.shape[1:]), np.float64) for key in keys])

    def smoothed(name, value):
        past[name] = (1 - ema) * value + ema * past[name] if name in past else value
        return past[name]

    for i in range(low, STEPS):
        t, t_next = float(TIMES[i]), float(TIMES[i + 1])
        if i < high:
            found = {name: [] for name in WEIGHTS}
            for draw in range(draws):
                s_t = (1 - t) * s + t * noise(i, draw)
                found["source"].append(v("source", s_t, t))
                found["wanted"].append(v("wanted", z + s_t - s, t))
            means = {name: np.mean(values, axis=0) for name, values in found.items()}
            momentum = {name: means[name] - 0.75 * momentum[name] for name in WEIGHTS}
            means = {name: smoothed(name, value) for name, value in means.items()}
            z = z + (t_next - t) * (means["wanted"] - means["source"])
            continue
        if x is None:
            x = z + ((1 - t) * s + t * noise(i, 0)) - s
        value = v("wanted", x, t)
        momentum["wanted"] = value - 0.75 * momentum["wanted"]
        x = x + (t_next - t) * smoothed("wanted", value)
    return z if x is None else x


@pytest.mark.heavy
@pytest.mark.parametrize("low, high, draws, ema", [(0, 6, 1, 0.0), (2, 4, 1, 0.0), (1, 5, 3, 0.2), (3, 3, 1, 0.1)])
def test_matches_the_equations(low, high, draws, ema):
    clean = normal(2, FRAMES, 3)
    options = dict(draws=draws) | (dict(ema=jnp.float32(ema)) if ema else {})
    found = advance(begun(clean), jnp.asarray(clean), (low, high), **options)
    assert_close(found.x, expected(clean, low, high, draws, ema), 1e-5)


def test_steps_one_by_one_are_all_steps():
    clean = normal(2, FRAMES, 3)
    whole, state = advance(begun(clean), jnp.asarray(clean), (1, 4)), begun(clean)
    one = program(jnp.asarray(clean), (1, 4), 1)
    for i in range(STEPS):
        state = one(state, i)
    assert isinstance(state, State)
    assert_close(state.x, whole.x, 1e-6)


def test_the_same_text_changes_nothing(monkeypatch):
    """Where both velocities are one function, and all steps edit."""
    monkeypatch.setitem(WEIGHTS, "wanted", WEIGHTS["source"])
    clean = normal(2, FRAMES, 3)
    assert_close(advance(begun(clean), jnp.asarray(clean), (0, STEPS)).x, clean, 1e-6)


def test_window():
    """Fractions of the steps, rounded down, but for rounding errors."""
    assert flow_edit.window(0.0, 1.0, 8) == (0, 8)
    assert flow_edit.window(0.3, 0.7, 10) == (3, 7)
    assert flow_edit.window(0.34, 0.99, 3) == (1, 2)
