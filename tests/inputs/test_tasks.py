"""The six tasks: against diffusers' pipeline, and what diffusers does not do against the formulas."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from acestep_jax import AceStepPipeline, InputError, Request
from acestep_jax.diffusion import denoise
from acestep_jax.diffusion.guidance import GUIDANCE, Guided
from acestep_jax.diffusion.schedule import schedule
from acestep_jax.inputs import programs, sources, tasks
from acestep_jax.inputs.buckets import BUCKETS
from acestep_jax.inputs.collate import pad_tokens
from acestep_jax.inputs.keywords import requests_of
from acestep_jax.io import audio
from acestep_jax.request import KINDS
from tests.noise import drawn
from tests.parity import DIFFUSERS, assert_close, normal, relative_error
from tests.solving import integrate

RATE, HOP, CHANNELS = 48_000, 1920, 8
PARTS = dict(lyrics="[verse]\nla la", num_inference_steps=4)


def song(seconds, seed=0):
    """A chord with noise, [2, samples]."""
    t = np.arange(round(seconds * RATE)) / RATE
    tones = [np.sin(2 * np.pi * f * (1 + seed / 9) * t) for f in (220, 277, 330)]
    return (0.1 * np.stack([sum(tones), sum(tones[1:])]) + 0.05 * normal(2, len(t), seed=seed)).astype(np.float32)


@pytest.fixture(scope="module")
def pipe(tiny_base):
    return AceStepPipeline.from_checkpoint(tiny_base[1])


@pytest.fixture(scope="module")
def theirs(tiny_base):
    """diffusers' pipeline with the mean of the posterior for a sample of it."""
    from diffusers import AceStepPipeline as TorchPipeline
    from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDiagonalGaussianDistribution

    pipe = TorchPipeline.from_pretrained(tiny_base[0])
    pipe.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OobleckDiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
        yield pipe


def torch_latents(theirs, prompt, noise, **arguments):
    """diffusers' latents for the same noise; arrays become tensors."""
    import torch

    for name in ("src_audio", "reference_audio"):
        if name in arguments:
            arguments[name] = torch.from_numpy(arguments[name])
    return theirs(prompt, latents=torch.from_numpy(noise), output_type="latent", **arguments).audios.numpy()


SOURCE, REFERENCE = song(4.0), song(7.0, seed=3)
CODES = "".join(f"<|audio_code_{i * 997 % 64_000}|>" for i in range(20))
TASKS = {
    "cover": dict(task_type="cover", src_audio=SOURCE),
    "cover of codes": dict(audio_codes=CODES),
    "cover, blended": dict(task_type="cover", src_audio=SOURCE, audio_cover_strength=0.4),
    "repaint": dict(task_type="repaint", src_audio=SOURCE, repainting_start=1.0, repainting_end=2.3),
    "repaint to the end": dict(task_type="repaint", src_audio=SOURCE, repainting_start=2.5),
    "extract": dict(task_type="extract", src_audio=SOURCE, track_name="vocals"),
    "extract, no name": dict(task_type="extract", src_audio=SOURCE),
    "lego": dict(task_type="lego", src_audio=SOURCE, track_name="backing_vocals"),
    "lego in a window": dict(task_type="lego", src_audio=SOURCE, track_name="bass", repainting_end=1.5),
    "complete": dict(task_type="complete", src_audio=SOURCE, complete_track_classes=["drums", "bass"]),
    "reference": dict(reference_audio=REFERENCE),
    "long reference": dict(task_type="cover", src_audio=SOURCE, reference_audio=song(31.0, seed=4)),
}


def caption_of(pipe, tokens=220, **arguments):
    """Return a caption with which the whole prompt has so many tokens: where padding counts, texts have no buckets, and
    each length would be a program of its own."""
    (request,), _, sampling = requests_of(dict(prompt="soft rock") | arguments)
    missing = tokens - len(pipe.prepare(request, sampling).prompt_ids)
    assert missing >= 0
    return "soft rock" + "!" * missing


# Their programs and texts are those of others: of extract, repaint, lego in a window and reference.
SLOW_TASKS = ("extract, no name", "repaint to the end", "lego", "long reference")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW_TASKS)) for case in TASKS]
)
def test_tasks_match_diffusers(pipe, theirs, case):
    """The same noise, in float32; guided, so that the branch without condition has the right context."""
    noise = normal(1, 100 if {"src_audio", "audio_codes"} & TASKS[case].keys() else 300, CHANNELS)
    arguments = PARTS | dict(guidance_scale=3.0, shift=1.0, audio_duration=12.0) | TASKS[case]
    caption = caption_of(pipe, **DIFFUSERS, **arguments)
    expected = torch_latents(theirs, caption, noise, **arguments)
    found = pipe(caption, latents=noise, output_type="latent", **DIFFUSERS, **arguments)
    assert_close(found.latents, expected, 1e-4)
    given = np.pad(noise, ((0, 0), (0, 300 - noise.shape[1]), (0, 0)))
    text = PARTS | DIFFUSERS | dict(audio_duration=12.0, guidance_scale=3.0)
    text = pipe(caption_of(pipe, **text), latents=given, output_type="latent", **text)
    assert relative_error(found.latents, text.latents[:, : noise.shape[1]]) > 1e-3


def test_long_references_are_cut(pipe):
    """Ten seconds each from the front, from one third on and from the back."""
    whole = song(31.0, seed=4)
    job = pipe.prepare(Request("x", reference_audio=whole))
    third = whole.shape[1] // 3
    parts = whole[:, : 10 * RATE], whole[:, third : third + 10 * RATE], whole[:, -10 * RATE :]
    np.testing.assert_array_equal(job.reference, np.concatenate(parts, axis=1))


def test_a_ragged_batch_matches_diffusers(pipe, theirs, caplog, monkeypatch):
    """diffusers attends to the padding of the shorter texts, and so can we, as far as padding sees the text."""
    noise = normal(2, 300, CHANNELS)
    prompts = ["short", "a prompt that is much longer than the other one, so that there is padding"]
    window = pipe.condition_encoder.config.sliding_window
    lyrics = ["[verse]\nla la la " + "o" * window, "[verse]\nla la la "]
    arguments = PARTS | dict(lyrics=lyrics, audio_duration=12.0, guidance_scale=1.0, shift=3.0)
    expected = torch_latents(theirs, prompts, noise, **arguments)
    arguments |= DIFFUSERS
    found = pipe(prompts, latents=noise, output_type="latent", **arguments)
    assert_close(found.latents, expected, 1e-4)
    assert "attend_to_padding" not in caplog.text
    masked = pipe(prompts, latents=noise, output_type="latent", attend_to_padding=False, **arguments)
    assert relative_error(masked.latents, expected) > 1e-3

    class Warned(Exception):
        """Ends a song before its programs, which these texts would need of their own, are compiled."""

    def end(*_, **__):
        raise Warned

    monkeypatch.setattr(programs, "encode", end)
    with pytest.raises(Warned):
        pipe(prompts, output_type="latent", **arguments | dict(lyrics=[lyrics[0] + "o", lyrics[1]]))
    assert f"differ by {window + 1} tokens, more than the window of {window}" in caplog.text


@pytest.mark.slow
def test_a_weak_cover_pads_its_two_texts_apart(pipe, theirs):
    """As diffusers does, where padding counts: the texts of a cover and of text to music differ by a few tokens.

    By default the ragged batch and the blended cover show the padding of one text, and two texts.
    """
    noise = normal(2, 100, CHANNELS)
    source, prompts = song(4.0), ["short", "a prompt that is much longer"]
    arguments = PARTS | dict(lyrics=["x", "x"], task_type="cover", audio_cover_strength=0.5, guidance_scale=1.0)
    expected = torch_latents(theirs, prompts, noise, src_audio=source, audio_duration=12.0, shift=3.0, **arguments)
    ours = DIFFUSERS | dict(audio_duration=12.0, shift=3.0, output_type="latent")
    assert_close(pipe(prompts, latents=noise, src_audio=source, **arguments, **ours).latents, expected, 1e-4)


# Of the kinds below, by default those with all that only some songs of a batch have: a weak cover with a reference (two
# texts, another context), and regions (injection).
# By default `test_a_ragged_batch_matches_diffusers` has songs at once.
@pytest.mark.slow
@pytest.mark.parametrize("chosen", [pytest.param(range(8), id="eight"), (3, 4)])
def test_songs_at_once_are_the_songs(pipe, chosen):
    """Each with its own prompt, lyrics, seed, length, task and reference."""
    kinds = [
        {},
        dict(reference_audio=REFERENCE),
        dict(task_type="cover", src_audio=song(2.0, 1)),
        dict(task_type="cover", src_audio=song(1.33, 2), audio_cover_strength=0.5, reference_audio=song(2.0, 5)),
        dict(task_type="repaint", src_audio=song(3.1, 3), repainting_start=[0.5, 2], repainting_end=[1.25, 2.5]),
        dict(task_type="lego", src_audio=song(2.5, 4), track_name="drums", repainting_start=1.0),
        dict(audio_codes=CODES[: 20 * 9]),
        dict(task_type="complete", src_audio=song(1.52, 6), complete_track_classes=("bass",)),
    ]
    requests = []
    for i in chosen:
        kind = kinds[i]
        length = {} if "src_audio" in kind or "audio_codes" in kind else dict(audio_duration=10 + 0.015 * i)
        # All in one bucket of text, so that songs alone share programs.
        requests.append(
            Request(f"song {i} " + "long " * (i % 4), lyrics="la " * (2 * i), seed=100 + i, **kind, **length)
        )
    sampling = dict(num_inference_steps=2, guidance_scale=2.0, repaint_injection_ratio=0.5)
    batch = pipe(requests, **sampling)
    assert len(set(batch.samples)) >= len(chosen) - 2 and batch.seeds == tuple(100 + i for i in chosen)
    for i, request in enumerate(requests):
        alone = pipe(request, **sampling)
        assert alone.samples == batch.samples[i : i + 1] and alone.frames == batch.frames[i : i + 1]
        assert_close(batch.latents[i, : alone.frames[0]], alone.latents[0])
        assert_close(batch.audios[i, :, : alone.samples[0]], alone.audios[0])
        assert not batch.audios[i, :, alone.samples[0] :].any() and not batch.latents[i, alone.frames[0] :].any()


# Repaint


def test_repainting_keeps_the_rest_sample_for_sample(pipe):
    """Two regions, a source that is no whole number of frames; the result is as long, and so is the file."""
    source = song(9.0)[:, :-777]
    found = pipe(
        "x",
        task_type="repaint",
        src_audio=source,
        repainting_start=[2.0, 6],
        repainting_end=[4.0, 6.5],
        seed=0,
        **PARTS,
    )
    inside = np.zeros(source.shape[1], bool)
    inside[2 * RATE : 4 * RATE] = inside[6 * RATE : round(6.5 * RATE)] = True
    assert found.audios.shape == (1, *source.shape) and found.samples == (source.shape[1],)
    np.testing.assert_array_equal(found.audios[0][:, ~inside], source[:, ~inside])
    assert relative_error(found.audios[0][:, inside], source[:, inside]) > 0.05
    # No jumps at the edges: what was made comes in and goes out within 25 ms.
    for edge in (2 * RATE, 4 * RATE - 1):
        assert np.abs(found.audios[0][:, edge] - source[:, edge]).max() < 0.01


def test_repainted_files_keep_the_rest_bit_for_bit(pipe, tmp_path):
    whole = np.round(song(5.0).T * 2**15).astype(np.int16)
    soundfile.write(tmp_path / "in.wav", whole, RATE)
    made = pipe(
        "x", task_type="repaint", src_audio=tmp_path / "in.wav", repainting_start=1, repainting_end=2, seed=0, **PARTS
    )
    made.save(tmp_path / "out.wav")
    found, _ = soundfile.read(tmp_path / "out.wav", dtype="int16")
    np.testing.assert_array_equal(found[:RATE], whole[:RATE])
    np.testing.assert_array_equal(found[2 * RATE :], whole[2 * RATE :])
    assert (found[RATE : 2 * RATE] != whole[RATE : 2 * RATE]).mean() > 0.9


@pytest.mark.unit
def test_splice():
    """Made at two and a half times full scale: brought down to it. The gap of 4 samples between regions is kept."""
    source, made = np.full((1, 40), 0.5, np.float32), np.full((1, 40), 2.5, np.float32)
    mask = np.zeros(40, bool)
    mask[8:20] = mask[24:40] = True
    out = audio.splice(source, made, mask, (0, 30), 4)[0]
    np.testing.assert_array_equal(out[:8], 0.5)
    np.testing.assert_array_equal(out[20:24], 0.5)
    ramp = 0.5 + 0.5 * (np.arange(4) + 0.5) / 4
    np.testing.assert_allclose(out[8:12], ramp)
    np.testing.assert_allclose(out[16:20], ramp[::-1])
    np.testing.assert_allclose(out[24:28], ramp)
    np.testing.assert_allclose(out[28:], 1.0)  # to the end, where the source has none to fade to
    np.testing.assert_allclose(audio.splice(source, made, mask, (9, 30), 4)[0, 8], 1.0)


def test_regions_make_a_song_longer(pipe):
    """To both sides; the source stands in the middle, sample for sample."""
    source = song(4.0)
    made = pipe(
        "x", task_type="repaint", src_audio=source, repainting_start=[-2, 3.9], repainting_end=[0, 6], seed=0, **PARTS
    )
    assert made.samples == (8 * RATE,)
    np.testing.assert_array_equal(made.audios[0, :, 2 * RATE : round(5.9 * RATE)], source[:, : round(3.9 * RATE)])
    assert all(np.abs(made.audios[0, :, part]).max() > 1e-3 for part in (slice(0, RATE), slice(7 * RATE, None)))


@pytest.mark.unit
@pytest.mark.parametrize(
    "starts, ends, left, frames, regions",
    [
        ([3.0], [7.3], 0, 300, [(75, 183)]),
        ([3.01], [7.28], 0, 300, [(75, 182)]),
        ([None], [None], 0, 300, [(0, 300)]),
        ([8.5], [-1], 0, 300, [(212, 300)]),
        ([-2.01], [1.0], 51, 351, [(0, 76)]),
        ([0.28], [0.56], 0, 300, [(7, 14)]),  # on borders, where floating point is not
        ([-2], [0], 50, 350, [(0, 50)]),
        ([11], [14.5], 0, 363, [(275, 363)]),
        ([0, 5.0], [0.01, 6], 0, 300, [(0, 1), (125, 150)]),
    ],
)
def test_extent(starts, ends, left, frames, regions):
    found = tasks.extent(starts, ends, 300, 25.0, 600.0)
    assert (found.left, found.frames, list(found.regions)) == (left, frames, regions)
    mask = found.mask()
    assert mask.shape == (frames,) and mask.sum() == sum(end - start for start, end in regions)


@pytest.mark.unit
def test_hundredths_in_front_of_a_song():
    """The song is longer by whole latent frames, the first of them all new, and the region ends at the requested sample
    of the source, which begins where the added frames end."""
    for hundredths in range(1, 101):
        found = tasks.extent([-hundredths / 100], [1.0], 300, 25.0, 600.0)
        left = -(-hundredths // 4)
        assert (found.left, found.frames, found.regions) == (left, 300 + left, ((0, left + 25),))
        ((start, end),) = found.seconds
        assert start == 0 and round(end * RATE) - left * 1920 == RATE


def test_injection_puts_back_what_is_kept(pipe):
    """After the last step as well with a ratio of 1: outside of the region, the latents are the source's."""
    source = song(10.24)
    arguments = PARTS | dict(task_type="repaint", src_audio=source, repainting_start=2, repainting_end=5, seed=0)
    arguments |= dict(repaint_mode="aggressive", shift=1.0)
    latents = sources.encode_audio(pipe.vae, [source], 256)
    inside = slice(50, 125)
    seen = []
    keep = lambda i, t, x: seen.append(x)  # noqa: E731
    whole = pipe("x", output_type="latent", repaint_injection_ratio=1.0, callback_on_step_end=keep, **arguments)
    times = [*np.linspace(1, 0, 5)[1:]]
    noise = drawn([0], 256)[2]
    for x, t in zip(seen, times, strict=True):
        expected = t * noise + (1 - t) * latents
        for part in (slice(0, 50), slice(125, None)):
            assert_close(x[:, part], expected[:, part], 1e-6)
        assert relative_error(x[:, inside], expected[:, inside]) > 1e-2 or t == times[0]
    watched = dict(callback_on_step_end=lambda *_: None)  # the programs of the song before
    half = pipe("x", output_type="latent", repaint_injection_ratio=0.5, **watched, **arguments)
    free = pipe("x", output_type="latent", **arguments)
    assert relative_error(half.latents[:, :50], whole.latents[:, :50]) > 1e-3
    assert relative_error(half.latents[:, inside], free.latents[:, inside]) > 1e-4


# Covers


@pytest.mark.slow
def test_weak_covers_turn_to_text_to_music(pipe):
    """Half of four steps with the source, then those of text to music from where they got: run in two parts."""
    source = song(10.24)
    arguments = dict(task_type="cover", src_audio=source, num_inference_steps=4, shift=1.0, guidance_scale=2.0)
    arguments |= dict(guidance="cfg", output_type="latent")
    seen = []
    keep = lambda i, t, x: seen.append(x)  # noqa: E731
    switched = pipe("x", seed=0, audio_cover_strength=0.5, **arguments)
    first = pipe("x", seed=0, callback_on_step_end=keep, **arguments)
    middle = seen[1]
    text = dict(audio_duration=10.24, guidance_scale=2.0, guidance="cfg", output_type="latent")
    second = pipe("x", latents=middle, timesteps=[0.5, 0.25], **text)
    assert_close(switched.latents, second.latents)
    assert relative_error(switched.latents, first.latents) > 1e-3
    # None of the steps is text to music alone; nearly all of them is the cover.
    none = pipe("x", seed=0, audio_cover_strength=0.0, **arguments)
    assert_close(none.latents, pipe("x", seed=0, num_inference_steps=4, shift=1.0, **text).latents)


def test_covers_start_from_their_source(pipe):
    """Noise strength 0.5 of four steps: from t = 0.5 on, from source and noise in equal parts."""
    source = song(10.24)
    arguments = dict(src_audio=source, task_type="cover", guidance_scale=1.0, seed=0, output_type="latent")
    found = pipe("x", num_inference_steps=4, shift=1.0, cover_noise_strength=0.5, **arguments)
    noise = drawn([0], 256)[2]
    start = 0.5 * noise + 0.5 * sources.encode_audio(pipe.vae, [source], 256)
    arguments["latents"] = start
    del arguments["seed"]
    expected = pipe("x", timesteps=[0.5, 0.25], **arguments)
    assert_close(found.latents, expected.latents)


# Codes


def test_codes_match_diffusers(pipe, theirs):
    """Tokenize and detokenize a song whose length is no multiple of a code: all codes equal, latents to 1e-5."""
    import torch

    source = song(7.08)  # 177 frames
    with torch.no_grad():
        latents = theirs.vae.encode(torch.from_numpy(source)[None]).latent_dist.mode().transpose(1, 2)
        silence = theirs.condition_encoder.silence_latent
        quantized, indices = theirs.audio_tokenizer.tokenize(latents, silence)
        expected = theirs.audio_token_detokenizer(quantized).numpy()
    codes = pipe.song_to_codes(source)
    np.testing.assert_array_equal(codes, indices[0, :, 0].numpy())
    assert len(codes) == 36 and len(set(codes.tolist())) > 2
    text = tasks.codes_to_text(codes)
    found = sources.detokenize(pipe.networks, [tasks.codes_from_text(text, 64_000)], 180)
    assert_close(found, expected)
    audio_ = pipe.codes_to_song(text)
    assert audio_.shape == (2, 36 * 5 * HOP) and np.abs(audio_).max() == pytest.approx(10 ** (-1 / 20), rel=1e-5)


@pytest.mark.slow
def test_all_codes_survive(tiny_base):
    """Index -> the levels that it stands for -> index, for each of the 64000.

    By default `test_every_code_survives_the_round_trip` of the audio tokenizer shows it.
    """
    quantizer = AceStepPipeline.from_pretrained(tiny_base[1], networks=["audio_tokenizer"]).audio_tokenizer.quantizer
    assert quantizer.codebook_size == 64_000
    indices = jnp.arange(64_000)[:, None]
    levels = np.array(quantizer.levels)
    digits = np.asarray(indices) // np.cumprod([1, *levels[:-1]]) % levels

    class Same:
        """Projections that do nothing, so that the codes themselves come out and go in."""

        kernel, bias = jnp.eye(6), jnp.zeros(6)

    quantizer.project_in = quantizer.project_out = Same()
    vectors = quantizer.get_output_from_indices(indices)
    np.testing.assert_allclose(vectors, digits * 2 / (levels - 1) - 1, atol=1e-6)
    # What the bound makes of it must be the code again.
    bound = 1 + 1 / (levels - 1)
    _, again = quantizer(jnp.asarray(np.arctanh(np.asarray(vectors) / bound) * bound, jnp.float32))
    np.testing.assert_array_equal(again, indices)


@pytest.mark.unit
def test_codes_as_text():
    codes = [0, 63_999, 12]
    text = tasks.codes_to_text(codes)
    assert text == "<|audio_code_0|><|audio_code_63999|><|audio_code_12|>"
    np.testing.assert_array_equal(tasks.codes_from_text(f"so: {text} \n", 64_000), codes)


# Instructions


@pytest.mark.unit
@pytest.mark.parametrize("task_type", [name for name in tasks.TASKS if name != "cover-nofsq"])
def test_instructions_match_diffusers(task_type):
    theirs = pytest.importorskip("diffusers").AceStepPipeline._get_task_instruction
    assert tasks.instruction(task_type) == theirs(task_type)
    if task_type in ("extract", "lego"):
        assert tasks.instruction(task_type, ["fx"]) == theirs(task_type, track_name="fx")
    if task_type == "complete":
        names = list(tasks.TRACKS)
        assert tasks.instruction(task_type, names) == theirs(task_type, complete_track_classes=names)


def test_turbo_models_warn(tiny, caplog):
    turbo = AceStepPipeline.from_checkpoint(tiny[1])
    turbo.prepare(Request("x", task_type="repaint", src_audio=song(2.0)))
    assert "turbo models were not trained" not in caplog.text
    turbo.prepare(Request("x", task_type="extract", src_audio=song(2.0)))
    assert "task_type extract: turbo models were not trained for it" in caplog.text


def test_files_of_other_rates_and_one_channel(pipe, tmp_path):
    """Resampled, and both channels the same."""
    t = np.arange(2 * 22_050) / 22_050
    soundfile.write(tmp_path / "mono.flac", 0.5 * np.sin(2 * np.pi * 440 * t), 22_050)
    found = pipe.prepare(Request("x", task_type="extract", src_audio=tmp_path / "mono.flac"))
    assert found.source.shape == (2, 2 * RATE) and found.samples == 2 * RATE
    np.testing.assert_array_equal(found.source[0], found.source[1])
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)
    assert np.abs(found.source[0] - expected)[100:-100].max() < 1e-3


REPAINT = dict(task_type="repaint", src_audio=song(2.0))
BAD = {
    "task_type: expected one of text2music, repaint, cover, cover-nofsq, extract, lego, complete, found 'remix'": dict(
        task_type="remix"
    ),
    "audio_duration: expected a number, found 'abc'": dict(audio_duration="abc"),
    "prompt: expected text, found 5": dict(prompt=5),
    "lyrics: expected text, found None": dict(lyrics=None),
    "bpm: expected 30 to 300 beats per minute, found '12O'": dict(bpm="12O"),
    "audio_codes: expected text, found 5": dict(audio_codes=5),
    "num_inference_steps: expected a whole number, found 8.0": dict(num_inference_steps=8.0),
    "guidance_scale: expected a number, found '7'": dict(guidance_scale="7"),
    "timesteps: expected a list of numbers, found 'abc'": dict(timesteps="abc"),
    "complete_track_classes: expected a list of texts, found 'vocals'": dict(
        task_type="complete", src_audio=song(2.0), complete_track_classes="vocals"
    ),
    "repainting_start: expected a number, found '1'": REPAINT | dict(repainting_start="1"),
    "repainting_start, repainting_end: expected as many of both, found 0 and 0": REPAINT
    | dict(repainting_start=[], repainting_end=[]),
    "repainting_start: expected at most the song's end, 2 s, found 5 s": REPAINT
    | dict(repainting_start=5, repainting_end=6),
    "repainting_end: expected 0 s or later, where the song begins, or -1 for its end, found -5 s": REPAINT
    | dict(repainting_start=-20, repainting_end=-5),
    "src_audio: expected a file or an array of floating-point samples, found int16": REPAINT
    | dict(src_audio=np.ones((2, RATE), np.int16)),
    "unknown track 'kazoo'": dict(
        task_type="extract", src_audio=song(2.0), track_name="kazoo", instruction="take the kazoo:"
    ),
    "expected a start before the end, found 5 and 4 s": REPAINT | dict(repainting_start=5, repainting_end=4),
    r"repainting_start: expected a finite number \(s\), found nan": REPAINT | dict(repainting_start=float("nan")),
    "with these the song is 601 s long, expected at most 600 s": REPAINT | dict(repainting_end=601),
    "with these the song is 602 s long": REPAINT | dict(repainting_start=-600, repainting_end=0),
    "expected as many of both, found 2 and 1": REPAINT | dict(repainting_start=[0, 1], repainting_end=[2]),
    "repainting_start: the task cover does not take it; leave it out, or set task_type to repaint or lego": dict(
        task_type="cover", src_audio=song(2.0), repainting_start=1
    ),
    "src_audio: expected 1 to 600 s of music, found 0.5 s": REPAINT | dict(src_audio=song(0.5)),
    r"src_audio: expected an array \[1 or 2 channels, samples\] at 48000 Hz, or a file, found shape \[96000, 2\]": (
        REPAINT | dict(src_audio=song(2.0).T)
    ),
    "src_audio: holds NaN": REPAINT | dict(src_audio=np.full((2, RATE), np.nan, np.float32)),
    "src_audio: the task repaint needs a source; give a file or an array": dict(task_type="repaint"),
    "src_audio: the task text2music does not take it; leave it out, or set task_type to repaint or cover or "
    "cover-nofsq or extract or lego or complete, or edit it with flow_edit_morph=True": dict(src_audio=song(2.0)),
    r"reference_audio: expected an array .* found shape \[3, 48000\]": dict(reference_audio=np.ones((3, RATE))),
    "audio_codes: expected codes from 0 to 63999, found 64000": dict(audio_codes="<|audio_code_64000|>"),
    "audio_codes: expected codes from 0 to 63999, found -1": dict(audio_codes="<|audio_code_-1|>"),
    "audio_codes: expected <|audio_code_N|> one after the other, found none in 'la la'": dict(audio_codes="la la"),
    "audio_codes: expected 1 to 600 s of music, found 0.2 s": dict(audio_codes="<|audio_code_1|>"),
    "audio_codes, src_audio: expected one of them": dict(task_type="cover", audio_codes=CODES, src_audio=song(2.0)),
    "audio_codes: the task repaint does not take it": REPAINT | dict(audio_codes=CODES, src_audio=None),
    "unknown track 'voice'; expected one of woodwinds, brass": dict(
        task_type="extract", src_audio=song(2.0), track_name="voice"
    ),
    "track_name: the task repaint does not take it": REPAINT | dict(track_name="drums"),
    "complete_track_classes: the task lego does not take it; leave it out, or set task_type to complete": dict(
        task_type="lego", src_audio=song(2.0), complete_track_classes=["drums"]
    ),
    "track_name: the task lego takes one track, found drums, bass": dict(
        task_type="lego", src_audio=song(2.0), track_name=["drums", "bass"]
    ),
    "audio_cover_strength: expected 0 to 1, found 1.5": dict(
        task_type="cover", src_audio=song(2.0), audio_cover_strength=1.5
    ),
    "audio_cover_strength: the task text2music does not take it": dict(audio_cover_strength=0.5),
    "cover_noise_strength: the task text2music does not take it": dict(cover_noise_strength=0.5),
    "cover_noise_strength: expected 0 to 1, found 2": dict(cover_noise_strength=2),
    "repaint_injection_ratio: expected 0 to 1, found -1": REPAINT | dict(repaint_injection_ratio=-1),
    "solver: expected one of euler, heun, ab2, ab3, sde, sde_linear, found 'dpm'": dict(solver="dpm"),
    "guidance: expected one of apg, adg, cfg, found 'none'": dict(guidance="none"),
    "cover_mode: expected one of switch, blend": dict(cover_mode="mix"),
    "cfg_interval_in: expected one of t, progress": dict(cfg_interval_in="x"),
    "noise: expected jax, torch or torch:GPU, found 'cuda'": dict(noise="cuda"),
    "noise: PyTorch's noise needs a number": dict(noise="torch", seed=jax.random.key(0)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(pipe, message):
    with pytest.raises(InputError, match=message.replace("<|audio_code_N|>", r"<\|audio_code_N\|>")):
        pipe(**dict(prompt="x") | BAD[message])


def test_bad_files(pipe, tmp_path):
    (tmp_path / "noise.wav").write_bytes(b"RIFF nothing")
    for name, error in (("src_audio", dict(task_type="cover")), ("reference_audio", {})):
        with pytest.raises(InputError, match="noise.wav: not a sound file"):
            pipe("x", **{name: tmp_path / "noise.wav"}, **error)
        with pytest.raises(FileNotFoundError):
            pipe("x", **{name: tmp_path / "none.wav"}, **error)
    soundfile.write(tmp_path / "short.wav", np.zeros((4800, 2)), RATE)
    with pytest.raises(InputError, match="short.wav: expected 1 to 600 s of music, found 0.1 s"):
        pipe("x", task_type="cover", src_audio=tmp_path / "short.wav")


def test_covers_need_the_audio_tokenizer(pipe):
    networks = {name: getattr(pipe, name) for name in "transformer condition_encoder text_encoder vae".split()}
    without = AceStepPipeline(**networks, tokenizer=pipe.tokenizer)
    with pytest.raises(InputError, match="cover needs the audio tokenizer, which this checkpoint lacks"):
        without("x", task_type="cover", src_audio=song(2.0))
    with pytest.raises(InputError, match="has no audio tokenizer"):
        without.song_to_codes(song(2.0))


def test_a_request_has_its_own_settings(pipe):
    with pytest.raises(InputError, match="lyrics: prompt 0 is a Request, which has its own; set it there"):
        pipe(Request("x"), lyrics="la")
    with pytest.raises(InputError, match="bpm: prompt 1 is a Request"):
        pipe(["y", Request("x")], bpm=90)
    fields = {field.name for kind in KINDS for field in dataclasses.fields(kind)}
    assert fields < set(inspect.signature(AceStepPipeline.__call__).parameters)


def test_noise_of_torch(pipe):
    """As much as the song needs, not its bucket; the network's dtype rounds it."""
    seeds, _, noise = drawn([0], 300, kind="torch")
    np.testing.assert_allclose(noise[0, 0, :4], [-0.92466259, -0.42534414, -2.64384580, 0.14518388], atol=2e-6)
    assert seeds == [0] and noise.shape == (1, BUCKETS.frames_of(300), CHANNELS) and not noise[:, 300:].any()
    arguments = dict(audio_duration=10, output_type="latent", num_inference_steps=1, guidance_scale=1.0)
    found = pipe("x", seed=0, noise="torch", **arguments)
    given = pipe("x", latents=drawn([0], 250, kind="torch")[2][:, :250], **arguments)
    assert_close(found.latents, given.latents, 1e-6)
    half = dict(channels=64, kind="torch", dtype="bfloat16")
    rounded = drawn([0], 640, **half)[2]  # 25.6 s, the longest for any GPU
    np.testing.assert_array_equal(rounded, rounded.astype(jnp.bfloat16).astype(np.float32))
    np.testing.assert_allclose(rounded[0, 0, :4], noise[0, 0, :4], rtol=0.004)
    with pytest.raises(InputError, match="depend on the GPU; name it"):
        drawn([0], 641, **half)


# By default sde is in `tests/test_golden.py`, ab3 in `test_further_evaluations_are_guided`.
@pytest.mark.slow
@pytest.mark.parametrize("solver", ["ab3", "sde"])
def test_solvers_in_the_pipeline(pipe, solver):
    """Against the solver with the network itself, called at every step on its own."""
    request = Request("x", seed=3, audio_duration=10.24)
    arguments = dict(solver=solver, num_inference_steps=4, shift=2.0, guidance_scale=1.0, output_type="latent")
    found = pipe(request, **arguments)
    job = pipe.prepare(request)
    texts = [pad_tokens([ids], 1, 0) for ids in (job.prompt_ids, job.lyric_ids)]
    timbres, owners = programs.encode_timbres(pipe.condition_encoder), np.zeros(1, np.int32)
    condition, _ = programs.encode(pipe.text_encoder, pipe.condition_encoder, *texts, timbres, owners)
    silence = pipe.condition_encoder.silence(256)
    context = jnp.concatenate([silence, jnp.ones_like(silence)], -1)
    times = jnp.asarray(schedule(4, 2.0))
    _, keys, noise = drawn([3], 256)

    @jax.jit
    def solve(transformer, noise):
        velocity = lambda x, i, m: (transformer(x, times[i][None], times[i][None], condition, context), m)  # noqa: E731
        return integrate(velocity, noise, times, solver=solver, keys=keys)

    assert_close(found.latents, solve(pipe.transformer, noise))


def test_noisy_solvers_make_a_song_again(pipe):
    """From given noise and the seed that the first song came with."""
    arguments = dict(solver="sde", num_inference_steps=4, guidance_scale=1.0, output_type="latent", audio_duration=10)
    first = pipe("x", latents=normal(1, 250, CHANNELS), **arguments)
    again = pipe("x", latents=normal(1, 250, CHANNELS), seed=first.seeds[0], **arguments)
    np.testing.assert_array_equal(first.latents, again.latents)
    other = pipe("x", latents=normal(1, 250, CHANNELS), seed=first.seeds[0] ^ 1, **arguments)
    assert relative_error(other.latents, first.latents) > 1e-3


# ADG is in `tests/test_golden.py`, by default too.
@pytest.mark.parametrize("guidance", [pytest.param("adg", marks=pytest.mark.slow), "cfg"])
def test_guidance_rules_in_the_pipeline(pipe, guidance):
    """One step from pure noise, against the rule on the two velocities."""
    arguments = dict(audio_duration=10.24, output_type="latent", num_inference_steps=1, seed=3)
    noise = drawn([3], 256)[2]
    apart = {}
    for scale in (1.0, 3.0):
        apart[scale] = noise - pipe("x", guidance="cfg", guidance_scale=scale, **arguments).latents
    cond, null = apart[1.0], (3 * apart[1.0] - apart[3.0]) / 2
    v, _ = GUIDANCE[guidance](Guided(cond, null, noise, np.float32(1.0), np.zeros_like(cond)), np.float32(5.0))
    found = noise - pipe("x", guidance=guidance, guidance_scale=5.0, **arguments).latents
    assert_close(found, v, 1e-4)
    outside = pipe("x", guidance=guidance, guidance_scale=5.0, cfg_interval_end=0.9, **arguments)
    assert_close(noise - outside.latents, cond)


def test_program_count(pipe):
    """Strengths, regions, sources and references are data."""
    arguments = dict(num_inference_steps=2, output_type="latent", guidance_scale=1.0, seed=0)
    one = dict(task_type="cover", src_audio=song(4.0), audio_cover_strength=0.3)
    two = dict(task_type="cover", src_audio=song(5.0, 1), audio_cover_strength=0.9)
    pipe("x", **one, **arguments)
    before = denoise.denoise._cache_size(), programs.encode_audio._cache_size(), programs.tokenize._cache_size()
    pipe("y", **two, **arguments)
    assert (
        denoise.denoise._cache_size(),
        programs.encode_audio._cache_size(),
        programs.tokenize._cache_size(),
    ) == before
