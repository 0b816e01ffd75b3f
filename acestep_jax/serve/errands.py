"""Requests to the engine other than songs: plans, descriptions, audio codes, latents. They and their results are
dropped when the server ends."""

import contextlib
import dataclasses
import shutil
import threading
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from acestep_jax.io import audio
from acestep_jax.planner.plan import Plan
from acestep_jax.serve import sounds
from acestep_jax.serve.engine import Engine, Work, message_of
from acestep_jax.serve.hearing import Heard
from acestep_jax.serve.records import Records, short_id
from acestep_jax.serve.store import FINAL, now
from acestep_jax.serve.submission import with_fields

KEPT = 100  # finished errands that are kept
KEPT_BYTES = 2**30  # maximum size of their files; the newest errand is always kept
SOUND, LATENTS_FILE = "sound.flac", "song.latents"


@dataclasses.dataclass(eq=False)
class Errand:
    """Works that were requested together.

    Attributes:
        plans: the result of each work; None: not finished yet.
        status: as for a record; "done" if all works have a result.
        uploads: a folder that is removed at the end.
        names: see `uploads.Body`.
        heard: what was found about existing songs, in the order of `works`, without what is in `files`.
        files: a folder with the requested latents or sound; None: there are none.
        size: bytes in `files`.
        extra: data specific to its protocol.
        is_refused: see `Work`; for a failed errand.
        converting: is held while its sound is converted.
    """

    works: list[Work]
    client: str
    uploads: Path | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    id: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    created: float = dataclasses.field(default_factory=now)
    plans: list[Plan | None] = dataclasses.field(default_factory=list)
    heard: list[Heard | None] = dataclasses.field(default_factory=list)
    files: Path | None = None
    size: int = 0
    status: str = "queued"
    error: str | None = None
    is_refused: bool = False
    version: int = 0
    converting: threading.Lock = dataclasses.field(default_factory=threading.Lock)

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


class Errands:
    """The errands of a server.

    Args:
        watching: the records, which wake those who watch an errand.
    """

    def __init__(self, engine: Engine, watching: Records):
        self.engine, self.watching = engine, watching
        self.all: OrderedDict[str, Errand] = OrderedDict()  # the newest result last
        self._short: dict[str, str] = {}
        self._owners: dict[int, Errand] = {}  # by id(work)
        self._lock = threading.RLock()

    def begin(
        self,
        works: Sequence[Work],
        client: str,
        uploads: Path | None = None,
        extra: dict[str, Any] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> Errand:
        """Put works, which have been checked, into the queue."""
        errand = Errand(list(works), client, uploads, names or {}, extra or {})
        errand.plans, errand.heard = [None] * len(works), [None] * len(works)
        with self._lock:
            self.all[errand.id] = errand
            self._short[short_id(errand.id)] = errand.id
            for work in errand.works:
                work.owner = errand.id
                self._owners[id(work)] = errand
        self.engine.submit(errand.works)
        return errand

    def find_short(self, name: str) -> Errand | None:
        """Return the errand whose id starts with `name`, see `records.short_id`."""
        return self.all.get(self._short.get(name, ""))

    def waiting(self, client: str | None = None) -> list[Work]:
        """Return the waiting works of a client, or of all."""
        with self._lock:
            found = [one for one in self.all.values() if not one.final and client in (None, one.client)]
            return [work for errand in found for work in errand.works if work.stage == "queued"]

    def cancel(self, errand: Errand) -> None:
        """Stop its unfinished works; do nothing if it has ended."""
        with self._lock:
            if errand.final:
                return
            self._end(errand, "cancelled")
        self.engine.cancel(errand.works)

    def changed(self, work: Work) -> None:
        """See `engine.Listener`."""
        with self._lock:
            if (errand := self._owners.get(id(work))) is not None:
                errand.status = "running"
                self.watching.touch(errand)

    def planned(self, work: Work, plan: Plan) -> None:
        """See `engine.Listener`."""
        heard, work.heard = work.heard, None
        try:
            files, size = self._written(heard)
        except Exception as error:  # a full disk fails the errand, not the server
            self.failed(work, f"cannot be stored: {message_of(error)}")
            return
        with self._lock:
            if (errand := self._owners.get(id(work))) is None:  # cancelled meanwhile
                if files is not None:
                    shutil.rmtree(files, ignore_errors=True)
                return
            place = errand.works.index(work)
            errand.plans[place], errand.files, errand.size = plan, files, size
            if heard is not None:
                errand.heard[place] = dataclasses.replace(heard, latents=None, audio=None)
            if None not in errand.plans:
                self._end(errand, "done")

    def failed(self, work: Work, message: str) -> None:
        """See `engine.Listener`. A failed work ends the errand."""
        with self._lock:
            if (errand := self._owners.get(id(work))) is None:
                return
            named = {"src_audio": work.request.src_audio, "src_latents": work.request.src_latents}
            paths = {errand.names.get(name, name): Path(str(path)) for name, path in named.items() if path is not None}
            errand.error = with_fields(message, paths).replace(str(self.watching.store.folder), "the server's folder")
            errand.is_refused = work.is_refused
            self._end(errand, "failed")
        self.engine.cancel(errand.works)

    def sound(self, errand: Errand, form: sounds.Format) -> Path:
        """Return the sound that was made, converted to a format at the first request and kept beside.

        Raises:
            FileNotFoundError: if it has been removed.
        """
        if errand.files is None:
            raise FileNotFoundError(errand.id)
        source = errand.files / SOUND
        path = source.with_suffix(form.suffix)
        with errand.converting:
            if not path.exists():
                if not source.exists():
                    raise FileNotFoundError(source)
                sounds.convert(source, path, form)
                with self._lock, contextlib.suppress(KeyError):  # removed meanwhile
                    self._trim(self.all[errand.id], path.stat().st_size)
        return path

    def _written(self, heard: Heard | None) -> tuple[Path | None, int]:
        """Write latents or sound into a new folder; return it and its bytes, None if there is nothing to write."""
        if heard is None or heard.latents is None and heard.audio is None:
            return None, 0
        folder = self.watching.store.new_folder()
        try:
            if heard.latents is not None:
                sounds.write_latents(folder / LATENTS_FILE, heard.latents)
            if heard.audio is not None:
                audio.write(folder / SOUND, heard.audio, heard.sample_rate)
            return folder, sum(path.stat().st_size for path in folder.iterdir())
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _trim(self, newest: Errand, more: int = 0) -> None:
        """Make one the newest, whose files have grown by `more` bytes, and forget the oldest that have ended, beyond
        what is kept. Called with the lock."""
        newest.size += more
        self.all.move_to_end(newest.id)  # others look it up meanwhile
        ended = [one for one in self.all.values() if one.final]
        size = 0
        for i, one in enumerate(reversed(ended)):
            size += one.size
            if i >= KEPT or i and one.size and size > KEPT_BYTES:
                size -= one.size
                del self.all[one.id], self._short[short_id(one.id)]
                if one.files is not None:
                    shutil.rmtree(one.files, ignore_errors=True)

    def _end(self, errand: Errand, status: str) -> None:
        """End an errand. Called with the lock held."""
        for work in errand.works:
            self._owners.pop(id(work), None)
        errand.status = status
        if errand.uploads is not None:
            shutil.rmtree(errand.uploads, ignore_errors=True)
        self._trim(errand)
        self.watching.touch(errand)
