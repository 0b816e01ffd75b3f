"""Both kernels with a window, interpreted on a CPU, against a dense masked softmax in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax.models.attention import attention
from acestep_jax.models.kernels import fused, windowed
from tests.attention import band, dense, inputs, within
from tests.parity import assert_close, normal


def windowed_splash(q, k, v, first_query, lengths, window):
    return fused.splash(q, k, v, window=window, first_query=first_query, key_lengths=lengths, interpret=True)


def windowed_triton(q, k, v, first_query, lengths, window):
    return windowed.windowed(q, k, v, jnp.int32(first_query), lengths, window, True)


@pytest.fixture(params=[(windowed_splash, 128), (windowed_triton, 16)], ids=["splash", "triton"])
def windowed_kernel(request, monkeypatch):
    """A kernel with a window in interpret mode, of small tiles, and the head dim that it takes."""
    monkeypatch.setattr(fused, "WINDOW_BLOCKS", (128, 128))
    monkeypatch.setattr(windowed, "QUERIES", 32)
    monkeypatch.setattr(windowed, "KEYS", 16)
    kernel, head_dim = request.param
    return jax.jit(kernel, static_argnums=5), head_dim


# Tokens, window and key lengths: several tiles, a window that is no multiple of one, fewer keys than a tile visits.
WINDOWED = [(300, 20, (300, 170)), (256, 64, (256, 1)), (40, 30, (40, 39))]


@pytest.mark.parametrize(("t", "window", "lengths"), WINDOWED)
def test_windowed_kernels(windowed_kernel, t, window, lengths):
    kernel, head_dim = windowed_kernel
    q, k, v = inputs(t, head_dim=head_dim)
    lengths = np.array(lengths, np.int32)
    expected = dense(q, k, v, band(t, window) & within(lengths, t))
    got = kernel(q, k, v, 0, lengths, window)
    sees = (np.arange(t) - window < lengths[:, None])[:, :, None, None]  # others see nothing, and get anything finite
    assert np.isfinite(got).all()
    assert_close(np.where(sees, got, 0), np.where(sees, expected, 0), 1e-5)


@pytest.mark.parametrize("part", range(3))
def test_windowed_kernels_of_a_part_of_the_queries(windowed_kernel, part):
    """As on a mesh split along time: with the neighbours' keys, zeros before the first and after the last."""
    kernel, head_dim = windowed_kernel
    t, window, size = 300, 20, 100
    q, k, v = inputs(t, head_dim=head_dim)
    lengths = np.array([300, 170], np.int32)
    expected = dense(q, k, v, band(t, window) & within(lengths, t))
    first = part * size
    around = [
        np.pad(x, ((0, 0), (window, window), (0, 0), (0, 0)))[:, first : first + size + 2 * window] for x in (k, v)
    ]
    got = kernel(q[:, first : first + size], *around, first, lengths, window)
    sees = (np.arange(first, first + size) - window < lengths[:, None])[:, :, None, None]
    assert_close(np.where(sees, got, 0), np.where(sees, expected[:, first : first + size], 0), 1e-5)


def test_derivatives_of_windowed_kernels(windowed_kernel):
    """In reverse mode, against the plain form; the one for GPUs has derivatives in forward mode as well."""
    kernel, head_dim = windowed_kernel
    arrays = inputs(140, head_dim=head_dim)
    lengths, weights = np.array([140, 90], np.int32), normal(*arrays[0].shape, seed=3)
    plain = lambda *x: attention(*x, window=20, key_lengths=lengths)  # noqa: E731
    fast = lambda *x: kernel(*x, 0, lengths, 20)  # noqa: E731
    gradients = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(f(*x) * weights), argnums=(0, 1, 2)))(*arrays)  # noqa: E731
    # What sees nothing is anything, and so are its derivatives.
    weights = np.where((np.arange(140) < lengths[:, None] + 20)[:, :, None, None], weights, 0)
    for found, expected in zip(gradients(fast), gradients(plain), strict=True):
        assert_close(found, expected, 1e-4)
    if head_dim == 16:
        slopes = [jax.jvp(f, arrays, arrays)[1] for f in (fast, plain)]
        assert_close(*slopes, 1e-5)
