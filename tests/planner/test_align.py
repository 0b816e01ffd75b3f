"""Timestamps of a song of the small random model, from its request to LRC."""

import dataclasses

import numpy as np
import pytest

from acestep_jax import AceStepPipeline, InputError, Request, Sampling
from acestep_jax.inputs.prompt import lyric_text
from acestep_jax.planner.timestamps import align, token_texts
from acestep_jax.song import Song
from tests.parity import normal

LYRICS = "[Verse]\nDer Regen fällt 雨\n\nla la"
HEADS = {"1": [0], "2": [1, 3]}


@pytest.fixture(scope="module")
def pipe(tiny):
    return AceStepPipeline.from_checkpoint(tiny[1])


@pytest.fixture
def with_heads(pipe, monkeypatch):
    config = dataclasses.replace(pipe.transformer.config, lyric_alignment_layers_config=HEADS)
    monkeypatch.setattr(pipe.transformer, "config", config)
    return pipe


def aligned(pipe, lyrics=LYRICS, duration=10.0):
    job = pipe.prepare(Request("rain", lyrics=lyrics, audio_duration=duration, seed=1), Sampling())
    latents = normal(job.frames, 8)
    with pipe.on_mesh(), pipe.placement.stage(pipe.networks) as networks:
        silent = pipe.silent_timbre.token(pipe.networks, networks)
        return align(networks, pipe.tokenizer, job, latents, silent, steps=8)


def test_lines_of_a_song(with_heads):
    """What is found in random weights has no meaning, but each line has its place within the song, in order."""
    found = aligned(with_heads)
    assert [line.text for line in found.lines] == ["[Verse]", "Der Regen fällt 雨", "la la"]
    times = np.array([(line.start, line.end) for line in found.lines])
    assert (times[:, 0] <= times[:, 1]).all() and (np.diff(times[:, 0]) >= 0).all()
    assert times.min() >= 0 and times.max() <= 10.0
    assert 0 <= found.score <= 1 and 0 <= found.codes_score <= 1 and found.score != found.codes_score
    assert aligned(with_heads) == found


def test_texts_of_tokens(pipe):
    ids = pipe.tokenizer.encode(lyric_text(LYRICS, "de")).ids
    first, texts = token_texts(pipe.tokenizer, ids, pipe.tokenizer.token_to_id("<|endoftext|>"))
    assert "".join(texts) == LYRICS
    assert pipe.tokenizer.decode(ids[:first], skip_special_tokens=False) == "# Languages\nde\n\n# Lyric\n"


def test_what_cannot_be_aligned_is_refused(pipe, with_heads):
    with pytest.raises(InputError, match="no lyrics"):
        aligned(with_heads, "[Instrumental]")


def test_other_models_are_refused(pipe):
    with pytest.raises(InputError, match="lyric_alignment_layers_config"):
        aligned(pipe)


@pytest.mark.parametrize(
    "variant, sampling, steps",
    [
        ("turbo", {}, 8),
        ("base", {}, 32),
        ("base", dict(compat="diffusers"), 8),
        ("sft", dict(compat="diffusers"), 8),
        ("base", dict(timesteps=[1.0, 0.6, 0.2]), 3),
        ("base", dict(num_inference_steps=5, cover_noise_strength=0.9), 5),
    ],
)
def test_noise_is_that_of_the_last_step(pipe, monkeypatch, variant, sampling, steps):
    """As many steps as `run` makes from pure noise."""
    config = dataclasses.replace(pipe.transformer.config, is_turbo=variant == "turbo", model_version=variant)
    monkeypatch.setattr(pipe.transformer, "config", config)
    found = []
    monkeypatch.setattr("acestep_jax.planner.timestamps.align", lambda *_, steps: found.append(steps))
    task = dict(task_type="cover", audio_codes="<|audio_code_1|>" * 50) if "cover_noise_strength" in sampling else {}
    request = Request("rain", lyrics=LYRICS, **task)
    pipe.timestamps(Song(np.zeros((2, 480000), np.float32), normal(250, 8), 48000, 1), request, Sampling(**sampling))
    assert found == [steps]
