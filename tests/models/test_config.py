"""What a config refuses, by name of the field, and what it understands."""

import pytest

from acestep_jax import InputError
from acestep_jax.models.config import (
    AudioTokenDetokenizerConfig,
    AudioTokenizerConfig,
    AutoencoderConfig,
    ConditionEncoderConfig,
    TextEncoderConfig,
    TransformerConfig,
)

pytestmark = pytest.mark.unit

SLIDING, FULL = "sliding_attention", "full_attention"
REFUSED = {
    "zero": (TransformerConfig, dict(hidden_size=0), "TransformerConfig.hidden_size: expected a positive integer"),
    "text": (
        TransformerConfig,
        dict(num_hidden_layers="4"),
        "num_hidden_layers: expected a positive integer, found '4'",
    ),
    "fraction": (TransformerConfig, dict(patch_size=2.0), "patch_size: expected a positive integer, found 2.0"),
    "true": (TransformerConfig, dict(sliding_window=True), "sliding_window: expected a positive integer, found True"),
    "null": (TransformerConfig, dict(head_dim=None), "head_dim: expected a positive integer, found None"),
    "width": (
        TransformerConfig,
        dict(encoder_hidden_size=0),
        "encoder_hidden_size: expected a positive integer or null",
    ),
    "number": (TransformerConfig, dict(rope_theta="1e6"), "rope_theta: expected a number, zero or more, found '1e6'"),
    "negative": (TransformerConfig, dict(attention_dropout=-0.1), "attention_dropout: expected a number, zero or more"),
    "flag": (TransformerConfig, dict(attention_bias="no"), "attention_bias: expected true or false, found 'no'"),
    "heads": (TransformerConfig, dict(num_attention_heads=6, num_key_value_heads=4), "(6) must be a multiple of"),
    "odd heads": (
        ConditionEncoderConfig,
        dict(head_dim=15),
        "ConditionEncoderConfig.head_dim: expected an even number",
    ),
    "few layer types": (TransformerConfig, dict(layer_types=[FULL]), "24 layers need as many entries, found 1"),
    "unknown layer type": (AudioTokenDetokenizerConfig, dict(layer_types=["foo"]), "layer_types: expected sliding_att"),
    "odd ratio": (AutoencoderConfig, dict(downsampling_ratios=(2, 3, 4, 6, 10)), "expected even numbers, found [3]"),
    "ratios": (AutoencoderConfig, dict(downsampling_ratios=(2, 4)), "must have the same length"),
    "bad ratio": (AutoencoderConfig, dict(channel_multiples=[1, "2"]), "channel_multiples: expected positive integers"),
    "no list": (AutoencoderConfig, dict(channel_multiples=2), "channel_multiples: expected positive integers, found 2"),
    "quantizer": (AudioTokenizerConfig, dict(fsq_dim=64), "fsq_dim: the quantizer reads the pooler's output"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    config, values, message = REFUSED[case]
    with pytest.raises(InputError) as error:
        config(**values)
    assert message in str(error.value)


FOREIGN = {
    "unknown": ({"foo": 1, "bar": 2}, "here: unknown key(s) bar, foo; TextEncoderConfig knows"),
    "own": ({"remat": "full"}, "unknown key(s) remat"),
    "scaled": ({"rope_scaling": {"type": "yarn"}}, "scaled rotary embeddings are not supported"),
    "scaled, new form": ({"rope_parameters": {"rope_type": "yarn"}}, "scaled rotary embeddings are not supported"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', found 'gelu'"),
    "window": ({"use_sliding_window": True}, "use_sliding_window"),
    "layers": ({"layer_types": [SLIDING]}, "layer_types: the text encoder has only full attention"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_config_refused(case):
    values, message = FOREIGN[case]
    with pytest.raises(InputError) as error:
        TextEncoderConfig.from_hf(values, "here")
    assert message in str(error.value)


def test_text_encoder_config_of_either_transformers_version():
    notes = {"model_type": "qwen3", "torch_dtype": "bfloat16", "max_window_layers": 28, "use_sliding_window": False}
    old = TextEncoderConfig.from_hf(notes | {"rope_theta": 5.0, "rope_scaling": None})
    new = TextEncoderConfig.from_hf(notes | {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}})
    assert old == new and old.rope_theta == 5.0


@pytest.mark.parametrize("config", [TransformerConfig, ConditionEncoderConfig, AudioTokenizerConfig, AutoencoderConfig])
def test_to_hf_is_the_inverse(config):
    values = config().to_hf()
    assert not values.keys() & {"dtype", "param_dtype", "remat"}
    assert config.from_hf(values | {"_class_name": "X", "_diffusers_version": "1"}) == config()


def test_windows():
    config = TransformerConfig(num_hidden_layers=3, sliding_window=7)
    assert config.windows(3) == (7, None, 7)
    assert TransformerConfig(num_hidden_layers=2, layer_types=[FULL, SLIDING, FULL]).windows(2) == (None, 128)


def test_turbo():
    assert TransformerConfig(is_turbo=True).turbo and TransformerConfig(model_version="turbo").turbo
    assert not TransformerConfig(model_version="base").turbo
