"""The kernels for NVIDIA GPUs on an attached card, not interpreted: `JAX_PLATFORMS=cuda python -m pytest tests/models`.

Attention in half precision is compared with float64; networks with themselves in float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax.models.attention import attention
from acestep_jax.models.config import PlannerConfig, TransformerConfig
from acestep_jax.models.kernels import heads_gpu, rows_gpu, token_gpu, windowed
from acestep_jax.models.kernels.attention import choose_kernel
from acestep_jax.models.kernels.platform import compute_capability
from acestep_jax.models.layers import rotary_embedding
from acestep_jax.models.qwen3 import Qwen3ForCausalLM
from acestep_jax.models.runtime import Runtime
from acestep_jax.models.transformer import AceStepTransformer1DModel
from tests.attention import band, dense, inputs, within
from tests.parity import assert_close, normal, random_network, relative_error, run_jax

if jax.default_backend() != "gpu" or compute_capability() < 8:
    pytest.skip(
        "needs an NVIDIA GPU of compute capability 8.0 or higher, and JAX_PLATFORMS=cuda", allow_module_level=True
    )

# JAX warns of each kernel; without the backend, plain JAX is used.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

HALF = {"bfloat16": 1e-2, "float16": 2e-3}  # limits
LENGTHS = np.array([700, 431], np.int32)


def of_dtype(dtype, *arrays):
    return [jnp.asarray(x, dtype) for x in arrays]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", windowed.HEAD_DIMS)
@pytest.mark.parametrize(("t", "window"), [(700, 128), (700, 50), (150, 128)])
def test_windowed_attention(dtype, head_dim, t, window):
    q, k, v = of_dtype(dtype, *inputs(t, head_dim=head_dim))
    lengths = np.minimum(LENGTHS, [t, t // 2 + 1])
    assert choose_kernel("auto", q, k) == "cudnn"
    got = jax.jit(functools.partial(attention, window=window))(q, k, v, key_lengths=lengths)
    expected = dense(q, k, v, band(t, window) & within(lengths, t))
    sees = (np.arange(t) - window < lengths[:, None])[:, :, None, None]
    assert np.isfinite(np.asarray(got, np.float32)).all()
    assert_close(np.where(sees, got, 0), np.where(sees, expected, 0), HALF[dtype])


@pytest.mark.parametrize("part", range(3))
def test_windowed_attention_of_a_part_of_the_queries(part):
    t, window, size = 900, 128, 300
    q, k, v = of_dtype("bfloat16", *inputs(t, head_dim=128))
    expected = dense(q, k, v, band(t, window) & within(LENGTHS, t))
    first = part * size
    around = [
        jnp.pad(x, ((0, 0), (window, window), (0, 0), (0, 0)))[:, first : first + size + 2 * window] for x in (k, v)
    ]
    kernel = jax.jit(windowed.windowed, static_argnums=5)
    got = kernel(q[:, first : first + size], *around, jnp.int32(first), LENGTHS, window)
    sees = (np.arange(first, first + size) - window < LENGTHS[:, None])[:, :, None, None]
    assert_close(np.where(sees, got, 0), np.where(sees, expected[:, first : first + size], 0), 1e-2)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("s", [700, 513])
def test_full_attention(dtype, s):
    q, k, v = of_dtype(dtype, *inputs(700, s, head_dim=128))
    lengths = np.minimum(LENGTHS, s)
    got = jax.jit(attention)(q, k, v, key_lengths=lengths)
    assert_close(np.asarray(got, np.float32), dense(q, k, v, within(lengths, s)), HALF[dtype])


@pytest.mark.parametrize(("window", "lengths"), [(128, None), (None, LENGTHS)])
def test_derivatives(window, lengths):
    arrays = of_dtype("bfloat16", *inputs(700, head_dim=64))
    weights = normal(*arrays[0].shape, seed=3)

    def gradients(kernel, arrays):
        run = functools.partial(attention, window=window, key_lengths=lengths, kernel=kernel)
        loss = lambda *x: jnp.sum(run(*x).astype(jnp.float32) * weights)  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

    expected = gradients("xla", of_dtype("float32", *arrays))
    for found, wanted in zip(gradients("auto", arrays), expected, strict=True):
        assert_close(np.asarray(found, np.float32), wanted, 3e-2)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("tokens", [32, 375])
def test_heads_of_a_product(dtype, limit, tokens):
    ends = 16 * 128, 24 * 128
    scales = (jnp.asarray(1 + 0.1 * normal(128, seed=i), dtype) for i in (1, 2))
    x = jnp.asarray(normal(2, tokens, 32 * 128), dtype), *scales, rotary_embedding(tokens, 128, 1e6)
    split = jax.jit(functools.partial(heads_gpu.split, ends=ends, eps=1e-6), static_argnames="plain")
    for part, expected in zip(split(*x), split(*x, plain=True), strict=True):
        assert_close(np.asarray(part, np.float32), np.asarray(expected, np.float32), limit)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize(("count", "size"), [(1, 3072), (2, 2560), (2, 1024)])
def test_products_of_few_vectors(dtype, limit, count, size):
    x, rows = of_dtype(dtype, normal(count, size), normal(300, size))
    assert rows_gpu.suits(x, rows) and not rows_gpu.suits(jnp.tile(x, (3, 1)), rows)
    expected = np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T
    assert_close(np.asarray(jax.jit(rows_gpu.multiply)(x, rows), np.float32), expected, limit)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize(("n", "k", "position"), [(16, 8, 70), (16, 8, 300), (32, 8, 511), (24, 8, 300), (5, 1, 300)])
def test_attention_of_a_token(dtype, limit, n, k, position):
    b, h, slots = 2, 128, 512
    qkv, *arrays = of_dtype(
        dtype, normal(b, (n + 2 * k) * h), normal(b, k, h, slots, seed=1), normal(b, k, slots, h, seed=2)
    )
    scales = of_dtype(dtype, 1 + 0.1 * normal(h, seed=3), 1 + 0.1 * normal(h, seed=4))
    angles = normal(b, h // 2, seed=5)
    assert token_gpu.suits(h, slots)
    attend = jax.jit(functools.partial(token_gpu.attend, eps=1e-6))
    given = qkv, scales, (np.cos(angles), np.sin(angles)), *arrays, np.int32([0, 70]), jnp.int32(position)
    expected = token_gpu.attend(*given, eps=1e-6, interpret=True)
    for found, wanted in zip(attend(*given), expected, strict=True):
        assert_close(np.asarray(found, np.float32), np.asarray(wanted, np.float32), limit)


def test_transformer_in_bfloat16():
    """Both forms of its layers, with window and without, odd lengths and padding, against float32."""
    config = TransformerConfig(num_hidden_layers=4)
    frames = 1001
    t = np.array([0.9, 0.3], np.float32)
    shapes = (2, frames, 64), (2, 140, config.hidden_size), (2, frames, 128)
    x, condition, context = (normal(*shape, seed=i) for i, shape in enumerate(shapes))
    arrays = x, t, t / 3, condition, context
    exact = random_network("transformer", config)
    expected = run_jax(exact, *arrays)
    half = random_network("transformer", config, Runtime.of("bfloat16"))
    stacked = run_jax(half, *arrays)
    unstacked = run_jax(jax.jit(AceStepTransformer1DModel.unstacked)(half), *arrays)
    assert relative_error(stacked, expected) < 3e-2
    assert relative_error(unstacked, expected) < 3e-2
    plain = random_network("transformer", config, Runtime(dtype="bfloat16", param_dtype="bfloat16", attention="xla"))
    assert relative_error(unstacked, expected) < 1.5 * relative_error(run_jax(plain, *arrays), expected)


def test_planner_as_separate_layers():
    """Each decoded token as in a forward pass over the whole text, in float32."""
    vocabulary = dict(vocab_size=1000, first_code=500, num_codes=400, eos_token_id=1)
    config = PlannerConfig(**vocabulary, num_hidden_layers=2, num_attention_heads=8, hidden_size=256)
    network = random_network("planner", config)
    assert isinstance(network, Qwen3ForCausalLM)
    tokens = np.random.default_rng(0).integers(0, 500, (2, 80)).astype(np.int32)
    expected = run_jax(network, tokens)
    split = network.split()
    start = np.zeros(2, np.int32)
    hidden, cache = jax.jit(lambda m, x: m.prefill(x, start, m.init_cache(2, 128)))(split, tokens[:, :64])
    assert_close(hidden, expected[:, 63], 1e-5)
    decode = jax.jit(lambda m, x, i, c: m.decode(x, i, start, c, window=128))
    for i in range(64, 80):
        hidden, cache = decode(split, tokens[:, i], jnp.int32(i), cache)
        assert_close(hidden, expected[:, i], 1e-5)
