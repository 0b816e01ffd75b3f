"""The latent blend at the borders of regions, and the noise of variations."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from acestep_jax import Request
from acestep_jax.inputs.collate import blend_weights, draw_retake_seeds, draw_seeds, initial_noise
from tests.noise import drawn

pytestmark = pytest.mark.unit


def job(*regions, frames=20, keeps_source=True):
    mask = np.zeros(frames, bool)
    for start, end in regions:
        mask[start:end] = True
    return SimpleNamespace(frames=frames, mask=mask, keeps_source=keeps_source)


def test_blend_falls_outside_of_a_region():
    """In equal steps, without 0 and 1 themselves, as torch.linspace(0, 1, n + 2)[1:-1]; steeper where the song ends."""
    (row,) = blend_weights([job((8, 12))], 24, 3)
    ramp = np.linspace(0, 1, 5)[1:-1]
    expected = np.concatenate([np.zeros(5), ramp, np.ones(4), ramp[::-1], np.zeros(5), np.ones(4)])
    np.testing.assert_allclose(row, expected, atol=1e-7)
    (row,) = blend_weights([job((1, 19))], 20, 3)
    np.testing.assert_allclose(row, [0.5, *np.ones(18), 0.5])


def test_blend_of_several_regions():
    """Between two that are near, the larger of both counts; a song that keeps nothing is left as it is."""
    both, none, whole = blend_weights([job((4, 6), (9, 12)), job((4, 6), keeps_source=False), job((0, 20))], 20, 4)
    np.testing.assert_allclose(both[:9], [*np.linspace(0, 1, 6)[1:-1], 1, 1, 0.8, 0.6, 0.8], atol=1e-7)
    assert (none == 1).all() and (whole == 1).all()
    hard = blend_weights([job((4, 6))], 20, 0)[0]
    np.testing.assert_array_equal(hard, job((4, 6)).mask)


def retaken(**values):
    jobs = [SimpleNamespace(request=Request("x", seed=3, **values), frames=40)]
    seeds, keys = draw_seeds(jobs, needed=False)
    size = dict(frames=64, channels=8, dtype="float32")
    return initial_noise(jobs, seeds, keys, "jax", **size, retake_seeds=draw_retake_seeds(jobs))[:, :40]


def test_retake_mixes_a_second_noise():
    """cos and sin of the variance in quarter turns, so that the noise stays one of unit variance."""
    first, second = drawn([3], 40)[2][:, :40], drawn([8], 40)[2][:, :40]
    np.testing.assert_array_equal(retaken(retake_seed=8), first)
    for variance in (0.25, 1.0):
        angle = variance * np.pi / 2
        expected = np.cos(angle) * first + np.sin(angle) * second
        np.testing.assert_allclose(retaken(retake_seed=8, retake_variance=variance), expected, atol=1e-6)


def test_retake_seeds():
    """New ones, all different, where there is a second noise and none was given."""

    def drawn(*values):
        return draw_retake_seeds([SimpleNamespace(request=Request("x", **value)) for value in values])

    part = dict(retake_variance=0.5)
    assert drawn({}, dict(retake_seed=3)) == [None, None]
    none, given, *fresh = drawn({}, part | dict(retake_seed=0), part, part)
    assert (none, given) == (None, 0)
    assert all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in fresh)
    assert len({*fresh, *drawn(part, part)}) == 4


def test_retake_of_given_noise():
    """A song's own latents are the first noise then."""
    own = np.asarray(jax.random.normal(jax.random.key(2), (40, 8)))
    found = retaken(latents=own, retake_seed=8, retake_variance=0.5)
    np.testing.assert_allclose(found[0], (own + drawn([8], 40)[2][0, :40]) / np.sqrt(2), atol=1e-6)
