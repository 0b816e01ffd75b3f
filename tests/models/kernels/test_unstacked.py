"""Unstacked layers compute what stacked ones do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from acestep_jax.io import checkpoint
from acestep_jax.io.adapter import Adapter
from acestep_jax.models.adapters import apply_adapters, prepare_adapter
from acestep_jax.models.config import LoRAConfig, TransformerConfig
from acestep_jax.models.kernels import unstacked
from acestep_jax.models.kernels.unstacked import FusedLinear, unstacking_pays
from acestep_jax.models.quantization import quantize
from acestep_jax.models.transformer import AceStepTransformer1DModel, TimeEmbedding
from tests.parity import assert_close, normal

pytestmark = pytest.mark.unit

SIZE = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
CONFIG = TransformerConfig(**SIZE, num_hidden_layers=4, sliding_window=8, attention_bias=True)
X, CONTEXT, CONDITION = normal(2, 41, 64), normal(2, 41, 128, seed=1), normal(2, 9, 32, seed=2)
TIME = np.float32([0.9, 0.3])


@functools.cache
def network():
    """A network, all of whose parameters are random."""
    made = jax.jit(lambda: AceStepTransformer1DModel(CONFIG, rngs=nnx.Rngs(0)))()
    leaves = {
        name: jnp.asarray(leaf[...] + 0.1 * normal(*leaf.shape, seed=i))
        for i, (name, leaf) in enumerate(sorted(checkpoint.leaves(made).items()))
    }
    return checkpoint.assemble(checkpoint.abstract("transformer", CONFIG), leaves)


def adapted(layers):
    """The network with an adapter of these layers."""
    shapes, leaves = checkpoint.leaf_shapes("transformer", CONFIG), {}
    for i, layer in enumerate(layers):
        *stack, inputs, outputs = shapes[f"{layer}.kernel"].shape
        leaves[f"{layer}.lora_a"] = 0.3 * normal(*stack, inputs, 4, seed=i)
        leaves[f"{layer}.lora_b"] = 0.3 * normal(*stack, 4, outputs, seed=i)
    adapter = Adapter(LoRAConfig(rank=4, alpha=8.0, targets=layers), leaves)
    return apply_adapters(network(), [prepare_adapter(network(), adapter.leaves, adapter.config.scaling)], [0.7])


def partly_quantised():
    """The network in int8 but for one layer, as a LoKr adapter leaves it, which is merged into a copy of the kernel."""
    made = quantize(network(), "int8")
    made.layers.self_attn.to_k = made.layers.self_attn.to_k.restored()
    return made


@jax.jit
def velocity(model):
    """Of a network as in the loop of denoising: time, keys and values of the condition are computed before."""
    time = TimeEmbedding(*model.embed_time(TIME, TIME / 3))
    lengths = np.int32([41, 30]), np.int32([9, 5])
    keys_values = model.embed_condition(CONDITION)
    return model(X, time, None, keys_values, CONTEXT, lengths=lengths[0], encoder_lengths=lengths[1])


NETWORKS = {
    "plain": (network, (True, True)),
    "int8": (lambda: quantize(network(), "int8"), (True, True)),
    "partly int8": (partly_quantised, (False, True)),
    # Where one of several layers has an adapter, none are fused.
    "adapter of queries": (lambda: adapted(("layers.self_attn.to_q",)), (False, True)),
    "adapter of the last": (lambda: adapted(("layers.mlp.up_proj", "layers.self_attn.to_v")), (False, False)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_velocity(name):
    make, fused = NETWORKS[name]
    stacked = make()
    apart = jax.jit(AceStepTransformer1DModel.unstacked)(stacked)
    assert len(apart.layers) == 4
    layer = apart.layers[1]
    assert tuple(isinstance(first, FusedLinear) for first in (layer.self_attn.to_q, layer.mlp.gate_proj)) == fused
    assert_close(velocity(apart), velocity(stacked), 2e-6)
    assert not isinstance(stacked.layers, nnx.List)  # what it was made of stays as it was


def test_where_it_pays(monkeypatch):
    assert not unstacking_pays(0, 100)  # on a CPU
    monkeypatch.setattr(unstacked, "platform", lambda: "gpu")
    assert unstacking_pays(75, 100) and not unstacking_pays(76, 100)
    assert not unstacking_pays(0, None)
