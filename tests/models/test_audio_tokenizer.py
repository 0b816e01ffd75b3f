"""Audio tokenizer, its quantizer and the detokenizer against diffusers'; codes are to be equal, not close."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepAudioTokenDetokenizer as TorchDetokenizer
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepAudioTokenizer as TorchTokenizer

from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint
from acestep_jax.models.config import AudioTokenDetokenizerConfig, AudioTokenizerConfig
from acestep_jax.models.runtime import Runtime
from tests.parity import as_torch, assert_close, convert, make_pair, normal, relative_error, run_torch

ATTENTION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=2,  # less than the five frames of a code and the token before them
    audio_acoustic_hidden_dim=12,
)
SMALL = ATTENTION | dict(fsq_dim=32)
FULL = "full_attention"
CASES = {
    "default": {},
    "wide_window": dict(sliding_window=128, num_attention_pooler_hidden_layers=1),
    "two_quantizers": dict(fsq_input_num_quantizers=2, num_attention_pooler_hidden_layers=1),
    "others": dict(attention_bias=True, layer_types=[FULL] * 2, rope_theta=10.0, rms_norm_eps=0.1, pool_window_size=3),
    "levels": dict(fsq_input_levels=[3, 4, 7], num_attention_pooler_hidden_layers=1),
}
FSQ_ALONE = dict(num_attention_pooler_hidden_layers=1)

tokenize = jax.jit(lambda network, latents, silence: network.tokenize(latents, silence))
apply = jax.jit(lambda network, x: network(x))
from_indices = jax.jit(lambda quantizer, indices: quantizer.get_output_from_indices(indices))


def pair(**changes):
    arguments = SMALL | changes
    return make_pair("audio_tokenizer", TorchTokenizer(**arguments), AudioTokenizerConfig(**arguments))


def assert_same_codes(ours, theirs):
    (quantized, indices), (expected, expected_indices) = ours, theirs
    assert indices.dtype == jnp.int32
    np.testing.assert_array_equal(indices, expected_indices)
    assert_close(quantized, expected)


# Windows are in the test of the pooler below, several quantizers in those of the quantizer.
SLOW_CASES = ("wide_window", "two_quantizers")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW_CASES)) for case in CASES]
)
def test_tokenizer_matches_torch(case):
    """53 frames: the last window is filled up with silence."""
    theirs, ours = pair(**CASES[case])
    latents, silence = normal(2, 53, 12), normal(1, 20, 12, seed=1)
    found = tokenize(ours, latents, silence)
    assert_same_codes(found, run_torch(theirs.tokenize, latents, silence))
    assert len(np.unique(found[1])) > 10
    assert_same_codes((from_indices(ours.quantizer, found[1]), found[1]), found)


@pytest.mark.parametrize("frames", [50, 3])
def test_tokenize_other_lengths(frames):
    """Whole windows need no silence, and less than one needs it too."""
    theirs, ours = pair(num_attention_pooler_hidden_layers=1)
    latents, silence = normal(2, frames, 12), normal(1, 20, 12, seed=1)
    assert_same_codes(tokenize(ours, latents, silence), run_torch(theirs.tokenize, latents, silence))


def test_pooler_matches_torch_and_its_narrow_window_bites():
    theirs, ours = pair()
    wide = convert("audio_tokenizer", theirs, dataclasses.replace(ours.config, sliding_window=128))
    x = normal(2, 10, 5, 32)
    expected = run_torch(theirs.attention_pooler, x)
    assert_close(apply(ours.attention_pooler, x), expected)
    assert relative_error(apply(wide.attention_pooler, x), expected) > 0.01


@pytest.mark.parametrize(("quantizers", "count"), [(1, 2000), (2, 2000), (3, 100)])
def test_quantizer_matches_torch(quantizers, count):
    """Vectors of many sizes, some far beyond the outermost levels.

    The finer the last grid, the more often a code hangs on the last bit: with two grids one in 200000.
    """
    theirs, ours = pair(**FSQ_ALONE, fsq_input_num_quantizers=quantizers)
    x = normal(count, 32) * np.geomspace(0.1, 10, count, dtype=np.float32)[:, None]
    expected = run_torch(theirs.quantizer, x)
    assert_same_codes(apply(ours.quantizer, x), expected)
    assert all(len(np.unique(row)) > count // 2 for row in expected[1].T)


@pytest.mark.parametrize("quantizers", [1, 2])
def test_output_from_indices_matches_torch(quantizers):
    theirs, ours = pair(**FSQ_ALONE, fsq_input_num_quantizers=quantizers)
    indices = np.random.default_rng(0).integers(0, 64000, (2, 1000, quantizers))
    found = from_indices(ours.quantizer, indices)
    assert_close(found, run_torch(theirs.quantizer.get_output_from_indices, indices))


def test_every_code_survives_the_round_trip():
    """index -> code -> index for all 64000, with projections that pass the six numbers of a code as they are."""
    theirs, ours = pair(**FSQ_ALONE)
    with torch.no_grad():
        for layer in (theirs.quantizer.project_in, theirs.quantizer.project_out):
            layer.weight.copy_(torch.eye(*layer.weight.shape))
            layer.bias.zero_()
    ours = convert("audio_tokenizer", theirs, ours.config)
    assert ours.quantizer.codebook_size == theirs.quantizer.codebook_size == 64000
    indices = np.arange(64000).reshape(1, -1, 1)
    codes = np.asarray(from_indices(ours.quantizer, indices))
    assert_close(codes, run_torch(theirs.quantizer.get_output_from_indices, indices), 2e-7)
    bound = 1 + 1 / (np.pad([8.0, 8, 8, 5, 5, 5], (0, 26), constant_values=2) - 1)
    before = (np.arctanh(codes / bound) * bound).astype(np.float32)  # undoes the soft clamp
    again, found = apply(ours.quantizer, before)
    np.testing.assert_array_equal(found, indices)
    assert_close(again, codes, 2e-7)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_keeps_the_quantizer_in_float32(param_dtype):
    theirs, ours = pair(**FSQ_ALONE)
    if param_dtype == "bfloat16":
        theirs = theirs.bfloat16()
    x = normal(20, 1000, 32)
    with torch.no_grad():
        expected = theirs.quantizer(as_torch(x))[1].numpy()
    ours = convert("audio_tokenizer", theirs.float(), ours.config, dtype="bfloat16", param_dtype=param_dtype)
    quantizer = jax.tree.map(lambda leaf: leaf.astype(param_dtype), ours.quantizer)
    quantized, found = apply(quantizer, x)
    np.testing.assert_array_equal(found, expected)
    assert quantized.dtype == from_indices(quantizer, found).dtype == jnp.bfloat16
    low = x.astype(jnp.bfloat16).astype(np.float32)
    assert np.any(np.asarray(apply(quantizer, low)[1]) != expected)  # bfloat16 before it would show


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="default"),
        pytest.param(dict(sliding_window=128), id="wide_window", marks=pytest.mark.slow),
        pytest.param(dict(attention_bias=True, layer_types=[FULL], pool_window_size=3), id="others"),
    ],
)
def test_detokenizer_matches_torch(changes):
    if "layer_types" in changes:
        changes = changes | {"num_attention_pooler_hidden_layers": 1}
    arguments = ATTENTION | changes
    theirs, ours = make_pair(
        "audio_token_detokenizer", TorchDetokenizer(**arguments), AudioTokenDetokenizerConfig(**arguments)
    )
    x = normal(2, 11, 32)
    found = apply(ours, x)
    assert found.shape == (2, 11 * ours.config.pool_window_size, 12)
    assert_close(found, run_torch(theirs, x))


def test_quantizer_must_fit_the_pooler():
    with pytest.raises(InputError, match="fsq_dim"):
        AudioTokenizerConfig(**ATTENTION, fsq_dim=64)


@pytest.mark.parametrize(
    ("name", "network", "config"),
    [
        ("audio_tokenizer", TorchTokenizer, AudioTokenizerConfig),
        ("audio_token_detokenizer", TorchDetokenizer, AudioTokenDetokenizerConfig),
    ],
)
def test_config_and_dtype(name, network, config):
    """The defaults are torch's, and a bfloat16 runtime computes in bfloat16."""
    with torch.device("meta"):
        theirs = {key: value for key, value in network().config.items() if not key.startswith("_")}
    assert config.from_hf(theirs) == config()
    small = SMALL if name == "audio_tokenizer" else ATTENTION
    model = checkpoint.abstract(name, config(**small), Runtime(dtype="bfloat16"))
    x = normal(2, 11, 5, 12) if name == "audio_tokenizer" else normal(2, 11, 32)
    assert jax.tree.leaves(jax.eval_shape(apply, model, x))[0].dtype == jnp.bfloat16
