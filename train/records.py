"""The records of `preprocess`: the existing ones of earlier runs and other processes, and the shards it writes."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import jax

from acestep_jax.errors import InputError
from acestep_jax.io.files import TEMPORARY, is_remote
from acestep_jax.train import data_folder
from acestep_jax.train.data_folder import Index, IndexEntry

SHARD_SONGS, SHARD_BYTES = 32, 128 * 2**20  # a shard ends at whichever comes first
PART = "part-"  # prefix of the folders that processes create in the data folder


class ExistingRecords:
    """The songs that earlier runs, and the processes of this one, have encoded.

    index: index of the data folder, or the given one if there is none.
    parts: indices of the per-process folders in it, by name.
    songs: songs of the index, then those of the parts that it lacks; their shards are relative to the data folder.
    """

    def __init__(self, data_dir: Path, index: Index):
        self.index = _read_old(data_dir, index)
        names = sorted(folder.name for folder in data_dir.glob(f"{PART}*") if (folder / data_folder.INDEX).exists())
        self.parts = {name: _read_old(data_dir / name, index) for name in names}
        everything = list(self.index.songs)
        for name, part in self.parts.items():
            everything += [dataclasses.replace(song, shard=f"{name}/{song.shard}") for song in part.songs]
        self.songs = tuple({song.source: song for song in reversed(everything)}.values())[::-1]
        self._by_source, self._by_content = {}, {}
        for song in everything:
            self._by_source.setdefault(song.source, []).append(song)
            self._by_content.setdefault(song.sha256, []).append(song)

    def sha256(self, source: str, file: Path, size: int, mtime_ns: int) -> str:
        """Return the SHA-256 of a file, without reading it if its size and modification time are known."""
        for song in self._by_source.get(source, ()):
            if (song.size, song.mtime_ns) == (size, mtime_ns):
                return song.sha256
        return data_folder.file_sha256(file)

    def find(self, sha256: str, source: str, text_sha256: str | None = None) -> IndexEntry | None:
        """Return a song with these bytes, preferring one with this source, then these texts, then one in the index."""

        def differs(song: IndexEntry) -> tuple[bool, bool, bool]:
            return song.source != source, song.text_sha256 != text_sha256, self.is_of_part(song)

        return min(self._by_content.get(sha256, ()), key=differs, default=None)

    def has(self, sha256: str) -> bool:
        """Return whether the index has a song with these bytes."""
        return any(not self.is_of_part(song) for song in self._by_content.get(sha256, ()))

    @staticmethod
    def is_of_part(song: IndexEntry) -> bool:
        """Return whether the record of a song is in the folder of one process."""
        return song.shard.startswith(PART)


class ShardWriter:
    """Collects records into shards. After each shard, the index lists the finished songs and the songs of the old index
    that were not checked yet, since an interrupted run may need them.

    songs: finished songs by source, in order.

    Args:
        index: fields of the index other than its songs.
        old: songs of the index before this run.
    """

    def __init__(self, folder: Path, index: Index, old: Sequence[IndexEntry]):
        self._folder, self.index, self._old = folder, index, old
        self.songs: dict[str, IndexEntry | None] = {}
        self._pending: list[tuple[dict, bytes]] = []
        self._next = 1 + max((int(shard[6:11]) for shard in _shards(folder)), default=-1)

    def keep(self, song: IndexEntry) -> None:
        """Add a song whose record exists already."""
        self.songs[song.source] = song

    def add(self, values: dict, record: bytes) -> None:
        """Add a song, except for its place in a shard, and its record."""
        self.songs[values["source"]] = None  # reserves its place in the order
        self._pending.append((values, record))
        if len(self._pending) >= SHARD_SONGS or sum(len(record) for _, record in self._pending) >= SHARD_BYTES:
            self.flush()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        # Also after another failure, such as running out of memory for one song: the others are finished.
        if kind is None or not issubclass(kind, InputError):
            self.flush()

    def flush(self) -> None:
        """Write the collected records as a shard, and update the index."""
        if not self._pending:
            return
        self._folder.mkdir(parents=is_remote(self._folder), exist_ok=True)
        shard = f"songs-{self._next:05d}.array_record"
        data_folder.write_shard(self._folder / shard, [record for _, record in self._pending])
        for row, (values, _) in enumerate(self._pending):
            self.songs[values["source"]] = IndexEntry(**values, shard=shard, row=row)
        self._pending, self._next = [], self._next + 1
        rest = [song for song in self._old if song.source not in self.songs]
        data_folder.write_index(
            self._folder, dataclasses.replace(self.index, songs=(*self.songs.values(), *rest), complete=False)
        )


def _read_old(data_dir: Path, index: Index) -> Index:
    """Read the index of the data folder; return `index` if there is none. Raise InputError if it belongs to another
    checkpoint or dtype."""
    if not (data_dir / data_folder.INDEX).exists():
        return index
    old = data_folder.read_index(data_dir, unfinished=True)
    for name in ("checkpoint", "dtype"):
        theirs, ours = getattr(old, name)[:12], getattr(index, name)[:12]
        if getattr(old, name) != getattr(index, name):
            raise InputError(
                f"{data_dir}: holds data of {name} {theirs}, but {name} is now {ours}; give the same {name} or another "
                "DATA_DIR"
            )
    if jax.process_index() == 0:
        remove_leftovers(data_dir, old)
    return old


def _shards(folder: Path) -> list[str]:
    return [file.name for file in folder.glob("songs-*") if re.fullmatch(r"songs-\d{5}\.array_record", file.name)]


def remove_leftovers(folder: Path, index: Index) -> None:
    """Delete shards without songs, and incomplete files of a killed run."""
    used = {song.shard for song in index.songs}
    begun = [file.name for file in folder.glob(f"{TEMPORARY}*")]
    for name in [*begun, *(shard for shard in _shards(folder) if shard not in used)]:
        (folder / name).unlink(missing_ok=True)
