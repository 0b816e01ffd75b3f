"""Latents given instead of audio: read, checked, and laid out as audio would be.

A file holds [frames, channels] float32, little-endian, without a header: what the server gives as `I.latents`, and
acestep.cpp as `.vae`.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from acestep_jax.errors import InputError
from acestep_jax.io.files import as_path
from acestep_jax.request import MAX_DURATION, Audio

ITEM = np.dtype("<f4")


def load_latents(source: Audio, name: str, vae: Any) -> np.ndarray:
    """Read latents from a file or an array.

    Args:
        name: of the argument, for error messages.
        vae: the autoencoder's config, whose channels they have.

    Returns:
        [frames, channels] float32.

    Raises:
        InputError: if they have another shape or non-finite values, or are of less than 1 s or more than 600 s.
        OSError: if there is no such file.
    """
    channels = vae.decoder_input_channels
    if isinstance(source, str | Path):
        name, data = str(source), as_path(source).read_bytes()
        check_size(len(data), name, channels)
        found = np.frombuffer(data, ITEM).astype(np.float32).reshape(-1, channels)
    else:
        found = np.asarray(source)
        found = found[0] if found.ndim == 3 and len(found) == 1 else found  # as those of a call with one song
        if not np.issubdtype(found.dtype, np.floating) or found.ndim != 2 or found.shape[1] != channels:
            raise InputError(
                f"{name}: expected a file or an array [frames, {channels} channels] of floating-point numbers, found "
                f"{found.dtype} {list(found.shape)}"
            )
        found = found.astype(np.float32)
    if not np.isfinite(found).all():
        raise InputError(f"{name}: holds NaN or infinities; expected latents of a song")
    seconds = len(found) * vae.hop_length / vae.sampling_rate
    if not 1 <= seconds <= MAX_DURATION:
        raise InputError(f"{name}: expected 1 to {MAX_DURATION:g} s of music, found {seconds:.3g} s")
    return found


def check_size(size: int, name: str, channels: int) -> None:
    """Raise InputError unless a file of so many bytes holds whole frames."""
    frame = channels * ITEM.itemsize
    if not size or size % frame:
        raise InputError(
            f"{name}: expected latents in float32, {frame} bytes for each frame of {channels} channels, found "
            f"{size} bytes"
        )


def excerpt(values: np.ndarray, whole: int) -> np.ndarray:
    """Return `whole` columns of [rows, columns]: a third each from the start, from one third on and from the end.
    Fewer columns are repeated first."""
    part = whole // 3
    values = np.tile(values, (1, math.ceil(whole / values.shape[1])))
    third, end = values.shape[1] // 3, values.shape[1]
    return np.concatenate([values[:, :part], values[:, third : third + part], values[:, end - part :]], axis=1)
