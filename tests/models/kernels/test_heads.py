"""The norm and rotation of heads in one kernel, in interpret mode, against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax.models.kernels import heads
from acestep_jax.models.layers import rotary_embedding
from tests.parity import assert_close, normal

pytestmark = pytest.mark.unit

rotation = jax.jit(rotary_embedding, static_argnums=(0, 1, 2))


@pytest.fixture
def fused(monkeypatch):
    """The kernel in interpret mode, of small tiles, and the plain form; both of x, scale and tables."""
    monkeypatch.setattr(heads, "ROWS", (16, 8))
    kernel = jax.jit(lambda *x: heads._fused(*x, 1e-6, True))
    return kernel, jax.jit(lambda *x: heads._plain(*x, 1e-6))


def arguments(dtype, rotated, tokens=40):
    x, scale = normal(2, tokens, 3, 128, seed=0), 1 + 0.1 * normal(128, seed=1)
    tables = rotation(tokens, 128, 1e6) if rotated else None
    return jnp.asarray(x, dtype), jnp.asarray(scale, dtype), tables


@pytest.mark.heavy
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_kernel(fused, dtype, limit, rotated):
    """In bfloat16 to two last bits: XLA for CPUs may leave out the roundings within either form."""
    kernel, plain = fused
    x = arguments(dtype, rotated)
    found, expected = (np.asarray(f(*x), np.float32) for f in (kernel, plain))
    assert_close(found, expected, limit)


@pytest.mark.heavy
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_derivatives(fused, dtype, limit, rotated):
    """By x and scale, over several tiles of both axes. In bfloat16 the plain form rounds between its steps."""
    x, scale, rope = arguments(dtype, rotated)
    weights = normal(*x.shape, seed=2)

    def gradients(f):
        loss = lambda *args: jnp.sum(f(*args, rope).astype(jnp.float32) * weights)  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, scale)

    for found, expected in zip(*map(gradients, fused), strict=True):
        assert found.dtype == expected.dtype
        assert_close(np.asarray(found, np.float32), np.asarray(expected, np.float32), limit)


def test_a_cpu_has_no_kernel():
    x = arguments("float32", True)
    assert not heads.suits(128)
    chosen, plain = (jax.jit(lambda *x, f=f: f(*x, eps=1e-6)) for f in (heads.normalise, heads._plain))
    np.testing.assert_array_equal(chosen(*x), plain(*x))
