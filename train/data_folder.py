"""The folder of training data: what `python -m train preprocess` writes and `python -m train fit` reads.

`index.json` says what there is, one entry for a song; the arrays are in ArrayRecord shards `songs-00000.array_record`,
one record for a song. A record is the bytes of a safetensors file:

| name | | |
|---|---|---|
| `mean`, `std` | float32 [frames, 64] | posterior of the autoencoder for the whole song |
| `lyric_ids` | int32 [n] | tokens of the text that the lyric encoder reads |
| `text.{task}.{duration}` | [s, 1024] | what the text encoder makes of the prompt, in its dtype, without padding |

The prompt names the task and the duration in whole seconds, so there is one for each task and for each length of crop.
"""

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from ml_dtypes import bfloat16
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint
from acestep_jax.io.files import publish_file
from acestep_jax.models.config import NetworkConfig

SCHEMA_VERSION = 1
TASKS = ("text2music", "repaint", "cover")  # the place of a task here is its number
INDEX = "index.json"
NETWORKS = ("text_encoder", "vae")  # that the data depend on

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# safetensors' names; its own `load` knows no bfloat16.
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": bfloat16, "I32": np.int32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Song:
    """One entry of the index.

    source: path of the audio file in its folder, with "/" between its parts.
    sha256, size, mtime_ns: of that file, by which it is known again.
    text_sha256: of all that the texts of the record were made from, crop durations included.
    seconds: of audio; frames: latent frames.
    caption, lyrics, language, bpm, keyscale, timesignature: as used; None: not known.
    repeat: how often the song comes up in an epoch.
    prompt_tokens: of the longest of its prompts; lyric_tokens: of its lyrics.
    shard, row: where its record is.
    """

    source: str
    sha256: str
    size: int
    mtime_ns: int
    text_sha256: str
    seconds: float
    frames: int
    caption: str
    lyrics: str
    language: str
    bpm: int | None
    keyscale: str | None
    timesignature: str | None
    repeat: int
    prompt_tokens: int
    lyric_tokens: int
    shard: str
    row: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """What `index.json` says.

    checkpoint: `fingerprint` of the one whose networks made the data; dtype: that they computed in.
    crop_seconds: lengths of crop that there are prompts for.
    skipped: pairs of a source and why it is not among the songs.
    complete: false while `preprocess` runs, and after it was stopped.
    """

    checkpoint: str
    dtype: str
    latents_per_second: float
    latent_channels: int
    crop_seconds: tuple[float, ...]
    songs: tuple[Song, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    complete: bool = False
    schema_version: int = SCHEMA_VERSION


def crop_durations(seconds: float, crop_seconds: Sequence[float]) -> list[int]:
    """The whole seconds that prompts name for a song of `seconds`, in order: of each crop, or all of a shorter one."""
    return sorted({int(min(crop, seconds)) for crop in crop_seconds})


def text_key(task: str, duration: int) -> str:
    """The name in a record of the hidden states for a task of `TASKS` and whole seconds."""
    return f"text.{task}.{duration}"


def read_index(folder: str | Path, *, unfinished: bool = False) -> Index:
    """Reads the index of a data folder.

    Args:
        unfinished: whether one will do that `preprocess` has not completed.

    Raises:
        InputError: if there is none, it is of another version, damaged or not complete, or one of its shards is gone.
    """
    folder = Path(folder)
    again = "run `python -m train preprocess` again"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected training data that `python -m train preprocess` made")
    try:
        values = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        version = values["schema_version"]
    except FileNotFoundError:
        raise InputError(
            f"{folder}: no {INDEX} here, so this is no folder of training data; give the DATA_DIR of "
            "`python -m train preprocess AUDIO_DIR DATA_DIR`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / INDEX}: damaged ({error!r}); remove the folder and {again}") from None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{folder / INDEX}: schema_version {version}, but this version of acestep-jax reads {SCHEMA_VERSION}; "
            f"update the package, or {again} with another DATA_DIR"
        )
    try:
        songs = tuple(Song(**song) for song in values.pop("songs"))
        skipped = tuple((str(source), str(reason)) for source, reason in values.pop("skipped"))
        crops = tuple(float(crop) for crop in values.pop("crop_seconds"))
        index = Index(**values, songs=songs, skipped=skipped, crop_seconds=crops)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / INDEX}: damaged ({error}); remove the folder and {again}") from None
    if not index.complete and not unfinished:
        raise InputError(f"{folder}: preprocessing was stopped before its end; {again}, and it goes on from there")
    for shard in sorted({song.shard for song in index.songs}):
        if not (folder / shard).is_file():
            raise InputError(f"{folder / shard}: missing; remove {folder / INDEX} and {again}")
    return index


def write_index(folder: str | Path, index: Index) -> None:
    """Writes the index, whole or not at all. Raises InputError if the disk is full."""
    text = json.dumps(dataclasses.asdict(index), indent=1, ensure_ascii=False) + "\n"
    _write(Path(folder) / INDEX, lambda path: path.write_text(text, encoding="utf-8"))


def write_shard(path: Path, records: Sequence[bytes]) -> None:
    """Writes a shard, whole or not at all. Raises InputError if the disk is full."""

    def write(temporary: Path) -> None:
        try:
            writer = ArrayRecordWriter(str(temporary), "group_size:1")
            for record in records:
                writer.write(record)
            writer.close()
        except RuntimeError as error:  # the library raises nothing narrower
            full = any(os.strerror(number) in str(error) for number in _DISK_FULL)
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error

    _write(path, write)


def read_records(shard: str | Path, rows: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
    """Records of one shard in the order of `rows`; raises InputError if it is damaged."""
    try:
        reader = ArrayRecordReader(str(shard))
        try:
            for row in rows:
                yield decode_record(reader.read([row])[0])
        finally:
            reader.close()
    except (RuntimeError, IndexError, SafetensorError) as error:
        raise InputError(f"{shard}: damaged ({error}); remove the data folder and preprocess again") from None


def encode_record(arrays: dict[str, np.ndarray]) -> bytes:
    """The bytes of a record."""
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def decode_record(record: bytes) -> dict[str, np.ndarray]:
    """The arrays of a record, by the names of the table above; those of 16-bit types have ml_dtypes' dtypes."""
    arrays = {}
    for name, found in deserialize(bytes(record)):
        arrays[name] = np.frombuffer(found["data"], _DTYPES[found["dtype"]]).reshape(found["shape"])
    return arrays


def fingerprint(path: str | Path, networks: Sequence[str] = NETWORKS) -> str:
    """SHA-256, in hex, of the tokenizer and of configs and weights of some networks of a checkpoint; by default those
    that the data depend on, which variants of the model may share.

    Raises:
        InputError: if there is no checkpoint, or it is damaged.
    """
    path = Path(path)
    manifest = checkpoint.read_manifest(path)
    stored = checkpoint.network_leaves(path, manifest)
    checkpoint.load_tokenizer(path)
    digest = hashlib.sha256((path / checkpoint.TOKENIZER).read_bytes())
    # How a network is computed is not what it computes.
    manner = {field.name for field in dataclasses.fields(NetworkConfig)}
    for name in networks:
        config = dataclasses.asdict(manifest.configs[name])
        values = {key: value for key, value in config.items() if key not in manner}
        digest.update(f"{name} {json.dumps(values, sort_keys=True)}\n".encode())
        for batch in checkpoint.batches(sorted(stored[name].items())):
            arrays = checkpoint.read_leaves(path, name, batch)
            for leaf in sorted(arrays):
                array = np.ascontiguousarray(arrays[leaf])
                digest.update(f"{leaf} {array.dtype} {array.shape}\n".encode())
                digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_sha256(values: Any) -> str:
    """SHA-256, in hex, of what JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _write(path: Path, write) -> None:
    """Calls `write` with a temporary path, which takes the name `path` if all went well and is removed otherwise."""
    try:
        with publish_file(path) as temporary:
            write(temporary)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise InputError(
            f"{path}: the disk is full; make room and run the same command again, it goes on from there"
        ) from error
