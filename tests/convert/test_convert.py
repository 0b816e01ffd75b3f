"""PyTorch checkpoints to native ones and back, in every form they come in: bit for bit."""

import shutil
import weakref

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AceStepPipeline as TorchPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from acestep_jax.convert.random_checkpoint import write_random_checkpoint
from acestep_jax.convert.to_torch import to_torch
from acestep_jax.io import checkpoint, checkpoint_writer
from acestep_jax.io.conversion import WEIGHT_NORM, from_torch
from acestep_jax.io.pretrained import fold, open_checkpoint
from acestep_jax.io.safetensors_writer import write_safetensors
from acestep_jax.models.registry import FAMILY
from tests.folders import MODEL, SILENCE, assert_equal_arrays, edit_tensors, native_arrays, tensors, write_original


@pytest.fixture(scope="module")
def tiny(standard):
    """Return the checkpoint with the layers and blocks that the original layout takes for given."""
    return standard


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """The tiny checkpoint, converted and converted back to diffusers' layout."""
    folder = tmp_path_factory.mktemp("exported") / "diffusers"
    to_torch(tiny[1], folder, layout="diffusers")
    return folder


@pytest.fixture(scope="module")
def expected(tiny):
    return native_arrays(tiny[0])


def test_diffusers_round_trip_is_bit_exact(tiny, exported):
    before, after = tensors(tiny[0]), tensors(exported)
    assert len(before) > 400 and after == before


def test_diffusers_loads_the_result(tiny, exported):
    """The same configs, the same tokens and exactly the same song."""
    songs = []
    pipelines = [TorchPipeline.from_pretrained(folder) for folder in (tiny[0], exported)]
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        arguments = dict(lyrics="[verse]\nla", audio_duration=1.0, num_inference_steps=2, output_type="np")
        songs.append(pipeline("piano", generator=torch.Generator().manual_seed(0), **arguments).audios)
    assert np.abs(songs[0]).max() > 0.1
    np.testing.assert_array_equal(*songs)
    first, second = pipelines
    for name in ("transformer", "condition_encoder", "vae", "audio_tokenizer", "audio_token_detokenizer"):
        configs = [{k: v for k, v in p.components[name].config.items() if k[0] != "_" and v} for p in pipelines]
        assert configs[1] | {"fsq_input_levels": 0} == configs[0] | {"fsq_input_levels": 0}, name
    assert first.tokenizer("a ü <|endoftext|>").input_ids == second.tokenizer("a ü <|endoftext|>").input_ids


def test_bfloat16_source_is_bit_exact(tmp_path):
    """A half-precision checkpoint computes in half precision but for the folded convolutions."""
    write_random_checkpoint(tmp_path / "torch", dtype="bfloat16")
    from_torch(tmp_path / "torch", tmp_path / "native")
    to_torch(tmp_path / "native", tmp_path / "back", layout="diffusers")
    before = tensors(tmp_path / "torch")
    assert {dtype for dtype, *_ in before.values()} == {torch.bfloat16}
    assert tensors(tmp_path / "back") == before
    networks = checkpoint.load(tmp_path / "native")
    assert {name: network.runtime.dtype for name, network in networks.items()} == {
        name: "float32" if name == "vae" else "bfloat16" for name in FAMILY.networks
    }


def test_dtype_casts_every_tensor(tiny, tmp_path):
    from_torch(tiny[0], tmp_path / "native", dtype="bfloat16")
    stored = checkpoint.stored_leaves(tmp_path / "native")
    assert {leaf.dtype for leaf in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    to_torch(tmp_path / "native", tmp_path / "back", layout="diffusers")
    cast = tmp_path / "cast"
    shutil.copytree(tiny[0], cast)
    for file in cast.rglob("*.safetensors"):
        edit_tensors(file, lambda state: {name: value.to(torch.bfloat16) for name, value in state.items()})
    assert tensors(tmp_path / "back") == tensors(cast)


def test_original_round_trip_is_bit_exact(tiny, tmp_path):
    """And the original layout in between is, tensor for tensor, what a writer makes that is not the converter."""
    to_torch(tiny[1], tmp_path / "original", layout="original")
    write_original(tiny[0], tmp_path / "published")
    (silence,) = (tmp_path / "original").glob("*/silence_latent.pt")
    silence.parent.rename(tmp_path / "original" / MODEL)
    assert tensors(tmp_path / "original") == tensors(tmp_path / "published")
    silences = [torch.load(tmp_path / name / SILENCE, weights_only=True) for name in ("original", "published")]
    assert {value.dtype for value in silences} == {torch.float32} and silences[0].shape == (1, 8, 15000)
    assert torch.equal(*silences)

    from_torch(tmp_path / "original", tmp_path / "native")
    to_torch(tmp_path / "native", tmp_path / "diffusers", layout="diffusers")
    assert tensors(tmp_path / "diffusers") == tensors(tiny[0])


def test_changed_convolution_gets_new_factors(tiny, expected, tmp_path):
    """Weight norm: v is the new kernel, and both foldings give it back; the others keep the factors they came from."""
    changed, key = "vae.decoder.block.1.conv_t1.kernel", "vae/decoder.block.1.conv_t1.weight"
    arrays = expected | {changed: 2 * expected[changed] + 1}
    opened = open_checkpoint(tiny[0])
    native = tmp_path / "native"
    checkpoint_writer.save(native, opened.configs, arrays.items(), opened.tokenizer, opened.tokenizer_config)
    shutil.copy(tiny[1] / WEIGHT_NORM, native)
    to_torch(native, tmp_path / "torch", layout="diffusers")
    before, after = tensors(tiny[0]), tensors(tmp_path / "torch")
    assert {name for name in before if before[name] != after[name]} == {f"{key}_g", f"{key}_v"}
    assert_equal_arrays(native_arrays(tmp_path / "torch"), arrays)
    state = load_file(tmp_path / "torch" / "vae" / "diffusion_pytorch_model.safetensors")
    g, v = (state[f"{key.removeprefix('vae/')}_{part}"] for part in "gv")
    torch.testing.assert_close(torch._weight_norm(v, g, 0), v, rtol=1e-6, atol=0)
    np.testing.assert_array_equal(fold(g.numpy(), v.numpy()), v.numpy())


def test_writer_streams(tmp_path):
    """Tensors are read in turn, each forgotten before the next; the library reads the file and finds the same."""
    values = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "b": np.array([[1.5, -0.0]], ml_dtypes.bfloat16),
        "c": np.ones((3, 1, 5), np.float16),
        "d": np.zeros((0, 4), np.float32),
    }
    alive = []

    def read(name):
        assert not any(reference() is not None for reference in alive)
        value = values[name].copy()
        alive.append(weakref.ref(value))
        return value

    path = tmp_path / "x.safetensors"
    write_safetensors(path, [(n, v.shape, v.dtype, lambda n=n: read(n)) for n, v in values.items()])
    assert len(alive) == 4
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == values.keys() and file.metadata() == {"format": "pt"}
        for name, value in values.items():
            found = file.get_tensor(name)
            assert found.dtype == value.dtype and found.shape == value.shape
            assert found.tobytes() == value.tobytes()
    with pytest.raises(ValueError, match=r"a: promised \(2,\)"):
        write_safetensors(path, [("a", (2,), np.dtype("float32"), lambda: np.zeros(3, np.float32))])
