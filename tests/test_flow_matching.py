"""Schedules, guidance and the sampler against diffusers and exact solutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AceStepPipeline as TorchPipeline
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

from acestep_jax.errors import InputError
from acestep_jax.flow_matching import apg, custom_schedule, euler, schedule
from tests.parity import assert_close, normal


@pytest.mark.parametrize("steps, shift", [(8, 3.0), (8, 1.0), (50, 1.0), (13, 2.5), (1, 3.0)])
def test_schedule_matches_diffusers(steps, shift):
    theirs = TorchPipeline._get_timestep_schedule(None, steps, shift, dtype=torch.float32).numpy()
    ours = schedule(steps, shift)
    assert ours.dtype == np.float32 and ours[-1] == 0.0
    np.testing.assert_allclose(ours[:-1], theirs, rtol=1e-6)


def test_published_turbo_schedule():
    expected = [1.0, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0.0]
    np.testing.assert_allclose(schedule(8, 3.0), expected, atol=1e-6)


def test_custom_schedule():
    np.testing.assert_array_equal(custom_schedule([0.9, 0.5]), np.float32([0.9, 0.5, 0.0]))
    np.testing.assert_array_equal(custom_schedule([0.9, 0.0]), np.float32([0.9, 0.0]))


@pytest.mark.parametrize("arguments", [(0,), (-1,), (8, 0.0), (8, -1.0), (8, float("nan")), (8, float("inf"))])
def test_bad_schedule(arguments):
    with pytest.raises(InputError):
        schedule(*arguments)


@pytest.mark.parametrize("size", [0.01, 1.0])
def test_apg_matches_diffusers(size):
    """Over several steps, with differences below and above the norm threshold."""
    buffer, momentum = MomentumBuffer(-0.75), jnp.zeros((2, 40, 8))
    for step in range(4):
        cond = normal(2, 40, 8, seed=step)
        null = cond + size * normal(2, 40, 8, seed=100 + step)
        theirs = normalized_guidance(
            torch.from_numpy(cond),
            torch.from_numpy(null),
            guidance_scale=6.0,
            momentum_buffer=buffer,
            eta=0.0,
            norm_threshold=2.5,
            use_original_formulation=True,
            norm_dim=(1,),
        )
        ours, momentum = apg(cond, null, 7.0, momentum)
        assert_close(ours, theirs.numpy(), 1e-6)
        assert_close(momentum, buffer.running_average.numpy(), 1e-6)


def test_apg_of_equal_predictions_is_finite():
    cond = normal(1, 10, 4)
    v, momentum = apg(cond, cond, 7.0, jnp.zeros_like(cond))
    np.testing.assert_array_equal(v, cond)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(apg(x, cond, 7.0, jnp.zeros_like(cond))[0]))(cond + 1)).all()


def test_euler_is_exact_on_straight_paths():
    """v = noise - x0 is constant along the flow, so any number of steps arrives at x0."""
    noise, x0 = normal(2, 9, 4), normal(2, 9, 4, seed=1)
    for times in (schedule(1), schedule(7, 3.0)):
        x = jax.jit(lambda n, t: euler(lambda x, i, s: (noise - x0, s), n, t))(noise, times)
        assert_close(x, x0, 1e-6)


def test_euler_is_of_first_order():
    """dx/dt = x from 1 to 0 ends at x / e; twice the steps, half the error."""
    start = jnp.ones((1, 1, 1))

    def error(steps):
        return abs(float(euler(lambda x, i, s: (x, s), start, jnp.asarray(schedule(steps)))[0, 0, 0]) - np.exp(-1))

    assert np.log2(error(32) / error(64)) == pytest.approx(1.0, abs=0.05)


def test_state_and_steps():
    """The state of the velocity function is carried, and every step is reported with its time."""
    seen = []

    def velocity(x, i, count):
        return jnp.full_like(x, count), count + 1

    def report(i, t, x):
        jax.debug.callback(lambda *step: seen.append([float(np.max(value)) for value in step]), i, t, x)

    times = np.float32([1.0, 0.5, 0.25, 0.0])
    x = euler(velocity, jnp.zeros((1, 1, 1)), jnp.asarray(times), 0.0, report)
    jax.effects_barrier()
    assert float(x[0, 0, 0]) == -(1 * 0.25 + 2 * 0.25)
    assert seen == [[0, 1.0, 0.0], [1, 0.5, -0.25], [2, 0.25, -0.75]]
