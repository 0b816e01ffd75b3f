"""Audio files: read and written by libsndfile, resampled by soxr."""

import io
import logging
from pathlib import Path

import numpy as np
import soundfile
import soxr

from acestep_jax.errors import InputError
from acestep_jax.io import files
from acestep_jax.io.files import as_path, publish_file

logger = logging.getLogger(__name__)

# Format and subtype of libsndfile by suffix.
FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_24"),
    ".ogg": ("OGG", "VORBIS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}

BLOCK_FRAMES = 65536  # per call: libsndfile's Vorbis encoder overflows its stack on minutes of audio


def read(path: str | Path, sample_rate: int, channels: int = 2) -> np.ndarray:
    """Read a sound file in any format of libsndfile (WAV, FLAC, MP3, Ogg Vorbis and Opus, AIFF, ...).

    Args:
        sample_rate: Hz; other rates are resampled to it with soxr's high quality.
        channels: number of channels; mono is copied to all of them.

    Returns:
        [channels, samples] float32, full scale at 1; nothing is scaled or clipped.

    Raises:
        InputError: if the file cannot be read, is empty, holds NaN or infinities, or has another number of channels.
            Surround is not mixed down: how depends on its layout, and the first two channels lack the voice.
        OSError: if there is no such file, or it may not be read.
    """
    path = as_path(path)
    with path.open("rb") as file:
        try:
            audio, rate = soundfile.read(file, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, TypeError) as error:  # TypeError: files without a header, such as .raw
            raise InputError(
                f"{path}: not a sound file that can be read ({getattr(error, 'error_string', error)}); expected WAV, "
                "FLAC, MP3, OGG or Opus; if it is another kind, convert it: ffmpeg -i FILE song.flac"
            ) from None
    if not len(audio):
        raise InputError(f"{path}: holds no samples; expected music; remove or replace it")
    if not np.isfinite(audio).all():
        bad = int((~np.isfinite(audio)).sum())
        raise InputError(
            f"{path}: {bad} of {audio.size} samples are NaN or infinite; expected finite numbers; export it again"
        )
    if audio.shape[1] not in (1, channels):
        raise InputError(
            f"{path}: {audio.shape[1]} channels, expected 1 or {channels}; mix it down first: "
            f"ffmpeg -i FILE -ac {channels} song.flac"
        )
    if rate != sample_rate:
        audio = soxr.resample(audio, rate, sample_rate)
    return np.ascontiguousarray(np.broadcast_to(audio, (len(audio), channels)).T)


def check_finite(values: np.ndarray, name: str, what: str) -> None:
    """Raise InputError, with advice, if a result contains NaN or infinities, so that it is not used.

    Args:
        name: name of the result for the message, such as a file or a song.
        what: description of the values, such as "of the audio".
    """
    if bad := int((~np.isfinite(values)).sum()):
        raise InputError(
            f"{name}: {bad} of {values.size} values {what} are NaN or infinite, so nothing is written. If it is "
            "computed in float16 or bfloat16, try --dtype float32; else weights or an adapter may be damaged: convert "
            "or download them again, and leave adapters out"
        )


def splice(
    source: np.ndarray, made: np.ndarray, mask: np.ndarray, source_samples: tuple[int, int], fade: int
) -> np.ndarray:
    """Return `made` inside the mask, and the source outside of it, sample for sample. All are [channels, samples].

    Inside the mask, next to kept samples, the source fades out. `made` is scaled down if it exceeds full scale.

    Args:
        mask: [samples] bool.
        source_samples: first sample that the source has, and one past the last; it cannot fade where it has none.
        fade: length of the fades, in samples.
    """
    weight = mask.astype(np.float32)
    edges = np.flatnonzero(np.diff(mask.astype(np.int8))) + 1
    bounds = [0, *edges.tolist(), len(mask)]
    for start, end in zip(bounds, bounds[1:], strict=False):
        if not mask[start]:
            continue
        length = min(fade, (end - start) // 2)
        ramp = (np.arange(length, dtype=np.float32) + 0.5) / max(length, 1)
        if 0 < start and source_samples[0] <= start and start + length <= source_samples[1]:
            weight[start : start + length] = ramp
        if end < len(mask) and source_samples[0] <= end - length and end <= source_samples[1]:
            weight[end - length : end] = ramp[::-1]
    loudest = np.abs(made[:, mask]).max(initial=1.0)
    return np.where(weight == 0, source, weight * (made / loudest) + (1 - weight) * source).astype(np.float32)


def check_output(path: str | Path, *, overwrite: bool = False) -> Path:
    """Return the path, if a file can be written there.

    Raises:
        InputError: if the suffix is not one of `FORMATS`, the folder does not exist or cannot be written to, or the
            file exists and may not be overwritten.
    """
    path = as_path(path)
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: unknown kind of audio file; use one of the suffixes {', '.join(FORMATS)}")
    if not soundfile.check_format(*FORMATS[path.suffix.lower()]):
        raise InputError(f"{path}: the installed libsndfile cannot write {path.suffix}; use .wav")
    return files.check_output(path, overwrite=overwrite)


def write(path: str | Path, audio: np.ndarray, sample_rate: int, *, overwrite: bool = False) -> None:
    """Write an audio file atomically.

    Samples beyond full scale, which only a source that had them has, are kept in .wav, as 32-bit floating point; in
    other formats a warning counts them.

    Args:
        path: its suffix selects the format: .wav (16 bit), .flac (24 bit), .ogg or .mp3.
        audio: [channels, samples] float, full scale at 1.
        sample_rate: Hz.

    Raises:
        InputError: see `check_output`; or if a sample is not finite.
        OSError: if it cannot be written, with nothing left behind.
    """
    path = check_output(path, overwrite=overwrite)
    kind, subtype = FORMATS[path.suffix.lower()]
    frames = np.ascontiguousarray(np.asarray(audio, np.float32).T)
    check_finite(frames, f"{path}", "of the audio")
    over = int((np.abs(frames) > 1).sum())
    if over and kind == "WAV":
        subtype = "FLOAT"
        logger.warning(
            "%s: %d of %d samples exceed full scale, up to %.2f; written as 32-bit floating point, which keeps them",
            *(path, over, frames.size, np.abs(frames).max()),
        )
    elif over:
        logger.warning(
            "%s: %d of %d samples exceed full scale, up to %.2f, and are clipped; a .wav file keeps them",
            *(path, over, frames.size, np.abs(frames).max()),
        )
        frames = np.clip(frames, -1, 1)
    # Encoded in memory first: libsndfile does not report a full disk, Python's files do.
    encoded = io.BytesIO()
    channels = frames.shape[1]
    if subtype.startswith("PCM"):
        # Convert to integers with the scale used for reading: libsndfile's scales for reading and writing differ, so a
        # sample that is read and written again would change.
        scale = 2.0 ** (int(subtype[4:]) - 1)
        whole = np.clip(np.round(frames.astype(np.float64) * scale), -scale, scale - 1)
        frames = (whole * (2.0**31 / scale)).astype(np.int32)
    with soundfile.SoundFile(encoded, "w", sample_rate, channels, format=kind, subtype=subtype) as file:
        for start in range(0, len(frames), BLOCK_FRAMES):
            file.write(frames[start : start + BLOCK_FRAMES])
    with publish_file(path) as temporary:
        temporary.write_bytes(encoded.getbuffer())
