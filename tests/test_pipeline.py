"""The whole pipeline against diffusers', and what its users rely on."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AceStepPipeline as TorchPipeline

from acestep_jax import AceStepPipeline, InputError, make_mesh
from acestep_jax.inputs import programs
from acestep_jax.io import checkpoint
from acestep_jax.io.adapter import Adapter, save_adapter
from acestep_jax.models.config import LoRAConfig
from acestep_jax.request import collect
from tests.adapters import ATTENTION, CONFIG, random_adapter
from tests.parity import assert_close, normal, relative_error

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
    assert_same_song(pipe("lofi piano", latents=noise, **arguments), reference)


GUIDED = {
    "all_steps": {},
    "interval": dict(cfg_interval_start=0.2, cfg_interval_end=0.5, cfg_interval_in="progress"),
    "timesteps": dict(timesteps=[1.0, 0.7, 0.5, 0.1]),
}


@pytest.mark.parametrize("case", GUIDED)
def test_guidance_matches_diffusers(tiny_base, base_pipe, case):
    noise = normal(1, FRAMES, CHANNELS)
    arguments = SONG | dict(num_inference_steps=10, guidance_scale=5.0, shift=2.0) | GUIDED[case]
    theirs = {name: value for name, value in arguments.items() if name != "cfg_interval_in"}
    reference = torch_song(tiny_base[0], "techno", noise, **theirs)
    assert_same_song(base_pipe("techno", latents=noise, **arguments), reference)
    if case == "interval":
        everywhere = torch_song(tiny_base[0], "techno", noise, **theirs | dict(cfg_interval_end=1.0))
        assert relative_error(everywhere[0], reference[0]) > 0.01


def test_batch_matches_diffusers(tiny, pipe):
    """Prompts of one length, so that diffusers has no padding to attend to."""
    noise = normal(2, FRAMES, CHANNELS)
    prompts, arguments = ["slow jazz", "fast funk"], SONG | dict(lyrics=["one", "two"])
    reference = torch_song(tiny[0], prompts, noise, guidance_scale=1.0, **arguments)
    assert_same_song(pipe(prompts, latents=noise, **arguments), reference)


def test_defaults_are_the_variants(pipe, base_pipe, monkeypatch):
    seen = []

    def denoise(*arguments, program, report):
        seen.append((arguments[6], float(arguments[7]), program.guidance))
        return jnp.asarray(arguments[2])

    monkeypatch.setattr(programs, "denoise", denoise)
    for model in (pipe, base_pipe):
        model("x", audio_duration=10, output_type="latent")
    (turbo_times, _, turbo_guided), (base_times, base_scale, base_guided) = seen
    np.testing.assert_allclose(turbo_times[:8], [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3], atol=1e-6)
    assert len(turbo_times) == 9 and turbo_guided is None
    np.testing.assert_allclose(base_times, np.linspace(1, 0, 51), atol=1e-6)
    assert base_guided == "apg" and base_scale == 7.0


def test_same_seed_alone_or_in_a_batch(pipe):
    """Other prompts of other lengths in the batch change nothing; song i of seed s has seed s + i."""
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
    """Guided, with a number of tokens that divides by the mesh and an audio that is decoded in tiles."""
    arguments = SONG | dict(audio_duration=20.8, num_inference_steps=2)
    one = base_pipe(["piano", "drums"], seed=3, **arguments)
    mesh = make_mesh(**axes)
    sharded = AceStepPipeline.from_checkpoint(tiny_base[1], mesh=mesh)
    kernel = sharded.transformer.layers.mlp.up_proj.kernel[...]
    assert kernel.sharding.mesh == mesh and len(kernel.sharding.device_set) == 8
    eight = sharded(["piano", "drums"], seed=3, **arguments)
    assert_close(eight.audios, one.audios)
    given = jax.device_put(one.latents, jax.devices()[1])  # committed to a device of its own
    assert sharded(["piano", "drums"], latents=given, output_type="latent", **arguments).latents.shape == (2, 520, 8)


def test_seeds_and_keys(pipe):
    def noise(prompt, frames=5, seed=None):
        requests = collect(list(prompt), {}, {}, seed, None)
        seeds, _, x = pipe._noise(requests, [frames] * len(prompt), "jax", False)
        return seeds, x[:, :frames]

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
    """In order, with the times of the schedule and the latents after the step; an error comes out afterwards."""
    steps = []
    song = pipe("piano", seed=0, callback_on_step_end=lambda *step: steps.append(step), **SONG)
    assert [i for i, _, _ in steps] == list(range(8))
    assert steps[0][1] == 1.0 and steps[-1][1] == pytest.approx(0.3)
    np.testing.assert_array_equal(steps[-1][2], song.latents)

    def fail(i, t, latents):
        raise KeyboardInterrupt if i < 0 else RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        pipe("piano", seed=0, callback_on_step_end=fail, **SONG)


def test_one_program_for_all_prompts_and_strengths(base_pipe):
    """Prompts, steps' times, strengths and seeds are data: nothing compiles again."""
    first = dict(num_inference_steps=3, output_type="latent", audio_duration=10)
    base_pipe("piano", guidance_scale=3.0, shift=1.0, seed=0, **first)
    before = programs.denoise._cache_size(), programs.encode._cache_size()
    base_pipe("drums and bass", lyrics="oh", guidance_scale=6.0, shift=2.5, seed=1, cfg_interval_end=0.5, **first)
    assert (programs.denoise._cache_size(), programs.encode._cache_size()) == before


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
    with pytest.raises(InputError, match="no audio to save"):
        song.save("song.wav")


def test_turbo_ignores_guidance_with_a_warning(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        guided = pipe("piano", seed=0, guidance_scale=7.0, output_type="latent", **SONG)
    assert "guidance_scale 7.0 is ignored" in caplog.text
    np.testing.assert_array_equal(guided.latents, pipe("piano", seed=0, output_type="latent", **SONG).latents)


BAD = {
    "prompt: it is empty": dict(prompt="  "),
    "prompt: the list is empty": dict(prompt=[]),
    "audio_duration: expected 10 to 600 seconds, found 9.5": dict(audio_duration=9.5),
    "audio_duration: expected 10 to 600 seconds, found 601": dict(audio_duration=601),
    "audio_duration: expected 10 to 600 seconds, found nan": dict(audio_duration=float("nan")),
    "num_inference_steps: expected at least 1, found 0": dict(num_inference_steps=0),
    "shift: expected a number above 0, found 0": dict(shift=0),
    "shift: expected a number above 0, found -1": dict(shift=-1),
    "guidance_scale: expected a number of at least 0, found -0.1": dict(guidance_scale=-0.1),
    "guidance_scale: expected a number of at least 0, found inf": dict(guidance_scale=float("inf")),
    "seed: expected whole numbers": dict(seed=1.5),
    "bpm: expected 30 to 300": dict(bpm=-5),
    r"latents: expected \[250, 8\]": dict(latents=np.zeros((1, 8, 250), np.float32)),
    "lyrics: expected one or 1, one for each prompt, found 2": dict(lyrics=["a", "b"]),
    "vocal_language: expected one or 1": dict(vocal_language=["en", "de"]),
    "seed: expected one or 1, one for each prompt, found 2": dict(seed=[1, 2]),
    "seed: expected numbers from 0": dict(seed=-1),
    "output_type": dict(output_type="pt"),
    "cfg_interval_start": dict(cfg_interval_start=0.6, cfg_interval_end=0.5),
    r"timesteps: expected falling numbers within \(0, 1\], found \[0.5, 0.7\]": dict(timesteps=[0.5, 0.7]),
    r"timesteps: expected falling numbers within \(0, 1\], found \[1.5\]": dict(timesteps=[1.5]),
    r"timesteps: expected falling numbers within \(0, 1\], found \[\]": dict(timesteps=[]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(pipe, message):
    with pytest.raises(InputError, match=message):
        pipe(**dict(prompt="piano", audio_duration=10.0) | BAD[message])


def test_batches_must_divide_by_the_mesh(pipe):
    """More songs than one, that is; one alone is replicated."""
    networks = {name: getattr(pipe, name) for name in checkpoint.NETWORKS}
    pipe = AceStepPipeline(**networks, tokenizer=pipe.tokenizer, mesh=make_mesh(data=8))
    with pytest.raises(InputError, match="prompt: 3 do not divide by the mesh's data=8"):
        pipe(["a", "b", "c"], **SONG)


def with_loras(pipe, *arguments):
    """The latents of a pipeline like `pipe` with adapters."""
    networks = {name: getattr(pipe, name) for name in checkpoint.NETWORKS}
    adapted = AceStepPipeline(**networks, tokenizer=pipe.tokenizer)
    adapted.load_lora(*arguments)
    return adapted("piano", seed=0, output_type="latent", **SONG).latents


def test_adapters(pipe, tmp_path):
    """From folders, each with its strength: two at once are one of both ranks together; without strength, none."""
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
