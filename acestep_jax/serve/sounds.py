"""Sound files for clients: the formats that can be asked for, and songs and latents in them."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from acestep_jax.errors import InputError
from acestep_jax.io.audio import BLOCK_FRAMES
from acestep_jax.io.files import publish_file


class Format(NamedTuple):
    """A kind of sound file: its suffix, its MIME type, and the format and subtype of libsndfile."""

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
MAX_RATE = 192_000  # Hz; beyond, a second of sound is more memory than any song needs


def check_format(name: object) -> str:
    """Return the name of a format; raise InputError if there is none of that name."""
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
    """Write latents [frames, C] as float32, little-endian, without a header, as acestep.cpp has them."""
    with publish_file(path) as temporary:
        temporary.write_bytes(np.ascontiguousarray(latents, "<f4").tobytes())


def check_upload(path: Path, field: str, max_seconds: float) -> None:
    """Raise InputError unless a file is sound that can be decoded, of at most `max_seconds`.

    It is decoded in blocks and nothing is kept: a small file may hold hours, whatever its header says.
    """
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
