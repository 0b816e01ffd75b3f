"""Splash attention, interpreted on a CPU, against a dense masked softmax in float64 and the form in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax.models.kernels import blockwise, fused
from tests.attention import dense, inputs, within
from tests.parity import assert_close, normal


def splash(*arrays, lengths=None):
    return fused.splash(*arrays, key_lengths=lengths, interpret=True)


# T, S and key lengths: several tiles, of which the last are padded; padding alone, and neither.
SPLASH = [(200, 300, (300, 170)), (130, 70, None), (128, 256, None)]


@pytest.mark.parametrize(("t", "s", "lengths"), SPLASH)
def test_splash(t, s, lengths, monkeypatch):
    monkeypatch.setattr(fused, "SPLASH_BLOCK", 128)
    q, k, v = inputs(t, s, head_dim=128)
    lengths = None if lengths is None else np.array(lengths, np.int32)
    assert_close(jax.jit(splash)(q, k, v, lengths=lengths), dense(q, k, v, within(lengths, s)), 1e-5)


def test_splash_gradients():
    arrays = inputs(140, 200, head_dim=128)
    lengths, weights = np.array([200, 90], np.int32), normal(2, 140, 4, 128, seed=3)

    def gradients(kernel):
        loss = jax.grad(lambda *x: jnp.sum(kernel(*x) * weights), argnums=(0, 1, 2))
        return jax.jit(loss)(*arrays)

    expected = gradients(lambda *x: blockwise.chunked(*x, key_lengths=lengths))
    for found, reference in zip(gradients(lambda *x: splash(*x, lengths=lengths)), expected, strict=True):
        assert_close(found, reference, 1e-4)
