"""The native format by one small network, without conversion: written, read back, cast, refused."""

import os

import numpy as np
import pytest

from acestep_jax import InputError
from acestep_jax.io import checkpoint, checkpoint_writer
from acestep_jax.models.config import AutoencoderConfig
from acestep_jax.models.registry import FAMILY
from tests.parity import normal

pytestmark = pytest.mark.unit
CONFIG = AutoencoderConfig(
    encoder_hidden_size=4,
    decoder_channels=4,
    decoder_input_channels=2,
    channel_multiples=(1, 1),
    downsampling_ratios=(2, 2),
)


@pytest.fixture(scope="module")
def arrays():
    shapes = checkpoint.leaf_shapes("vae", CONFIG)
    return {f"vae.{name}": normal(*shape.shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


@pytest.fixture
def folder(arrays, tmp_path):
    checkpoint_writer.save(tmp_path / "made", {"vae": CONFIG}, arrays.items(), None, {"made by": "a test"})
    return tmp_path / "made"


def loaded(folder, **options):
    return {
        f"vae.{name}": value[...]
        for name, value in checkpoint.leaves(checkpoint.load(folder, names=["vae"], **options)["vae"]).items()
    }


def test_what_is_saved_is_loaded(folder, arrays):
    manifest = checkpoint.read_manifest(folder, {"vae"})
    assert set(manifest.configs) == {"vae"} and manifest.configs["vae"].hop_length == 4
    found = loaded(folder)
    assert found.keys() == arrays.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, arrays[name], err_msg=name)


def test_weights_are_cast(folder, arrays):
    for name, value in loaded(folder, dtype="bfloat16").items():
        assert value.dtype == "bfloat16"
        np.testing.assert_array_equal(value, arrays[name].astype(value.dtype), err_msg=name)


def test_a_checkpoint_is_not_overwritten(folder, arrays):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(InputError, match="made.*already exists"):
        checkpoint_writer.save(folder, {"vae": CONFIG}, arrays.items(), None, {})
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_incomplete_save_leaves_nothing(arrays, tmp_path):
    first, *rest = arrays.items()
    with pytest.raises(KeyError, match=first[0]):
        checkpoint_writer.save(tmp_path / "half", {"vae": CONFIG}, rest, None, {})
    assert not list(tmp_path.iterdir())


def test_damaged_weights_are_named(folder):
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with pytest.raises(InputError, match="weights: damaged"):
        checkpoint.load(folder, names=["vae"])


def test_the_small_model_holds_every_network():
    manifest = checkpoint.read_manifest(checkpoint.SMALL_MODEL)
    assert set(manifest.configs) == set(FAMILY.networks)
    with pytest.raises(InputError, match="has no foo"):
        checkpoint.load(checkpoint.SMALL_MODEL, names=["foo"])
