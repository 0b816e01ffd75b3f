"""The text encoder against transformers' Qwen3, and its config against transformers' own."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import Qwen3Config
from transformers import Qwen3Model as TorchQwen3

from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint
from acestep_jax.models.config import TextEncoderConfig
from acestep_jax.models.kernels.blockwise import QUERY_BLOCK
from acestep_jax.models.runtime import Runtime
from tests.parity import assert_close, make_pair, relative_error, run_torch

SMALL = dict(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)
CASES = {
    "default": {},
    "attention_bias": dict(attention_bias=True),
    "theta_eps": dict(rope_parameters={"rope_type": "default", "rope_theta": 100.0}, rms_norm_eps=0.1),
    "multi_head": dict(num_key_value_heads=4, num_hidden_layers=1),
}
# Of Qwen/Qwen3-Embedding-0.6B, in the form of transformers 4.
PUBLISHED = """{
  "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
  "eos_token_id": 151643, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
  "intermediate_size": 3072, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen3",
  "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
  "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
  "torch_dtype": "bfloat16", "transformers_version": "4.51.3", "use_cache": true, "use_sliding_window": false,
  "vocab_size": 151669
}"""

# One function for all tests, so that what was compiled for one is at hand for the next.
run = jax.jit(lambda network, ids: network(ids))


def written(config):
    """What transformers writes to config.json."""
    return json.loads(config.to_json_string(use_diff=True))


def pair(**changes):
    theirs = TorchQwen3(Qwen3Config(**SMALL | changes))
    return make_pair("text_encoder", theirs, TextEncoderConfig.from_hf(written(theirs.config)))


def tokens(length, batch=2, seed=0):
    return np.random.default_rng(seed).integers(0, SMALL["vocab_size"], (batch, length))


def torch_hidden(theirs, ids):
    return run_torch(lambda ids: theirs(ids).last_hidden_state, ids)


@pytest.mark.parametrize("case", CASES)
def test_matches_torch(case):
    theirs, ours = pair(**CASES[case])
    ids = tokens(19)
    assert_close(run(ours, ids), torch_hidden(theirs, ids))


def test_long_prompt_matches_torch():
    """Longer than a block of queries, by a number that leaves the last block part empty; causal across blocks."""
    theirs, ours = pair()
    ids = tokens(QUERY_BLOCK + 89)
    assert_close(run(ours, ids), torch_hidden(theirs, ids))


def test_padding_does_not_reach_earlier_tokens():
    theirs, ours = pair()
    ids, padding = tokens(19), tokens(12, seed=1)
    found = np.asarray(run(ours, np.concatenate([ids, padding], axis=1)))
    assert_close(found[:, :19], torch_hidden(theirs, ids))
    # Earlier tokens do reach later ones.
    swapped = np.concatenate([padding, ids], axis=1)
    assert relative_error(np.asarray(run(ours, swapped))[:, 12:], found[:, :19]) > 0.01


def test_embedding_is_the_table_of_torch():
    theirs, ours = pair()
    ids = tokens(19)
    expected = run_torch(theirs.get_input_embeddings(), ids)
    np.testing.assert_array_equal(jax.jit(lambda network, ids: network.embed_tokens(ids))(ours, ids), expected)


def test_compute_dtype_is_the_runtimes():
    config = TextEncoderConfig.from_hf(written(Qwen3Config(**SMALL)))
    model = checkpoint.abstract("text_encoder", config, Runtime(dtype="bfloat16"))
    assert jax.eval_shape(run, model, tokens(3)).dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in checkpoint.leaves(model).values())


def test_defaults_are_the_published_model():
    assert TextEncoderConfig.from_hf(json.loads(PUBLISHED)) == TextEncoderConfig()


@pytest.mark.parametrize("case", CASES)
def test_config_goes_to_transformers_and_back(case):
    config = Qwen3Config(**SMALL | CASES[case], dtype="bfloat16")  # of the weights: not ours to compute in
    ours = TextEncoderConfig.from_hf(written(config))
    again = Qwen3Config(**json.loads(json.dumps(ours.to_hf())))
    for name in ("rope_parameters", "head_dim", "hidden_act", "layer_types", *ours.to_hf()):
        if name not in ("architectures", "model_type", "rope_theta"):
            assert getattr(again, name) == getattr(config, name), name
    assert TextEncoderConfig.from_hf(written(again)) == ours


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_rope_head_dim": 8}, "qk_rope_head_dim"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "scaled rotary"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}}, "scaled rotary"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    ],
)
def test_config_rejects_another_model(changes, message):
    with pytest.raises(InputError, match=f"(?s)somewhere.json.*{message}"):
        TextEncoderConfig.from_hf(written(Qwen3Config(**SMALL)) | changes, "somewhere.json")
