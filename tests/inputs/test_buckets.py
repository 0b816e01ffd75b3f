"""Lengths padded to buckets: the same song as without padding, and few programs."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from acestep_jax import AceStepPipeline
from acestep_jax.diffusion import denoise, noise
from acestep_jax.inputs import collate, programs
from acestep_jax.inputs.buckets import BUCKETS
from tests.noise import drawn
from tests.parity import assert_close, relative_error

PROGRAMS = dict(noise=noise.normal, encode=programs.encode, denoise=denoise.denoise, decode=programs.decode)
SHORT = dict(lyrics="[verse]\nla la la", num_inference_steps=2)


@pytest.fixture(scope="module")
def pipe(tiny):
    return AceStepPipeline.from_checkpoint(tiny[1])


@pytest.mark.unit
def test_sizes_of_buckets():
    """Of all durations from 10 to 600 s."""
    frames = np.arange(250, 15001)
    sizes = np.array([BUCKETS.frames_of(int(n)) for n in frames])
    assert (sizes >= frames).all() and (np.diff(sizes) >= 0).all() and (sizes % 256 == 0).all()
    assert all(BUCKETS.frames_of(size) == size for size in set(sizes.tolist()))
    assert (sizes - frames < 256)[frames <= 4096].all()
    assert (sizes / frames)[frames > 2048].max() <= 1.125
    assert len(set(sizes.tolist())) == 31


@pytest.mark.parametrize("seconds", [10.5, pytest.param(13.0, marks=pytest.mark.slow)])
def test_a_song_in_its_bucket_is_the_song_without(pipe, monkeypatch, seconds):
    """Padded by 249 frames of 512, so that whole windows and blocks of attention are padding, and by 187; and so are
    the lyrics and the prompt."""
    padded = pipe("piano", seed=1, audio_duration=seconds, **SHORT)
    size = BUCKETS.frames_of(padded.latents.shape[1])
    monkeypatch.setattr(type(BUCKETS), "frames_of", lambda self, n: n)
    monkeypatch.setattr(collate, "BUCKETS", dataclasses.replace(BUCKETS, prompt=1, lyrics=1))
    alone = pipe("piano", seed=1, audio_duration=seconds, **SHORT)
    assert padded.latents.shape[1] == alone.latents.shape[1] < size
    assert_close(padded.latents, alone.latents)
    assert_close(padded.audios, alone.audios)


def test_noise_begins_the_same_in_every_bucket():
    short, same, long = (drawn([4, 5], frames)[2] for frames in (250, 256, 3000))
    assert short.shape == (2, 256, 8) and long.shape == (2, 3072, 8)
    np.testing.assert_array_equal(short, same)
    np.testing.assert_array_equal(long[:, :256], short)
    exact = noise.normal(jax.vmap(jax.random.key)(np.array([4, 5], np.uint32)), (263, 8))
    np.testing.assert_array_equal(long[:, :263], exact)


def test_what_pads_the_noise_changes_nothing(pipe):
    """Given noise is padded with zeros, that of a seed with more noise."""
    initial = drawn([2], 263)[2]
    assert initial[:, 263:].any()
    arguments = SHORT | dict(audio_duration=10.5)
    given, seeded = pipe("piano", latents=initial[:, :263], **arguments), pipe("piano", seed=2, **arguments)
    assert_close(given.latents, seeded.latents, 1e-6)
    assert_close(given.audios, seeded.audios, 1e-6)


def test_ten_requests_compile_one_program_for_each_bucket(pipe):
    """Durations in two buckets, texts in one; prompts, lyrics, seeds and shifts are data."""
    seconds = [10, 10.24, 10.5, 13, 20.48, 10.1, 18, 10.23, 15.001, 10.25]
    before = compiled()
    for i, duration in enumerate(seconds, start=1):
        request = dict(prompt="aba"[: 1 + i % 3], lyrics="la " * 3 * i, seed=i, shift=1.0 + i / 4)
        song = pipe(**request, audio_duration=duration, num_inference_steps=2)
        assert song.audios.shape == (1, 2, 1920 * math.ceil(duration * 25))
    new = {name: n - before[name] for name, n in compiled().items()}
    assert new["noise"] <= 2 and new["encode"] <= 1 and new["denoise"] <= 2 and new["decode"] <= 2, new


def test_guidance_is_data(tiny_base):
    """Its strength and its interval."""
    pipe = AceStepPipeline.from_checkpoint(tiny_base[1])
    arguments = SHORT | dict(num_inference_steps=4, output_type="latent", audio_duration=10, seed=0)
    first = pipe("piano", guidance_scale=3.0, **arguments)
    before = compiled()
    for changed in (dict(guidance_scale=9.5), dict(guidance_scale=3.0, cfg_interval_start=0.3, cfg_interval_end=0.6)):
        other = pipe("piano", **arguments | changed)
        assert relative_error(other.latents, first.latents) > 1e-3
    assert compiled() == before


def compiled():
    """How many of each stage have been compiled."""
    return {name: program._cache_size() for name, program in PROGRAMS.items()}
