"""Adapters computed beside the weights of a network, whose scales are data."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from acestep_jax import InputError, make_mesh
from acestep_jax.distributed import variable_sharding
from acestep_jax.io import checkpoint
from acestep_jax.io.adapter import merge_adapters
from acestep_jax.models.adapters import AdaptedLinear, apply_adapters, dora_gain, prepare_adapter, rescale_adapters
from acestep_jax.models.config import TransformerConfig
from acestep_jax.models.layers import linear
from acestep_jax.models.lora import merge_loras
from acestep_jax.models.runtime import Runtime
from acestep_jax.models.transformer import AceStepTransformer1DModel
from tests.adapters import (
    ATTENTION,
    MLP,
    OTHERS,
    SMALL,
    pair,
    peft_model,
    random_adapter,
    torch_adapter,
    torch_velocity,
    velocity,
)
from tests.parity import assert_close, normal, relative_error

KINDS = {"lora": {}, "dora": dict(use_dora=True)}


def factors(network, adapters):
    return [prepare_adapter(network, adapter.leaves, adapter.config.scaling) for adapter in adapters]


def applied(network, adapters, scales):
    return apply_adapters(network, factors(network, adapters), scales)


def three():
    """Adapters of both kinds, of different ranks and layers."""
    return [
        random_adapter(),
        random_adapter(layers=(*ATTENTION, *OTHERS), rank=2, alpha=3.0, use_dora=True, seed=1),
        random_adapter(layers=(*MLP, *OTHERS), rank=3, alpha=1.0, use_dora=True, seed=2),
    ]


# LoRA on its own is compared with PEFT's in `tests/convert/test_convert_lora.py` and `tests/io/test_adapter_reader.py`.
@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
def test_matches_peft(kind):
    theirs = peft_model(**KINDS[kind])
    network = pair()[1]
    ours = applied(network, [torch_adapter(theirs, **KINDS[kind])], [1.0])
    assert isinstance(ours.layers.self_attn.to_out, AdaptedLinear)
    assert isinstance(network.layers.self_attn.to_out, nnx.Linear)
    assert_close(velocity(ours), torch_velocity(theirs))


SCALES = {"trained": [1.0, 1.0, 1.0], "mixed": [0.7, 1.5, -0.4], "one is off": [0.3, 0.0, 1.0]}


@pytest.mark.parametrize("case", SCALES)
def test_matches_merged_weights(case):
    """LoRA and DoRA together, with and without biases, in any order."""
    network, adapters, scales = pair()[1], three(), SCALES[case]
    merged = velocity(merge_adapters(network, adapters, scales))
    assert relative_error(velocity(network), merged) > 0.05
    assert_close(velocity(applied(network, adapters, scales)), merged)
    assert_close(velocity(applied(network, adapters[::-1], scales[::-1])), merged)


def test_other_scales_are_other_data():
    """They share every array but the scales themselves, compile nothing, and give what a new network would."""
    network, adapters = pair()[1], three()
    prepared = factors(network, adapters)
    first = apply_adapters(network, prepared, [1.0, 1.0, 1.0])
    first_velocity, programs = velocity(first), velocity._cache_size()
    second = rescale_adapters(first, prepared, [0.2, -1.0, 0.5])
    assert_close(velocity(second), velocity(apply_adapters(network, prepared, [0.2, -1.0, 0.5])), 1e-6)
    assert relative_error(velocity(second), first_velocity) > 0.05
    assert velocity._cache_size() == programs
    np.testing.assert_array_equal(velocity(first), first_velocity)  # which has kept its scales
    base, before, after = (checkpoint.leaves(x) for x in (network, first, second))
    for name, variable in after.items():
        shared = before[name].get_value() is variable.get_value()
        assert shared != name.endswith((".lora_scale", ".lora_gain")), name
        if name in base:
            assert base[name].get_value() is variable.get_value(), name


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_scale_zero_is_the_base_bit_for_bit(tiny, dtype):
    (network,) = checkpoint.load(tiny[1], dtype=dtype, names=["transformer"]).values()
    config = network.config
    layers = (*ATTENTION, *MLP, *OTHERS)
    adapters = [random_adapter(config, layers, use_dora=dora, seed=dora) for dora in (False, True)]
    channels, hidden = config.audio_acoustic_hidden_dim, config.encoder_hidden_size or config.hidden_size
    inputs = normal(1, 50, channels), normal(1, 7, hidden), normal(1, 50, 2 * channels)
    time = jnp.array([0.9])

    @jax.jit
    def run(network):
        return network(inputs[0], time, time, *inputs[1:])

    base = run(network)
    np.testing.assert_array_equal(run(applied(network, adapters, [0.0, 0.0])), base)
    assert relative_error(run(applied(network, adapters, [1.0, 1.0])), base) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_nearer_than_merged_weights(kind):
    """With changes of the size that training makes, a tenth of the weight."""
    layer = linear(256, 256, ("embed", "mlp"), Runtime(dtype="bfloat16", param_dtype="bfloat16"), rngs=nnx.Rngs(0))
    network, weight = nnx.Dict(layer=layer), np.float64(layer.kernel[...])
    a, b = normal(256, 8) / 16, 0.1 * normal(8, 256) / 8**0.5
    parameters, expected = {"layer.lora_a": a, "layer.lora_b": b}, weight + np.float64(a) @ b
    if kind == "dora":
        norm = np.linalg.norm(expected, axis=0)
        parameters["layer.lora_magnitude"] = np.float32(norm * (1 + 0.1 * normal(256)))
        expected = expected / norm * parameters["layer.lora_magnitude"]
    x = jnp.asarray(normal(64, 256), jnp.bfloat16)

    def error(network):
        y = network.layer(x)
        assert y.dtype == jnp.bfloat16
        return np.linalg.norm(np.float64(y) - np.float64(x) @ expected) / np.linalg.norm(np.float64(x) @ expected)

    beside = error(apply_adapters(network, [prepare_adapter(network, parameters, 1.0)], [1.0]))
    assert beside < 0.8 * error(merge_loras(network, [(parameters, 1.0, 1.0)]))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [dict(data=2, tensor=2, fsdp=2), dict(fsdp=2, tensor=2, sequence=2)])
def test_on_a_mesh(axes):
    """The same as on one device; factors are split like the kernels they belong to."""
    network, adapters, scales = pair()[1], three(), [0.7, 1.5, -0.4]
    reference = velocity(applied(network, adapters, scales))
    mesh = make_mesh(**axes)
    leaves = checkpoint.leaves(network)
    placed = {name: jax.device_put(v[...], variable_sharding(v, mesh)) for name, v in leaves.items()}
    with jax.set_mesh(mesh):
        placed = checkpoint.assemble(network, placed)
        prepared = factors(placed, adapters)
        first = apply_adapters(placed, prepared, [1.0, 1.0, 1.0])
        split = rescale_adapters(first, prepared, scales)
        assert_close(velocity(split), reference)
    for name, variable in checkpoint.leaves(split).items():
        assert variable[...].sharding == variable_sharding(variable, mesh), name
    up, down = split.layers.mlp.up_proj, split.layers.mlp.down_proj  # [L, embed, mlp], [L, mlp, embed]
    for variable, spec in (
        (up.lora_a, (None, "fsdp", None)),
        (up.lora_b, (None, None, "tensor")),
        (up.lora_gain, (None, "tensor")),
        (down.lora_a, (None, "tensor", None)),
        (down.lora_b, (None, None, "fsdp")),
    ):
        assert tuple(variable[...].sharding.spec) == spec, variable


@pytest.mark.slow
def test_scales_take_no_memory_of_the_weights():
    """A wide network: applying takes the factors, another scale a few vectors, a DoRA norm one layer at a time."""
    config = TransformerConfig(**SMALL | dict(hidden_size=256, intermediate_size=512, num_hidden_layers=8))
    network = AceStepTransformer1DModel(config, rngs=nnx.Rngs(0))
    adapters = [random_adapter(config, ATTENTION, use_dora=dora, seed=dora) for dora in (False, True)]
    kernels = sum(v[...].nbytes for name, v in checkpoint.leaves(network).items() if name.endswith("kernel"))
    prepared = factors(network, adapters)
    first = apply_adapters(network, prepared, [1.0, 1.0])
    rescale_adapters(first, prepared, [0.5, 0.5])

    def allocated(make):
        gc.collect()
        before = {id(array) for array in jax.live_arrays()}
        made = make()
        gc.collect()
        return made, sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)

    _, taken = allocated(lambda: apply_adapters(network, prepared, [1.0, 0.5]))
    size = sum(value.nbytes for adapter in adapters for value in adapter.leaves.values())
    assert 0 < taken < 1.1 * size < kernels / 4
    second, taken = allocated(lambda: rescale_adapters(first, prepared, [0.5, 0.2]))
    assert 0 < taken < size / 4
    for name, variable in checkpoint.leaves(network).items():
        pointer = checkpoint.leaves(second)[name].get_value().unsafe_buffer_pointer()
        assert pointer == variable.get_value().unsafe_buffer_pointer(), name

    layer, adapter = network.layers.self_attn.to_q, adapters[1].leaves
    parts = [adapter[f"layers.self_attn.to_q.lora_{part}"] for part in ("a", "b", "magnitude")]
    memory = jax.jit(dora_gain).lower(layer.kernel[...], *parts, 2.0).compile().memory_analysis()
    assert memory.temp_size_in_bytes < layer.kernel[...].nbytes / 2


def test_changing_a_scale_compiles_nothing(caplog):
    network, adapters = pair()[1], three()
    prepared = factors(network, adapters)
    first = rescale_adapters(apply_adapters(network, prepared, [1.0, 1.0, 1.0]), prepared, [0.1, 0.2, 0.3])
    velocity(first)
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        velocity(rescale_adapters(first, prepared, [0.9, -0.2, 0.0]))
    assert not [message for message in caplog.messages if "ompil" in message]


def test_an_adapter_of_another_layer():
    adapter = random_adapter(layers=("layers.self_attn.to_q",))
    leaves = {name.replace("self_attn", "lstm"): value for name, value in adapter.leaves.items()}
    with pytest.raises(InputError, match="layers.lstm.to_q is not a linear layer of this network"):
        prepare_adapter(pair()[1], leaves, 1.0)
