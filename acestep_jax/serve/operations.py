"""Requests to the engine other than songs: plans, descriptions, audio codes, latents. They and their results are
dropped when the server ends."""

import dataclasses
import shutil
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import soundfile

from acestep_jax.io import audio
from acestep_jax.planner.plan import Plan
from acestep_jax.serve import sounds
from acestep_jax.serve.analysis import AnalysisResult
from acestep_jax.serve.engine import Engine, Work, message_of
from acestep_jax.serve.records import Records, short_id
from acestep_jax.serve.store import FINAL, now
from acestep_jax.serve.submission import message_for_client

KEPT = 100  # finished operations that are kept
KEPT_BYTES = 2**30  # maximum size of their files; the newest operation is always kept
SOUND, LATENTS_FILE = "sound.flac", "song.latents"


@dataclasses.dataclass(eq=False)
class Operation:
    """Works that were requested together.

    Attributes:
        plans: the result of each work; None: not finished yet.
        status: as for a record; "done" if all works have a result.
        uploads: a folder that is removed at the end.
        names: see `uploads.Body`.
        analyses: what was found about existing songs, in the order of `works`, without what is in `files`.
        files: a folder with the requested latents or sound; None: there are none.
        size: bytes in `files`.
        extra: data specific to its protocol.
        is_refused: see `Work`; for a failed operation.
        converting: is held while its sound is converted.
        ending: is held while it ends, which removes files; it is acquired before the lock of `Operations`.
    """

    works: list[Work]
    client: str
    uploads: Path | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    id: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    created: float = dataclasses.field(default_factory=now)
    plans: list[Plan | None] = dataclasses.field(default_factory=list)
    analyses: list[AnalysisResult | None] = dataclasses.field(default_factory=list)
    files: Path | None = None
    size: int = 0
    status: str = "queued"
    error: str | None = None
    is_refused: bool = False
    version: int = 0
    converting: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    ending: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.plans, self.analyses = [None] * len(self.works), [None] * len(self.works)

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.status in FINAL

    @property
    def model(self) -> str:
        """The name of the model whose planner is used."""
        return self.works[0].model

    def progress(self) -> tuple[str, int, int]:
        """Return the stage, the steps made and the total steps of the work that is furthest behind."""
        first = next((work for work, plan in zip(self.works, self.plans, strict=True) if plan is None), self.works[-1])
        return (self.status if self.final else first.stage), first.step, first.steps


class Operations:
    """The operations of a server.

    Args:
        watching: the records, which wake those who watch an operation.
    """

    def __init__(self, engine: Engine, watching: Records):
        self.engine, self.watching = engine, watching
        self.all: OrderedDict[str, Operation] = OrderedDict()  # the newest result last
        self._short: dict[str, str] = {}
        self._owners: dict[int, Operation] = {}  # by id(work)
        self._lock = threading.Lock()  # the event loop acquires it too, so no files are removed while it is held

    def reserve(self, operation: Operation) -> None:
        """Count the works of an operation as waiting before they are in the queue."""
        with self._lock:
            self.all[operation.id] = operation
            self._short[short_id(operation.id)] = operation.id
            for work in operation.works:
                work.owner = operation.id
                self._owners[id(work)] = operation

    def begin(self, operation: Operation) -> None:
        """Put the works of an operation, which are checked and reserved, into the queue."""
        self.engine.submit(operation.works)

    def find_short(self, name: str) -> Operation | None:
        """Return the operation whose id starts with `name`, see `records.short_id`."""
        return self.all.get(self._short.get(name, ""))

    def waiting(self, client: str | None = None) -> list[Work]:
        """Return the waiting works of a client, or of all."""
        with self._lock:
            found = [one for one in self.all.values() if not one.final and client in (None, one.client)]
            return [work for operation in found for work in operation.works if work.stage == "queued"]

    def cancel(self, operation: Operation) -> None:
        """Stop its unfinished works; do nothing if it has ended."""
        with operation.ending:
            if operation.final:
                return
            self._end(operation, "cancelled")
        self.engine.cancel(operation.works)

    def changed(self, work: Work) -> None:
        """See `engine.Listener`."""
        with self._lock:
            if (operation := self._owners.get(id(work))) is not None:
                operation.status = "running"
                self.watching.touch(operation)

    def planned(self, work: Work, plan: Plan) -> None:
        """See `engine.Listener`."""
        found, work.analysis = work.analysis, None
        try:
            files, size = self._written(found)
        except Exception as error:  # a full disk fails the operation, not the server
            self.failed(work, f"cannot be stored: {message_of(error)}")
            return
        if (operation := self._owner(work)) is None:  # cancelled meanwhile
            _remove([files])
            return
        with operation.ending:
            if self._owner(work) is None:
                _remove([files])
                return
            place = operation.works.index(work)
            if files is not None:
                assert operation.files is None, "only one work of an operation has files"
                operation.files, operation.size = files, size
            if found is not None:
                operation.analyses[place] = dataclasses.replace(found, latents=None, audio=None)
            operation.plans[place] = plan
            if None not in operation.plans:
                self._end(operation, "done")

    def failed(self, work: Work, message: str) -> None:
        """See `engine.Listener`. A failed work ends the operation."""
        if (operation := self._owner(work)) is None:
            return
        sources = {"src_audio": work.request.src_audio, "src_latents": work.request.src_latents}
        paths = {name: Path(str(path)) for name, path in sources.items() if path is not None}
        with operation.ending:
            if self._owner(work) is None:
                return
            operation.error = message_for_client(message, paths, operation.names, self.watching.store.folder)
            operation.is_refused = work.is_refused
            self._end(operation, "failed")
        self.engine.cancel(operation.works)

    def sound(self, operation: Operation, form: sounds.Format) -> Path:
        """Return the sound that was made, converted to a format at the first request and cached in the same folder.

        Raises:
            FileNotFoundError: if it has been removed.
        """
        if operation.files is None:
            raise FileNotFoundError(operation.id)
        source = operation.files / SOUND
        path = source.with_suffix(form.suffix)
        with operation.converting:
            if not path.exists():
                if not source.exists():
                    raise FileNotFoundError(source)
                try:
                    sounds.convert(source, path, form)
                except (OSError, soundfile.SoundFileError):
                    if source.exists():
                        raise
                    raise FileNotFoundError(source) from None
                size = path.stat().st_size
                with self._lock:
                    is_kept = operation.id in self.all
                    forgotten = self._trim(operation, size) if is_kept else []
                _remove(forgotten)
        return path

    def _owner(self, work: Work) -> Operation | None:
        """Return the operation of a work; None if it has ended, or is about to."""
        with self._lock:
            return self._owners.get(id(work))

    def _written(self, found: AnalysisResult | None) -> tuple[Path | None, int]:
        """Write latents or sound into a new folder; return it and its bytes, None if there is nothing to write."""
        if found is None or found.latents is None and found.audio is None:
            return None, 0
        folder = self.watching.store.new_folder()
        try:
            if found.latents is not None:
                sounds.write_latents(folder / LATENTS_FILE, found.latents)
            if found.audio is not None:
                audio.write(folder / SOUND, found.audio, found.sample_rate)
            return folder, sum(path.stat().st_size for path in folder.iterdir())
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _trim(self, newest: Operation, more: int = 0) -> list[Path | None]:
        """Make one the newest, whose files have grown by `more` bytes, and forget the oldest that have ended, beyond
        what is kept; return their folders. Called with the lock held."""
        newest.size += more
        self.all.move_to_end(newest.id)  # others look it up meanwhile
        ended = [one for one in self.all.values() if one.final]
        size, forgotten = 0, []
        for i, one in enumerate(reversed(ended)):
            size += one.size
            if i >= KEPT or i and one.size and size > KEPT_BYTES:
                size -= one.size
                del self.all[one.id], self._short[short_id(one.id)]
                forgotten.append(one.files)
        return forgotten

    def _end(self, operation: Operation, status: str) -> None:
        """End an operation. Called with its `ending` held."""
        with self._lock:
            for work in operation.works:
                self._owners.pop(id(work), None)
        _remove([operation.uploads])
        with self._lock:
            operation.status = status  # from here on, a client may be answered
            forgotten = self._trim(operation)
            self.watching.touch(operation)
        _remove(forgotten)


def _remove(folders: Iterable[Path | None]) -> None:
    """Remove folders, which takes time. Called without the lock."""
    for folder in folders:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
