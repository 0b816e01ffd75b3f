"""Precisions: which one a device gets, and that float16 products under it keep what plain float16 loses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from acestep_jax import InputError
from acestep_jax.io import checkpoint
from acestep_jax.models.attention import attention
from acestep_jax.models.autoencoder import AutoencoderOobleck
from acestep_jax.models.condition_encoder import AceStepConditionEncoder
from acestep_jax.models.config import AutoencoderConfig, ConditionEncoderConfig, TextEncoderConfig, TransformerConfig
from acestep_jax.models.kernels.platform import default_precision, precision_for
from acestep_jax.models.kernels.products import float16_dot_general, to_float16
from acestep_jax.models.qwen3 import Qwen3Model
from acestep_jax.models.runtime import PRECISIONS, Runtime
from acestep_jax.models.transformer import AceStepTransformer1DModel
from tests.parity import normal, relative_error, run_jax

unit = pytest.mark.unit

SIZE = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
LENGTHS = np.array([9, 5], np.int32)
# Scales of weights, by the ends of their names, under which activations leave the range of float16 (65504), and not
# that of float32: the product within an MLP, and so the residual stream after it.
SCALES = {"mlp.gate_proj.kernel": 300.0, "mlp.up_proj.kernel": 300.0}
NETWORKS = {
    "transformer": (
        AceStepTransformer1DModel,
        TransformerConfig(**SIZE, num_hidden_layers=2, sliding_window=8, layer_types=("sliding_attention",) * 2),
        SCALES,
        (normal(2, 41, 64), np.float32([0.9, 0.3]), np.float32([0.9, 0.3]), normal(2, 9, 32), normal(2, 41, 128)),
        {},
    ),
    "text_encoder": (
        Qwen3Model,
        TextEncoderConfig(**SIZE, num_hidden_layers=2, vocab_size=64),
        SCALES,
        (np.arange(18, dtype=np.int32).reshape(2, 9),),
        {},
    ),
    "condition_encoder": (
        AceStepConditionEncoder,
        ConditionEncoderConfig(
            **SIZE, text_hidden_dim=16, num_lyric_encoder_hidden_layers=2, num_timbre_encoder_hidden_layers=2
        ),
        SCALES,
        (
            *(normal(2, 9, 16), np.ones((2, 9), bool), normal(2, 9, 16, seed=1), np.arange(9) < LENGTHS[:, None]),
            *(normal(2, 20, 64), np.arange(2)),
        ),
        {},
    ),
    "vae": (
        AutoencoderOobleck,
        AutoencoderConfig(
            encoder_hidden_size=8, decoder_channels=8, decoder_input_channels=4, downsampling_ratios=(2, 4),
            channel_multiples=(1, 2),
        ),
        {"decoder.conv1.kernel": 1e5, "decoder.conv2.kernel": 1e-3},
        (normal(1, 50, 4),),
        dict(method="decode"),
    ),
}  # fmt: skip


@functools.cache
def weights_of(name):
    """Return random weights by dotted path, float32."""
    make, config, _, _, _ = NETWORKS[name]
    made = jax.jit(lambda: make(config, rngs=nnx.Rngs(0)))()
    return {leaf: np.asarray(variable[...]) for leaf, variable in checkpoint.leaves(made).items()}


def network_of(name, precision):
    """Return the network with weights scaled in float32, then rounded to those of the precision."""
    _, config, scales, _, _ = NETWORKS[name]
    runtime = Runtime.of(precision)

    def scaled(leaf, value):
        factor = next((factor for end, factor in scales.items() if end in leaf), 1.0)
        return jnp.asarray((value * np.float32(factor)).astype(runtime.param_dtype))

    arrays = {leaf: scaled(leaf, value) for leaf, value in weights_of(name).items()}
    return checkpoint.assemble(checkpoint.abstract(name, config, runtime), arrays)


def result_of(name, precision):
    _, _, _, inputs, static = NETWORKS[name]
    made = run_jax(network_of(name, precision), *inputs, **static)
    return np.asarray(made[0] if isinstance(made, tuple) else made, np.float32)


# By default, `test_products_take_float16_operands` looks at every product of the transformer.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["text_encoder", "vae", "transformer", "condition_encoder"])
def test_mixed_is_right_where_float16_is_not(name):
    """Plain float16 gives NaN or infinity; the mixed precision errs no more than twice what bfloat16 does."""
    exact = result_of(name, "float32")
    assert not np.isfinite(result_of(name, "float16")).all()
    bfloat16, mixed = (relative_error(result_of(name, precision), exact) for precision in ("bfloat16", "mixed_float16"))
    print(f"{name}: error of bfloat16 {bfloat16:.2e}, of mixed_float16 {mixed:.2e}")
    assert mixed <= 2 * bfloat16


def test_products_take_float16_operands():
    """So the fast products of such a card are used: each linear layer and both products of attention."""
    _, config, _, inputs, _ = NETWORKS["transformer"]
    network = checkpoint.abstract("transformer", config, Runtime.of("mixed_float16"))
    program = jax.make_jaxpr(lambda network, inputs: network(*inputs))(network, inputs)
    kinds = [equation for equation in _equations(program.jaxpr) if equation.primitive.name == "dot_general"]
    assert kinds
    half = [e for e in kinds if {str(v.aval.dtype) for v in e.invars} == {"float16"}]
    assert all(str(e.outvars[0].aval.dtype) == "float32" for e in half)
    # What is left are the patches at both ends, which plain products compute.
    assert len(kinds) - len(half) == 2


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


@unit
def test_operands_are_scaled_by_powers_of_two():
    """Exactly, whatever the size: rows of zeros, of 1e30, of 1e-30, and at and just below a power of two."""
    x = np.float32([[0, 0], [1e30, -3e29], [1e-30, 5e-31], [4, 1], [np.nextafter(np.float32(4), np.float32(0)), 1]])
    half, scale = jax.jit(lambda x: to_float16(x, (1,)))(x)
    assert half.dtype == jnp.float16 and np.isfinite(half).all()
    assert (np.abs(np.asarray(half, np.float32)) <= 2).all()
    np.testing.assert_array_equal(np.frexp(scale)[0], 0.5)
    np.testing.assert_allclose(half.astype(np.float32) * scale, x, rtol=2**-11)


@unit
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_product(size):
    x, w = normal(3, 5, 64) * np.float32(size), normal(64, 16)
    made = float16_dot_general(jnp.asarray(x), jnp.asarray(w), (((2,), (0,)), ((), ())))
    assert made.dtype == jnp.float32
    assert relative_error(made, x.astype(np.float64) @ w) < 1e-3


@pytest.mark.parametrize("window", [None, 4])
def test_attention_to_large_values(window):
    q, k, v = normal(2, 20, 4, 8), normal(2, 20, 2, 8), normal(2, 20, 2, 8) * np.float32(1e6)
    run = jax.jit(functools.partial(attention, window=window), static_argnames="products")
    exact = run(q, k, v, key_lengths=jnp.array([20, 13]))
    made = run(q, k, v, key_lengths=jnp.array([20, 13]), products="float16")
    assert made.dtype == jnp.float32
    assert relative_error(made[0], exact[0]) < 2e-3 and relative_error(made[1, :13], exact[1, :13]) < 2e-3


@unit
@pytest.mark.parametrize(
    "platform, capability, expected",
    [
        ("cpu", 0, "float32"),
        ("tpu", 0, "bfloat16"),
        ("gpu", 7.0, "mixed_float16"),  # V100
        ("gpu", 7.5, "mixed_float16"),  # T4
        ("gpu", 8.0, "bfloat16"),  # A100
        ("gpu", 8.9, "bfloat16"),  # L4
        ("gpu", 9.0, "bfloat16"),  # H100
        ("gpu", 12.0, "bfloat16"),
        ("gpu", 0, "float32"),  # not NVIDIA's
    ],
)
def test_precision_of_a_device(platform, capability, expected):
    assert precision_for(platform, capability) == expected
    assert expected in PRECISIONS


@unit
def test_precision_of_this_device():
    assert default_precision() == default_precision(jax.make_mesh((8,), ("data",))) == "float32"


@unit
def test_runtime_of_a_precision():
    for precision in ("float32", "bfloat16", "float16"):
        assert Runtime.of(precision) == Runtime(dtype=precision, param_dtype=precision)
    mixed = Runtime(dtype="float32", param_dtype="float16", products="float16", remat="full")
    assert Runtime.of("mixed_float16", remat="full") == mixed
    with pytest.raises(InputError, match="'int8' is not a dtype of this library; use one of .*, mixed_float16"):
        Runtime.of("int8")
    for wrong in (dict(products="float16", dtype="bfloat16"), dict(products="bfloat16")):
        with pytest.raises(InputError, match="Runtime.products: expected None, or 'float16' with"):
            Runtime(**wrong)
