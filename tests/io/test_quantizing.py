"""Weights of 8 bits in checkpoints: at load, by conversion and by the command they are the same bits."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from acestep_jax import InputError, make_mesh
from acestep_jax.cli import main
from acestep_jax.io import cache, checkpoint
from acestep_jax.io.manifest import read_manifest
from acestep_jax.io.native import native_folder
from acestep_jax.models.quantization import NETWORKS, parts
from acestep_jax.models.runtime import QUANTIZATIONS
from tests.folders import edit_json

QUANTIZED = [name for name in NETWORKS if name != "planner"]


def bits(networks):
    """Every leaf by name, with its dtype and bytes."""
    return {
        f"{name}.{leaf}": (str(v.dtype), np.asarray(v[...]).tobytes())
        for name, network in networks.items()
        for leaf, v in checkpoint.leaves(network).items()
    }


@pytest.fixture(scope="module")
def stored(tiny, tmp_path_factory):
    """Native checkpoints that the command wrote, by kind."""
    folder = tmp_path_factory.mktemp("quantized")
    for kind in QUANTIZATIONS:
        assert main(["convert", "quantize", str(tiny[1]), str(folder / kind), "--dtype", kind]) == 0
    return {kind: folder / kind for kind in QUANTIZATIONS}


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_what_is_stored_is_what_is_made_at_load(tiny, stored, tmp_path, kind):
    """Bit for bit, also by way of the cache of conversions; and it says so of itself."""
    expected = bits(checkpoint.load(tiny[1], quantization=kind))
    assert bits(checkpoint.load(stored[kind])) == bits(checkpoint.load(stored[kind], quantization=kind)) == expected
    manifest = read_manifest(stored[kind])
    assert manifest.quantization == dict.fromkeys(QUANTIZED, kind)
    values = json.loads((stored[kind] / "config.json").read_text())
    assert values["format_version"] == 3 and json.loads((tiny[1] / "config.json").read_text())["format_version"] == 2
    converted = native_folder(tiny[0], dtype=kind, cache_dir=tmp_path)
    assert read_manifest(converted) == manifest
    assert bits(checkpoint.load(converted)) == expected
    (entry,) = cache.entries(tmp_path)
    assert entry.dtype == kind and entry.complete
    assert native_folder(tiny[0], dtype=kind, cache_dir=tmp_path) == converted
    names = {file.name for file in stored[kind].iterdir()}
    assert names == {file.name for file in tiny[1].iterdir()}
    size = lambda folder: sum(file.stat().st_size for file in (folder / "weights").rglob("*") if file.is_file())  # noqa: E731
    assert size(stored[kind]) < size(tiny[1])


def test_only_weights_that_are_not_quantised_take_a_dtype(stored):
    """Norms and projections do; values and scales stay as they are, and float32 products read them."""
    loaded = checkpoint.load(stored["int8"], dtype="bfloat16", names=["transformer"])
    found = checkpoint.leaves(loaded["transformer"])
    quantized = parts(loaded["transformer"])
    scales = {part.scale for part in quantized.values()}
    assert quantized and all(found[leaf].dtype == jnp.int8 for leaf in quantized)
    assert all(found[leaf].dtype == jnp.float32 for leaf in scales)
    assert {str(v.dtype) for leaf, v in found.items() if leaf not in {*quantized, *scales}} == {"bfloat16"}
    assert loaded["transformer"].runtime.quantization == "int8"
    assert checkpoint.load(stored["int8"], names=["transformer"])["transformer"].runtime.dtype == "float32"


def test_a_mesh_gets_its_parts(tiny, stored):
    mesh = make_mesh(tensor=2, fsdp=4)
    expected = bits(checkpoint.load(stored["int8"], names=["transformer"]))
    for source in (tiny[1], stored["int8"]):
        loaded = checkpoint.load(source, quantization="int8", mesh=mesh, names=["transformer"])
        layer = loaded["transformer"].layers.mlp.up_proj
        assert layer.kernel[...].sharding.spec == P(None, "fsdp", "tensor")
        assert layer.scale[...].sharding.spec == P(None, "tensor")
        assert bits(loaded) == expected


def test_bad_input(tiny, stored, tmp_path):
    refusals = {
        "--dtype: expected int8 or fp8, found 'int4'": [str(tiny[1]), "--dtype", "int4"],
        f"{stored['int8']}: its .* is quantised to int8, but what is quantised": [
            str(stored["int8"]),
            "--dtype",
            "int8",
        ],
        "already exists": [str(tiny[1]), "--dtype", "int8", str(stored["int8"])],
        "expected an acestep-jax checkpoint": [str(tmp_path / "absent"), "--dtype", "int8"],
    }
    from acestep_jax.io.quantizing import quantize_checkpoint

    for words, (source, _, dtype, *target) in refusals.items():
        with pytest.raises(InputError, match=words):
            quantize_checkpoint(source, target[0] if target else tmp_path / "made", dtype)
    assert not (tmp_path / "made").exists()
    message = "its transformer is quantised to int8 and cannot be quantised to fp8; leave the dtype"
    with pytest.raises(InputError, match=message):
        checkpoint.load(stored["int8"], quantization="fp8")
    with pytest.raises(InputError, match="dtype: 'int4' is not a dtype of this library; use one of .*, int8, fp8"):
        native_folder(tiny[0], dtype="int4", cache_dir=tmp_path)


def test_what_needs_other_weights_refuses(stored, tmp_path):
    from acestep_jax.convert.merge import merge_lora
    from acestep_jax.convert.to_torch import to_torch
    from acestep_jax.train.preprocess import preprocess

    (tmp_path / "songs").mkdir()
    (tmp_path / "songs" / "a.wav").write_bytes(b"")
    calls = {
        "adapters are merged into": lambda: merge_lora(stored["int8"], tmp_path / "made", []),
        "PyTorch's layouts have": lambda: to_torch(stored["int8"], tmp_path / "made", layout="diffusers"),
        "training needs": lambda: preprocess(tmp_path / "songs", tmp_path / "made", checkpoint=stored["int8"]),
    }
    for what, call in calls.items():
        with pytest.raises(InputError, match=f"is quantised to int8, but {what} weights in float32"):
            call()
    assert not (tmp_path / "made").exists()


def test_damaged_manifests(tiny, stored, tmp_path):
    for name, change, words in (
        ("kind", dict(quantization={"transformer": "int4"}), "expected int8 or fp8 for some of .*, found 'int4' for"),
        ("network", dict(quantization={"vae": "int8"}), "expected int8 or fp8 for some of .*, found 'int8' for vae"),
        ("form", dict(quantization=["int8"]), "quantization: expected a JSON object"),
        ("other", dict(quantization={}), "belongs to no network|is int8, expected float32"),
    ):
        shutil.copytree(stored["int8"], tmp_path / name)
        edit_json(tmp_path / name / "config.json", **change)
        with pytest.raises(InputError, match=words):
            checkpoint.load(tmp_path / name)
    shutil.copytree(tiny[1], tmp_path / "plain")
    edit_json(tmp_path / "plain" / "config.json", format_version=3, quantization={"transformer": "int8"})
    with pytest.raises(InputError, match=r"transformer.*(is missing|is float32, expected int8)"):
        checkpoint.load(tmp_path / "plain")
