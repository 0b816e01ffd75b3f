"""The whole pipeline against diffusers', and what its users rely on."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import torch
from diffusers import AceStepPipeline as TorchPipeline

from acestep_jax import AceStepPipeline, InputError, Request, make_mesh
from acestep_jax.diffusion import denoise
from acestep_jax.diffusion.guidance import GUIDANCE
from acestep_jax.diffusion.schedule import schedule
from acestep_jax.diffusion.solvers import SOLVERS
from acestep_jax.errors import Cancelled
from acestep_jax.inputs import programs
from acestep_jax.inputs.keywords import requests_of
from acestep_jax.io import checkpoint
from acestep_jax.io.adapter import Adapter, save_adapter
from acestep_jax.models.config import LoRAConfig
from acestep_jax.request import Sampling
from tests.adapters import ATTENTION, CONFIG, random_adapter
from tests.noise import drawn
from tests.parity import DIFFUSERS, assert_close, normal, relative_error

SONG = dict(lyrics="[verse]\nla la la\n[chorus]\nhello", audio_duration=10.0, bpm=90, keyscale="C major")
FRAMES, CHANNELS = 250, 8


@pytest.fixture(scope="module")
def pipe(tiny):
    return AceStepPipeline.from_checkpoint(tiny[1])


@pytest.fixture(scope="module")
def base_pipe(tiny_base):
    return AceStepPipeline.from_checkpoint(tiny_base[1])


def torch_song(folder, prompt, noise, **arguments):
    """diffusers' latents and audio for the same noise."""
    theirs = TorchPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    kept = {}

    def keep(_, step, time, tensors):
        kept["latents"] = tensors["latents"]

    out = theirs(prompt, latents=torch.from_numpy(noise), output_type="np", callback_on_step_end=keep, **arguments)
    return kept["latents"].numpy(), out.audios


def assert_same_song(song, reference):
    latents, audio = reference
    assert song.latents.dtype == song.audios.dtype == np.float32
    assert_close(song.latents, latents, 1e-4)
    assert_close(song.audios, audio, 1e-3)


def test_turbo_matches_diffusers(tiny, pipe):
    """Eight steps with shift 3 are the defaults of both; the duration gives an odd number of frames."""
    noise = normal(1, 257, CHANNELS)
    arguments = SONG | dict(audio_duration=10.25, vocal_language="de", timesignature="3")
    reference = torch_song(tiny[0], "lofi piano", noise, guidance_scale=1.0, **arguments)
    assert_same_song(pipe("lofi piano", latents=noise, **DIFFUSERS, **arguments), reference)


GUIDED = {
    "all_steps": {},
    "interval": dict(cfg_interval_start=0.2, cfg_interval_end=0.5, cfg_interval_in="progress"),
    "timesteps": dict(timesteps=[1.0, 0.7, 0.5, 0.1]),
}


# "timesteps" is guided at all steps, too; where guidance acts is data, see `tests/inputs/test_buckets.py`.
@pytest.mark.parametrize(
    "case", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("all_steps", "interval")), "timesteps"]
)
def test_guidance_matches_diffusers(tiny_base, base_pipe, case):
    noise = normal(1, FRAMES, CHANNELS)
    arguments = SONG | dict(num_inference_steps=10, guidance_scale=5.0, shift=2.0) | GUIDED[case]
    theirs = {name: value for name, value in arguments.items() if name != "cfg_interval_in"}
    reference = torch_song(tiny_base[0], "techno", noise, **theirs)
    assert_same_song(base_pipe("techno", latents=noise, **DIFFUSERS, **arguments), reference)
    if case == "interval":
        everywhere = torch_song(tiny_base[0], "techno", noise, **theirs | dict(cfg_interval_end=1.0))
        assert relative_error(everywhere[0], reference[0]) > 0.01


@pytest.mark.slow
def test_batch_matches_diffusers(tiny, pipe):
    """Prompts of one length, so that diffusers has no padding to attend to.

    By default `test_a_ragged_batch_matches_diffusers` of the tasks shows it.
    """
    noise = normal(2, FRAMES, CHANNELS)
    prompts, arguments = ["slow jazz", "fast funk"], SONG | dict(lyrics=["one", "two"])
    reference = torch_song(tiny[0], prompts, noise, guidance_scale=1.0, **arguments)
    assert_same_song(pipe(prompts, latents=noise, **DIFFUSERS, **arguments), reference)


def test_defaults_are_the_variants(pipe, base_pipe, monkeypatch):
    seen = []

    def instead(transformer, condition_encoder, inputs, *, method):
        seen.append((inputs.times, float(inputs.guidance_scale), method.guidance))
        return jnp.asarray(inputs.x)

    monkeypatch.setattr(denoise, "denoise", instead)
    for model in (pipe, base_pipe):
        model("x", audio_duration=10, output_type="latent")
    (turbo_times, _, turbo_guided), (base_times, base_scale, base_guided) = seen
    np.testing.assert_allclose(turbo_times[:8], [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3], atol=1e-6)
    assert len(turbo_times) == 9 and turbo_guided is None
    np.testing.assert_allclose(base_times, schedule(32, 3.0), atol=1e-6)
    assert base_guided == "apg" and base_scale == 7.0


@pytest.mark.slow
def test_same_seed_alone_or_in_a_batch(pipe):
    """Other prompts of other lengths in the batch change nothing; song i of seed s has seed s + i.

    By default `test_songs_at_once_are_the_songs` of the tasks shows it.
    """
    alone = pipe("piano", seed=8, **SONG)
    prompts = ["a very long prompt, of several instruments and many moods, that needs more padding" * 2, "piano"]
    lyrics = ["", SONG["lyrics"]]
    batch = pipe(prompts, seed=7, **SONG | dict(lyrics=lyrics))
    assert batch.seeds == (7, 8) and alone.seeds == (8,)
    assert_close(batch.audios[1:], alone.audios)
    assert relative_error(batch.audios[:1], alone.audios) > 0.1


@pytest.mark.parametrize(
    "axes", [dict(data=2, tensor=2, sequence=2), pytest.param(dict(fsdp=4, tensor=2), marks=pytest.mark.slow)]
)
def test_same_seed_on_one_device_or_eight(tiny_base, base_pipe, axes):
    """Guided, with a number of tokens that divides by the mesh and an audio that is decoded in tiles.

    Three songs, to which the mesh adds a fourth, and which alone are returned.
    """
    prompts = ["piano", "drums", "bass"]
    arguments = SONG | dict(audio_duration=20.8, num_inference_steps=2)
    one = base_pipe(prompts, seed=3, **arguments)
    mesh = make_mesh(**axes)
    sharded = AceStepPipeline.from_checkpoint(tiny_base[1], mesh=mesh)
    kernel = sharded.transformer.layers.mlp.up_proj.kernel[...]
    assert kernel.sharding.mesh == mesh and len(kernel.sharding.device_set) == 8
    eight = sharded(prompts, seed=3, **arguments)
    assert len(eight) == 3 and eight.seeds == (3, 4, 5)
    assert_close(eight.audios, one.audios)
    given = jax.device_put(one.latents, jax.devices()[1])  # committed to a device of its own
    assert sharded(prompts, latents=given, output_type="latent", **arguments).latents.shape == (3, 520, 8)


def test_seeds_and_keys():
    def noise(prompt, frames=5, seed=None):
        requests, *_ = requests_of(dict(prompt=list(prompt), seed=seed))
        seeds, _, x = drawn([request.seed for request in requests], frames)
        return tuple(seeds), x[:, :frames]

    seeds, two = noise("ab", seed=[4, 4])
    assert seeds == (4, 4)
    np.testing.assert_array_equal(two[0], two[1])
    _, one = noise("a", seed=4)
    np.testing.assert_array_equal(one[0], two[0])
    _, key = noise("a", seed=jax.random.key(4)[None])
    np.testing.assert_array_equal(key, one)
    assert noise("ab", seed=np.int64(4))[0] == noise("ab", seed=jnp.int32(4))[0] == (4, 5)
    fresh, other = noise("a"), noise("a")
    assert fresh[0] != other[0] and relative_error(fresh[1], other[1]) > 0.1
    _, longer = noise("a", frames=300, seed=4)
    np.testing.assert_array_equal(longer[:, :5], one)


def test_steps_are_reported(pipe):
    """In order, with the times of the schedule and the latents after the step."""
    steps = []
    song = pipe("piano", seed=0, callback_on_step_end=lambda *step: steps.append(step), **SONG)
    assert [i for i, _, _ in steps] == list(range(8))
    assert steps[0][1] == 1.0 and steps[-1][1] == pytest.approx(0.3)
    np.testing.assert_array_equal(steps[-1][2], song.latents)


def test_a_song_can_be_stopped(pipe):
    """What a callback raises at step 3 of 8 ends the run before the next step, and so does a flag."""
    steps = []

    def fail(i, t, latents):
        steps.append(i)
        if i == 3:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        pipe("piano", seed=0, callback_on_step_end=fail, **SONG)
    assert steps == [0, 1, 2, 3]
    job, asked = pipe.prepare(Request("piano", seed=0, **SONG)), []

    def should_stop():
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(Cancelled, match="stopped before step 2 of 8"):
        pipe.run([job], Sampling(), should_stop=should_stop)
    (song,) = pipe.run([job], Sampling(), should_stop=lambda: False)
    np.testing.assert_array_equal(song.audio, pipe("piano", seed=0, **SONG).audio)


PIECES = {
    **{f"solver {name}": dict(solver=name) for name in SOLVERS},
    **{f"guidance {name}": dict(guidance=name, solver="heun") for name in GUIDANCE},
    "injection": dict(task_type="repaint", repainting_start=1.0, repainting_end=2.0, repaint_injection_ratio=0.6),
    "corrected": dict(task_type="repaint", repainting_start=1.0, repainting_end=2.0, dcw_enabled=True, solver="heun")
    | dict(dcw_wavelet="db4", velocity_norm_threshold=0.5, velocity_ema_factor=0.2),
    "edited": dict(task_type="cover", flow_edit_morph=True, flow_edit_source_caption="drums", flow_edit_n_max=0.7)
    | dict(flow_edit_n_min=0.2, flow_edit_n_avg=2, velocity_ema_factor=0.1),
    "switched cover": dict(task_type="cover", audio_cover_strength=0.5),
    "blended cover": dict(task_type="cover", audio_cover_strength=0.5, cover_mode="blend"),
}


# Other loops carry no more from step to step than "corrected", with heun and APG's momentum, and ab3 do. Noise by step
# and editing are in `tests/diffusion`, step by step.
PIECES_BY_DEFAULT = ("corrected", "solver ab3")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case not in PIECES_BY_DEFAULT)) for case in PIECES]
)
def test_the_loop_in_pieces_is_the_loop(base_pipe, case):
    """Watched, it runs a step at a time, from programs that call nothing back; the song is the same."""
    source = dict(src_audio=0.1 * normal(2, 4 * 48_000)) if "task_type" in PIECES[case] else dict(audio_duration=10)
    arguments = dict(seed=1, num_inference_steps=5, guidance_scale=3.0, output_type="latent") | source | PIECES[case]
    whole = base_pipe("piano", **arguments)
    steps = []
    pieces = base_pipe("piano", callback_on_step_end=lambda i, t, x: steps.append(i), **arguments)
    assert steps == list(range(5))
    assert_close(pieces.latents, whole.latents, 1e-6)


def test_prepare_and_run(pipe, tmp_path):
    """Files are read once; jobs with the same key share programs; songs are one by one or a batch."""
    request = Request("piano", seed=0, **SONG)
    first, second = pipe.prepare(request), pipe.prepare(dataclasses.replace(request, prompt="drums", seed=1))
    assert first.program_key == second.program_key and hash(first.program_key)
    assert first.program_key != pipe.prepare(dataclasses.replace(request, audio_duration=30)).program_key
    one, two = pipe.run([first, second])
    both = pipe(["piano", "drums"], seed=0, **SONG)
    np.testing.assert_array_equal(both.audios, np.stack([one.audio, two.audio]))
    assert [song.seed for song in both] == [one.seed, two.seed] == [0, 1] and len(both) == 2 and both[1].seed == 1
    with pytest.raises(InputError, match="expected one song, found 2"):
        _ = both.audio
    assert one.save(tmp_path / "one.wav") == tmp_path / "one.wav"
    soundfile.write(tmp_path / "source.wav", 0.1 * normal(48_000, 2), 48_000)
    job = pipe.prepare(Request("x", task_type="cover", src_audio=tmp_path / "source.wav"))
    (tmp_path / "source.wav").unlink()
    (song,) = pipe.run([job], Sampling(num_inference_steps=1))
    assert song.audio.shape == (2, 48_000)


def test_one_program_for_all_prompts_and_strengths(base_pipe):
    """Prompts, steps' times, strengths and seeds are data: nothing compiles again."""
    first = dict(num_inference_steps=3, output_type="latent", audio_duration=10)
    base_pipe("piano", guidance_scale=3.0, shift=1.0, seed=0, **first)
    before = denoise.denoise._cache_size(), programs.encode._cache_size()
    base_pipe("drums and bass", lyrics="oh", guidance_scale=6.0, shift=2.5, seed=1, cfg_interval_end=0.5, **first)
    assert (denoise.denoise._cache_size(), programs.encode._cache_size()) == before


@pytest.mark.slow
def test_bfloat16(tiny):
    pipe = AceStepPipeline.from_checkpoint(tiny[1], dtype="bfloat16")
    assert pipe.transformer.layers.mlp.up_proj.kernel.dtype == jnp.bfloat16
    song = pipe("piano", seed=0, output_type="latent", **SONG)
    assert song.latents.dtype == np.float32 and np.isfinite(song.latents).all()
    assert jax.eval_shape(pipe.vae.decode, song.latents).dtype == jnp.bfloat16


def test_loudness(pipe):
    song = pipe("piano", seed=0, **SONG)
    assert np.abs(song.audios).max() == pytest.approx(10 ** (-1 / 20), rel=1e-6)
    assert song.audios.shape == (1, 2, 480000) and song.sample_rate == 48000


def test_output_type_latent(pipe):
    song = pipe("piano", seed=0, output_type="latent", **SONG)
    assert song.audios is None and song.latents.shape == (1, FRAMES, CHANNELS)
    with pytest.raises(InputError, match="there is no audio, because of output_type"):
        song.save("song.wav")


def test_turbo_ignores_guidance_with_a_warning(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        guided = pipe("piano", seed=0, guidance_scale=7.0, output_type="latent", **SONG)
    assert "guidance_scale 7.0 is ignored" in caplog.text
    np.testing.assert_array_equal(guided.latents, pipe("piano", seed=0, output_type="latent", **SONG).latents)


BAD = {
    "prompt: it is empty": dict(prompt="  "),
    "prompt: the list is empty": dict(prompt=[]),
    "audio_duration: expected 10 to 600 s, found 9.5": dict(audio_duration=9.5),
    "audio_duration: expected 10 to 600 s, found 601": dict(audio_duration=601),
    "audio_duration: expected 10 to 600 s, found nan": dict(audio_duration=float("nan")),
    "num_inference_steps: expected at least 1, found 0": dict(num_inference_steps=0),
    "shift: expected a number above 0, found 0": dict(shift=0),
    "shift: expected a number above 0, found -1": dict(shift=-1),
    "guidance_scale: expected at least 0, found -0.1": dict(guidance_scale=-0.1),
    "guidance_scale: expected at least 0, found inf": dict(guidance_scale=float("inf")),
    "seed: expected whole numbers": dict(seed=1.5),
    "bpm: expected 30 to 300": dict(bpm=-5),
    r"latents: expected \[250, 8\]": dict(latents=np.zeros((1, 8, 250), np.float32)),
    "lyrics: expected one or 1, one for each prompt, found 2": dict(lyrics=["a", "b"]),
    "vocal_language: expected one or 1": dict(vocal_language=["en", "de"]),
    "bpm: expected one or 1": dict(bpm=[90, 91]),
    "generator: expected a torch.Generator or a list of them, found 0; use seed=N": dict(generator=0),
    "num_inference_step: unknown argument; did you mean num_inference_steps?": dict(num_inference_step=3),
    "seed: expected one or 1, one for each prompt, found 2": dict(seed=[1, 2]),
    "seed: expected 0 to 2\\^32 - 1, found -1": dict(seed=-1),
    'output_type: expected "np" or "latent", found \'pt\'; torch.from_numpy': dict(output_type="pt"),
    "cfg_interval_start": dict(cfg_interval_start=0.6, cfg_interval_end=0.5),
    r"timesteps: expected strictly decreasing numbers within \(0, 1\], found \[0.5, 0.7\]": dict(timesteps=[0.5, 0.7]),
    r"timesteps: expected strictly decreasing numbers within \(0, 1\], found \[1.5\]": dict(timesteps=[1.5]),
    r"timesteps: expected strictly decreasing numbers within \(0, 1\], found \[\]": dict(timesteps=[]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(pipe, message):
    with pytest.raises(InputError, match=message):
        pipe(**dict(prompt="piano", audio_duration=10.0) | BAD[message])


@pytest.mark.slow
def test_batches_are_filled_up_for_the_mesh(tiny, pipe):
    """Three songs on a mesh with data=8, which are the songs without.

    By default `test_same_seed_on_one_device_or_eight` shows it, on data=2.
    """
    sharded = AceStepPipeline.from_pretrained(tiny[1], mesh=make_mesh(data=8))
    arguments = SONG | dict(num_inference_steps=2, seed=5)
    found = sharded(["a", "b", "c"], **arguments)
    assert len(found) == 3 and found.seeds == (5, 6, 7)
    assert_close(found.audios, pipe(["a", "b", "c"], **arguments).audios)


def test_unknown_arguments_of_from_pretrained():
    with pytest.raises(InputError, match='torch_dtype: unknown argument; use dtype="bfloat16"'):
        AceStepPipeline.from_pretrained(torch_dtype="bfloat16")


def test_arguments_of_torch_users(pipe):
    """A generator is its seed, tensors are arrays: the same songs, bit for bit, as with ours."""
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 7)]
    noise = torch.from_numpy(normal(2, FRAMES, CHANNELS)).to(torch.bfloat16)
    arguments = SONG | dict(num_inference_steps=2, output_type="latent")
    found = pipe(["a", "b"], generator=generators, **arguments)
    assert found.seeds == (3, 7)
    np.testing.assert_array_equal(found.latents, pipe(["a", "b"], seed=[3, 7], **arguments).latents)
    found = pipe(["a", "b"], latents=noise, **arguments)
    np.testing.assert_array_equal(found.latents, pipe(["a", "b"], latents=noise.float().numpy(), **arguments).latents)


def with_loras(pipe, *arguments):
    """The latents of a pipeline like `pipe` with adapters."""
    adapted = AceStepPipeline(**pipe.networks, tokenizer=pipe.tokenizer)
    adapted.load_lora(*arguments)
    return adapted("piano", seed=0, output_type="latent", **SONG).latents


@pytest.mark.slow
def test_adapters(pipe, tmp_path):
    """From folders, each with its strength: two at once are one of both ranks together; without strength, none.

    By default `tests/test_adapters_pipeline.py` shows it against merged weights.
    """
    one, two = (random_adapter(pipe.transformer.config, ATTENTION, seed=i) for i in (1, 2))
    for name, adapter in (("one", one), ("two", two)):
        save_adapter(tmp_path / name, adapter)
    plain = pipe("piano", seed=0, output_type="latent", **SONG).latents
    both = with_loras(pipe, [tmp_path / "one", str(tmp_path / "two")], [1.0, -0.5])
    factors = {"lora_a": (2, 1.0), "lora_b": (1, -0.5)}  # the axis of the rank, and what counts for the strength
    leaves = {}
    for leaf in one.leaves:
        axis, strength = factors[leaf.rpartition(".")[2]]
        leaves[leaf] = np.concatenate([one.leaves[leaf], strength * two.leaves[leaf]], axis=axis)
    joined = Adapter(LoRAConfig(rank=8, alpha=16.0, targets=ATTENTION), leaves)
    assert relative_error(both, plain) > 0.01 and relative_error(both, with_loras(pipe, one)) > 0.01
    assert_close(both, with_loras(pipe, joined))
    np.testing.assert_array_equal(with_loras(pipe, [one, two], 0.0), plain)
    np.testing.assert_array_equal(pipe("piano", seed=0, output_type="latent", **SONG).latents, plain)


def test_bad_adapters(pipe, tmp_path):
    save_adapter(tmp_path / "other", random_adapter(CONFIG, ATTENTION))
    before = pipe.transformer
    cases = {
        "absent: no such folder": (tmp_path / "absent",),
        "other: layers.*; the adapter is for another model": (tmp_path / "other",),
        "scale: expected one number or 1, one for each adapter, found 2": (tmp_path / "other", [1.0, 2.0]),
        "scale: expected a finite number such as 0.8, found nan": (tmp_path / "other", float("nan")),
    }
    for message, arguments in cases.items():
        with pytest.raises(InputError, match=message):
            pipe.load_lora(*arguments)
    assert pipe.transformer is before


@pytest.mark.parametrize("network, stage", [("transformer", "after denoising"), ("vae", "after decoding")])
def test_a_damaged_weight_gives_no_song(tiny, tmp_path, network, stage):
    """One NaN is an error that says what to do, for songs and for codes."""
    broken = AceStepPipeline.from_checkpoint(tiny[1])
    leaf = checkpoint.leaves(broken.networks[network])
    name = "decoder.conv1.kernel" if network == "vae" else "norm_out.scale"
    leaf[name][...] = leaf[name][...].at[..., 0].set(jnp.nan)
    with pytest.raises(
        InputError, match=f"song 'piano', seed 5: .*{stage}, are NaN.*nothing is written.*--dtype float32"
    ):
        broken("piano", seed=5, audio_duration=10.0, num_inference_steps=1)
    if network == "vae":
        with pytest.raises(InputError, match="audio_codes: .*after decoding, are NaN"):
            broken.codes_to_song("<|audio_code_1|>" * 5)


def test_what_needs_a_network_that_was_not_loaded_says_so(tiny, tmp_path):
    song = np.zeros((2, 480000), np.float32)
    pipe = AceStepPipeline.from_checkpoint(tiny[1], networks=["text_encoder", "audio_tokenizer"])
    for needs, call in (
        ("transformer", lambda: pipe.load_lora(tmp_path)),
        ("transformer", lambda: pipe.timestamps(song, Request("a", "la"))),
        ("vae", lambda: pipe.prepare(Request("a"))),
        ("vae", lambda: pipe.song_to_latents(song)),
    ):
        with pytest.raises(InputError, match=f"loaded without {needs}; load it with this network"):
            call()
    pipe = AceStepPipeline.from_checkpoint(tiny[1], networks=["vae", "audio_tokenizer", "audio_token_detokenizer"])
    with pytest.raises(InputError, match="loaded without condition_encoder; load it with this network"):
        pipe.song_to_codes(song)
