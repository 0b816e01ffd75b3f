"""Queries, keys and values out of one product in one kernel, in interpret mode, against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax.models.kernels import heads_gpu
from acestep_jax.models.layers import rotary_embedding
from tests.parity import assert_close, normal

pytestmark = pytest.mark.unit

ENDS = 3 * 32, 5 * 32  # three heads of queries, two of keys and two of values


def arguments(dtype, tokens):
    scales = (jnp.asarray(1 + 0.1 * normal(32, seed=i), dtype) for i in (1, 2))
    return jnp.asarray(normal(2, tokens, 7 * 32), dtype), *scales, rotary_embedding(tokens, 32, 1e6)


@pytest.mark.heavy
@pytest.mark.parametrize("tokens", [32, 75])  # one tile; the last of three shares tokens with the one before
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_kernel(dtype, limit, tokens):
    x = arguments(dtype, tokens)
    found = heads_gpu._fused(*x, ENDS, 1e-6, True)
    for part, expected in zip(found, heads_gpu._plain(*x, ENDS, 1e-6), strict=True):
        assert part.shape == expected.shape and part.dtype == dtype
        assert_close(np.asarray(part, np.float32), np.asarray(expected, np.float32), limit)


@pytest.mark.heavy
def test_derivatives():
    x = arguments("float32", 32)
    tangents = jax.tree.map(jnp.ones_like, x)
    kernel, plain = (
        jax.jvp(lambda *x, f=f, rest=rest: f(*x, ENDS, 1e-6, *rest), x, tangents)[1]
        for f, rest in ((heads_gpu._fused, (True,)), (heads_gpu._plain, ()))
    )
    for part, expected in zip(kernel, plain, strict=True):
        assert_close(part, expected, 1e-6)


def test_a_cpu_has_no_kernel():
    x = arguments("float32", 40)
    for part, expected in zip(heads_gpu.split(*x, ends=ENDS, eps=1e-6), heads_gpu._plain(*x, ENDS, 1e-6), strict=True):
        np.testing.assert_array_equal(part, expected)
