"""The folder of training data: what `acestep-jax train preprocess` writes and `acestep-jax train fit` reads.

`index.json` lists the songs; the arrays are in ArrayRecord shards `songs-00000.array_record`, one record for each song.
A record is the bytes of a safetensors file:

| name | | |
|---|---|---|
| `mean`, `std` | float32 [frames, 64] | posterior of the autoencoder for the whole song |
| `lyric_ids` | int32 [n] | token ids of the lyric encoder's input |
| `text.{task}.{duration}` | [s, 1024] | hidden states of the prompt, in the text encoder's dtype, without padding |

The prompt names the task and the duration in whole seconds, so there is one for each task and crop length.
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
from acestep_jax.io.files import DISK_FULL, as_path, local_copy, publish_file

SCHEMA_VERSION = 1
INDEX = "index.json"
NETWORKS = ("text_encoder", "vae")  # the networks that the data depend on


# Dtypes by the names that safetensors uses; its own `load` does not read bfloat16.
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": bfloat16, "I32": np.int32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexEntry:
    """One entry of the index.

    source: path of the audio file relative to its folder, with "/" as separator.
    sha256, size, mtime_ns: hash, size and modification time that identify the file.
    text_sha256: hash of everything that the texts of the record were made from, including the crop durations and, where
        a prompt is too long, the rule for truncating it.
    seconds: duration of the audio; frames: number of latent frames.
    caption, lyrics, language, bpm, keyscale, timesignature: values that were used; None: unknown.
    repeat: how often the song occurs in an epoch.
    prompt_tokens: length of its longest prompt; lyric_tokens: length of its lyrics.
    shard, row: location of its record.
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
    """The contents of `index.json`.

    checkpoint: `fingerprint` of the checkpoint whose networks encoded the data; dtype: dtype of their computation.
    crop_seconds: crop lengths for which there are prompts.
    skipped: pairs of a source and the reason why it was skipped.
    complete: false while `preprocess` runs, and after it was interrupted.
    """

    checkpoint: str
    dtype: str
    latents_per_second: float
    latent_channels: int
    crop_seconds: tuple[float, ...]
    songs: tuple[IndexEntry, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    complete: bool = False
    schema_version: int = SCHEMA_VERSION


def crop_durations(seconds: float, crop_seconds: Sequence[float]) -> list[int]:
    """Return the sorted durations, in whole seconds, that the prompts of a song of `seconds` name: the length of each
    crop, or of the song if it is shorter."""
    return sorted({int(min(crop, seconds)) for crop in crop_seconds})


def text_key(task: str, duration: int) -> str:
    """Return the record's key of the hidden states for a task of `config.TASKS` and a duration in whole seconds."""
    return f"text.{task}.{duration}"


def read_index(folder: str | Path, *, unfinished: bool = False) -> Index:
    """Read the index of a data folder.

    Args:
        folder: data folder, as written by `preprocess`.
        unfinished: accept an index that `preprocess` has not completed.

    Raises:
        InputError: if the index is missing, of another version, damaged or incomplete, or a shard is missing.
    """
    folder = as_path(folder)
    again = "run `acestep-jax train preprocess` again"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected training data of `acestep-jax train preprocess`")
    try:
        values = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        version = values["schema_version"]
    except FileNotFoundError:
        raise InputError(
            f"{folder}: no {INDEX} here, so this is not a folder of training data; give the DATA_DIR of "
            "`acestep-jax train preprocess AUDIO_DIR DATA_DIR`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / INDEX}: damaged ({error!r}); remove the folder and {again}") from None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{folder / INDEX}: schema_version {version}, but this version of acestep-jax reads {SCHEMA_VERSION}; "
            f"update the package, or {again} with another DATA_DIR"
        )
    try:
        songs = tuple(IndexEntry(**song) for song in values.pop("songs"))
        skipped = tuple((str(source), str(reason)) for source, reason in values.pop("skipped"))
        crops = tuple(float(crop) for crop in values.pop("crop_seconds"))
        index = Index(**values, songs=songs, skipped=skipped, crop_seconds=crops)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / INDEX}: damaged ({error}); remove the folder and {again}") from None
    if not index.complete and not unfinished:
        raise InputError(f"{folder}: preprocessing was interrupted; {again}, which resumes it")
    for shard in sorted({song.shard for song in index.songs}):
        if not (folder / shard).is_file():
            raise InputError(f"{folder / shard}: missing; remove {folder / INDEX} and {again}")
    return index


def write_index(folder: str | Path, index: Index) -> None:
    """Write the index atomically. Raise InputError if the disk is full."""
    text = json.dumps(dataclasses.asdict(index), indent=1, ensure_ascii=False) + "\n"
    _write(as_path(folder) / INDEX, lambda path: path.write_text(text, encoding="utf-8"))


def write_shard(path: Path, records: Sequence[bytes]) -> None:
    """Write a shard atomically. Raise InputError if the disk is full."""

    def write(temporary: Path) -> None:
        try:
            writer = ArrayRecordWriter(str(temporary), "group_size:1")
            for record in records:
                writer.write(record)
            writer.close()
        except RuntimeError as error:  # the library raises nothing narrower
            full = any(os.strerror(number) in str(error) for number in DISK_FULL)
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error

    _write(path, write)


def read_records(shard: str | Path, rows: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
    """Read records of one shard in the order of `rows`; raise InputError if it is damaged."""
    try:
        reader = ArrayRecordReader(str(local_copy(as_path(shard))))
        try:
            for row in rows:
                yield decode_record(reader.read([row])[0])
        finally:
            reader.close()
    except (RuntimeError, IndexError, SafetensorError) as error:
        raise InputError(f"{shard}: damaged ({error}); remove the data folder and preprocess again") from None


def encode_record(arrays: dict[str, np.ndarray]) -> bytes:
    """Return the bytes of a record."""
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def decode_record(record: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a record by the names of the table above; bfloat16 is ml_dtypes' type."""
    arrays = {}
    for name, found in deserialize(bytes(record)):
        arrays[name] = np.frombuffer(found["data"], _DTYPES[found["dtype"]]).reshape(found["shape"])
    return arrays


def fingerprint(path: str | Path, networks: Sequence[str] = NETWORKS) -> str:
    """Return the SHA-256, in hex, of a checkpoint's tokenizer and of the configs and weights of some of its networks.

    The default is the networks that the data depend on, which variants of the model may share.

    Raises:
        InputError: if there is no checkpoint, or it is damaged.
    """
    path = as_path(path)
    manifest = checkpoint.read_manifest(path)
    stored = checkpoint.network_leaves(path, manifest)
    checkpoint.load_tokenizer(path)
    digest = hashlib.sha256((path / checkpoint.TOKENIZER).read_bytes())
    for name in networks:
        values = dataclasses.asdict(manifest.configs[name])
        digest.update(f"{name} {json.dumps(values, sort_keys=True)}\n".encode())
        for batch in checkpoint.batches(sorted(stored[name].items())):
            arrays = checkpoint.read_leaves(path, name, batch)
            for leaf in sorted(arrays):
                array = np.ascontiguousarray(arrays[leaf])
                digest.update(f"{leaf} {array.dtype} {array.shape}\n".encode())
                digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_sha256(values: Any) -> str:
    """Return the SHA-256, in hex, of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _write(path: Path, write) -> None:
    """Call `write` with a temporary path, which is renamed to `path` on success and removed otherwise."""
    try:
        with publish_file(path) as temporary:
            write(temporary)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise InputError(
            f"{path}: the disk is full; free some space and run the same command again, which resumes"
        ) from error
