"""The records of a server: in memory, in its folder, and watched by waiting clients."""

import contextlib
import dataclasses
import logging
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import soundfile

from acestep_jax.errors import InputError
from acestep_jax.request import LATENTS
from acestep_jax.serve import sounds
from acestep_jax.serve.store import Record, Store, now

logger = logging.getLogger(__name__)


class Watched(Protocol):
    """A record or an operation, whose changes can be watched."""

    id: str
    version: int


class Records:
    """All records, oldest first.

    Attributes:
        all: the records by id.
        on_remove: called with each removed record, from any thread.
        ending: lock that is held while a record ends or is removed, which writes to the disk. It is always the first
            lock that a thread acquires, so that readers never wait for the disk.
    """

    def __init__(self, store: Store):
        self.store = store
        self.all: dict[str, Record] = {}
        self.on_remove: list[Callable[[Record], object]] = []
        self.ending = threading.RLock()
        self._lock = threading.RLock()
        # Locks of the files that are being converted, while a thread holds or waits for them.
        self._converting: weakref.WeakValueDictionary[Path, threading.Lock] = weakref.WeakValueDictionary()
        self._short: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._told_full = False  # whether the log already says that favourites alone exceed the limit
        self._watchers: dict[str, list[Callable[[], None]]] = {}

    def load(self) -> list[Record]:
        """Read the history; return the unfinished records."""
        unfinished = []
        for record in self.store.load():
            self.put(record)
            if record.final:
                self.measure(record)
            else:
                unfinished.append(record)
        return unfinished

    def put(self, record: Record) -> None:
        """Add a record."""
        with self._lock:
            self.all[record.id] = record
            self._short[short_id(record.id)] = record.id

    def find_short(self, name: str) -> Record | None:
        """Return the record whose id starts with `name`, see `short_id`."""
        return self.all.get(self._short.get(name, ""))

    def history(self, limit: int, before: str | None = None) -> list[Record]:
        """Return at most `limit` records, newest first, that are older than the record `before`.

        Raises:
            InputError: if there is no record with that id.
        """
        with self._lock:
            records = list(self.all.values())
        if before is not None:
            places = [i for i, record in enumerate(records) if record.id == before]
            if not places:
                raise InputError(f"before: there is no record {before!r}")
            records = records[: places[0]]
        return records[::-1][:limit]

    def counts(self) -> dict[str, int]:
        """Return the number of records in each state."""
        found: dict[str, int] = dict.fromkeys(("queued", "running", "done", "failed", "cancelled"), 0)
        with self._lock:
            for record in self.all.values():
                found[record.status] += 1
        return found

    def end(self, record: Record, status: str) -> None:
        """Store the outcome of a record, then announce it, so that it cannot be lost afterwards. Called with `ending`
        held."""
        ended = dataclasses.replace(record, status=status, finished=now())
        try:
            self.store.finish(ended)
        except OSError:
            logger.exception("%s: its outcome could not be written; it is made again after a restart", record.id)
        self.measure(record)
        with self._lock:
            record.status, record.finished = ended.status, ended.finished
            self.touch(record)

    def remove(self, record: Record) -> None:
        """Forget a record, and delete its files. Called with `ending` held."""
        with self._lock:
            self.all.pop(record.id, None)
            self._short.pop(short_id(record.id), None)
            self._sizes.pop(record.id, None)
        for forget in self.on_remove:
            forget(record)
        self.store.remove(record)
        self.wake(record)

    def measure(self, record: Record) -> None:
        """Measure the size of a record's files."""
        try:
            size = self.store.size(record)
        except OSError as error:
            logger.warning("%s: its size is unknown (%s)", record.id, error.strerror)
            return
        with self._lock:
            if record.id in self.all:
                self._sizes[record.id] = size

    def beyond(self, most_bytes: int, most_records: int, newest: Record | None = None) -> list[Record]:
        """Return the oldest finished records to remove, as many as exceed the limits, but never `newest`. Records with
        a favourite are kept and do not count, so that new songs are kept even if there are many favourites."""
        with self._lock:
            starred = {record.id for record in self.all.values() if any(song.favourite for song in record.songs)}
            on_top = sum(self._sizes.get(one, 0) for one in starred)
            total, count = sum(self._sizes.values()) - on_top, len(self.all) - len(starred)
            found = []
            for record in self.all.values():
                if total <= most_bytes and count <= most_records:
                    break
                if record.final and record is not newest and record.id not in starred:
                    total, count = total - self._sizes.get(record.id, 0), count - 1
                    found.append(record)
            is_full = on_top > most_bytes or len(starred) > most_records
            tell, self._told_full = is_full and not self._told_full, is_full
        if tell:
            logger.warning(
                "%d records with favourites take %.1f GB, more than --keep-gb or 10,000 records; they are kept anyway",
                *(len(starred), on_top / 10**9),
            )
        return found

    def sound(self, record: Record, index: int, name: str) -> tuple[Path | None, bool]:
        """Return the file of a song in a format of `sounds.FORMATS`, and whether it was converted now; None if there is
        no song."""
        form = sounds.FORMATS[name]
        if not 0 <= index < len(record.songs) or record.songs[index].status != "done":
            return None, False
        path, original = self.store.song_path(record, index, form.suffix), self.store.song_path(record, index)
        with self._lock:
            lock = self._converting.setdefault(path, threading.Lock())
        with lock:
            is_new = not path.exists() and original.exists()
            if is_new:
                try:
                    sounds.convert(original, path, form)
                except (OSError, soundfile.SoundFileError):
                    if original.exists():
                        raise
                    return None, False  # removed meanwhile
        if is_new:
            self.measure(record)
        return path if path.is_file() and not path.is_symlink() else None, is_new

    def set_favourite(self, record: Record, index: int, favourite: bool) -> None:
        """Mark or unmark a song as a favourite; do nothing if its record was removed meanwhile.

        Raises:
            OSError: if this cannot be written; then nothing changes.
        """
        with self.ending:
            if record.id not in self.all:
                return
            self.store.keep_favourite(record, index, favourite)
            record.songs[index].favourite = favourite
            self.touch(record)

    def use_song(self, uploads: Path, field: str, record: Record, index: int) -> None:
        """Use a finished song of this server as the upload for a field of a submission.

        Raises:
            InputError: if the song is not finished.
        """
        path, _ = self.sound(record, index, "flac")
        if path is not None and field in LATENTS:
            path = self.store.song_path(record, index, ".latents")
        refused = InputError(f"{field}: song {index} of {record.id} is not finished")
        if path is None:
            raise refused
        try:
            os.link(path, uploads / field)
        except FileNotFoundError:  # removed meanwhile
            raise refused from None
        except OSError:
            shutil.copyfile(path, uploads / field)

    @contextlib.contextmanager
    def watched(self, record: Watched, wake: Callable[[], None]) -> Iterator[None]:
        """Call `wake`, from any thread, whenever the record changes inside the block."""
        with self._lock:
            self._watchers.setdefault(record.id, []).append(wake)
        try:
            yield
        finally:
            with self._lock:
                self._watchers[record.id].remove(wake)
                if not self._watchers[record.id]:
                    del self._watchers[record.id]

    def touch(self, record: Watched) -> None:
        """Notify the watchers of a record of a change."""
        with self._lock:
            record.version += 1
        self.wake(record)

    def wake(self, record: Watched | None = None) -> None:
        """Wake the watchers of a record, or of all."""
        with self._lock:
            ids = list(self._watchers) if record is None else [record.id]
            watchers = [wake for one in ids for wake in self._watchers.get(one, ())]
        for wake in watchers:
            with contextlib.suppress(RuntimeError):  # from an event loop that has ended
                wake()


def short_id(record_id: str) -> str:
    """Return the first 16 digits of an id, by which acestep.cpp's clients refer to a record."""
    return record_id.replace("-", "")[:16]
