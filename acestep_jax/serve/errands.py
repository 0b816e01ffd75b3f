"""What clients ask of the engine that is no song: plans, descriptions, audio codes. It is kept in memory alone."""

import dataclasses
import shutil
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acestep_jax.planner.plan import Plan
from acestep_jax.serve.engine import Engine, Work
from acestep_jax.serve.records import Records, short_id
from acestep_jax.serve.store import FINAL, now

KEPT = 100  # errands that have ended


@dataclasses.dataclass(eq=False)
class Errand:
    """Works that were asked for together.

    Attributes:
        plans: what each of them gave; None: nothing yet.
        status: as of a record; "done" if all of them gave something.
        uploads: a folder that is removed at the end.
        extra: what only its protocol knows.
        is_refused: see `Work`, of one that failed.
    """

    works: list[Work]
    client: str
    uploads: Path | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    id: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    created: float = dataclasses.field(default_factory=now)
    plans: list[Plan | None] = dataclasses.field(default_factory=list)
    status: str = "queued"
    error: str | None = None
    is_refused: bool = False
    version: int = 0

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.status in FINAL

    @property
    def model(self) -> str:
        """The model whose planner is asked."""
        return self.works[0].model

    def progress(self) -> tuple[str, int, int]:
        """Return the stage, and the steps made and in all, of the work that is furthest behind."""
        first = next((work for work, plan in zip(self.works, self.plans, strict=True) if plan is None), self.works[-1])
        return (self.status if self.final else first.stage), first.step, first.steps


class Errands:
    """The errands of a server.

    Args:
        watching: whom those who wait are known to.
    """

    def __init__(self, engine: Engine, watching: Records):
        self.engine, self.watching = engine, watching
        self.all: dict[str, Errand] = {}
        self._short: dict[str, str] = {}
        self._owners: dict[int, Errand] = {}  # by id(work)
        self._lock = threading.RLock()

    def begin(
        self, works: Sequence[Work], client: str, uploads: Path | None = None, extra: dict[str, Any] | None = None
    ) -> Errand:
        """Put works into the queue, which are checked already."""
        errand = Errand(list(works), client, uploads, extra or {}, plans=[None] * len(works))
        with self._lock:
            self.all[errand.id] = errand
            self._short[short_id(errand.id)] = errand.id
            for work in errand.works:
                work.owner = errand.id
                self._owners[id(work)] = errand
            ended = [one for one in self.all.values() if one.final]
            for one in ended[: max(0, len(ended) - KEPT)]:
                del self.all[one.id], self._short[short_id(one.id)]
        self.engine.submit(errand.works)
        return errand

    def find_short(self, name: str) -> Errand | None:
        """Return the errand whose id begins like this, see `records.short_id`."""
        return self.all.get(self._short.get(name, ""))

    def waiting(self, client: str | None = None) -> list[Work]:
        """Return the works that wait, of a client or of all."""
        with self._lock:
            found = [one for one in self.all.values() if not one.final and client in (None, one.client)]
            return [work for errand in found for work in errand.works if work.stage == "queued"]

    def cancel(self, errand: Errand) -> None:
        """Stop what is not finished; nothing if it has ended."""
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
        with self._lock:
            if (errand := self._owners.get(id(work))) is None:  # cancelled meanwhile
                return
            errand.plans[errand.works.index(work)] = plan
            if None not in errand.plans:
                self._end(errand, "done")

    def failed(self, work: Work, message: str) -> None:
        """See `engine.Listener`. One that fails ends the errand."""
        with self._lock:
            if (errand := self._owners.get(id(work))) is None:
                return
            source = work.request.src_audio
            errand.error = message if source is None else message.replace(str(source), "audio")
            errand.is_refused = work.is_refused
            self._end(errand, "failed")
        self.engine.cancel(errand.works)

    def _end(self, errand: Errand, status: str) -> None:
        """Called with the lock."""
        for work in errand.works:
            self._owners.pop(id(work), None)
        errand.status = status
        if errand.uploads is not None:
            shutil.rmtree(errand.uploads, ignore_errors=True)
        self.watching.touch(errand)
