"""The table between torch's tensors and ours: complete, unambiguous and exactly invertible."""

import numpy as np
import pytest
import torch
from diffusers import AceStepTransformer1DModel, AutoencoderOobleck
from diffusers.pipelines.ace_step.modeling_ace_step import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
)
from transformers import Qwen3Config, Qwen3Model

from acestep_jax.convert.random_checkpoint import SIZES
from acestep_jax.io import checkpoint, rules
from acestep_jax.io.conversion import plan
from acestep_jax.io.original import attention_name
from acestep_jax.io.pretrained import fold_weight_norm, open_checkpoint
from acestep_jax.io.safetensors_reader import Tensor
from acestep_jax.models.config import TextEncoderConfig
from acestep_jax.models.registry import FAMILY
from tests.folders import native_arrays

TORCH = {
    "transformer": AceStepTransformer1DModel,
    "condition_encoder": AceStepConditionEncoder,
    "vae": AutoencoderOobleck,
    "audio_tokenizer": AceStepAudioTokenizer,
    "audio_token_detokenizer": AceStepAudioTokenDetokenizer,
}
XL = dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=32, num_attention_heads=32)
CASES = {
    **{f"{name} tiny": (name, SIZES["tiny"][name]) for name in FAMILY.networks},
    **{f"{name} default": (name, {}) for name in FAMILY.networks},
    **{f"{name} biased": (name, SIZES["tiny"][name] | {"attention_bias": True}) for name in TORCH if name != "vae"},
    "transformer xl": ("transformer", XL | {"encoder_hidden_size": 2048}),
}
NUMBER = {"transformer default": 476, "transformer xl": 628, "condition_encoder default": 142}  # of torch tensors


def network(case):
    """The config and the tensors of a torch network, without their memory."""
    name, arguments = CASES[case]
    with torch.device("meta"):
        if name == "text_encoder":
            arguments = TextEncoderConfig(**arguments).to_hf()
            module = Qwen3Model(Qwen3Config(**arguments))
        else:
            module = TORCH[name](**arguments)
            arguments = module.config
    state = {key: Tensor(tuple(value.shape), np.dtype("float32"), None) for key, value in module.state_dict().items()}
    if name == "text_encoder":
        state = {attention_name(key): value for key, value in state.items()}
    config = FAMILY.networks[name][1].from_hf(arguments)
    return name, config, fold_weight_norm(state, None) if name == "vae" else state


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_has_one_rule_and_every_leaf_one_source(case):
    name, config, state = network(case)
    assert len(state) == NUMBER.get(case, len(state))
    shapes = checkpoint.leaf_shapes(name, config)
    sources = {}
    for key in state:
        leaf, row, rule = rules.to_jax(name, key)  # raises if not exactly one matches
        assert sources.setdefault((leaf, row), key) == key
        names, back = rules.to_torch(name, leaf, shapes[leaf].shape)
        assert names[row or 0] == key and back == rule
        assert rules.is_stacked(leaf) == (row is not None)
    rows = {leaf: range(s.shape[0]) if rules.is_stacked(leaf) else [None] for leaf, s in shapes.items()}
    assert sources.keys() == {(leaf, row) for leaf in rows for row in rows[leaf]}
    plan(name, config, state)  # raises if a shape differs


@pytest.mark.parametrize("name", FAMILY.networks)
def test_rules_are_exactly_inverse(name):
    _, config, state = network(f"{name} tiny")
    shapes = checkpoint.leaf_shapes(name, config)
    for key, tensor in state.items():
        leaf, row, rule = rules.to_jax(name, key)
        x = numbers(tensor.shape)
        ours = rule.to_jax(x)
        assert ours.shape == (shapes[leaf].shape if row is None else shapes[leaf].shape[1:]), key
        np.testing.assert_array_equal(rule.to_torch(ours), x)


def numbers(shape):
    """All different."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_no_rule_is_dead():
    used = set()
    for case in CASES:
        name, config, _ = network(case)
        used |= {rules.to_torch(name, leaf, s.shape)[1] for leaf, s in checkpoint.leaf_shapes(name, config).items()}
    assert used == {rule for table in rules.RULES.values() for rule in table}


def test_layouts():
    """Linear [out, in] -> [in, out]; convolution [out, in, k] -> [k, in, out]; transposed ones, see below."""
    x = numbers((2, 3, 4))
    to_jax = lambda network, name: rules.to_jax(network, name)[2].to_jax  # noqa: E731
    linear = to_jax("transformer", "layers.0.self_attn.to_q.weight")(x[0])
    assert linear.shape == (4, 3) and linear[3, 2] == x[0, 2, 3]
    patch = to_jax("transformer", "proj_in_conv.weight")(x)
    assert patch.shape == (4, 3, 2) and patch[3, 2, 1] == x[1, 2, 3]
    unpatch = to_jax("transformer", "proj_out_conv.weight")(x)  # torch: [in, out, k]
    assert unpatch.shape == (2, 4, 3) and unpatch[1, 3, 2] == x[1, 2, 3]
    upsample = to_jax("vae", "decoder.block.0.conv_t1.weight")(x)  # torch: [in, out, 2 * stride]
    assert upsample.shape == (2, 2, 2, 3)
    assert upsample[0, 1, 0, 2] == x[1, 2, 2] and upsample[1, 1, 0, 2] == x[1, 2, 0]


def test_row_of_a_stack_is_the_layer(tiny):
    arrays = native_arrays(tiny[0])
    stacked = 0
    for name, state in open_checkpoint(tiny[0]).tensors.items():
        for key, tensor in state.items():
            leaf, row, rule = rules.to_jax(name, key)
            value = arrays[f"{name}.{leaf}"]
            np.testing.assert_array_equal(value if row is None else value[row], rule.to_jax(tensor.read()))
            stacked += row is not None
    assert stacked > 100
