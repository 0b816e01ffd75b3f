"""Sound files for clients: the available formats, and conversion of songs and latents to them."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from acestep_jax.errors import InputError
from acestep_jax.inputs.latents import ITEM, check_size
from acestep_jax.inputs.prepare import check_length
from acestep_jax.io.audio import BLOCK_FRAMES
from acestep_jax.io.files import publish_file
from acestep_jax.models.config import AutoencoderConfig


class Format(NamedTuple):
    """A format of sound files: its suffix, its MIME type, and libsndfile's format and subtype."""

    suffix: str
    media_type: str
    kind: str
    subtype: str


FORMATS = {
    "flac": Format(".flac", "audio/flac", "FLAC", "PCM_24"),
    "wav": Format(".wav", "audio/wav", "WAV", "PCM_16"),
    "mp3": Format(".mp3", "audio/mpeg", "MP3", "MPEG_LAYER_III"),
    "ogg": Format(".ogg", "audio/ogg", "OGG", "VORBIS"),
    "opus": Format(".opus", "audio/ogg", "OGG", "OPUS"),
    "wav24": Format(".24.wav", "audio/wav", "WAV", "PCM_24"),
    "wav32": Format(".32.wav", "audio/wav", "WAV", "FLOAT"),
}
NAMES = tuple(FORMATS)
MAX_RATE = 192_000  # Hz; beyond, a second of audio takes more memory than any song needs


def check_format(name: object) -> str:
    """Return the name of a format; raise InputError if there is no such format."""
    if not isinstance(name, str) or name not in FORMATS:
        raise InputError(f"format: expected one of {', '.join(FORMATS)}, found {name!r}")
    return name


def convert(path: Path, target: Path, form: Format) -> None:
    """Write a sound file of this server in another format, atomically and in blocks."""
    encoded = io.BytesIO()
    with (
        soundfile.SoundFile(path) as source,
        soundfile.SoundFile(
            encoded, "w", source.samplerate, source.channels, format=form.kind, subtype=form.subtype
        ) as made,
    ):
        for block in source.blocks(BLOCK_FRAMES, dtype="float32", always_2d=True):
            made.write(block)
    with publish_file(target) as temporary:
        temporary.write_bytes(encoded.getbuffer())


def write_latents(path: Path, latents: np.ndarray) -> None:
    """Write latents [frames, C] as little-endian float32 without a header, as acestep.cpp does."""
    with publish_file(path) as temporary:
        temporary.write_bytes(np.ascontiguousarray(latents, "<f4").tobytes())


def check_upload(path: Path, field: str, max_seconds: float, config: AutoencoderConfig | None = None) -> None:
    """Raise InputError unless a file is decodable audio, or latents, of 1 s to `max_seconds`.

    Audio is decoded in blocks that are not kept, because a small file may hold hours, whatever its header says.

    Args:
        config: the autoencoder's config, for latents; None: it is audio.
    """
    if config is not None:
        check_latents(path, field, max_seconds, config)
        return
    try:
        with path.open("rb") as file, soundfile.SoundFile(file) as sound:
            rate = sound.samplerate
            if rate > MAX_RATE or sound.channels > 2:
                raise InputError(
                    f"{field}: {sound.channels} channels at {rate} Hz, expected 1 or 2 at up to {MAX_RATE} Hz"
                )
            longest = int(max_seconds * rate) + rate // 10
            if sound.format != "MP3" and sound.frames > longest:
                raise InputError(f"{field}: {sound.frames / rate:g} s, expected at most {max_seconds:g} s; cut it")
            count = 0
            while len(block := sound.read(BLOCK_FRAMES, dtype="float32")):
                count += len(block)
                if count > longest:
                    raise InputError(f"{field}: longer than {max_seconds:g} s; cut it")
    except (soundfile.SoundFileError, TypeError, RuntimeError) as error:
        reason = getattr(error, "error_string", "it has no header")
        raise InputError(
            f"{field}: not a sound file that can be read ({reason}); expected WAV, FLAC, MP3, OGG or Opus"
        ) from None
    if not count:
        raise InputError(f"{field}: holds no samples")
    check_length(count / rate, field)


def check_latents(path: Path, field: str, max_seconds: float, config: AutoencoderConfig) -> None:
    """Raise InputError unless a file has latents of the autoencoder, of 1 s to `max_seconds`."""
    size = path.stat().st_size
    check_size(size, field, config.decoder_input_channels)
    frame = config.hop_length / config.sampling_rate
    if (seconds := size // (4 * config.decoder_input_channels) * frame) > max_seconds + frame:
        raise InputError(f"{field}: {seconds:g} s, expected at most {max_seconds:g} s; cut it")
    check_length(seconds, field)
    if not np.isfinite(np.fromfile(path, ITEM)).all():
        raise InputError(f"{field}: holds NaN or infinities; expected latents of a song")
