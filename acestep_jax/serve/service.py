"""The server without HTTP: it accepts submissions, has the engine make them, and tells how far they are."""

import contextlib
import dataclasses
import ipaddress
import logging
import math
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from acestep_jax.errors import InputError
from acestep_jax.planner.plan import Plan
from acestep_jax.serve import accepting, sounds
from acestep_jax.serve.engine import BatchReport, Engine, Work, message_of
from acestep_jax.serve.errands import Errand, Errands
from acestep_jax.serve.inputs import Inputs
from acestep_jax.serve.making import Making
from acestep_jax.serve.records import Records
from acestep_jax.serve.store import FILE_FIELDS, LRC, Record, Store, now
from acestep_jax.serve.submission import (
    NO_PLANNER,
    Limits,
    Submission,
    check_values,
    request_and_sampling,
    with_fields,
)
from acestep_jax.serve.thinking import Thought

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # ends of the process while a record was made, after which it is at fault


class Busy(Exception):
    """The queue is full; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class Closing(Exception):
    """The server is stopping and takes no new work."""


class Service:
    """What clients may do, and what they may know.

    Args:
        strict: whether fields that would be ignored are an error.
        inputs: the folder that clients may name files of; None: none.
        on_report: called with each batch, from the engine's thread.
        on_death: called when the engine has ended by an error.

    Attributes:
        records: by id, oldest first.
        closing: whether new work is refused.
        is_stopped: whether the engine has ended, so that nothing will change any more.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
        *,
        strict: bool = False,
        inputs: Inputs | None = None,
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
        self.errands = Errands(engine, self.kept)
        self.making = Making(
            self.kept, engine, self.errands, on_end=self._trim, on_report=self._reported, on_death=self._died
        )
        self.works, self.cancel = self.making.works, self.making.cancel
        self._reading = threading.Semaphore(2)  # sources that are decoded at once, each up to hundreds of MB

    def start(self) -> None:
        """Read the history, put unfinished songs into the queue again, and start the engine."""
        for record in self.kept.load():
            self._resume(record)
        self._trim()
        self.engine.start(self.making)

    def close(self, grace: float) -> None:
        """Stop: new work is refused, songs under way get `grace` seconds, those that wait stay on the disk."""
        self.closing = True
        self.kept.wake()  # those who wait for what waits need not wait any longer
        self.engine.stop(grace)
        self.making.close()
        if not self.dead and not self.is_stopped:
            self.making.forget_attempts()
        self.is_stopped = True
        self.kept.wake()

    # What clients do

    def accept(self, submission: Submission) -> Record:
        """Check a submission, keep it, and put its songs into the queue.

        Raises:
            InputError: if it cannot be made.
            Busy: if the queue is full.
            Closing: if the server is stopping.
        """
        try:
            record, works = self._prepared(submission)
            client = submission.client
            self.making.reserve(record, works, client, lambda: self.check_room(client, len(works)))
            try:
                self.store.accept(record, submission.uploads)
            except BaseException:
                self.making.release(record)
                raise
        except BaseException:
            if submission.uploads is not None:
                shutil.rmtree(submission.uploads, ignore_errors=True)
            raise
        paths = {field: self.store.upload_path(record, field) for field in record.files}
        for work in works:
            work.request = dataclasses.replace(work.request, **{f: str(p) for f, p in paths.items()})
        self.making.enter(record, works, range(len(works)))
        return record

    def ask(
        self, works: Sequence[Work], client: str, uploads: Path | None = None, extra: dict[str, Any] | None = None
    ) -> Errand:
        """Put into the queue what is no song, see `serve.errands`. Sources are checked, and are in `uploads`.

        Raises:
            InputError, Busy, Closing: see `accept`.
        """
        try:
            self.check_room(client, len(works))
            for work in works:
                if work.request.src_audio is not None:
                    with self._reading:
                        sounds.check_upload(Path(str(work.request.src_audio)), "audio", self.limits.duration)
                lengths = {name: getattr(work.request, name) for name in ("audio_duration", "audio_codes")}
                check_values(lengths, self.limits)
                if work.thought is not None:
                    work.thought = work.thought.within(self.limits.duration)
                self.engine.check(work)
        except BaseException:
            if uploads is not None:
                shutil.rmtree(uploads, ignore_errors=True)
            raise
        return self.errands.begin(works, client, uploads, extra)

    def check_room(self, client: str, count: int = 1) -> None:
        """Raise Busy or Closing unless `count` more songs may wait."""
        if self.closing:
            raise Closing("the server is stopping")
        waiting, own = self.making.waiting(), len(self.making.waiting(client))
        if len(waiting) + count > self.limits.queue:
            raise Busy("Server busy: queue is full", self._retry_after(waiting))
        if own + count > self.limits.per_client and not _is_local(client):
            raise Busy(f"{own} songs of this address wait already", self._retry_after(waiting))
        seconds = self.engine.remaining(waiting) if waiting else 0.0
        if seconds is not None and seconds > 60 * self.limits.queue_minutes:
            raise Busy(f"Server busy: {seconds / 60:.0f} minutes of work wait", self._retry_after(waiting))

    def delete(self, record: Record) -> None:
        """Remove a record with its files; one that has not ended is cancelled first."""
        with self.kept.ending:
            self.cancel(record)
            self.kept.remove(record)

    def sound(self, record: Record, index: int, name: str) -> Path | None:
        """Return the file of a song in a format of `sounds.FORMATS`, made if need be; None if there is none."""
        path, is_new = self.kept.sound(record, index, name)
        if is_new:
            self._trim(record)
        return path

    # What is known

    def planner_of(self, model: str | None = None) -> str | None:
        """Return the name of the planner of a model, by default the first; None if there is none, or no such model."""
        known = self.engine.models
        found = next(iter(known.values())) if model is None else known.get(model)
        return None if found is None else found.planner

    def position(self, record: Record) -> int:
        """Return the place in the queue, from 1; 0 for what does not wait."""
        if record.status != "queued":
            return 0
        return self.engine.ahead(self.works(record)) + 1

    def eta(self, record: Record) -> float | None:
        """Return the estimated seconds until a record ends; None if nothing alike was measured yet, or its plan is not
        there, which decides how long the song is."""
        if record.final:
            return 0.0
        works = self.works(record)
        return None if any(work.thought is not None for work in works) else self.engine.remaining(works)

    def progress(self, record: Record) -> tuple[float, str, int, int]:
        """Return the part that is done, 0 to 1, the stage, and the steps made and in all of the song
        that is furthest behind."""
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
        """Return how many songs wait."""
        return len(self.making.waiting())

    def is_over(self, record: Record | Errand) -> bool:
        """Return whether nothing about a record will change in this process: it has ended, or waits for the next."""
        return record.final or self.is_stopped or self.closing and record.status == "queued"

    # Within

    def _prepared(self, submission: Submission) -> tuple[Record, list[Work]]:
        """Return the record of a submission and its works, checked."""
        self.check_room(submission.client, len(submission.songs))
        with self._reading if submission.files else contextlib.nullcontext():
            songs, works = accepting.check(submission, self.engine, self.limits)
        record = Record(
            id=self.store.new_id(),
            created=now(),
            api=submission.api,
            model=works[0].model,
            adapters=dict(submission.adapters),
            songs=songs,
            format=submission.format,
            notes=list(submission.notes),
            extra=submission.extra,
            files=list(submission.files),
            lrc=submission.lrc,
        )
        return record, works

    def _resume(self, record: Record) -> None:
        """Put the songs of an earlier process that have no sound yet into the queue."""
        files = {field: self.store.upload_path(record, field) for field in record.files if field in FILE_FIELDS}
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
                    raise InputError(f"the server ended {ATTEMPTS} times while it made this; it is not tried again")
                request, sampling = request_and_sampling(song.request | song.sampling, files)
                work = Work(request, sampling, record.model, tuple(sorted(record.adapters.items())), lrc=record.lrc)
                if record.model not in self.engine.models:
                    raise InputError(f"model: the server was started without {record.model}")
                if song.thought is not None and song.plan is not None:  # which was written before the end
                    work.plan = Plan.from_dict(song.plan)
                    work.request = work.plan.request(work.request)
                elif song.thought is not None and self.planner_of(record.model) is not None:
                    work.thought = Thought.from_dict(song.thought).within(self.limits.duration)
                elif song.thought is not None and (note := f"thinking: {NO_PLANNER}; ignored") not in record.notes:
                    record.notes.append(note)
                self.engine.check(work)
            except Exception as error:  # whatever is wrong with one record, the server starts
                song.status, song.error = "failed", with_fields(message_of(error), files)
                continue
            works.append(work)
            places.append(i)
        self.making.enter(record, works, places)

    def _trim(self, newest: Record | None = None) -> None:
        """Remove the oldest records beyond what may be kept, but for the one that has just ended."""
        with self.kept.ending:  # or a song would go that becomes a favourite
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
    """Return which part of a song is done: its plan, if it has one, is the first third."""
    part = work.step / max(1, work.steps)
    if work.thought is not None:
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
