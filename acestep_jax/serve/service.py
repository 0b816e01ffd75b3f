"""The server without HTTP: it accepts submissions, keeps them, has the engine make them, and tells how they are."""

import contextlib
import dataclasses
import ipaddress
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from acestep_jax.errors import InputError
from acestep_jax.io import audio
from acestep_jax.serve import accepting, sounds
from acestep_jax.serve.engine import BatchReport, Engine, Work, message_of
from acestep_jax.serve.store import FILE_FIELDS, Record, Store, now
from acestep_jax.serve.submission import (
    Limits,
    Submission,
    request_and_sampling,
    with_fields,
)
from acestep_jax.song import Song

logger = logging.getLogger(__name__)

UNWRITTEN = 8  # songs that wait to be written, beyond which the engine waits


class Busy(Exception):
    """The queue is full; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class Closing(Exception):
    """The server is stopping and takes no new work."""


class Service:
    """Records, their works in the engine, and those who watch them.

    Args:
        on_report: called with each batch, from the engine's thread.
        on_death: called when the engine has ended by an error.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
        *,
        strict: bool = False,
        on_report: Callable[[BatchReport], None] | None = None,
        on_death: Callable[[], None] | None = None,
    ):
        self.store, self.engine, self.limits, self.strict = store, engine, limits, strict
        self.on_report, self.on_death = on_report, on_death
        self.records: dict[str, Record] = {}
        self.closing = False
        self.dead = False
        self._lock = threading.RLock()
        self._reading = threading.Semaphore(2)  # sources that are decoded at once, each up to hundreds of MB
        self._works: dict[str, list[Work]] = {}  # of records that have not ended
        self._places: dict[int, tuple[Record, int]] = {}  # by id(work)
        self._clients: dict[str, str] = {}
        self._watchers: dict[str, list[Callable[[], None]]] = {}
        self._sizes: dict[str, int] = {}
        self._writer = ThreadPoolExecutor(1, "writer")
        self._unwritten = threading.Semaphore(UNWRITTEN)

    def start(self) -> None:
        """Read the history, put unfinished songs into the queue again, and start the engine."""
        for record in self.store.load():
            self.records[record.id] = record
            if record.final:
                self._sizes[record.id] = self.store.size(record)
            else:
                self._resume(record)
        self.engine.start(self)

    def close(self, grace: float) -> None:
        """Stop: new work is refused, songs under way get `grace` seconds, those that wait stay on the disk."""
        self.closing = True
        for record_id in list(self._watchers):
            self._wake(record_id)
        self.engine.stop(grace)
        self._writer.shutdown(wait=True)

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
            with self._lock:
                self.check_room(submission.client, len(works))
                self.store.accept(record, submission.uploads)
                paths = {field: self.store.upload_path(record, field) for field in record.files}
                for work in works:
                    work.request = dataclasses.replace(work.request, **{f: str(p) for f, p in paths.items()})
                self._clients[record.id] = submission.client
                self._enter(record, works, range(len(works)))
        except BaseException:
            if submission.uploads is not None:
                shutil.rmtree(submission.uploads, ignore_errors=True)
            raise
        return record

    def check_room(self, client: str, count: int = 1) -> None:
        """Raise Busy or Closing unless `count` more songs may wait."""
        if self.closing:
            raise Closing("the server is stopping")
        with self._lock:
            waiting = [work for works in self._works.values() for work in works if work.stage == "queued"]
            mine = [work for one, other in self._clients.items() if other == client for work in self._works[one]]
            own = sum(work.stage == "queued" for work in mine)
        if len(waiting) + count > self.limits.queue:
            raise Busy("Server busy: queue is full", self._retry_after(waiting))
        if own + count > self.limits.per_client and not _is_local(client):
            raise Busy(f"{own} songs of this address wait already", self._retry_after(waiting))
        seconds = self.engine.remaining(waiting) if waiting else 0.0
        if seconds is not None and seconds > 60 * self.limits.queue_minutes:
            raise Busy(f"Server busy: {seconds / 60:.0f} minutes of work wait", self._retry_after(waiting))

    def cancel(self, record: Record) -> None:
        """Stop the songs of a record that are not finished; nothing if it has ended."""
        with self._lock:
            if record.final:
                return
            for song in record.songs:
                if song.status not in ("done", "failed"):
                    song.status = "cancelled"
            works = self._works.get(record.id, [])
            self._end(record, "cancelled")
        self.engine.cancel(works)

    def delete(self, record: Record) -> None:
        """Remove a record with its files; one that has not ended is cancelled first."""
        self.cancel(record)
        with self._lock:
            self.records.pop(record.id, None)
            self._sizes.pop(record.id, None)
            self.store.remove(record)
            self._wake(record.id)

    def history(self, limit: int, before: str | None = None) -> list[Record]:
        """Return records, newest first: at most `limit`, of those older than the one called `before`."""
        with self._lock:
            records = list(self.records.values())
        if before is not None:
            places = [i for i, record in enumerate(records) if record.id == before]
            if not places:
                raise InputError(f"before: there is no record {before!r}")
            records = records[: places[0]]
        return records[::-1][:limit]

    def sound(self, record: Record, index: int, name: str) -> Path | None:
        """Return the file of a song in a format of `sounds.FORMATS`, made if need be; None if there is none."""
        form = sounds.FORMATS[name]
        if not 0 <= index < len(record.songs) or record.songs[index].status != "done":
            return None
        path, original = self.store.song_path(record, index, form.suffix), self.store.song_path(record, index)
        if not path.exists() and original.exists():
            sounds.convert(original, path, form)
        return path if path.is_file() and not path.is_symlink() else None

    def use_song(self, uploads: Path, field: str, record: Record, index: int) -> None:
        """Give a finished song of this server to a field of a submission, as an upload."""
        path = self.sound(record, index, "flac")
        if path is None:
            raise InputError(f"{field}: song {index} of {record.id} is not finished")
        try:
            os.link(path, uploads / field)
        except OSError:
            shutil.copyfile(path, uploads / field)

    # What is known

    def works(self, record: Record) -> list[Work]:
        """Return what the engine has of a record that has not ended."""
        with self._lock:
            return list(self._works.get(record.id, ()))

    def position(self, record: Record) -> int:
        """Return the place in the queue, from 1; 0 for what does not wait."""
        if record.status != "queued":
            return 0
        return self.engine.ahead(self.works(record)) + 1

    def eta(self, record: Record) -> float | None:
        """Return the estimated seconds until a record ends; None if nothing alike was measured yet."""
        return 0.0 if record.final else self.engine.remaining(self.works(record))

    def progress(self, record: Record) -> tuple[float, str, int, int]:
        """Return the part that is done, 0 to 1, the stage, and the steps made and in all of the song
        that is furthest behind."""
        if record.final:
            return 1.0, record.status, 0, 0
        works = self.works(record)
        busy = [work for work in works if work.stage != "queued"]
        first = busy[0] if busy else works[0] if works else None
        finished = len(record.songs) - len(works)
        part = finished + sum(work.step / max(1, work.steps) for work in works) * 0.95
        if first is None:  # all of them are being written
            return part / len(record.songs), "decoding", 0, 0
        return part / len(record.songs), first.stage, first.step, first.steps

    def counts(self) -> dict[str, int]:
        """Return how many records there are in each state."""
        found: dict[str, int] = dict.fromkeys(("queued", "running", "done", "failed", "cancelled"), 0)
        with self._lock:
            for record in self.records.values():
                found[record.status] += 1
        return found

    def waiting(self) -> int:
        """Return how many songs wait."""
        with self._lock:
            return sum(work.stage == "queued" for works in self._works.values() for work in works)

    @contextlib.contextmanager
    def watched(self, record: Record, wake: Callable[[], None]) -> Iterator[None]:
        """Call `wake`, from any thread, whenever the record changes within the block."""
        with self._lock:
            self._watchers.setdefault(record.id, []).append(wake)
        try:
            yield
        finally:
            with self._lock:
                self._watchers[record.id].remove(wake)
                if not self._watchers[record.id]:
                    del self._watchers[record.id]

    # What the engine tells, see `engine.Listener`

    def changed(self, work: Work) -> None:
        with self._lock:
            if (place := self._places.get(id(work))) is None:
                return
            record, i = place
            record.songs[i].status = "running"
            if record.status == "queued":
                record.status, record.started = "running", now()
            self._touch(record)

    def done(self, work: Work, song: Song) -> None:
        self._unwritten.acquire()
        self._writer.submit(self._write, work, song)

    def failed(self, work: Work, message: str) -> None:
        with self._lock:
            if (place := self._places.get(id(work))) is None:
                return
            record, i = place
            paths = {field: self.store.upload_path(record, field) for field in record.files}
            record.songs[i].status, record.songs[i].error = "failed", with_fields(message, paths)
            self._finished(work)

    def stopped(self, work: Work) -> None:
        """Nothing is left to do: `cancel` has ended the record."""

    def reported(self, report: BatchReport) -> None:
        shape = report.program.shape
        logger.info(
            "batch of %d (size %d, %d frames)%s: %.2f s; %d wait; %s",
            *(len(report.works), report.program.size, shape.frames, ", compiled" if report.first else ""),
            *(report.seconds, report.waiting, " ".join(work.owner for work in report.works)),
        )
        if self.on_report is not None:
            self.on_report(report)

    def died(self, error: BaseException) -> None:
        self.dead = True
        if self.on_death is not None:
            self.on_death()

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
        )
        return record, works

    def _resume(self, record: Record) -> None:
        """Put the songs of an earlier process that have no sound yet into the queue."""
        files = {field: self.store.upload_path(record, field) for field in record.files if field in FILE_FIELDS}
        works, places = [], []
        for i, song in enumerate(record.songs):
            path = self.store.song_path(record, i)
            if path.exists():
                try:
                    song.status, song.seconds = "done", _seconds(path)
                    continue
                except Exception as error:  # it is made again
                    logger.warning("%s: not a sound file (%s)", path, error)
            try:
                request, sampling = request_and_sampling(song.request | song.sampling, files)
                work = Work(request, sampling, record.model, tuple(sorted(record.adapters.items())))
                if record.model not in self.engine.models:
                    raise InputError(f"model: the server was started without {record.model}")
                self.engine.check(work)
            except Exception as error:  # whatever is wrong with one record, the server starts
                song.status, song.error = "failed", with_fields(message_of(error), files)
                continue
            works.append(work)
            places.append(i)
        self._enter(record, works, places)

    def _enter(self, record: Record, works: list[Work], places: Sequence[int]) -> None:
        self.records[record.id] = record
        if not works:
            self._end(record, self._outcome(record))
            return
        self._works[record.id] = list(works)
        for work, place in zip(works, places, strict=True):
            self._places[id(work)] = record, place
            work.owner = record.id
        self.engine.submit(works)

    def _write(self, work: Work, song: Song) -> None:
        """Keep a song; runs in the writer's thread."""
        try:
            with self._lock:
                place = self._places.get(id(work))
            if place is None:  # cancelled meanwhile
                return
            record, i = place
            try:
                assert song.audio is not None
                sounds.write_latents(self.store.song_path(record, i, ".latents"), song.latents)
                audio.write(self.store.song_path(record, i), song.audio, song.sample_rate, overwrite=True)
                status, error = "done", None
            except Exception as problem:  # a full disk fails the song, not the server
                status, error = "failed", f"cannot be kept: {message_of(problem)}"
                error = error.replace(str(self.store.folder), "the server's folder")
            with self._lock:
                if self._places.get(id(work)) is None:
                    return
                record.songs[i].status, record.songs[i].error = status, error
                record.songs[i].seconds = song.audio.shape[1] / song.sample_rate if song.audio is not None else None
                self._finished(work)
        except Exception:
            logger.exception("a song was not kept")
        finally:
            self._unwritten.release()

    def _finished(self, work: Work) -> None:
        """Forget a work; end its record after the last one. Called with the lock."""
        record, _ = self._places.pop(id(work))
        self._works[record.id] = [other for other in self._works[record.id] if other is not work]
        if not self._works[record.id]:
            self._end(record, self._outcome(record))
        else:
            self._touch(record)

    def _outcome(self, record: Record) -> str:
        return "done" if any(song.status == "done" for song in record.songs) else "failed"

    def _end(self, record: Record, status: str) -> None:
        ended = dataclasses.replace(record, status=status, finished=now())
        for work in self._works.pop(record.id, ()):
            self._places.pop(id(work), None)
        self._clients.pop(record.id, None)
        try:
            self.store.finish(ended)  # before it is told: what has ended stays so
            self._sizes[record.id] = self.store.size(record)
        except OSError:
            logger.exception("%s: how it ended could not be written; it is made again after a restart", record.id)
        record.status, record.finished = ended.status, ended.finished
        self._touch(record)
        self._trim(record)

    def _trim(self, newest: Record) -> None:
        """Remove the oldest records beyond what may be kept, but for the one that has just ended."""
        total = sum(self._sizes.values())
        for record in list(self.records.values()):
            if total <= self.limits.keep_bytes:
                return
            if record.final and record is not newest:
                total -= self._sizes.get(record.id, 0)
                logger.info("%s: removed, --keep-gb is reached", record.id)
                self.delete(record)

    def _touch(self, record: Record) -> None:
        record.version += 1
        self._wake(record.id)

    def _wake(self, record_id: str) -> None:
        with self._lock:
            watchers = list(self._watchers.get(record_id, ()))
        for wake in watchers:
            with contextlib.suppress(RuntimeError):  # of an event loop that has ended
                wake()

    def _retry_after(self, waiting: Sequence[Work]) -> int:
        seconds = self.engine.remaining(waiting[:1]) if waiting else 1.0
        return min(600, max(1, math.ceil(seconds))) if seconds is not None else 10


def _is_local(client: str) -> bool:
    try:
        return ipaddress.ip_address(client).is_loopback
    except ValueError:
        return False


def _seconds(path: Path) -> float:
    import soundfile

    found = soundfile.info(str(path))
    return found.frames / found.samplerate
