"""Every form a PyTorch checkpoint comes in gives the same native arrays."""

import dataclasses
import shutil

import pytest
import torch
from diffusers import AceStepPipeline as TorchPipeline
from diffusers import AceStepTransformer1DModel as TorchTransformer

from acestep_jax import InputError
from acestep_jax.convert import original
from acestep_jax.convert.from_torch import WEIGHT_NORM, from_torch
from acestep_jax.convert.random_checkpoint import SIZES, randomise
from acestep_jax.convert.to_torch import to_torch
from acestep_jax.convert.torch_checkpoint import open_checkpoint
from acestep_jax.io import checkpoint
from acestep_jax.models.registry import FAMILY
from tests.folders import (
    MODEL,
    TEXT_ENCODER,
    VAE,
    assert_equal_arrays,
    edit_json,
    edit_tensors,
    native_arrays,
    tensors,
    write_original,
)


@pytest.fixture(scope="module")
def published(tiny, tmp_path_factory):
    """The tiny checkpoint in the original layout, written without the converter: the folder above the model's."""
    folder = tmp_path_factory.mktemp("original")
    write_original(tiny[0], folder)
    return folder


@pytest.fixture(scope="module")
def expected(tiny):
    return native_arrays(tiny[0])


@pytest.mark.parametrize("given", ["model", "above", "options"])
def test_original_layout_is_read(published, expected, tmp_path, given):
    if given == "options":
        shutil.copytree(published / MODEL, tmp_path / "model")
        options = dict(vae=published / VAE, text_encoder=str(published / TEXT_ENCODER))
        found = native_arrays(tmp_path / "model", **options)
    else:
        found = native_arrays(published / MODEL if given == "model" else published)
    assert_equal_arrays(found, expected)


def assert_equal_configs(source, reference):
    """The original layout names the kind of each layer, which diffusers may leave to the default; and its XL models
    read the timbre token."""
    found, wanted = open_checkpoint(source).configs, open_checkpoint(reference).configs
    assert found.keys() == wanted.keys()
    xl = wanted["transformer"].hidden_size != wanted["condition_encoder"].hidden_size
    for name, config in found.items():
        if name != "vae":
            config = dataclasses.replace(config, layer_types=None)
        if name == "condition_encoder":
            assert config.timbre_special_token == xl and not wanted[name].timbre_special_token
            config = dataclasses.replace(config, timbre_special_token=False)
        assert config == wanted[name]
    assert found["transformer"].windows(4) == wanted["transformer"].windows(4)


def test_original_config_is_that_of_diffusers(tiny, published):
    assert_equal_configs(published, tiny[0])


def test_transformer_larger_than_the_encoders(tiny, tmp_path):
    """The XL models: the sizes of the encoders have keys of their own in the original layout, both ways."""
    folder = tmp_path / "torch"
    shutil.copytree(tiny[0], folder)
    sizes = dict(hidden_size=96, intermediate_size=80, num_attention_heads=8, encoder_hidden_size=64, patch_size=4)
    transformer = TorchTransformer(**SIZES["tiny"]["transformer"] | sizes)
    randomise(transformer).save_pretrained(folder / "transformer")
    model = write_original(folder, tmp_path / "original")
    assert_equal_configs(model, folder)
    assert_equal_arrays(native_arrays(model), native_arrays(folder))
    configs = open_checkpoint(model).configs
    again = original.split_config(original.join_config(configs), "")
    assert again == {name: configs[name] for name in again} and configs["transformer"].encoder_hidden_size == 64


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
    """It converts both ways but for the original layout, which has no place for what is missing.

    Nor is the file with the factors of the convolutions needed: others give the same kernels.
    """
    folder, back = tmp_path / "torch", tmp_path / "back"
    shutil.copytree(tiny[0], folder)
    for name in FAMILY.optional:
        shutil.rmtree(folder / name)
    edit_json(folder / "model_index.json", **dict.fromkeys(FAMILY.optional))
    from_torch(folder, tmp_path / "native")
    found = checkpoint.read_manifest(tmp_path / "native").configs.keys()
    assert found == FAMILY.networks.keys() - set(FAMILY.optional)

    (tmp_path / "native" / WEIGHT_NORM).unlink()
    to_torch(tmp_path / "native", back, layout="diffusers")
    before, after = tensors(folder), tensors(back)
    assert before.keys() == after.keys()
    differing = {name for name in before if before[name] != after[name]}
    assert len(differing) > 100 and all(name.startswith("vae/") and name[-2:] in ("_g", "_v") for name in differing)
    assert_equal_arrays(native_arrays(back), native_arrays(folder))
    assert TorchPipeline.from_pretrained(back).audio_tokenizer is None

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
