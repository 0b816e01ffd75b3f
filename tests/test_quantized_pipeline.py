"""Songs by weights of 8 bits, from the small model of the package and the tiny planner, and what memory they count."""

import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax import AceStepPipeline, InputError, memory
from acestep_jax.io import checkpoint
from acestep_jax.models.quantization import NETWORKS

SONG = dict(lyrics="[Instrumental]", audio_duration=10.0, num_inference_steps=2, seed=0, output_type="latent")


@pytest.fixture(scope="module")
def pipe():
    return AceStepPipeline.from_pretrained(dtype="int8")


def test_songs(pipe, tmp_path):
    """Near those of the model itself, and the same, bit for bit, by the checkpoint that is saved of it."""
    for name, network in pipe.networks.items():
        assert network.runtime.quantization == ("int8" if name in NETWORKS else None), name
        assert network.runtime.dtype == "float32"
    assert pipe.transformer.layers.mlp.up_proj.kernel.dtype == jnp.int8
    found = np.asarray(pipe("lofi piano", **SONG).latents)
    exact = np.asarray(AceStepPipeline.from_pretrained()("lofi piano", **SONG).latents)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.1, error
    pipe.save_pretrained(tmp_path / "saved")
    again = AceStepPipeline.from_pretrained(tmp_path / "saved")
    assert again.transformer.runtime.quantization == "int8"
    np.testing.assert_array_equal(again("lofi piano", **SONG).latents, found)
    with pytest.raises(InputError, match="is quantised to int8 and cannot be quantised to fp8"):
        AceStepPipeline.from_pretrained(tmp_path / "saved", dtype="fp8")


def test_unknown_dtypes_are_refused():
    with pytest.raises(InputError, match="dtype: 'int4' is not a dtype of this .*; use one of .*mixed_float16, int8"):
        AceStepPipeline.from_pretrained(dtype="int4")


@pytest.mark.unit
@pytest.mark.parametrize("size", memory.SIZES)
def test_memory(size):
    """Bytes are those of the leaves: layers and tables a half of bfloat16's, all networks together less than 0.6."""
    configs = memory.configs_of(size)
    half, found = memory.weight_bytes(configs, "bfloat16"), memory.weight_bytes(configs, "bfloat16", "int8")
    for name in configs:
        if name not in NETWORKS:
            assert found[name] == half[name]
    shapes = checkpoint.leaf_shapes("text_encoder", configs["text_encoder"], "int8")
    scales = {f"{n.rpartition('.')[0]}.scale" for n, shape in shapes.items() if shape.dtype.itemsize == 1}
    expected = sum(
        int(np.prod(s.shape)) * (4 if n in scales else 1 if s.dtype.itemsize == 1 else 2) for n, s in shapes.items()
    )
    assert found["text_encoder"] == expected
    assert found["transformer"] < 0.54 * half["transformer"] and sum(found.values()) < 0.6 * sum(half.values())
    needed = [memory.needed_bytes(configs, "bfloat16", "tpu", 600.0, kind) for kind in (None, "int8")]
    assert needed[0] - needed[1] == sum(half.values()) - sum(found.values())
    turns = [memory.needed_in_turn(configs, "bfloat16", "tpu", 600.0, kind) for kind in (None, "int8")]
    assert turns[1] < turns[0]
