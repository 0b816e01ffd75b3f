"""The correction in the wavelet domain against PyWavelets and the equations, in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax.diffusion import dcw
from tests.parity import assert_close, normal

pytestmark = pytest.mark.unit

# Compiled, because each of some forty operations of a filter on its own would be a program.
low_band, correct = jax.jit(dcw.low_band, static_argnums=1), jax.jit(dcw.correct, static_argnums=3)


@pytest.mark.parametrize("wavelet", dcw.WAVELETS)
@pytest.mark.parametrize("frames", [1, 2, 7, 31, 64])
def test_low_band_matches_pywavelets(wavelet, frames):
    """Even and odd lengths, also below those of the filters."""
    pywt = pytest.importorskip("pywt")
    np.testing.assert_allclose(dcw.WAVELETS[wavelet], pywt.Wavelet(wavelet).rec_lo, rtol=1e-12)
    d = normal(2, frames, 3).astype(np.float64)
    low, _ = pywt.dwt(d, wavelet, mode="zero", axis=1)
    expected = pywt.idwt(low, None, wavelet, mode="zero", axis=1)[:, :frames]
    with jax.enable_x64(True):
        found = low_band(jnp.asarray(d), dcw.WAVELETS[wavelet])
    np.testing.assert_allclose(found, expected, atol=1e-14)


@pytest.mark.parametrize("wavelet", dcw.WAVELETS)
def test_filters_are_orthogonal(wavelet):
    """What PyWavelets need not be installed for: unit sum of squares, orthogonal to their even shifts, and P P = P."""
    taps = np.array(dcw.WAVELETS[wavelet])
    for shift in range(0, len(taps), 2):
        assert taps[shift:] @ taps[: len(taps) - shift] == pytest.approx(float(shift == 0), abs=1e-8)
    assert taps.sum() == pytest.approx(2**0.5)
    d = np.pad(normal(1, 40, 2), ((0, 0), (20, 20), (0, 0)))  # away from the ends, where d is cut
    once = low_band(jnp.asarray(d), dcw.WAVELETS[wavelet])
    assert_close(low_band(once, dcw.WAVELETS[wavelet]), once, 1e-5)


def test_scales():
    """Of each mode, at the beginning of every step."""
    times = np.float32([1.0, 0.75, 0.25, 0.0])
    expected = {
        "low": [[0.1, 0], [0.075, 0], [0.025, 0]],
        "high": [[0, 0], [0, 0.025], [0, 0.075]],
        "double": [[0.1, 0], [0.075, 0.05], [0.025, 0.15]],
        "pix": [[0.1, 0.1]] * 3,
    }
    assert expected.keys() == set(dcw.MODES)
    for mode, values in expected.items():
        found = dcw.scales(mode, times, 0.1, 0.2)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, values, atol=1e-7)


def test_haar_is_the_mean_of_pairs():
    """x' + low mean(d) + high (d - mean(d)); the last frame of an odd number pairs with nothing, that is with zero."""
    x, x0 = normal(2, 7, 3), normal(2, 7, 3, seed=1)
    d = np.pad((x - x0).astype(np.float64), ((0, 0), (0, 1), (0, 0)))
    mean = np.repeat((d[:, ::2] + d[:, 1::2]) / 2, 2, axis=1)
    expected = x + (0.3 * mean + 0.2 * (d - mean))[:, :7]
    assert_close(correct(jnp.asarray(x), jnp.asarray(x0), jnp.float32([0.3, 0.2])), expected, 1e-6)


@pytest.mark.parametrize("wavelet", ["haar", "sym8"])
def test_padding_after_a_song_changes_nothing(wavelet):
    x, x0 = normal(1, 9, 3), normal(1, 9, 3, seed=1)
    scales = jnp.float32([0.3, 0.2])
    alone = correct(jnp.asarray(x), jnp.asarray(x0), scales, wavelet)
    behind = np.full((1, 7, 3), 5.0, np.float32)
    padded = correct(
        jnp.asarray(np.concatenate([x, behind], 1)), jnp.asarray(np.concatenate([x0, behind], 1)), scales, wavelet
    )
    assert_close(padded[:, :9], alone, 1e-6)


@pytest.mark.parametrize("wavelet", dcw.WAVELETS)
def test_equal_scales_need_no_wavelet(wavelet):
    """Which is why `pix` has none."""
    x, x0 = normal(1, 9, 3), normal(1, 9, 3, seed=1)
    found = correct(jnp.asarray(x), jnp.asarray(x0), jnp.float32([0.3, 0.3]), wavelet)
    assert_close(found, x + 0.3 * (x - x0), 1e-6)
