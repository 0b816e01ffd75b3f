"""Schedules, guidance and solvers against diffusers, plain NumPy in double precision, and exact solutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax.diffusion.guidance import GUIDANCE, Guided, adg, apg, cfg
from acestep_jax.diffusion.schedule import custom_schedule, late_start, schedule
from acestep_jax.diffusion.solvers import SOLVERS, reached
from acestep_jax.errors import InputError
from tests.parity import assert_close, normal, relative_error
from tests.solving import integrate

pytestmark = pytest.mark.unit

RULES = {name: jax.jit(rule) for name, rule in GUIDANCE.items()}  # each operation on its own would be a program


@pytest.mark.parametrize("steps, shift", [(8, 3.0), (8, 1.0), (50, 1.0), (13, 2.5), (1, 3.0)])
def test_schedule_matches_diffusers(steps, shift):
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    theirs = diffusers.AceStepPipeline._get_timestep_schedule(None, steps, shift, dtype=torch.float32).numpy()
    ours = schedule(steps, shift)
    assert ours.dtype == np.float32 and ours[-1] == 0.0
    np.testing.assert_allclose(ours[:-1], theirs, rtol=1e-6)


def test_published_turbo_schedule():
    expected = [1.0, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0.0]
    np.testing.assert_allclose(schedule(8, 3.0), expected, atol=1e-6)


def test_custom_schedule():
    np.testing.assert_array_equal(custom_schedule([0.9, 0.5]), np.float32([0.9, 0.5, 0.0]))
    np.testing.assert_array_equal(custom_schedule([0.9, 0.0]), np.float32([0.9, 0.0]))


def test_late_start():
    """From the nearest time on; the earlier of two at the same distance; never from the end."""
    times = np.float32([1.0, 0.75, 0.5, 0.25, 0.0])
    for level, first in ((1.0, 1.0), (0.9, 1.0), (0.875, 1.0), (0.8, 0.75), (0.3, 0.25), (0.0, 0.25)):
        np.testing.assert_array_equal(late_start(times, level), times[times.tolist().index(first) :])


@pytest.mark.parametrize("arguments", [(0,), (-1,), (8, 0.0), (8, -1.0), (8, float("nan")), (8, float("inf"))])
def test_bad_schedule(arguments):
    with pytest.raises(InputError):
        schedule(*arguments)


# Guidance


def guided(step=0, size=1.0, momentum=None):
    cond = normal(2, 40, 8, seed=step)
    null = cond + size * normal(2, 40, 8, seed=100 + step)
    momentum = np.zeros_like(cond) if momentum is None else momentum
    return Guided(cond, null, normal(2, 40, 8, seed=200 + step), np.float32(0.9 - 0.2 * step), momentum)


@pytest.mark.parametrize("size", [0.01, 1.0])
def test_apg_matches_diffusers(size):
    """Over several steps, with differences below and above the norm threshold."""
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    buffer, momentum = theirs.MomentumBuffer(-0.75), None
    for step in range(4):
        g = guided(step, size, momentum)
        expected = theirs.normalized_guidance(
            torch.from_numpy(g.cond),
            torch.from_numpy(g.null),
            guidance_scale=6.0,
            momentum_buffer=buffer,
            eta=0.0,
            norm_threshold=2.5,
            use_original_formulation=True,
            norm_dim=(1,),
        )
        ours, momentum = RULES["apg"](g, 7.0)
        assert_close(ours, expected.numpy(), 1e-6)
        assert_close(momentum, buffer.running_average.numpy(), 1e-6)


def numpy_apg(g, scale):
    """One channel of one song after the other."""
    momentum = g.cond - g.null - 0.75 * g.momentum
    out = np.empty_like(g.cond)
    for b, c in np.ndindex(g.cond.shape[0], g.cond.shape[2]):
        m, v = momentum[b, :, c], g.cond[b, :, c]
        m = m * min(1.0, 2.5 / np.sqrt(m @ m))
        out[b, :, c] = v + (scale - 1) * (m - (m @ v) / (v @ v) * v)
    return out, momentum


def numpy_adg(g, scale):
    """One frame of one song after the other."""
    out = np.empty_like(g.cond)
    for b, f in np.ndindex(g.cond.shape[:2]):
        c, u = (g.x - g.t * g.cond)[b, f], (g.x - g.t * g.null)[b, f]
        weight = max(scale - 1, 0) + 0.001
        angle = np.arccos(np.clip(c @ u / np.linalg.norm(c) / np.linalg.norm(u), -1 + 1e-6, 1 - 1e-6))
        turned = np.clip(weight * angle, -3.14 / 6, 3.14 / 6)
        away = (c - u) - (c - u) @ u / (u @ u + 1e-8) * u
        factor = np.sin(turned) / np.sin(angle) if np.sin(angle) > 1e-3 else weight
        out[b, f] = (g.x[b, f] - np.cos(turned) * c - away * factor) / g.t
    return out, g.momentum


def numpy_cfg(g, scale):
    return (1 - scale) * g.null + scale * g.cond, g.momentum


@pytest.mark.parametrize("size", [1e-4, 0.05, 1.0])
@pytest.mark.parametrize("name", GUIDANCE)
def test_guidance_matches_double_precision(name, size):
    """Small differences, which are turned by less than the greatest angle, and large ones."""
    g = guided(1, size, normal(2, 40, 8, seed=9))
    ours = RULES[name](g, np.float32(4.5))
    rule = dict(apg=numpy_apg, adg=numpy_adg, cfg=numpy_cfg)[name]
    theirs = rule(Guided(*(np.asarray(x, np.float64) for x in g)), 4.5)
    assert_close(ours[0], theirs[0], 1e-6)
    assert_close(ours[1], theirs[1], 1e-6)


def test_guidance_of_equal_predictions_is_finite():
    cond = normal(1, 10, 4)
    g = Guided(cond, cond, normal(1, 10, 4, seed=1), np.float32(0.5), np.zeros_like(cond))
    for rule in (apg, cfg):
        np.testing.assert_allclose(rule(g, 7.0)[0], cond, rtol=1e-6)
        value = lambda x, rule=rule: jnp.sum(rule(g._replace(cond=x), 7.0)[0])  # noqa: E731
        assert np.isfinite(jax.jit(jax.grad(value))(cond + 1)).all()
    assert_close(adg(g, 7.0)[0], cond, 0.02)  # by the smallest angle, seven times 0.0014


# Solvers


def solve(solver, times, f=lambda x, t: x, start=1.0, **options):
    """dx/dt = f(x, t) from a number."""
    times = jnp.asarray(times, jnp.float32)
    run = lambda x: integrate(lambda x, i, m: (f(x, times[i]), m), x, times, solver=solver, **options)  # noqa: E731
    return jax.jit(run)(jnp.full((1, 1, 1), start, jnp.float32))


@pytest.mark.heavy
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_are_exact_on_straight_paths(solver):
    """v = noise - x0 is constant along the flow, so any number of steps arrives at x0."""
    noise, x0 = normal(2, 9, 4), normal(2, 9, 4, seed=1)
    keys = jax.random.split(jax.random.key(0), 2)
    for times in (schedule(1), schedule(2), schedule(7, 3.0)):

        def velocity(x, i, momentum, times=times):
            t = jnp.asarray(times)[i]
            return (x - x0) / jnp.where(t > 0, t, 1) if "sde" in solver else noise - x0, momentum

        x = jax.jit(lambda n, t: integrate(velocity, n, t, solver=solver, keys=keys))(noise, times)  # noqa: B023
        assert_close(x, x0, 1e-6)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("ab2", 2), ("ab3", 3)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_order_of_convergence(solver, order, shift):
    """dx/dt = (1 + cos(3 t)) x, with steps of equal length and of growing ones: the error falls by 2^order for each
    doubling of the steps. In double precision, so that rounding is not what is left."""
    exact = np.exp(-1 - np.sin(3.0) / 3)
    with jax.enable_x64(True):

        def error(steps):
            u = np.linspace(1, 0, steps + 1)
            times = jnp.asarray(shift * u / (1 + (shift - 1) * u))
            x = jnp.ones((1, 1, 1))
            y = integrate(lambda x, i, m: ((1 + jnp.cos(3 * times[i])) * x, m), x, times, solver=solver)
            return abs(float(y[0, 0, 0]) - exact)

        assert np.log2(error(200) / error(400)) == pytest.approx(order, abs=0.1)


def numpy_solve(solver, f, x, times):
    """The same in double precision, from the definitions: Adams-Bashforth by integrating Lagrange's polynomials."""
    past = []
    for i, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
        v = f(x, t)
        past = [(t, v), *past][:3]
        first = solver == "heun" or solver == "ab3" and i == 0
        if first:
            x = x + (t_next - t) * (v + f(x + (t_next - t) * v, t_next)) / 2
            continue
        known = past[: {"euler": 1, "ab2": 2, "ab3": 3}[solver]]
        for j, (node, value) in enumerate(known):
            basis = np.polynomial.Polynomial([1.0])
            for k, (other, _) in enumerate(known):
                if k != j:
                    basis *= np.polynomial.Polynomial([-other, 1.0]) / (node - other)
            area = basis.integ()
            x = x + (area(t_next) - area(t)) * value
    return x


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "ab3"])
def test_solvers_match_double_precision(solver):
    weights = normal(4, 4, seed=3) / 2
    start, times = normal(2, 9, 4), schedule(11, 2.0)
    f = lambda x, t: np.sin(4 * t) * x @ np.asarray(weights, x.dtype)  # noqa: E731
    theirs = numpy_solve(solver, f, np.asarray(start, np.float64), times.astype(np.float64))
    velocity = lambda x, i, m: (jnp.sin(4 * jnp.asarray(times)[i]) * (x @ weights), m)  # noqa: E731
    assert_close(jax.jit(lambda x: integrate(velocity, x, jnp.asarray(times), solver=solver))(start), theirs, 1e-6)


@pytest.mark.parametrize("solver", ["sde", "sde_linear"])
def test_noisy_solvers_match_double_precision(solver):
    start, times = normal(2, 9, 4), schedule(6, 3.0)
    keys = jax.random.split(jax.random.key(5), 2)
    velocity = lambda x, i, m: (jnp.sin(4 * jnp.asarray(times)[i]) * x, m)  # noqa: E731
    ours = jax.jit(lambda x: integrate(velocity, x, jnp.asarray(times), solver=solver, keys=keys))(start)
    x = np.asarray(start, np.float64)
    for i, (t, t_next) in enumerate(zip(times.astype(np.float64), times[1:].astype(np.float64), strict=False)):
        x0 = x - t * np.sin(4 * t) * x
        level = t_next if solver == "sde" else 1 - (i + 1) / 6
        noise = np.stack([jax.random.normal(jax.random.fold_in(key, i), (9, 4)) for key in keys])
        x = level * noise + (1 - level) * x0
    assert_close(ours, x, 1e-6)


def test_noise_of_solvers_belongs_to_the_song_and_the_frame():
    """A song's noise is the same in any batch, and begins the same in a longer bucket."""
    keys, times = jax.random.split(jax.random.key(5), 2), jnp.asarray(schedule(3))
    run = jax.jit(lambda x, keys: integrate(lambda x, i, m: (x, m), x, times, solver="sde", keys=keys))
    x = normal(2, 9, 4)
    both, alone, longer = run(x, keys), run(x[1:], keys[1:]), run(np.pad(x, ((0, 0), (0, 7), (0, 0))), keys)
    assert_close(both[1:], alone, 1e-6)
    assert_close(both, longer[:, :9], 1e-6)


def test_momentum_and_steps():
    """What the velocity function remembers is carried, once a step; what comes after a step may change x."""
    seen = []

    def velocity(x, i, count):
        return jnp.full_like(x, 0 if count is None else count), None if count is None else count + 1

    def after(x, i):
        jax.debug.callback(lambda *step: seen.append([float(np.max(value)) for value in step]), i, x)
        return jnp.where(i == 1, x + 10, x)

    times = jnp.asarray([1.0, 0.5, 0.25, 0.0], jnp.float32)
    x = integrate(velocity, jnp.zeros((1, 1, 1)), times, momentum=0.0, after_step=after)
    jax.effects_barrier()
    assert float(x[0, 0, 0]) == 10 - (1 * 0.25 + 2 * 0.25)
    assert seen == [[0, 0.0], [1, -0.25], [2, 9.25]]
    heun = integrate(velocity, jnp.zeros((1, 1, 1)), times, solver="heun", momentum=0.0)
    assert float(heun[0, 0, 0]) == -(1 * 0.25 + 2 * 0.25) / 2  # the second evaluation is told apart


def test_euler_at_the_end_makes_one_evaluation_there():
    """Heun's last step, and only that, becomes Euler's: nothing is asked of the network at t = 0."""
    asked, times = [], schedule(3, 2.0)

    def velocity(x, i, momentum):
        jax.debug.callback(lambda i: asked.append(int(i)), i)
        return jnp.sin(x + i), momentum

    x = normal(1, 4, 2)
    run = lambda n, **o: integrate(velocity, jnp.asarray(x), jnp.asarray(times), solver="heun", **o)  # noqa: E731
    found = run(3, euler_end=True)
    jax.effects_barrier()
    assert sorted(asked) == [0, 1, 1, 2, 2]
    y = x.astype(np.float64)
    for i in range(3):
        h, v = float(times[i] - times[i + 1]), np.sin(y + i)
        y = y - h * (v if i == 2 else (v + np.sin(y - h * v + i + 1)) / 2)
    assert_close(found, y, 1e-6)
    assert relative_error(run(3), y) > 1e-3


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_velocities_remember_those_before(solver):
    """(1 - f) v + f v of the step before; within a step of Heun the first evaluation is the one before."""
    times, f, x = schedule(5, 2.0), 0.3, normal(1, 4, 2)
    velocity = lambda x, i, m: (jnp.sin(x + i), m)  # noqa: E731
    found = integrate(velocity, jnp.asarray(x), jnp.asarray(times), solver=solver, ema=jnp.float32(f))
    y, before = x.astype(np.float64), None
    for i in range(5):
        h, v = float(times[i] - times[i + 1]), np.sin(y + i)
        v = v if before is None else (1 - f) * v + f * before
        if solver == "heun":
            v = (v + (1 - f) * np.sin(y - h * v + i + 1) + f * v) / 2
        y, before = y - h * v, v
    assert_close(found, y, 1e-5)


def test_corrections_see_the_prediction_of_the_first_evaluation():
    """x0 = x - t v of the beginning of the step, also where a solver asks twice; before `after_step`."""
    times = jnp.asarray(schedule(2))
    seen = []

    def correct(x, x0, i):
        jax.debug.callback(lambda *values: seen.append([float(np.max(value)) for value in values]), i, x0)
        return x + 1

    x = integrate(
        lambda x, i, m: (jnp.full_like(x, 2.0), m),
        jnp.ones((1, 1, 1)),
        times,
        solver="heun",
        correct=correct,
        after_step=lambda x, i: 2 * x,
    )
    jax.effects_barrier()
    assert sorted(seen) == [[0, -1.0], [1, 1.0]]  # 1 - 1 * 2, then 2 - 0.5 * 2
    assert float(x[0, 0, 0]) == 2 * (2 * (1 - 1 + 1) - 1 + 1)


def test_noise_levels_that_steps_end_at():
    times = jnp.asarray(schedule(4, 3.0))
    for i in range(4):
        assert float(reached("sde_linear", times, i)) == pytest.approx(1 - (i + 1) / 4)
        assert float(reached("euler", times, i)) == float(reached("sde", times, i)) == float(times[i + 1])
