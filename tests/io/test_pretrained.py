"""Every form a PyTorch checkpoint comes in gives the same native arrays."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AceStepPipeline as TorchPipeline
from diffusers import AceStepTransformer1DModel as TorchTransformer
from tokenizers import Tokenizer
from transformers import Qwen2Tokenizer

from acestep_jax import InputError
from acestep_jax.convert.random_checkpoint import SIZES, randomise
from acestep_jax.convert.to_torch import to_torch
from acestep_jax.io import checkpoint, original
from acestep_jax.io.conversion import WEIGHT_NORM, from_torch, sampling_of
from acestep_jax.io.pretrained import open_checkpoint
from acestep_jax.models.registry import FAMILY
from tests.folders import (
    MODEL,
    TEXT_ENCODER,
    VAE,
    assert_equal_arrays,
    assert_refused,
    edit_json,
    edit_tensors,
    native_arrays,
    tensors,
    write_original,
)


@pytest.fixture(scope="module")
def tiny(standard):
    """Return the checkpoint with the layers and blocks that the original layout takes for given."""
    return standard


@pytest.fixture(scope="module")
def published(tiny, tmp_path_factory):
    """The tiny checkpoint in the original layout, written without the converter: the folder above the model's."""
    folder = tmp_path_factory.mktemp("original")
    write_original(tiny[0], folder)
    return folder


@pytest.fixture(scope="module")
def expected(tiny):
    return native_arrays(tiny[0])


def test_turbo_models_of_one_shift_have_it_as_their_default(published, tmp_path):
    """Their configs are those of turbo: the names of their folders tell them apart."""
    shutil.copytree(published, tmp_path / "torch")
    (tmp_path / "torch" / MODEL).rename(tmp_path / "torch/acestep-v15-turbo-shift1")
    from_torch(tmp_path / "torch", tmp_path / "native")
    assert checkpoint.read_manifest(tmp_path / "native").sampling == {"shift": 1.0}
    assert sampling_of([Path("ACE-Step/acestep-v15-turbo-shift3/abc/config.json")]) == {"shift": 3.0}
    for name in ("acestep-v15-turbo", "acestep-v15-turbo-continuous", "tests-of-turbo-shift1/acestep-v15-base"):
        assert sampling_of([Path(name, "config.json")]) == {}


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
    """The original layout names the kind of each layer, which diffusers may leave to the default."""
    found, wanted = open_checkpoint(source).configs, open_checkpoint(reference).configs
    assert found.keys() == wanted.keys()
    xl = wanted["transformer"].hidden_size != wanted["condition_encoder"].hidden_size
    for name, config in found.items():
        if name != "vae":
            config = dataclasses.replace(config, layer_types=None)
        if name == "transformer":  # diffusers has no key for it
            config = dataclasses.replace(config, lyric_alignment_layers_config=None)
        if name == "condition_encoder":
            assert config.timbre_special_token == wanted[name].timbre_special_token == xl
        assert config == wanted[name]
    assert found["transformer"].windows(4) == wanted["transformer"].windows(4)


def test_original_config_is_that_of_diffusers(tiny, published):
    assert_equal_configs(published, tiny[0])


def test_transformer_larger_than_the_encoders(tiny, tmp_path, caplog):
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
    joined = original.join_config(configs)
    again = original.split_config(joined, "")
    assert again == {name: configs[name] for name in again} and configs["transformer"].encoder_hidden_size == 64
    # All four keys, also of the size that both have in common: the original's XL classes read each.
    assert joined["num_key_value_heads"] == configs["condition_encoder"].num_key_value_heads
    assert {key for key in joined if key.startswith("encoder_")} == {f"encoder_{key}" for key in original._ENCODER_KEYS}
    assert f"{folder}: an XL model by its size" in caplog.text


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


def test_hub_id(tiny, expected, hub):
    """From a stand-in for the hub; what is not there is one clear error."""
    hub.add("org/name", tiny[0])
    assert_equal_arrays(native_arrays("org/name"), expected)
    with pytest.raises(InputError, match="org/other: "):
        native_arrays("org/other")


def test_layer_types_of_the_original_are_those_of_its_encoders_too(tiny, tmp_path):
    model = write_original(tiny[0], tmp_path / "original")
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    edit_json(model / "config.json", layer_types=kinds)
    configs = open_checkpoint(model).configs
    encoder, window = configs["condition_encoder"], configs["condition_encoder"].sliding_window
    assert encoder.windows(2) == encoder.timbre_windows() == (None, window)
    assert configs["audio_tokenizer"].windows(1) == (None,)
    joined = original.join_config(configs)
    assert joined["layer_types"] == kinds
    again = original.split_config(joined, "")
    assert again == {name: configs[name] for name in again}

    from_torch(model, tmp_path / "native")
    assert checkpoint.read_manifest(tmp_path / "native").configs == configs
    assert_refused(
        to_torch,
        tmp_path / "native",
        tmp_path / "back",
        ["timbre_layer_types", "--layout original"],
        layout="diffusers",
    )
    # Encoders in another order than the transformer's have no place in the original layout.
    other = dict(configs, condition_encoder=dataclasses.replace(encoder, timbre_layer_types=None))
    with pytest.raises(InputError, match="condition_encoder: timbre_layer_types is"):
        original.join_config(other)


def test_stems_checkpoint_is_known_by_its_config(tiny, tmp_path):
    model = write_original(tiny[0], tmp_path / "original")
    edit_json(model / "config.json", is_lego_sft=True)
    configs = open_checkpoint(model).configs
    assert configs["transformer"].is_lego_sft
    assert original.join_config(configs)["is_lego_sft"] is True
    assert "is_lego_sft" not in original.join_config(open_checkpoint(tiny[0]).configs)


def test_original_layout_has_the_vocabulary_as_files_of_its_own(tiny, tmp_path):
    """acestep.cpp's converter reads these, and nothing of tokenizer.json."""
    to_torch(tiny[1], tmp_path / "original", layout="original")
    folder = tmp_path / "original" / TEXT_ENCODER
    theirs = Qwen2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    text = "# Caption\nwarm lofi, café"
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert json.loads((folder / "vocab.json").read_text()) == {
        token: index for token, index in ours.get_vocab(with_added_tokens=False).items()
    }
    assert (folder / "merges.txt").read_text() == "#version: 0.2\n"
    assert theirs.encode(text) == ours.encode(text, add_special_tokens=False).ids
