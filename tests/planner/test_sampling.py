"""Drawing tokens, against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from acestep_jax import InputError
from acestep_jax.diffusion import noise
from acestep_jax.planner.sampling import Drawing, LanguageSampling, draw, guide, kept, penalise, step_keys
from tests.parity import normal

pytestmark = pytest.mark.unit

VOCABULARY = 3000
kept_program = jax.jit(kept)
draw_program = jax.jit(draw)


def reference_kept(logits, k, p):
    """Which tokens of one row are drawn from: those of equal likelihood together."""
    logits = logits.astype(np.float64)
    keep = np.isfinite(logits)
    if k:
        keep &= logits >= np.sort(logits)[-k]
    probabilities = np.where(keep, np.exp(logits - logits.max()), 0)
    probabilities /= probabilities.sum()
    if p < 1:
        better = np.array([probabilities[probabilities > one].sum() for one in probabilities])
        keep &= better < p
    return keep


@pytest.mark.parametrize("k", [0, 1, 50])
@pytest.mark.parametrize("p", [0.1, 0.9, 0.999, 1.0])
def test_kept_tokens(k, p):
    logits = 3 * normal(4, VOCABULARY)
    logits[:, 7::9] = -np.inf
    logits[1] = np.round(logits[1])  # equals
    logits[2, 5] = 80.0  # nearly all of the mass
    found = kept_program(logits, np.full(4, k, np.int32), np.full(4, p, np.float32))
    for row, ours in zip(logits, np.asarray(found), strict=True):
        np.testing.assert_array_equal(ours, reference_kept(row, k, p))


def test_rows_have_settings_of_their_own():
    logits = 3 * normal(4, VOCABULARY)
    ks, ps = np.int32([0, 1, 50, 0]), np.float32([1.0, 0.5, 0.9, 0.1])
    found = np.asarray(kept_program(logits, ks, ps))
    for i in range(4):
        np.testing.assert_array_equal(found[i], reference_kept(logits[i], ks[i], ps[i]))


def drawing(count, **values):
    return Drawing.of(LanguageSampling(**values), count)


def keys(count, step=0):
    return step_keys(jnp.stack([noise.key(seed) for seed in range(count)]), step)


@pytest.mark.parametrize("settings", [dict(top_p=1.0, temperature=1.0), dict(top_k=7, top_p=0.9, temperature=0.7)])
def test_frequencies(settings):
    """A hundred thousand draws against the distribution that they are of."""
    rows, size = 100_000, 20
    logits = 1.5 * normal(size)
    base = jax.random.split(noise.key(3), rows)
    found = np.asarray(draw_program(jnp.broadcast_to(logits, (rows, size)), base, drawing(rows, **settings)))
    scaled = logits.astype(np.float64) / settings["temperature"]
    keep = reference_kept(scaled.astype(np.float32), settings.get("top_k", 0), settings["top_p"])
    expected = np.where(keep, np.exp(scaled), 0)
    expected = rows * expected / expected.sum()
    counts = np.bincount(found, minlength=size)
    assert not counts[~keep].any()
    assert stats.chisquare(counts[keep], expected[keep]).pvalue > 1e-3


def test_no_temperature_takes_the_likeliest():
    logits = normal(8, 50)
    likeliest = logits.argmax(-1)
    for temperature in (0.0, 1e-6):
        ours = draw_program(logits, keys(8), drawing(8, temperature=temperature, top_p=1.0))
        np.testing.assert_array_equal(ours, likeliest)
    greedy = np.arange(8) % 2 == 0
    mixed = np.asarray(draw_program(logits, keys(8), drawing(8, temperature=5.0), greedy))
    free = np.asarray(draw_program(logits, keys(8), drawing(8, temperature=5.0)))
    np.testing.assert_array_equal(mixed, np.where(greedy, likeliest, free))
    assert (free != likeliest).any()


def test_steps_and_songs_are_independent():
    logits = np.zeros((4, VOCABULARY), np.float32)
    settings = drawing(4, top_p=1.0)
    first, second = (np.asarray(draw_program(logits, keys(4, step), settings)) for step in (0, 1))
    assert len({*first, *second}) == 8
    alone = draw_program(logits[2:3], keys(4)[2:3], drawing(1, top_p=1.0))
    assert alone[0] == first[2]


def test_illegal_tokens_are_never_drawn():
    logits = np.full((2, 30), -np.inf, np.float32)
    logits[0, 3], logits[1, [4, 29]] = -80.0, (1.0, 1.0)
    for step in range(20):
        first, second = np.asarray(draw_program(logits, keys(2, step), drawing(2, top_k=10)))
        assert first == 3 and second in (4, 29)


def test_guidance_and_penalty():
    conditional, unconditional = normal(2, 5), normal(2, 5, seed=1)
    scale = np.float32([1.0, 2.5])
    expected = unconditional + scale[:, None] * (conditional - unconditional)
    np.testing.assert_allclose(guide(conditional, unconditional, scale), expected, rtol=1e-6)
    seen = np.array([[True, False, True, False, False], [False] * 5])
    penalty = np.float32([1.3, 1.3])
    expected = np.where(seen, np.where(conditional < 0, conditional * 1.3, conditional / 1.3), conditional)
    np.testing.assert_allclose(penalise(conditional, seen, penalty), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(temperature=-1), "temperature: expected a number of at least 0, found -1"),
        (dict(cfg_scale=0.5), "cfg_scale: expected a number of at least 1, found 0.5"),
        (dict(top_k=1.5), "top_k: expected a whole number"),
        (dict(top_p=0), "top_p: expected a number above 0 and up to 1, found 0"),
        (dict(top_p=float("nan")), "top_p: expected a finite number"),
        (dict(repetition_penalty=0), "repetition_penalty: expected a number above 0"),
        (dict(negative_prompt=None), "negative_prompt: expected text"),
    ],
)
def test_bad_input(values, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(LanguageSampling(), **values)
