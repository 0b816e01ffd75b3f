"""Sources and references as latents: the songs that the sound gives which they are encoded from."""

import numpy as np
import pytest

from acestep_jax import AceStepPipeline, InputError
from acestep_jax.inputs import programs, sources
from acestep_jax.inputs.keywords import requests_of
from acestep_jax.inputs.latents import excerpt, load_latents
from acestep_jax.inputs.prepare import REFERENCE_SECONDS
from acestep_jax.models.config import AutoencoderConfig
from tests.parity import assert_close, normal

RATE, HOP, CHANNELS = 48_000, 1920, 8
PARTS = dict(seed=3, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
VAE = AutoencoderConfig(decoder_input_channels=CHANNELS)


@pytest.fixture(scope="module")
def pipe(tiny_base):
    return AceStepPipeline.from_checkpoint(tiny_base[1])


@pytest.fixture(scope="module")
def sound():
    return 0.1 * normal(2, 4 * RATE, seed=1)


@pytest.fixture(scope="module")
def latents(pipe, sound):
    return pipe.song_to_latents(sound)


@pytest.mark.parametrize(
    "asked",
    [
        dict(task_type="cover"),
        dict(task_type="repaint", repainting_start=[-1.0, 1.0], repainting_end=[0.5, 2.0]),
        dict(flow_edit_morph=True, flow_edit_source_caption="noise"),
    ],
    ids=["cover", "repaint, longer than the source", "edit"],
)
def test_the_song_is_that_of_the_sound(pipe, sound, latents, asked, tmp_path):
    file = tmp_path / "song.latents"
    file.write_bytes(latents.astype("<f4").tobytes())
    expected = pipe("x", src_audio=sound, **asked, **PARTS).latents
    for given in (latents, file):
        assert_close(pipe("x", src_latents=given, **asked, **PARTS).latents, expected)


def test_a_repainted_song_is_the_decoded_source_outside_of_its_regions(pipe, latents):
    parts = PARTS | dict(output_type="np", repaint_mode="aggressive")
    found = pipe("x", src_latents=latents, task_type="repaint", repainting_start=1.0, repainting_end=2.0, **parts)
    frames = len(latents)
    whole = np.zeros((1, 256, CHANNELS), np.float32)
    whole[0, :frames] = latents
    source = programs.decode(pipe.vae, whole, np.array([frames], np.int32), np.array([False]))
    outside = np.ones(frames * HOP, bool)
    outside[RATE : 2 * RATE] = False
    inside = ~outside
    source = np.asarray(source)[0, :, : frames * HOP]
    assert_close(found.audio[:, outside][:, : RATE // 2], source[:, outside][:, : RATE // 2])
    assert np.abs(found.audio[:, inside] - source[:, inside]).max() > 0.01


def test_songs_with_sound_latents_and_codes_share_a_batch(pipe, sound, latents):
    codes = "".join(f"<|audio_code_{i * 997 % 64_000}|>" for i in range(20))
    kinds = [dict(src_audio=sound), dict(src_latents=latents), dict(audio_codes=codes)]
    asked = [requests_of(dict(prompt="x", task_type="cover", seed=3, **one))[0][0] for one in kinds]
    jobs = [pipe.prepare(one) for one in asked]
    clean, source = sources.source_latents(pipe.networks, jobs, 256, CHANNELS)
    assert_close(clean[1, :100], clean[0, :100])
    assert_close(source[1, :100], source[0, :100])
    assert np.abs(source[2, :100] - source[0, :100]).max() > 0.01
    assert [job.program_key.latents for job in jobs] == [(False, False), (True, False), (False, False)]


def test_references(pipe, sound, latents):
    given = [dict(reference_audio=sound), {}, dict(reference_latents=latents)]
    asked = [requests_of(dict(prompt="x", seed=3, **one))[0][0] for one in given]
    jobs = [pipe.prepare(one) for one in asked]
    clips, owners = sources.references(pipe.networks, jobs)
    assert owners.tolist() == [0, 2, 1] and clips.shape == (2, 750, CHANNELS)
    alone, _ = sources.references(pipe.networks, jobs[:1])
    assert_close(clips[0], alone[0])
    np.testing.assert_array_equal(clips[1], excerpt(latents.T, 750).T)
    assert_close(clips[1][10:80], clips[0][10:80], 1e-3)  # away from the seams of the sound it is the same clip


@pytest.mark.unit
def test_an_excerpt_has_a_third_of_each_part():
    wave = np.arange(90 * REFERENCE_SECONDS)[None]
    found = excerpt(wave, 30)
    assert found[0, :10].tolist() == list(range(10)) and found[0, 10] == 30 * REFERENCE_SECONDS
    assert found[0, -1] == 90 * REFERENCE_SECONDS - 1
    assert excerpt(np.arange(7)[None], 30)[0, :10].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]


def test_there_and_back(pipe, latents):
    """Latents to sound as a song is decoded, and to the codes of the sound."""
    made = pipe.latents_to_song(latents)
    assert made.shape == (2, len(latents) * HOP) and np.abs(made).max() == pytest.approx(10 ** (-1 / 20), rel=1e-5)
    song = pipe("x", audio_duration=10.0, seed=0, num_inference_steps=1)
    assert_close(pipe.latents_to_song(song.latents), song.audio)
    assert pipe.latents_to_codes(latents).shape == (20,)


@pytest.mark.unit
@pytest.mark.parametrize(
    "given, message",
    [
        (np.zeros((100, 7), np.float32), r"expected a file or an array \[frames, 8 channels\] .*, found float32 \[100"),
        (np.zeros((100, 8), int), "found int64"),
        (np.full((100, 8), np.nan, np.float32), "holds NaN"),
        (np.zeros((24, 8), np.float32), "expected 1 to 600 s of music, found 0.96 s"),
        (np.zeros((15_001, 8), np.float32), "expected 1 to 600 s"),
        (b"x" * 33, "expected latents in float32, 32 bytes for each frame of 8 channels, found 33 bytes"),
        (b"", "found 0 bytes"),
    ],
)
def test_what_is_no_latents(given, message, tmp_path):
    if isinstance(given, bytes):
        (tmp_path / "a.latents").write_bytes(given)
        given = tmp_path / "a.latents"
    with pytest.raises(InputError, match=message):
        load_latents(given, "src_latents", VAE)


@pytest.mark.parametrize(
    "asked, message",
    [
        (dict(task_type="cover", src_audio="a.wav"), "src_audio, src_latents: expected one of them, found both"),
        (dict(task_type="cover", audio_codes="<|audio_code_1|>"), "audio_codes, src_latents: expected one of them"),
        (dict(), "src_latents: the task text2music does not take it"),
    ],
)
def test_what_latents_do_not_go_with(pipe, latents, asked, message):
    with pytest.raises(InputError, match=message):
        pipe("x", src_latents=latents, **asked)
    with pytest.raises(InputError, match="reference_audio, reference_latents: expected one of them"):
        pipe("x", reference_audio="a.wav", reference_latents=latents)
