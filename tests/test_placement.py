"""Networks on the host, copied to the device in turn: the same songs, and less memory of the device at once."""

import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from acestep_jax import AceStepPipeline, InputError, Request, Sampling, make_mesh, placement
from acestep_jax.models.kernels import unstacked
from tests.parity import assert_close

unit = pytest.mark.unit

SAMPLING = Sampling(num_inference_steps=1)
REQUEST = Request("a song", audio_duration=10.0, seed=3)


@pytest.fixture(scope="module")
def whole():
    return AceStepPipeline.from_pretrained()


@pytest.fixture
def offloaded(monkeypatch, caplog):
    """Return a pipeline for a device with too little memory: the second of the CPU devices, the first is the host."""
    monkeypatch.setattr(placement, "first_device", lambda: jax.devices()[1])
    monkeypatch.setattr(placement, "memory_limit", lambda device: 10_000_000)
    with caplog.at_level(logging.WARNING):
        pipe = AceStepPipeline.from_pretrained()
    assert sum("copied to the device in turn" in record.getMessage() for record in caplog.records) == 1
    assert pipe.placement.offloads
    return pipe


def on(device):
    """Return the bytes of all arrays on a device."""
    return sum(array.nbytes for array in jax.live_arrays() if array.devices() == {device})


def size(*networks):
    return sum(leaf.nbytes for network in networks for leaf in jax.tree.leaves(network))


def test_the_same_song_in_less_memory(whole, offloaded, monkeypatch):
    (expected,) = whole.run([whole.prepare(REQUEST)], SAMPLING)
    device = jax.devices()[1]
    before, seen = on(device), []

    def watch(step, t, latents):
        seen.append(on(device) - before)

    (song,) = offloaded.run([offloaded.prepare(REQUEST)], SAMPLING, on_step=watch)
    np.testing.assert_array_equal(song.latents, expected.latents)
    np.testing.assert_array_equal(song.audio, expected.audio)
    # While denoising, text encoder and autoencoder are not there; afterwards no network is.
    present = size(offloaded.transformer, offloaded.condition_encoder)
    assert present <= seen[0] < present + size(offloaded.text_encoder, offloaded.vae)
    assert on(device) - before < size(offloaded.vae) / 10
    # What a stage copied does not reach the pipeline's own networks.
    assert {d for leaf in jax.tree.leaves(offloaded.networks) for d in leaf.devices()} == {jax.devices()[0]}


def test_unstacked_layers_make_the_same_song(whole, monkeypatch):
    """Layers are unstacked once, and again for other weights."""
    (expected,) = whole.run([whole.prepare(REQUEST)], SAMPLING, output_type="latent")
    monkeypatch.setattr(whole, "placement", placement.Placement(second_copy=1))
    (song,) = whole.run([whole.prepare(REQUEST)], SAMPLING, output_type="latent")
    assert_close(song.latents, expected.latents)
    made = whole.placement.for_denoising(whole.transformer)
    assert isinstance(made.layers, nnx.List) and whole.placement.for_denoising(whole.transformer) is made
    other = nnx.merge(*nnx.split(whole.transformer))  # another module of the same arrays, which then changes in place
    assert whole.placement.for_denoising(other) is made
    other.norm_out.scale[...] = 2 * other.norm_out.scale[...]
    changed = whole.placement.for_denoising(other)
    assert changed is not made
    np.testing.assert_array_equal(changed.norm_out.scale[...], other.norm_out.scale[...])


@unit
def test_no_memory_for_unstacked_layers(monkeypatch, caplog):
    def fail(transformer):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr(placement, "_unstack", fail)
    placed, transformer = placement.Placement(second_copy=3_200_000_000), {"x": np.ones(3)}
    assert placed.for_denoising(transformer) is transformer and placed.second_copy == 0
    assert "3.2 GB" in caplog.text


@pytest.mark.slow
def test_codes(whole, offloaded):
    """By default `test_the_same_song_in_less_memory` shows it of a song, whose stages take the same way."""
    codes = "".join(f"<|audio_code_{i}|>" for i in range(50))
    audio = offloaded.codes_to_song(codes)
    np.testing.assert_array_equal(audio, whole.codes_to_song(codes))
    np.testing.assert_array_equal(offloaded.song_to_codes(audio), whole.song_to_codes(audio))


@unit
def test_networks_are_copied_when_they_are_asked_for():
    host, device = jax.devices()[:2]
    networks = {"a": {"x": jax.device_put(np.ones(3), host)}, "b": {"y": jax.device_put(np.ones(4), device)}}
    with placement.Placement(device).stage(networks) as placed:
        assert list(placed) == ["a", "b"]
        copy = placed["a"]["x"]
        assert copy.devices() == {device} and placed["a"]["x"] is copy
        assert placed["b"]["y"] is networks["b"]["y"]  # it is there already, and is not to be dropped
        with pytest.raises(InputError, match="loaded without vae"):
            placed["vae"]
    assert copy.is_deleted() and not networks["a"]["x"].is_deleted() and not networks["b"]["y"].is_deleted()
    with placement.Placement().stage(networks) as placed:
        assert placed["a"] is networks["a"]


@unit
def test_a_stage_gives_back_what_it_has_read(monkeypatch):
    """Also one that ends in an error."""
    given_back = []
    monkeypatch.setattr(placement.mapped, "release", lambda: given_back.append(True))
    with placement.Placement().stage({}):
        assert not given_back
    with pytest.raises(KeyboardInterrupt), placement.Placement().stage({}):
        raise KeyboardInterrupt
    assert len(given_back) == 2


@unit
def test_choice(monkeypatch, caplog):
    limited = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 10_000_000_000})
    monkeypatch.setattr(placement, "first_device", lambda: limited)
    assert not placement.choose(9_000_000_000, None, None).offloads and not caplog.records
    assert placement.choose(11_000_000_000, None, None).device is limited and len(caplog.records) == 1
    assert placement.choose(9_000_000_000, True, None).offloads
    assert not placement.choose(11_000_000_000, False, None).offloads
    assert len(caplog.records) == 1  # what was asked for is not said
    assert not placement.choose(5_000_000_000, None, None, 2_000_000_000).second_copy  # on a CPU
    monkeypatch.setattr(unstacked, "platform", lambda: "gpu")
    assert placement.choose(5_000_000_000, None, None, 2_000_000_000).second_copy
    assert not placement.choose(7_000_000_000, None, None, 2_000_000_000).second_copy
    assert not placement.choose(5_000_000_000, True, None, 2_000_000_000).second_copy
    monkeypatch.setattr(placement, "first_device", lambda: jax.devices()[0])
    assert not placement.choose(10**15, None, None).offloads  # a CPU's memory is the host's


@unit
def test_refusals(monkeypatch):
    mesh = make_mesh(data=8)
    with pytest.raises(InputError, match="offload: for one device only"):
        placement.choose(0, True, mesh)
    assert not placement.choose(10**15, None, mesh).offloads

    devices = jax.local_devices()

    def missing(backend=None):
        if backend == "cpu":
            raise RuntimeError("no such backend")
        return devices

    monkeypatch.setattr(jax, "local_devices", missing)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(InputError, match="JAX_PLATFORMS: .* set it to 'cuda,cpu'"):
        placement.choose(0, True, None)
