"""The parts that the networks share against NumPy in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from acestep_jax.models.layers import (
    RMSNorm,
    SwiGLU,
    TimestepEmbedding,
    apply_rotary,
    lecun_normal,
    rotary_embedding,
    shapes_only,
    sinusoid,
)
from acestep_jax.models.runtime import Runtime
from tests.parity import assert_close, normal

pytestmark = pytest.mark.unit
RUNTIME = Runtime()

# Compiled as a whole: operations one by one take several times as long to compile.
run = jax.jit(lambda layer, *arrays: layer(*arrays))
waves = jax.jit(sinusoid, static_argnums=1)


def double(variable):
    return np.asarray(variable[...], np.float64)


def silu(x):
    return x / (1 + np.exp(-x))


def test_rms_norm():
    norm, x = RMSNorm(12, 1e-6, RUNTIME), normal(2, 5, 12)
    norm.scale.set_value(jnp.asarray(normal(12, seed=1)))
    expected = x / np.sqrt(np.mean(np.square(x, dtype=np.float64), -1, keepdims=True) + 1e-6)
    assert_close(norm(x), expected * double(norm.scale), 1e-6)


def test_rms_norm_keeps_the_dtype_and_sums_in_float32():
    """A mean of squares of 300 entries of 100 is beyond what bfloat16 adds up."""
    x = jnp.full((1, 300), 100.0, jnp.bfloat16)
    found = RMSNorm(300, 1e-6, RUNTIME)(x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found, np.float32), 1.0)


def test_swiglu():
    layer, x = jax.jit(lambda: SwiGLU(8, 20, RUNTIME, rngs=nnx.Rngs(0)))(), normal(2, 5, 8)
    gate, up, down = (double(part.kernel) for part in (layer.gate_proj, layer.up_proj, layer.down_proj))
    assert_close(run(layer, x), (silu(x @ gate) * (x @ up)) @ down, 1e-6)


def test_sinusoid():
    """Cosines, then sines, at 10000^(-i / 4)."""
    t = np.array([0.0, 1.0, 999.5], np.float32)
    phase = t[:, None].astype(np.float64) * 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(waves(t, 8), np.concatenate([np.cos(phase), np.sin(phase)], 1), atol=1e-4)
    np.testing.assert_array_equal(waves(t, 8)[0], [1] * 4 + [0] * 4)


def test_timestep_embedding():
    layer = jax.jit(lambda: TimestepEmbedding(8, RUNTIME, rngs=nnx.Rngs(0)))()
    t = np.array([0.1, 0.9], np.float32)
    for i, part in enumerate((layer.linear_1, layer.linear_2, layer.time_proj)):
        part.bias.set_value(jnp.asarray(normal(*part.bias.shape, seed=i)))
    hidden = np.asarray(jax.jit(sinusoid)(1000 * t), np.float64)
    for part in (layer.linear_1, layer.linear_2):
        hidden = silu(hidden) if part is layer.linear_2 else hidden
        hidden = hidden @ double(part.kernel) + double(part.bias)
    found, modulation = run(layer, t)
    assert_close(found, hidden, 1e-5)
    expected = silu(hidden) @ double(layer.time_proj.kernel) + double(layer.time_proj.bias)
    assert_close(modulation, expected.reshape(2, 6, 8), 1e-5)


def test_rotary_embedding():
    """Position p turns the pair (i, i + H / 2) by p theta^(-2i / H), as multiplying a complex number does."""
    x = normal(2, 30, 3, 8)
    angle = np.arange(30)[:, None] * 500.0 ** (-np.arange(0, 8, 2) / 8)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[None, :, None]
    found = jax.jit(lambda x: apply_rotary(x, rotary_embedding(30, 8, 500.0)))(x)
    assert_close(found, np.concatenate([turned.real, turned.imag], -1), 1e-5)


def test_scores_of_rotated_heads_depend_on_distance_alone():
    q, k = (np.broadcast_to(normal(1, 1, 1, 16, seed=i), (1, 40, 1, 16)) for i in range(2))

    @jax.jit
    def products(q, k):
        turned = [apply_rotary(x, rotary_embedding(40, 16, 10000.0)) for x in (q, k)]
        return jnp.einsum("btnh,bsnh->ts", *turned, precision=jax.lax.Precision.HIGHEST)

    scores = products(q, k)
    for distance in (0, 3, -7):
        np.testing.assert_allclose(np.diag(scores, distance), np.diag(scores, distance)[0], atol=1e-4)
    assert np.ptp(np.asarray(scores)) > 0.1


def test_nothing_is_drawn_where_only_shapes_are_wanted():
    arguments = jax.random.key(0), (3, 4), jnp.float32
    with shapes_only():
        assert not lecun_normal()(*arguments).any()
    np.testing.assert_array_equal(lecun_normal()(*arguments), nnx.initializers.lecun_normal()(*arguments))
