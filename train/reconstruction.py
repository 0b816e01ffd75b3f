"""Loss and metrics of an autoencoder: spectral distance, KL divergence of the posterior, SI-SDR.

Audio is [B, 2, samples]. Spectra are of mid and side, so that the difference between left and right has the same weight
as their sum. Everything is computed in float32.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from acestep_jax.models.autoencoder import DiagonalGaussian

# Its square is added to power, which is 1 for a full-scale sine (so -80 dB): synthetic music is truly silent between
# notes and above its highest partial, where a logarithm would count inaudible errors.
FLOOR = 1e-4


def power(x: jax.Array, window: int) -> jax.Array:
    """Return the power spectrogram with a Hann window and a hop of half its length; a full-scale sine has power 1.

    [..., samples] -> [..., frames, window / 2 + 1], with frames = samples // (window / 2) - 1.
    """
    hop = window // 2
    blocks = x[..., : x.shape[-1] // hop * hop].reshape(*x.shape[:-1], -1, hop)
    frames = jnp.concatenate([blocks[..., :-1, :], blocks[..., 1:, :]], axis=-1)
    hann = 0.5 - 0.5 * jnp.cos(2 * jnp.pi / window * jnp.arange(window))  # its sum is window / 2
    spectrum = jnp.fft.rfft(frames * (hann * (4 / window)))
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def spectral_distance(x: jax.Array, y: jax.Array, windows: Sequence[int]) -> jax.Array:
    """Return the distance of audio x from the target y, a scalar: spectral convergence plus mean absolute difference of
    log magnitudes (in nats), averaged over the window lengths.

    Spectral convergence is |X - Y| / |Y| in the Frobenius norm, separately for mid and side.
    """
    x, y = ((a[:, :1] + jnp.array([[1.0], [-1.0]]) * a[:, 1:]) / 2 for a in (x, y))  # mid and side
    total: Any = 0.0
    for window in windows:
        a, b = (power(z, window) + FLOOR**2 for z in (x, y))
        # The small constant avoids the infinite derivative of the root at 0.
        error = jnp.sqrt(jnp.square(jnp.sqrt(a) - jnp.sqrt(b)).sum(axis=(0, 2, 3)) + 1e-12)
        norm = jnp.sqrt(b.sum(axis=(0, 2, 3)))
        total += (error / norm).mean() + 0.5 * jnp.abs(jnp.log(a) - jnp.log(b)).mean()
    return total / len(windows)


def divergence(posterior: DiagonalGaussian) -> jax.Array:
    """Return the KL divergence of the posterior from N(0, 1), in nats, averaged over all values; a scalar."""
    mean, std = (a.astype(jnp.float32) for a in posterior)
    return 0.5 * (jnp.square(mean) + jnp.square(std) - 1.0 - 2.0 * jnp.log(std)).mean()


def si_sdr(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the scale-invariant signal-to-distortion ratio of audio x given the target y, [B] in dB, treating both
    channels as one signal.

    Source: Le Roux et al., SDR - half-baked or well done? (2019).
    """
    x, y = (a.reshape(a.shape[0], -1) for a in (x, y))
    signal = (x * y).sum(-1, keepdims=True) / (jnp.square(y).sum(-1, keepdims=True) + 1e-12) * y
    return 10.0 * jnp.log10((jnp.square(signal).sum(-1) + 1e-12) / (jnp.square(x - signal).sum(-1) + 1e-12))
