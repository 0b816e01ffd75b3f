"""PyTorch checkpoints to native ones and back, in every form they come in: bit for bit."""

import dataclasses
import shutil
import weakref

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AceStepPipeline as TorchPipeline
from diffusers import AceStepTransformer1DModel as TorchTransformer
from safetensors import safe_open
from safetensors.torch import load_file

from acestep_jax import InputError, checkpoint
from convert.from_torch import WEIGHT_NORM, from_torch
from convert.random_checkpoint import SIZES, randomise, write_random_checkpoint
from convert.safetensors_writer import write_safetensors
from convert.to_torch import to_torch
from convert.torch_checkpoint import fold, open_checkpoint
from tests.folders import (
    MODEL,
    TEXT_ENCODER,
    VAE,
    edit_json,
    edit_tensors,
    native_arrays,
    tensors,
    write_original,
)


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """The tiny checkpoint, converted and converted back to diffusers' layout."""
    folder = tmp_path_factory.mktemp("exported") / "diffusers"
    to_torch(tiny[1], folder, layout="diffusers")
    return folder


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory):
    """The tiny checkpoint in the original layout, written without the converter: the folder above the model's."""
    folder = tmp_path_factory.mktemp("original")
    write_original(tiny[0], folder)
    return folder


@pytest.fixture(scope="module")
def expected(tiny):
    return native_arrays(tiny[0])


def assert_equal_arrays(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


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
    configs = checkpoint.read_manifest(tmp_path / "native").configs
    assert {name: config.dtype for name, config in configs.items()} == {
        name: "float32" if name == "vae" else "bfloat16" for name in checkpoint.NETWORKS
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
    to_torch(tiny[1], tmp_path / "original", layout="original")
    from_torch(tmp_path / "original", tmp_path / "native")
    to_torch(tmp_path / "native", tmp_path / "diffusers", layout="diffusers")
    assert tensors(tmp_path / "diffusers") == tensors(tiny[0])


def test_original_export_is_as_published(tiny, original, tmp_path):
    """Against the independent writer: names, bytes, silence and the keys that decide the network's shape."""
    to_torch(tiny[1], tmp_path / "ours", layout="original")
    (model,) = {file.parent for file in (tmp_path / "ours").glob("*/silence_latent.pt")}
    for ours, theirs in (
        (model, MODEL),
        (tmp_path / "ours" / VAE, VAE),
        (tmp_path / "ours" / TEXT_ENCODER, TEXT_ENCODER),
    ):
        by_name = lambda folder: {name.split("/")[1]: value for name, value in tensors(folder).items()}  # noqa: E731
        assert by_name(ours) == by_name(original / theirs)
    ours, theirs = (torch.load(f / "silence_latent.pt", weights_only=True) for f in (model, original / MODEL))
    assert ours.dtype == theirs.dtype == torch.float32 and ours.shape == (1, 8, 15000) and torch.equal(ours, theirs)


@pytest.mark.parametrize("given", ["model", "above", "options"])
def test_original_layout_is_read(original, expected, tmp_path, given):
    if given == "options":
        shutil.copytree(original / MODEL, tmp_path / "model")
        options = dict(vae=original / VAE, text_encoder=str(original / TEXT_ENCODER))
        found = native_arrays(tmp_path / "model", **options)
    else:
        found = native_arrays(original / MODEL if given == "model" else original)
    assert_equal_arrays(found, expected)


def assert_equal_configs(source, reference):
    """The original layout names the kind of each layer; diffusers may leave it to the default."""
    found, wanted = open_checkpoint(source).configs, open_checkpoint(reference).configs
    assert found.keys() == wanted.keys()
    for name, config in found.items():
        assert (
            dataclasses.replace(config, layer_types=None) == wanted[name] if name != "vae" else config == wanted[name]
        )
    assert found["transformer"].windows(4) == wanted["transformer"].windows(4)


def test_original_config_is_that_of_diffusers(tiny, original):
    assert_equal_configs(original, tiny[0])


def test_transformer_larger_than_the_encoders(tiny, tmp_path):
    """The XL models: the sizes of the encoders have keys of their own in the original layout."""
    folder = tmp_path / "torch"
    shutil.copytree(tiny[0], folder)
    sizes = dict(hidden_size=96, intermediate_size=80, num_attention_heads=8, encoder_hidden_size=64, patch_size=4)
    transformer = TorchTransformer(**SIZES["tiny"]["transformer"] | sizes)
    randomise(transformer).save_pretrained(folder / "transformer")
    model = write_original(folder, tmp_path / "original")
    assert_equal_configs(model, folder)
    assert_equal_arrays(native_arrays(model), native_arrays(folder))
    from_torch(model, tmp_path / "native")
    to_torch(tmp_path / "native", tmp_path / "again", layout="original")
    assert_equal_configs(tmp_path / "again", folder)
    assert_equal_arrays(native_arrays(tmp_path / "again"), native_arrays(folder))


def test_shards_are_read(tiny, expected, tmp_path):
    folder = tmp_path / "torch"
    shutil.copytree(tiny[0], folder)
    pipeline = TorchPipeline.from_pretrained(folder)
    for name in ("transformer", "text_encoder", "vae"):
        shutil.rmtree(folder / name)
        pipeline.components[name].save_pretrained(folder / name, max_shard_size="100KB")
        assert len(list((folder / name).glob("*.safetensors"))) > 1
    assert_equal_arrays(native_arrays(folder), expected)
    assert_equal_arrays(native_arrays(write_original(tiny[0], tmp_path / "original", shards=3)), expected)


def test_text_encoder_of_a_language_model_is_read(tiny, expected, tmp_path):
    """Its tensors have a prefix, and it has a head, which is not needed."""
    folder = tmp_path / "torch"
    shutil.copytree(tiny[0], folder)
    head = {"lm_head.weight": torch.zeros(257, 48)}
    path = folder / "text_encoder" / "model.safetensors"
    edit_tensors(path, lambda state: {f"model.{name}": value for name, value in state.items()} | head)
    edit_json(folder / "text_encoder" / "config.json", architectures=["Qwen3ForCausalLM"])
    assert_equal_arrays(native_arrays(folder), expected)


def test_checkpoint_without_audio_tokenizer(tiny, tmp_path):
    """It converts both ways but for the original layout, which has no place for what is missing."""
    folder = tmp_path / "torch"
    shutil.copytree(tiny[0], folder)
    for name in checkpoint.OPTIONAL_NETWORKS:
        shutil.rmtree(folder / name)
    edit_json(folder / "model_index.json", **dict.fromkeys(checkpoint.OPTIONAL_NETWORKS))
    from_torch(folder, tmp_path / "native")
    assert set(checkpoint.load(tmp_path / "native")) == checkpoint.NETWORKS.keys() - set(checkpoint.OPTIONAL_NETWORKS)
    to_torch(tmp_path / "native", tmp_path / "back", layout="diffusers")
    assert tensors(tmp_path / "back") == tensors(folder)
    assert TorchPipeline.from_pretrained(tmp_path / "back").audio_tokenizer is None
    with pytest.raises(InputError, match="original layout needs audio_tokenizer, audio_token_detokenizer"):
        to_torch(tmp_path / "native", tmp_path / "original", layout="original")
    assert not (tmp_path / "original").exists()


def test_hub_id(tiny, expected, tmp_path, monkeypatch):
    """Found in the cache of huggingface_hub, without the network; what is not there is one clear error."""
    from huggingface_hub import constants

    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny[0], repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_equal_arrays(native_arrays("org/name"), expected)
    with pytest.raises(InputError, match="org/other: neither a folder here nor a repository"):
        open_checkpoint("org/other")


def test_changed_convolution_gets_new_factors(tiny, expected, tmp_path):
    """Weight norm: v is the new kernel, and both foldings give it back; the others keep the factors they came from."""
    changed, key = "vae.decoder.block.1.conv_t1.kernel", "vae/decoder.block.1.conv_t1.weight"
    arrays = expected | {changed: 2 * expected[changed] + 1}
    opened = open_checkpoint(tiny[0])
    native = tmp_path / "native"
    checkpoint.save(native, opened.configs, arrays.items(), opened.tokenizer, opened.tokenizer_config)
    shutil.copy(tiny[1] / WEIGHT_NORM, native)
    to_torch(native, tmp_path / "torch", layout="diffusers")
    before, after = tensors(tiny[0]), tensors(tmp_path / "torch")
    assert {name for name in before if before[name] != after[name]} == {f"{key}_g", f"{key}_v"}
    assert_equal_arrays(native_arrays(tmp_path / "torch"), arrays)
    state = load_file(tmp_path / "torch" / "vae" / "diffusion_pytorch_model.safetensors")
    g, v = (state[f"{key.removeprefix('vae/')}_{part}"] for part in "gv")
    torch.testing.assert_close(torch._weight_norm(v, g, 0), v, rtol=1e-6, atol=0)
    np.testing.assert_array_equal(fold(g.numpy(), v.numpy()), v.numpy())


def test_factors_are_needed_for_the_way_back(tiny, tmp_path):
    """Without the file that keeps them, every convolution is the same function with other factors."""
    native = tmp_path / "native"
    shutil.copytree(tiny[1], native)
    (native / WEIGHT_NORM).unlink()
    to_torch(native, tmp_path / "torch", layout="diffusers")
    before, after = tensors(tiny[0]), tensors(tmp_path / "torch")
    differing = {name for name in before if before[name] != after[name]}
    assert len(differing) > 100 and all(name.startswith("vae/") and name[-2:] in ("_g", "_v") for name in differing)
    assert_equal_arrays(native_arrays(tmp_path / "torch"), native_arrays(tiny[0]))


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
