"""What the tests of adapters share: a small network in both frameworks, random adapters, and PEFT's."""

import copy
import functools

import jax
import numpy as np
import torch
from diffusers import AceStepTransformer1DModel as TorchTransformer
from diffusers.models.transformers.ace_step_transformer import AceStepAttention
from peft import LoraConfig, get_peft_model

from acestep_jax.io import checkpoint
from acestep_jax.io.adapter import Adapter
from acestep_jax.models.config import LoRAConfig, TransformerConfig
from tests.parity import make_pair, normal, run_torch

SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=8,
    layer_types=["sliding_attention"] * 8,  # of one kind, which compiles in half the time; enough for deeper networks
)
CONFIG = TransformerConfig(**SMALL)
ATTENTION = tuple(f"layers.{part}.to_{x}" for part in ("self_attn", "cross_attn") for x in ("q", "k", "v", "out"))
MLP = tuple(f"layers.mlp.{name}_proj" for name in ("gate", "up", "down"))
OTHERS = ("condition_embedder", "time_embed.linear_2", "time_embed_r.time_proj")
PEFT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "gate_proj", "up_proj", "down_proj", *OTHERS]
INPUTS = (
    normal(2, 61, 64),
    np.array([0.9, 0.3], np.float32),
    np.array([0.3, 0.1], np.float32),
    normal(2, 7, 32, seed=1),
    normal(2, 61, 128, seed=2),
)


@functools.cache
def pair():
    """diffusers' network and ours, with the same weights; copy before changing it."""
    return make_pair("transformer", TorchTransformer(**SMALL), CONFIG)


@jax.jit
def velocity(model):
    return model(*INPUTS)


def torch_velocity(model):
    return run_torch(model, *INPUTS, return_dict=False)[0]


def random_adapter(config=CONFIG, layers=(*ATTENTION, *MLP, *OTHERS), *, rank=4, alpha=8.0, use_dora=False, seed=0):
    """An adapter all of whose parameters are random, large enough to matter."""
    shapes, leaves = checkpoint.leaf_shapes("transformer", config), {}
    for i, layer in enumerate(layers):
        *stack, inputs, outputs = shapes[f"{layer}.kernel"].shape
        leaves[f"{layer}.lora_a"] = normal(*stack, inputs, rank, seed=100 * seed + i) / inputs**0.5
        leaves[f"{layer}.lora_b"] = 0.1 * normal(*stack, rank, outputs, seed=100 * seed + i)
        if use_dora:
            leaves[f"{layer}.lora_magnitude"] = 1 + 0.2 * normal(*stack, outputs, seed=100 * seed + i)
    return Adapter(LoRAConfig(rank=rank, alpha=alpha, targets=layers, dropout=0.1, use_dora=use_dora), leaves)


def peft_model(seed=0, **options):
    """PEFT on a copy of diffusers' network, with random values for all that it trains."""
    options = dict(r=4, lora_alpha=8, target_modules=PEFT_TARGETS) | options
    model = get_peft_model(copy.deepcopy(pair()[0]), LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if ".lora_A." in name:
                value.copy_(noise / value.shape[1] ** 0.5)
            elif ".lora_B." in name:
                value.copy_(0.1 * noise)
            elif ".lora_magnitude_vector." in name:
                value.mul_(1 + 0.2 * noise)
    return model


def torch_adapter(model, use_dora=False):
    """The adapter of a `peft_model`, put together without the converter."""
    found = {name.replace(".default", ""): p.detach().numpy() for name, p in model.named_parameters()}
    leaves = {}
    for layer in (*ATTENTION, *MLP, *OTHERS):
        torch_name = layer.replace("to_out", "to_out.0")
        rows = [torch_name.replace("layers.", f"layers.{i}.") for i in range(4)] if "layers" in layer else [torch_name]
        parts = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
        if use_dora:
            parts["lora_magnitude"] = "lora_magnitude_vector.weight"
        for ours, theirs in parts.items():
            values = [found[f"base_model.model.{row}.{theirs}"].T for row in rows]
            leaves[f"{layer}.{ours}"] = np.stack(values) if "layers" in layer else values[0]
    return Adapter(LoRAConfig(rank=4, alpha=8, targets=(*ATTENTION, *MLP, *OTHERS), use_dora=use_dora), leaves)


class OriginalAttention(AceStepAttention):
    """diffusers' attention with the modules called as in the original model, for what goes by their names."""

    to_q = property(lambda self: self.q_proj)
    to_k = property(lambda self: self.k_proj)
    to_v = property(lambda self: self.v_proj)
    to_out = property(lambda self: (self.o_proj, torch.nn.Identity()))


def original_model():
    """A copy of the torch network with the module names of the original decoder."""
    model = copy.deepcopy(pair()[0])
    for attention in [m for m in model.modules() if isinstance(m, AceStepAttention)]:
        parts = {f"{x}_proj": attention._modules.pop(f"to_{x}") for x in "qkv"}
        parts["o_proj"] = attention._modules.pop("to_out")[0]
        attention.__class__ = OriginalAttention
        for name, part in parts.items():
            setattr(attention, name, part)
    return model
