"""Queries, keys and values out of one product in one kernel, in interpret mode, against the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax.models.kernels import heads_gpu
from acestep_jax.models.layers import rotary_embedding
from tests.parity import assert_close, normal

pytestmark = pytest.mark.unit

ENDS = 3 * 32, 5 * 32  # three heads of queries, two of keys and two of values
EPS = 1e-6

# Compiled as wholes: operations one by one take ten times as long to compile.
fused = jax.jit(lambda *x: heads_gpu._fused(*x, ENDS, EPS, True))
plain = jax.jit(lambda *x: heads_gpu._plain(*x, ENDS, EPS))
split = jax.jit(functools.partial(heads_gpu.split, ends=ENDS, eps=EPS))
tables = jax.jit(rotary_embedding, static_argnums=(0, 1, 2))


def arguments(dtype, tokens):
    scales = (jnp.asarray(1 + 0.1 * normal(32, seed=i), dtype) for i in (1, 2))
    return jnp.asarray(normal(2, tokens, 7 * 32), dtype), *scales, tables(tokens, 32, 1e6)


@pytest.mark.heavy
@pytest.mark.parametrize("tokens", [32, 75])  # one tile; the last of three shares tokens with the one before
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_kernel(dtype, limit, tokens):
    x = arguments(dtype, tokens)
    for part, expected in zip(fused(*x), plain(*x), strict=True):
        assert part.shape == expected.shape and part.dtype == dtype
        assert_close(np.asarray(part, np.float32), np.asarray(expected, np.float32), limit)


@pytest.mark.heavy
def test_derivatives():
    x = arguments("float32", 32)
    tangents = jax.tree.map(np.ones_like, x)
    slopes = [jax.jit(functools.partial(jax.jvp, f))(x, tangents)[1] for f in (fused, plain)]
    for part, expected in zip(*slopes, strict=True):
        assert_close(part, expected, 1e-6)


def test_a_cpu_has_no_kernel():
    x = arguments("float32", 40)
    for part, expected in zip(split(*x), plain(*x), strict=True):
        np.testing.assert_array_equal(part, expected)
