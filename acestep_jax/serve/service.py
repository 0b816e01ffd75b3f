"""The server without HTTP: accepts submissions, passes them to the engine, and reports their progress."""

import contextlib
import dataclasses
import ipaddress
import logging
import math
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from acestep_jax.errors import InputError
from acestep_jax.planner.plan import Plan
from acestep_jax.request import FILES
from acestep_jax.serve import accepting, sounds
from acestep_jax.serve.engine import BatchReport, Engine, Work, message_of
from acestep_jax.serve.inputs import InputFolder
from acestep_jax.serve.making import EngineListener
from acestep_jax.serve.operations import Operation, Operations
from acestep_jax.serve.planner_task import PlannerTask
from acestep_jax.serve.records import Records
from acestep_jax.serve.store import LRC, Record, Store, now
from acestep_jax.serve.submission import (
    NO_PLANNER,
    Limits,
    Submission,
    check_values,
    message_for_client,
    model_named,
    naming,
    request_and_sampling,
)

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # crashes of the process while a record was made, after which the record is given up


class Busy(Exception):
    """The queue is full; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class Closing(Exception):
    """The server is stopping and takes no new work."""


class Service:
    """Accepts the work that clients submit, and answers their queries.

    Args:
        strict: whether fields that would be ignored are an error.
        inputs: the folder whose files clients may use; None: no folder.
        on_report: called with each batch's report, in the engine's thread.
        on_death: called when the engine has ended because of an error.

    Attributes:
        records: the records by id, oldest first.
        closing: whether new work is rejected.
        is_stopped: whether the engine has ended, so that nothing will change any more.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
        *,
        strict: bool = False,
        inputs: InputFolder | None = None,
        on_report: Callable[[BatchReport], None] | None = None,
        on_death: Callable[[], None] | None = None,
    ):
        self.store, self.engine, self.limits, self.strict = store, engine, limits, strict
        self.inputs = inputs
        self.on_report, self.on_death = on_report, on_death
        self.kept = Records(store)
        self.records = self.kept.all
        self.watched, self.history, self.counts = self.kept.watched, self.kept.history, self.kept.counts
        self.closing = self.is_stopped = False
        self.dead = False
        self.operations = Operations(engine, self.kept)
        self.listener = EngineListener(
            self.kept, engine, self.operations, on_end=self._trim, on_report=self._reported, on_death=self._died
        )
        self.works, self.cancel = self.listener.works, self.listener.cancel
        self._reserving = threading.Lock()  # between the check for room and the reservation of it
        self._reading = threading.Semaphore(2)  # sources decoded at once, each up to hundreds of MB

    def start(self) -> None:
        """Read the history, put unfinished songs into the queue again, and start the engine."""
        for record in self.kept.load():
            self._resume(record)
        self._trim()
        self.engine.start(self.listener)

    def close(self, grace: float) -> None:
        """Stop: reject new work, give songs in progress `grace` seconds, and leave waiting songs on the disk."""
        self.closing = True
        self.kept.wake()  # clients that wait for queued records need not wait any longer
        self.engine.stop(grace)
        self.listener.close()
        if not self.dead and not self.is_stopped:
            self.listener.forget_attempts()
        self.is_stopped = True
        self.kept.wake()

    # Work

    def accept(self, submission: Submission) -> Record:
        """Check a submission, store it, and put its songs into the queue.

        Raises:
            InputError: if it is invalid.
            Busy: if the queue is full.
            Closing: if the server is stopping.
        """
        try:
            with naming(submission.names):
                record, works = self._prepared(submission)
            with self._reserving:
                self.check_room(submission.client, len(works))
                self.listener.reserve(record, works, submission.client)
            try:
                self.store.accept(record, submission.uploads)
            except BaseException:
                self.listener.release(record)
                raise
        except BaseException:
            if submission.uploads is not None:
                shutil.rmtree(submission.uploads, ignore_errors=True)
            raise
        paths = {field: self.store.upload_path(record, field) for field in record.files}
        for work in works:
            work.request = dataclasses.replace(work.request, **{f: str(p) for f, p in paths.items()})
        self.listener.enter(record, works, range(len(works)))
        return record

    def submit(self, operation: Operation) -> Operation:
        """Check works that are not songs, with their sources, put them into the queue, and return them; see
        `serve.operations`.

        Raises:
            InputError, Busy, Closing: see `accept`.
        """
        try:
            self.check_room(operation.client, len(operation.works))
            for work in operation.works:
                vae = self.engine.models[work.model].configs["vae"]
                for name, path, config in (
                    ("src_audio", work.request.src_audio, None),
                    ("src_latents", work.request.src_latents, vae),
                ):
                    if path is not None:
                        with self._reading, naming(operation.names):
                            sounds.check_upload(Path(str(path)), name, self.limits.duration, config)
                lengths = {name: getattr(work.request, name) for name in ("audio_duration", "audio_codes")}
                check_values(lengths, self.limits)
                if work.planner_task is not None:
                    work.planner_task = work.planner_task.within(self.limits.duration)
                self.engine.check(work)
            with self._reserving:
                self.check_room(operation.client, len(operation.works))
                self.operations.reserve(operation)
        except BaseException:
            if operation.uploads is not None:
                shutil.rmtree(operation.uploads, ignore_errors=True)
            raise
        self.operations.begin(operation)
        return operation

    def check_room(self, client: str, count: int = 1) -> None:
        """Raise Busy or Closing unless `count` more songs may wait."""
        if self.closing:
            raise Closing("the server is stopping")
        waiting, own = self.listener.waiting(), len(self.listener.waiting(client))
        if len(waiting) + count > self.limits.queue:
            raise Busy("Server busy: queue is full", self._retry_after(waiting))
        if own + count > self.limits.per_client and not _is_local(client):
            raise Busy(f"{own} songs of this address are already waiting", self._retry_after(waiting))
        seconds = self.engine.remaining(waiting) if waiting else 0.0
        if seconds is not None and seconds > 60 * self.limits.queue_minutes:
            raise Busy(f"Server busy: {seconds / 60:.0f} minutes of work are waiting", self._retry_after(waiting))

    def delete(self, record: Record) -> None:
        """Remove a record with its files; cancel an unfinished one first."""
        with self.kept.ending:
            self.cancel(record)
            self.kept.remove(record)

    def sound(self, record: Record, index: int, name: str) -> Path | None:
        """Return the file of a song in a format of `sounds.FORMATS`, converted if necessary; None if there is none."""
        path, is_new = self.kept.sound(record, index, name)
        if is_new:
            self._trim(record)
        return path

    # Queries

    def model_named(self, name: object, field: str = "model") -> str:
        """Return the name of a model; see `submission.model_named`."""
        return model_named(self.engine.models, name, field)

    def planner_of(self, model: str | None = None) -> str | None:
        """Return the name of a model's planner, by default the first model's; None if there is no such model or
        planner."""
        known = self.engine.models
        found = next(iter(known.values())) if model is None else known.get(model)
        return None if found is None else found.planner

    def position(self, record: Record | Operation) -> int:
        """Return the place in the queue, from 1; 0 if the record is not waiting."""
        if record.status != "queued":
            return 0
        works = self.works(record) if isinstance(record, Record) else record.works
        return self.engine.ahead(works) + 1

    def eta(self, record: Record) -> float | None:
        """Return the estimated seconds until a record ends; None if nothing comparable was measured yet, or its plan,
        which determines the duration of the song, is not finished."""
        if record.final:
            return 0.0
        works = self.works(record)
        return None if any(work.planner_task is not None for work in works) else self.engine.remaining(works)

    def progress(self, record: Record) -> tuple[float, str, int, int]:
        """Return the completed fraction, 0 to 1, and the stage, the steps made and the total steps of the song that is
        furthest behind."""
        if record.final:
            return 1.0, record.status, 0, 0
        works = self.works(record)
        busy = [work for work in works if work.stage != "queued"]
        first = busy[0] if busy else works[0] if works else None
        finished = len(record.songs) - len(works)
        part = finished + sum(map(_part, works))
        if first is None:  # all of them are being written
            return part / len(record.songs), "decoding", 0, 0
        return part / len(record.songs), first.stage, first.step, first.steps

    def waiting(self) -> int:
        """Return the number of waiting songs."""
        return len(self.listener.waiting())

    def is_over(self, record: Record | Operation) -> bool:
        """Return whether a record will not change any more in this process: it has ended, or waits for a restart."""
        return record.final or self.is_stopped or self.closing and record.status == "queued"

    # Internals

    def _prepared(self, submission: Submission) -> tuple[Record, list[Work]]:
        """Return the record and the checked works of a submission."""
        self.check_room(submission.client, len(submission.songs))
        with self._reading if submission.files else contextlib.nullcontext():
            songs, works = accepting.check(submission, self.engine, self.limits)
        names = {ours: name for ours, name in submission.names.items() if name != ours}
        record = Record(
            id=self.store.new_id(),
            created=now(),
            api=submission.api,
            model=works[0].model,
            adapters=dict(submission.adapters),
            songs=songs,
            format=submission.format,
            notes=list(submission.notes),
            extra=submission.extra | (dict(names=names) if names else {}),
            files=list(submission.files),
            lrc=submission.lrc,
        )
        return record, works

    def _resume(self, record: Record) -> None:
        """Put the unfinished songs of an earlier process into the queue."""
        files = {field: self.store.upload_path(record, field) for field in record.files if field in FILES}
        is_at_fault = self.store.attempts(record) >= ATTEMPTS
        works, places = [], []
        for i, song in enumerate(record.songs):
            path = self.store.song_path(record, i)
            if path.exists():
                try:
                    song.status, song.seconds = "done", _seconds(path)
                    song.lrc = self.store.song_path(record, i, LRC).exists()
                    continue
                except Exception as error:  # it is made again
                    logger.warning("%s: not a sound file (%s)", path, error)
            try:
                if is_at_fault:
                    raise InputError(f"the server died {ATTEMPTS} times while it made this; it will not try again")
                request, sampling = request_and_sampling(song.request | song.sampling, files)
                work = Work(request, sampling, record.model, tuple(sorted(record.adapters.items())), lrc=record.lrc)
                if record.model not in self.engine.models:
                    raise InputError(f"model: the server was started without {record.model}")
                if song.planner_task is not None and song.plan is not None:  # the plan was finished before
                    work.plan = Plan.from_dict(song.plan)
                    work.request = work.plan.request(work.request)
                elif song.planner_task is not None and self.planner_of(record.model) is not None:
                    work.planner_task = PlannerTask.from_dict(song.planner_task).within(self.limits.duration)
                elif song.planner_task is not None and (note := f"thinking: {NO_PLANNER}; ignored") not in record.notes:
                    record.notes.append(note)
                self.engine.check(work)
            except Exception as error:  # one bad record must not keep the server from starting
                names = record.extra.get("names", {})
                message = message_for_client(message_of(error), files, names, self.store.folder)
                song.status, song.error = "failed", message
                continue
            works.append(work)
            places.append(i)
        self.listener.enter(record, works, places)

    def _trim(self, newest: Record | None = None) -> None:
        """Remove the oldest records that exceed the limits, but not the one that has just ended."""
        with self.kept.ending:  # otherwise a song that becomes a favourite could be removed
            for record in self.kept.beyond(self.limits.keep_bytes, self.limits.keep_records, newest):
                logger.info("%s: removed, --keep-gb is reached", record.id)
                self.delete(record)

    def _reported(self, report: BatchReport) -> None:
        if self.on_report is not None:
            self.on_report(report)

    def _died(self) -> None:
        self.dead = True
        if self.on_death is not None:
            self.on_death()

    def _retry_after(self, waiting: Sequence[Work]) -> int:
        seconds = self.engine.remaining(waiting[:1]) if waiting else 1.0
        return min(600, max(1, math.ceil(seconds))) if seconds is not None else 10


def _part(work: Work) -> float:
    """Return the completed fraction of a song; its plan, if it has one, is the first third."""
    part = work.step / max(1, work.steps)
    if work.planner_task is not None:
        return 0.3 * part
    return 0.3 + 0.65 * part if work.plan is not None else 0.95 * part


def _is_local(client: str) -> bool:
    try:
        return ipaddress.ip_address(client).is_loopback
    except ValueError:
        return False


def _seconds(path: Path) -> float:
    import soundfile

    found = soundfile.info(str(path))
    return found.frames / found.samplerate
