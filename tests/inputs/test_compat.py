"""What differs between implementations, in the pipeline: each switch against what it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax import AceStepPipeline, InputError, Request, Sampling
from acestep_jax.diffusion import dcw
from acestep_jax.inputs import sources
from acestep_jax.inputs.prompt import stems_caption
from tests.noise import drawn
from tests.parity import DIFFUSERS, assert_close, normal, relative_error

RATE, FRAMES, CHANNELS = 48_000, 256, 8
SONG = dict(audio_duration=10.24, seed=3, output_type="latent", guidance_scale=1.0)
WAVE = (0.1 * normal(2, FRAMES * 1920)).astype(np.float32)
SOURCE = dict(src_audio=WAVE, seed=3, output_type="latent", guidance_scale=1.0, num_inference_steps=2)


@pytest.fixture(scope="module")
def pipe(tiny_base):
    return AceStepPipeline.from_checkpoint(tiny_base[1])


def text_of(pipe, ids):
    return pipe.tokenizer.decode(list(ids), skip_special_tokens=False)


# While a song is made


def first_step(pipe, **arguments):
    """The latents after the first of two steps."""
    seen = []
    pipe("x", num_inference_steps=2, callback_on_step_end=lambda i, t, x: seen.append(x), **SONG, **arguments)
    return seen[0]


# The solvers differ in how often they evaluate and whether they add noise; by default one of each kind.
@pytest.mark.parametrize(
    "solver",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("euler", "heun", "ab2", "sde_linear")), "sde"],
)
def test_dcw_corrects_every_solver(pipe, solver):
    """By what a single step from the noise predicts of the end."""
    x0 = pipe("x", num_inference_steps=1, **SONG).latents
    plain = first_step(pipe, solver=solver)
    arguments = dict(dcw_mode="double", dcw_scaler=0.3, dcw_high_scaler=0.2)
    times = np.float32([1.0, 0.75, 0.0])  # two steps with the default shift of 3
    scales = jnp.asarray(dcw.scales("double", times, 0.3, 0.2)[0])
    found = first_step(pipe, solver=solver, dcw_enabled=True, **arguments)
    assert_close(found, dcw.correct(jnp.asarray(plain), jnp.asarray(x0), scales), 1e-5)
    assert relative_error(found, plain) > 1e-3


@pytest.mark.parametrize(
    "solver, guidance, further",
    [
        pytest.param("heun", "adg", "adg", marks=pytest.mark.slow),
        pytest.param("heun", "apg", "cfg", marks=pytest.mark.slow),
        pytest.param("ab3", "adg", "adg", marks=pytest.mark.slow),
        ("ab3", "apg", "cfg"),
    ],
)
def test_further_evaluations_are_guided(pipe, solver, guidance, further):
    """As requested; APG's momentum moves once in a step, so its further evaluation is plain CFG. Each velocity comes of
    a single step from where it is evaluated to t = 0."""
    arguments = SONG | dict(guidance_scale=3.0)
    noise = drawn([3], FRAMES)[2]
    v = noise - pipe("x", num_inference_steps=1, guidance=guidance, **arguments).latents
    ahead = noise - 0.25 * v  # at t = 0.75, where the first of two steps with a shift of 3 ends
    end = pipe("x", timesteps=[0.75], latents=ahead, guidance=further, **arguments).latents
    expected = noise - 0.25 * (v + (ahead - end) / 0.75) / 2
    seen = []
    keep = lambda i, t, x: seen.append(x)  # noqa: E731
    last = pipe("x", num_inference_steps=2, solver=solver, guidance=guidance, callback_on_step_end=keep, **arguments)
    assert_close(seen[0], expected, 1e-4)
    assert np.isfinite(last.latents).all()  # ADG is not defined at t = 0


def test_velocities_are_bounded(pipe):
    """In a single step from the noise x, v = x - x0 is scaled to the norm of x times the threshold, if above it."""
    noise = drawn([3], FRAMES)[2]
    v = noise - pipe("x", num_inference_steps=1, **SONG).latents
    ratio = np.linalg.norm(v) / np.linalg.norm(noise)
    for threshold in (0.5 * ratio, 2 * ratio):
        found = noise - pipe("x", num_inference_steps=1, velocity_norm_threshold=float(threshold), **SONG).latents
        assert_close(found, v * min(1, threshold / ratio), 1e-5)


def test_latents_are_rescaled_and_shifted(pipe):
    plain = pipe("x", num_inference_steps=1, **SONG).latents
    found = pipe("x", num_inference_steps=1, latent_rescale=0.5, latent_shift=0.1, **SONG).latents
    assert_close(found, 0.5 * plain + 0.1, 1e-6)


@pytest.mark.slow
def test_chunk_masks(pipe):
    """Auto is 2 everywhere: where all is generated it differs from 1, and in regions from 1 and 0.

    By default cases 17, 19 and 25 of `tests/test_golden.py` show it.
    """
    for task in (dict(task_type="complete"), dict(task_type="repaint", repainting_start=2, repainting_end=5)):
        explicit = pipe("x", **SOURCE, **task).latents
        np.testing.assert_array_equal(pipe("x", chunk_mask_mode="explicit", **SOURCE, **task).latents, explicit)
        assert relative_error(pipe("x", chunk_mask_mode="auto", **SOURCE, **task).latents, explicit) > 1e-3


def test_variations_are_made_again(pipe):
    """With the seed of the second noise, which each song of a batch has of its own, and alone."""
    arguments = SONG | dict(num_inference_steps=1)
    plain = pipe("x", **arguments)
    first, second = pipe(["x", "x"], retake_variance=0.3, **arguments | dict(seed=[3, 3]))
    assert plain.retake_seed is None and first.retake_seed != second.retake_seed
    again = pipe("x", retake_variance=0.3, retake_seed=second.retake_seed, **arguments)
    assert again.retake_seed == second.retake_seed
    assert_close(again.latents[0], second.latents, 1e-5)
    assert min(relative_error(one.latents, plain.latents[0]) for one in (first, second)) > 1e-2


# Regions


def test_repaint_modes(pipe):
    """Conservative leaves the source's latents a second away from the region; aggressive mends nothing."""
    latents = sources.encode_audio(pipe.vae, [WAVE], FRAMES)
    region = dict(task_type="repaint", repainting_start=4, repainting_end=6)
    outside = np.r_[: 100 - 25, 150 + 25 : FRAMES]
    made = {mode: pipe("x", repaint_mode=mode, **SOURCE, **region).latents for mode in ("conservative", "aggressive")}
    assert_close(made["conservative"][:, outside], latents[:, outside], 1e-5)
    assert relative_error(made["aggressive"][:, outside], latents[:, outside]) > 1e-2
    assert relative_error(made["conservative"][:, 100:150], latents[:, 100:150]) > 1e-2
    strength = dict(repaint_mode="balanced", repaint_strength=0.0)
    assert_close(pipe("x", **strength, **SOURCE, **region).latents, made["conservative"], 1e-6)
    assert_close(pipe("x", **strength | dict(repaint_strength=1.0), **SOURCE, **region).latents, made["aggressive"])


def test_lego_in_a_region_keeps_the_rest(pipe):
    """Sample for sample, as repaint; not as diffusers, and not where it is everywhere."""
    arguments = SOURCE | dict(task_type="lego", track_name="bass", output_type="np")
    inside = np.zeros(WAVE.shape[1], bool)
    inside[2 * RATE : 5 * RATE] = True
    part = dict(repainting_start=2, repainting_end=5)
    found = pipe("x", **arguments, **part).audios[0]
    np.testing.assert_array_equal(found[:, ~inside], WAVE[:, ~inside])
    assert relative_error(found[:, inside], WAVE[:, inside]) > 0.05
    theirs = pipe("x", **DIFFUSERS, **arguments, **part).audios[0]
    whole = pipe("x", **arguments).audios[0]
    for other in (theirs, whole):
        assert np.abs(other).max() == pytest.approx(10 ** (-1 / 20), rel=1e-5)
        assert relative_error(other[:, ~inside], WAVE[:, ~inside]) > 0.05


# Covers and FlowEdit


def test_covers_without_the_tokenizer(pipe):
    """The source's own latents, as complete has them, under the instruction of a cover; no tokenizer is needed."""
    cover = dict(instruction="Generate audio semantic tokens based on the given conditions:")
    found = pipe("x", task_type="cover-nofsq", **SOURCE).latents
    assert_close(found, pipe("x", task_type="complete", **SOURCE, **cover).latents, 1e-6)
    assert relative_error(found, pipe("x", task_type="cover", **SOURCE).latents) > 1e-3
    networks = {name: network for name, network in pipe.networks.items() if not name.startswith("audio_token")}
    without = AceStepPipeline(**networks, tokenizer=pipe.tokenizer)
    assert_close(without("x", task_type="cover-nofsq", **SOURCE).latents, found, 1e-6)


@pytest.mark.slow
def test_covers_switch_between_the_steps_of_heun(pipe):
    """The second evaluation of a step is the cover's, too, though it is made at the time at which the cover ends."""
    cover = SOURCE | dict(task_type="cover-nofsq", solver="heun")
    seen = {}
    songs = {
        strength: pipe(
            "x",
            audio_cover_strength=strength,
            callback_on_step_end=lambda i, t, x, s=strength: seen.setdefault(s, []).append(x),
            **cover,
        ).latents
        for strength in (0.5, 1.0)
    }
    assert_close(seen[0.5][0], seen[1.0][0], 1e-6)
    # The second of two steps with a shift of 3.
    rest = pipe("x", timesteps=[0.75], latents=seen[0.5][0], solver="heun", **SONG).latents
    assert_close(songs[0.5], rest, 1e-5)
    assert relative_error(songs[0.5], songs[1.0]) > 1e-3


EDIT = dict(flow_edit_morph=True, flow_edit_source_caption="piano", flow_edit_source_lyrics="la")


# The task changes the context alone; cover's has the most parts.
@pytest.mark.parametrize(
    "task", [*(pytest.param(t, marks=pytest.mark.slow) for t in ("text2music", "cover-nofsq")), "cover"]
)
def test_editing_towards_the_same_text_leaves_the_source(pipe, task):
    latents = sources.encode_audio(pipe.vae, [WAVE], FRAMES)
    arguments = SOURCE | EDIT | dict(task_type=task, guidance_scale=3.0)
    assert_close(pipe("piano", lyrics="la", **arguments).latents, latents, 1e-5)
    assert relative_error(pipe("brass", lyrics="oh", **arguments).latents, latents) > 1e-3


@pytest.mark.slow
def test_edits_that_end_before_they_begin_are_text_to_music(pipe):
    """From the noise of the first step, with the whole source at t = 0 in it: nothing of it is left at t = 1."""
    window = dict(flow_edit_n_max=0.0)
    found = pipe("brass", **SOURCE | EDIT | window)
    keys = drawn([3], FRAMES)[1]
    fold = jax.vmap(jax.random.fold_in, (0, None))
    noise = jax.vmap(lambda key: jax.random.normal(key, (FRAMES, CHANNELS)))(fold(fold(keys, 0), 0))
    text = dict(audio_duration=10.24, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    assert_close(found.latents, pipe("brass", latents=np.asarray(noise), **text).latents, 1e-5)


# What the encoders are told


def test_samples_of_the_posterior(pipe):
    """Another for each seed, and near the mean."""
    arguments = SOURCE | dict(task_type="complete", num_inference_steps=1)
    mean = pipe("x", **arguments).latents
    first, again = (pipe("x", posterior="sample", **arguments).latents for _ in range(2))
    np.testing.assert_array_equal(first, again)
    noise = drawn([3], FRAMES)[2]
    other = pipe("x", posterior="sample", latents=noise, **arguments | dict(seed=4)).latents
    assert min(relative_error(first, mean), relative_error(other, first)) > 1e-5


def test_defaults_of_a_request(pipe):
    for compat, frames, language in (("ace-step", 3000, "unknown"), ("diffusers", 1500, "en")):
        job = pipe.prepare(Request("x"), Sampling(compat=compat))
        assert job.frames == frames and f"# Languages\n{language}\n" in text_of(pipe, job.lyric_ids)
    own = AceStepPipeline(**pipe.networks, tokenizer=pipe.tokenizer, sampling_defaults=dict(vocal_language="en"))
    assert "# Languages\nen\n" in text_of(pipe, own.prepare(Request("x")).lyric_ids)


@pytest.mark.parametrize("compat, seconds", [("ace-step", 10), ("diffusers", 14)])
def test_texts_of_longer_songs(pipe, compat, seconds):
    """The authors' application says how long the source is, not the song."""
    request = Request("x", task_type="repaint", src_audio=WAVE, repainting_start=10, repainting_end=14)
    assert f"- duration: {seconds} seconds" in text_of(pipe, pipe.prepare(request, Sampling(compat=compat)).prompt_ids)


def test_captions_of_models_fine_tuned_on_stems(pipe):
    """The track's caption, the song's, and whether the mask is to be taken as it is; not where text2music follows."""
    config = dataclasses.replace(pipe.transformer.config, is_lego_sft=True)
    stems = AceStepPipeline(**pipe.networks, tokenizer=pipe.tokenizer)
    stems.transformer = type("Transformer", (), dict(config=config))()
    request = Request("bass line", global_caption="a slow waltz", task_type="lego", track_name="bass", src_audio=WAVE)
    for sampling, told in ((Sampling(), "false"), (Sampling(chunk_mask_mode="explicit"), "true")):
        job = stems.prepare(request, sampling)
        expected = f"# Caption\nGlobal: a slow waltz\nLocal: bass line\nMask Control: {told}\n\n# Metas"
        assert expected in text_of(pipe, job.prompt_ids)
        assert "# Caption\nbass line\n\n" in text_of(pipe, job.plain_ids)
    segment = stems_caption("bass", "waltz", "Generate a segment of the BASS track:", explicit=True)
    assert segment == "Local: bass\nMask Control: true"
    with pytest.raises(InputError, match="global_caption: only for models fine-tuned on stems"):
        pipe.prepare(request)


def test_jobs_of_another_compat_warn(pipe, caplog):
    job = pipe.prepare(Request("x", audio_duration=10.24, seed=3))
    pipe.run([job], Sampling(num_inference_steps=1, guidance_scale=1.0), output_type="latent")
    assert "compat" not in caplog.text
    sampling = Sampling(num_inference_steps=1, guidance_scale=1.0, compat="diffusers", attend_to_padding=False)
    pipe.run([job], sampling, output_type="latent")
    assert "compat: a song was prepared with ace-step and is sampled with diffusers" in caplog.text


BAD = {
    "flow_edit_source_caption: missing; describe the source": dict(src_audio=WAVE, flow_edit_morph=True),
    "flow_edit_source_caption: has an effect only with flow_edit_morph=True": dict(flow_edit_source_caption="x"),
    "src_audio: the task text2music needs a source": EDIT,
    "flow_edit_morph: the task repaint does not take it": EDIT | dict(task_type="repaint", src_audio=WAVE),
    "solver: expected euler with flow_edit_morph, found heun": EDIT | dict(src_audio=WAVE, solver="heun"),
    "dcw_enabled: expected False with flow_edit_morph": EDIT | dict(src_audio=WAVE, dcw_enabled=True),
    "retake_variance: with flow_edit_morph the noise is drawn from the seed": EDIT
    | dict(src_audio=WAVE, retake_variance=0.5),
    "audio_cover_strength: expected 1 with flow_edit_morph": EDIT
    | dict(src_audio=WAVE, task_type="cover", audio_cover_strength=0.5),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_requests(pipe, message):
    with pytest.raises(InputError, match=message):
        pipe("x", **BAD[message])
