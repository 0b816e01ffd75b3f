"""ComfyUI's files, all in one and apart, give the arrays and configs of the folder that they were made from."""

import shutil

import ml_dtypes
import numpy as np
import pytest
import torch

from acestep_jax import InputError
from acestep_jax.io import comfyui, companions, original
from acestep_jax.io.pretrained import open_checkpoint
from tests.folders import (
    MODEL,
    TEXT_ENCODER,
    VAE,
    assert_equal_arrays,
    native_arrays,
    write_comfyui,
    write_published,
)


@pytest.fixture(scope="module")
def published(standard, tmp_path_factory):
    return write_published(standard[0], tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def expected(published):
    return native_arrays(published)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Nothing comes from the hub."""

    def fetch(path, **options):
        raise InputError(f"{path}: no network here")

    monkeypatch.setattr(companions, "fetch_companion", fetch)


def add_companions(published, folder):
    shutil.copy(published / MODEL / "silence_latent.pt", folder)
    shutil.copy(published / TEXT_ENCODER / "tokenizer.json", folder)


@pytest.mark.parametrize("whole", [True, False], ids=["one file", "a file for each"])
def test_files_of_comfyui(published, expected, tmp_path, whole):
    file = write_comfyui(published, tmp_path, whole=whole)
    add_companions(published, file.parent)
    assert_equal_arrays(native_arrays(file), expected)
    found, wanted = open_checkpoint(file).configs, open_checkpoint(published).configs
    layers = {name: getattr(config, "layer_types", None) for name, config in wanted.items()}
    for name, config in wanted.items():
        changes = {} if layers[name] is None else {"layer_types": None}
        assert found[name] == type(config)(**(vars(config) | changes)), name
    assert file in open_checkpoint(file).files


def test_a_folder_with_files_for_each(published, expected, tmp_path):
    """ComfyUI's folder `models`, its parent, and a copy of the repository of split files; one of several by variant."""
    for name in ("models", "split_files"):
        file = write_comfyui(published, tmp_path / name / name, whole=False)
        add_companions(published, file.parent)
        assert_equal_arrays(native_arrays(tmp_path / name), expected)
        assert_equal_arrays(native_arrays(tmp_path / name / name), expected)
    shutil.copy(file, file.with_name("acestep_v1.5_xl_turbo_bf16.safetensors"))
    assert_equal_arrays(native_arrays(tmp_path / name, variant="turbo"), expected)
    for options, message in (({}, "several models; expected one"), ({"variant": "sft"}, "no model of the variant sft")):
        with pytest.raises(InputError, match=f"diffusion_models: {message}.*acestep_v1.5_turbo.safetensors"):
            open_checkpoint(tmp_path / name, **options)
    with pytest.raises(InputError, match="holds the variant turbo, not xl-turbo"):
        open_checkpoint(tmp_path / name, variant="xl-turbo")  # only by its name


def test_parts_in_folders_of_their_own(published, expected, tmp_path):
    """The model's file alone, with folders of the original layout beside it or given, whose tokenizer is taken."""
    file = write_comfyui(published, tmp_path / "files", whole=False)
    alone = tmp_path / "there" / file.name
    alone.parent.mkdir()
    shutil.copy(file, alone)
    shutil.copy(published / MODEL / "silence_latent.pt", alone.parent)
    with pytest.raises(InputError, match="holds only the diffusion model, and there is no vae"):
        open_checkpoint(alone)
    given = dict(vae=published / VAE, text_encoder=published / TEXT_ENCODER)
    assert_equal_arrays(native_arrays(alone, **given), expected)
    given["vae"] = tmp_path / "files" / "vae" / "ace_1.5_vae.safetensors"
    assert_equal_arrays(native_arrays(alone, **given), expected)
    for name in (VAE, TEXT_ENCODER):
        shutil.copytree(published / name, alone.parent / name)
    assert_equal_arrays(native_arrays(alone), expected)
    with pytest.raises(InputError, match="qwen_0.6b_ace15.safetensors: expected the vae, found something else"):
        open_checkpoint(alone, vae=tmp_path / "files" / "text_encoders" / "qwen_0.6b_ace15.safetensors")


def test_float8_with_scales(published, expected, tmp_path):
    """The products of layers in 8 bits, as ComfyUI's converters write them; the rest as it was."""
    scales = {}

    def quantise(state):
        found = dict(state)
        for name, value in state.items():
            if ".layers." in name and value.ndim == 2 and name.startswith("model."):
                scale = value.abs().max() / 448
                found[name] = (value / scale).to(torch.float8_e4m3fn)
                found[name.replace(".weight", ".scale_weight")] = scale
                scales[name.removeprefix("model.diffusion_model.")] = found[name].float() * scale
        return found | {"model.diffusion_model.scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}

    file = write_comfyui(published, tmp_path, whole=True, change=quantise)
    add_companions(published, file.parent)
    found = native_arrays(file)
    changed = {name for name, value in found.items() if not np.array_equal(value, expected[name])}
    assert len(changed) > 20 and {found[name].dtype for name in changed} == {np.dtype(ml_dtypes.bfloat16)}
    for name in changed:
        assert np.abs(found[name].astype(np.float32) - expected[name]).max() < 0.05 * np.abs(expected[name]).max()
    exact = native_arrays(file, dtype="float32")
    first = scales["decoder.layers.2.self_attn.q_proj.weight"].numpy().T
    np.testing.assert_array_equal(exact["transformer.layers.self_attn.to_q.kernel"][2], first)


def test_the_small_files_that_are_missing(published, tmp_path, monkeypatch):
    """They are fetched, or the error says what to download and where to put it."""
    file = write_comfyui(published, tmp_path, whole=True)
    message = "no silence_latent.pt here, .*no network here.*download acestep-v15-turbo/silence_latent.pt .*put"
    with pytest.raises(InputError, match=message):
        open_checkpoint(file)
    shutil.copy(published / MODEL / "silence_latent.pt", file.parent)
    with pytest.raises(InputError, match=f"no tokenizer.json here.*download {TEXT_ENCODER}/tokenizer.json"):
        open_checkpoint(file)
    asked = []
    opened = open_checkpoint(file, fetch=lambda path: asked.append(path) or published / path)
    assert asked == [f"{TEXT_ENCODER}/tokenizer.json"] and opened.tokenizer


def test_the_variant_is_told_by_the_name_or_given(published, tmp_path):
    file = write_comfyui(published, tmp_path, whole=True)
    add_companions(published, file.parent)
    other = file.rename(file.with_name("mine.safetensors"))
    with pytest.raises(InputError, match="mine: of which variant.; give variant .--variant. turbo, base or sft"):
        open_checkpoint(other)
    assert open_checkpoint(other, variant="base").configs["transformer"].variant == "base"
    assert open_checkpoint(other, variant="turbo").configs["transformer"].turbo
    with pytest.raises(InputError, match="holds the variant turbo, not xl-turbo"):
        open_checkpoint(other, variant="xl-turbo")


@pytest.mark.parametrize(
    "name, variant",
    [
        ("acestep_v1.5_turbo", "turbo"),
        ("acestep_v1.5_xl_turbo_bf16", "xl-turbo"),
        ("ace_step_1.5_turbo_aio", "turbo"),
        ("acestep-v15-turbo-shift3", "turbo-shift3"),
        ("acestep-v15-base", "base"),
        ("acestep_v1.5_xl_sft_fp8_e4m3fn", "xl-sft"),
    ],
)
def test_names_of_variants(name, variant):
    known = ["turbo", "base", "sft", "xl-turbo", "xl-base", "xl-sft", "turbo-shift3"]
    assert [one for one in known if original.names_variant(name, one)] == [variant]
    assert comfyui.find_variant(name, None) in variant
