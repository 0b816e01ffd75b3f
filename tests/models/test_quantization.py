"""Weights of 8 bits in the networks: what is quantised, that it computes what its values say, on every path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from acestep_jax import InputError, make_mesh
from acestep_jax.distributed import variable_sharding
from acestep_jax.io import checkpoint
from acestep_jax.models.adapters import AdaptedLinear, apply_adapters, prepare_adapter
from acestep_jax.models.config import LoRAConfig, PlannerConfig, TextEncoderConfig, TransformerConfig
from acestep_jax.models.layers import rotary_embedding
from acestep_jax.models.lora import add_lora, merge_loras
from acestep_jax.models.quantization import QuantizedLinear, dequantize, parts, quantize, quantize_array
from acestep_jax.models.qwen3 import Qwen3Model
from acestep_jax.models.runtime import QUANTIZATIONS, Runtime
from tests.parity import assert_close, normal, random_network, relative_error

unit = pytest.mark.unit

SIZE = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
# Layers of one kind, which compile in half the time.
CONFIG = TransformerConfig(**SIZE, num_hidden_layers=3, sliding_window=8, layer_types=("sliding_attention",) * 3)
VOCABULARY = dict(vocab_size=300, first_code=160, num_codes=130, eos_token_id=7)
INPUTS = (normal(2, 41, 64), np.float32([0.9, 0.3]), np.float32([0.9, 0.3]), normal(2, 9, 32), normal(2, 41, 128))
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12) * 11 % 160

run = jax.jit(lambda network, *inputs: network(*inputs))


@functools.cache
def network(kind=None):
    if kind is None:
        return random_network("transformer", CONFIG)
    return jax.jit(functools.partial(quantize, kind=kind))(network())


def error_of(found, expected):
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


def restored(made):
    """Return the network with plain weights in place of those of 8 bits, computed by NumPy."""
    arrays = {name: np.asarray(leaf[...]) for name, leaf in checkpoint.leaves(made).items()}
    for name, (scale, axis) in parts(made).items():
        arrays[name] = arrays[name].astype(np.float32) * np.expand_dims(arrays.pop(scale), axis)
    plain = checkpoint.abstract("transformer", CONFIG)
    return checkpoint.assemble(plain, {name: jnp.asarray(value) for name, value in arrays.items()})


@unit
def test_what_is_quantised():
    """The linear layers of stacks, and tables of embeddings; nothing else."""
    made = checkpoint.abstract("transformer", CONFIG, Runtime(quantization="int8"))
    found = set(parts(made))
    linears = {f"{a}.{b}" for a in ("self_attn", "cross_attn") for b in ("to_q", "to_k", "to_v", "to_out")}
    linears |= {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert found == {f"layers.{name}.kernel" for name in linears}
    config = TextEncoderConfig(**SIZE, num_hidden_layers=1, vocab_size=9)
    encoder = jax.eval_shape(lambda: quantize(Qwen3Model(config, rngs=nnx.Rngs(0)), "fp8"))
    assert "embed_tokens.embedding" in parts(encoder) and encoder.embed_tokens.scale.shape == (9,)
    assert encoder.runtime.quantization == "fp8"
    with pytest.raises(ValueError, match="layers.* quantised already"):
        quantize(made, "int8")


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_network_that_is_not_there_has_the_same_leaves(kind):
    made = checkpoint.abstract("transformer", CONFIG, Runtime(quantization=kind))
    describe = lambda network: {n: (v.shape, v.dtype) for n, v in checkpoint.leaves(network).items()}  # noqa: E731
    assert describe(made) == describe(network(kind))
    assert parts(made) == parts(network(kind))


@unit
def test_bytes_are_half_of_bfloat16():
    """And 0.1% more for scales, at published widths."""
    shapes = lambda kind: checkpoint.leaf_shapes("transformer", TransformerConfig(num_hidden_layers=2), kind)  # noqa: E731
    layers = lambda kind, itemsize: sum(  # noqa: E731
        np.prod(s.shape) * (itemsize or s.dtype.itemsize) for n, s in shapes(kind).items() if n.startswith("layers.")
    )
    assert 0.5 < layers("int8", None) / layers(None, 2) < 0.502


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_values_and_scales_compute_what_they_stand_for(kind):
    """The network equals the plain one with the same weights; and that is near the one that they were made from."""
    found = run(network(kind), *INPUTS)
    assert_close(found, run(restored(network(kind)), *INPUTS))
    assert 0 < error_of(found, run(network(), *INPUTS)) < {"int8": 0.02, "fp8": 0.1}[kind]


def test_scanned_layers_compute_what_unrolled_ones_do():
    made = network("int8")

    @jax.jit
    def unrolled(made, x, t, r, condition, context):
        h = made.proj_in_conv(jnp.concatenate([context, x], axis=-1))
        layers = [jax.tree.map(lambda leaf, i=i: leaf[i], made.layers) for i in range(CONFIG.num_hidden_layers)]
        rope = rotary_embedding(h.shape[1], CONFIG.head_dim, CONFIG.rope_theta)
        temb, modulation = made.embed_time(t, r)
        for layer, window in zip(layers, made.windows, strict=True):
            h = layer(h, modulation, made.condition_embedder(condition), rope=rope, window=window)
        shift, scale = jnp.split(made.scale_shift_table[...] + temb[:, None], 2, axis=1)
        return made.proj_out_conv(made.norm_out(h) * (1 + scale) + shift)[:, : x.shape[1]]

    assert_close(run(made, *INPUTS), unrolled(made, *INPUTS))


@pytest.mark.slow
def test_mixed_precision_multiplies_float16():
    """As cards without bfloat16 need it: 8 bits are exact in float16."""
    plain = {name: leaf[...] for name, leaf in checkpoint.leaves(network("int8")).items()}
    made = checkpoint.abstract("transformer", CONFIG, Runtime.of("mixed_float16", quantization="int8"))
    made = checkpoint.assemble(made, {n: plain[n].astype(leaf.dtype) for n, leaf in checkpoint.leaves(made).items()})
    text = str(jax.make_jaxpr(lambda network, inputs: network(*inputs))(made, INPUTS))
    assert "i8[3,32,64]" in text and "f16[32,64]" in text
    assert error_of(run(made, *INPUTS), run(network("int8"), *INPUTS)) < 3e-3


@pytest.mark.slow
def test_eight_devices_compute_what_one_does():
    """Scales are split as the outputs of their kernels are."""
    mesh, made = make_mesh(fsdp=2, tensor=2, sequence=2), network("int8")
    leaves = checkpoint.leaves(made)
    placed = {name: jax.device_put(v[...], variable_sharding(v, mesh)) for name, v in leaves.items()}
    assert placed["layers.mlp.up_proj.scale"].sharding.spec == P(None, "tensor")
    abstract = checkpoint.abstract("transformer", CONFIG, Runtime(quantization="int8"))
    with jax.set_mesh(mesh):
        found = run(checkpoint.assemble(abstract, placed), *INPUTS)
    assert_close(found, run(made, *INPUTS))


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_planner(kind):
    """Decoding token by token gives the logits of a full pass; both are near those of the weights that were
    quantised. The rows of heads have the scales of the table's."""
    config = PlannerConfig(**SIZE, num_hidden_layers=2, **VOCABULARY)
    plain = random_network("planner", config)
    made, start = jax.jit(lambda model: quantize(model, kind).split())(plain), np.int32([0, 3])

    @functools.partial(jax.jit, static_argnames="prompt")
    def decoded(model, tokens, *, prompt):
        hidden, cache = model.prefill(tokens[:, :prompt], start, model.init_cache(2, 12))
        head, found = model.code_head(), []
        for position in range(prompt, 12):
            found.append(model.code_logits(hidden, head))
            hidden, cache = model.decode(tokens[:, position], position, start, cache, window=12)
        return jnp.stack([*found, model.code_logits(hidden, head)], axis=1)[..., :131]

    whole = jax.jit(lambda model, tokens: model.logits(model.hidden_states(tokens, start)))
    every = np.asarray(whole(made, TOKENS))
    columns = [config.eos_token_id, *range(config.first_code, config.first_code + config.num_codes)]
    assert_close(decoded(made, TOKENS, prompt=10), every[:, 9:][..., columns])
    assert 0 < error_of(every[0], whole(plain, TOKENS)[0]) < {"int8": 0.02, "fp8": 0.2}[kind]


def factors(made, kind, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, np.float32) / 8  # noqa: E731
    layer, stack, inputs, outputs = "layers.self_attn.to_q", CONFIG.num_hidden_layers, 32, 32
    if kind == "lokr":
        found = {f"{layer}.lokr_w1": draw(stack, 4, 4), f"{layer}.lokr_w2": draw(stack, 8, 8)}
    else:
        found = {f"{layer}.lora_a": draw(stack, inputs, 3), f"{layer}.lora_b": draw(stack, 3, outputs)}
        if kind == "dora":
            found[f"{layer}.lora_magnitude"] = 1 + draw(stack, outputs) ** 2
    return prepare_adapter(made, found, 1.5)


@pytest.mark.parametrize("kind", ["dora", pytest.param("lokr", marks=pytest.mark.slow)])  # DoRA is LoRA with a gain
def test_adapters_compute_beside_or_instead_of_quantised_weights(kind):
    """What they do to the weights that the 8 bits stand for. LoRA and DoRA leave these as they are; a layer that LoKr
    changes is quantised no longer, for its change is less than a step."""
    made = network("int8")
    adapted = apply_adapters(made, [factors(made, kind)], [0.7])
    plain = restored(made)
    expected = run(apply_adapters(plain, [factors(plain, kind)], [0.7]), *INPUTS)
    assert_close(run(adapted, *INPUTS), expected)
    assert relative_error(expected, run(plain, *INPUTS)) > 1e-3
    layer = adapted.layers.self_attn.to_q
    assert isinstance(layer, nnx.Linear if kind == "lokr" else AdaptedLinear) and not isinstance(layer, QuantizedLinear)
    assert layer.kernel.dtype == (jnp.float32 if kind == "lokr" else jnp.int8)
    off = apply_adapters(made, [factors(made, kind)], [0.0])
    np.testing.assert_array_equal(run(off, *INPUTS), run(made, *INPUTS))


@pytest.mark.heavy
@unit
def test_training_and_merging_are_refused():
    with pytest.raises(InputError, match="an adapter is trained with weights in float32.*found int8"):
        add_lora(network("int8"), LoRAConfig(rank=2), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="adapters are merged with weights in float32.*found float8_e4m3fn"):
        merge_loras(network("fp8"), [])
    with pytest.raises(InputError, match="Runtime.quantization: expected one of None, int8, fp8, found 'int4'"):
        Runtime(quantization="int4")


@unit
def test_arrays():
    weight = normal(2, 16, 8)
    values, scale = jax.jit(lambda weight: quantize_array(weight, "int8", -2))(weight)
    assert values.shape == (2, 16, 8) and scale.shape == (2, 8) and scale.dtype == jnp.float32
    assert (np.abs(np.asarray(dequantize(values, scale) - weight)) <= np.asarray(scale)[:, None] * 0.5001).all()
