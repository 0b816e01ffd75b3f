"""The attention of one token in one kernel, in interpret mode, against the caches that do without it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from acestep_jax.models.attention import Attention
from acestep_jax.models.config import AttentionConfig
from acestep_jax.models.kernels import token_gpu
from acestep_jax.models.kv_cache import KernelCache, SplitCache, Step
from acestep_jax.models.runtime import Runtime
from tests.parity import assert_close, normal

B, N, K, H, SLOTS = 2, 4, 2, 32, 192
FIRST = np.int32([0, 70])  # the first block of the second song is not read

interpreted = functools.partial(token_gpu.attend, interpret=True)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def case(request):
    """An attention layer, an input, and a cache of random keys and values in one layer."""

    config = AttentionConfig(hidden_size=24, num_attention_heads=N, num_key_value_heads=K, head_dim=H)
    runtime = Runtime(dtype=request.param, param_dtype=request.param)
    part = Attention(config, runtime=runtime, rngs=nnx.Rngs(0))
    for i, norm in enumerate((part.norm_q, part.norm_k)):
        norm.scale[...] = jnp.asarray(1 + 0.2 * normal(H, seed=i), request.param)
    x = jnp.asarray(normal(B, 1, 24), request.param)
    angles = normal(B, 1, H // 2, seed=3)
    arrays = (jnp.asarray(normal(B, K, *shape, seed=4), request.param) for shape in ((H, SLOTS), (SLOTS, H)))
    return part, x, (np.cos(angles), np.sin(angles)), tuple((array,) for array in arrays)


@functools.partial(jax.jit, static_argnums=0)
def attend(kind, part, x, rope, arrays, position):
    cache = kind(*arrays)
    y, carried = cache.attend(cache.carried(), part, x, 0, Step(rope, FIRST, position, SLOTS))
    return y, cache.settled(carried, position)


@pytest.mark.parametrize("position", [70, 100, 127, 128, 191])  # the ends of blocks, and a block that is not read yet
def test_equals_a_cache_without_the_kernel(case, position, monkeypatch):
    monkeypatch.setattr(token_gpu, "attend", interpreted)
    (y, cache), (expected, plain) = (attend(kind, *case, np.int32(position)) for kind in (KernelCache, SplitCache))
    limit = 1e-6 if y.dtype == jnp.float32 else 1e-2
    assert_close(np.asarray(y, np.float32), np.asarray(expected, np.float32), limit)
    for (found,), (wanted,), (before,) in zip(cache, plain, case[-1], strict=True):
        assert found.dtype == before.dtype
        assert_close(np.asarray(found, np.float32), np.asarray(wanted, np.float32), limit)
        axis = 3 if found.shape[2] == H else 2
        others = np.delete(np.asarray(found, np.float32), position, axis)
        np.testing.assert_array_equal(others, np.delete(np.asarray(before, np.float32), position, axis))


def test_a_cpu_has_no_kernel():
    assert not token_gpu.suits(128, 512)


def test_grows_with_zeros_and_is_read_as_a_whole(case):
    cache = KernelCache(*case[-1]).grown(256)
    assert isinstance(cache, KernelCache) and cache.keys[0].shape == (B, K, H, 256)
    assert not np.asarray(cache.values[0][:, :, SLOTS:], np.float32).any()
    with pytest.raises(ValueError, match="of 256 slots is read as a whole, not 192"):
        cache.attend(cache, *case[:2], 0, Step(case[2], FIRST, np.int32(0), SLOTS))
    with pytest.raises(ValueError, match="blocks of 64 slots, found a cache of 200"):
        cache = KernelCache(*case[-1]).grown(200)
        cache.attend(cache, *case[:2], 0, Step(case[2], FIRST, np.int32(0), 200))
