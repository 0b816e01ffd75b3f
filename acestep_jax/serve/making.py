"""Songs on their way from the queue to the disk: handles the engine's events, and finishes the records."""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from acestep_jax.io import audio
from acestep_jax.planner.plan import Plan
from acestep_jax.planner.timestamps import write_lrc
from acestep_jax.serve import sounds
from acestep_jax.serve.engine import BatchReport, Engine, Work, message_of
from acestep_jax.serve.operations import Operations
from acestep_jax.serve.records import Records
from acestep_jax.serve.store import LRC, Record, now
from acestep_jax.serve.submission import message_for_client
from acestep_jax.song import Song

logger = logging.getLogger(__name__)

UNWRITTEN = 8  # songs waiting to be written, above which the engine blocks


class EngineListener:
    """The engine's listener, see `engine.Listener`, and the works of unfinished records.

    Args:
        operations: the requests other than songs.
        on_end: called with each record that has ended, holding `Records.ending`.
        on_report: called with each batch's report, in the engine's thread.
        on_death: called when the engine has ended because of an error.
    """

    def __init__(
        self,
        kept: Records,
        engine: Engine,
        operations: Operations,
        *,
        on_end: Callable[[Record], object],
        on_report: Callable[[BatchReport], object],
        on_death: Callable[[], object],
    ):
        self.kept, self.store, self.engine, self.operations = kept, kept.store, engine, operations
        self._on_end, self._on_report, self._on_death = on_end, on_report, on_death
        self._lock = threading.RLock()
        self._works: dict[str, list[Work]] = {}
        self._places: dict[int, tuple[Record, int]] = {}  # by id(work)
        self._clients: dict[str, str] = {}
        self._has_ended = False  # whether a record has ended since the start, so that the process makes progress
        self._writer = ThreadPoolExecutor(1, "writer")
        self._unwritten = threading.Semaphore(UNWRITTEN)

    def forget_attempts(self) -> None:
        """Forget the attempts of the records in progress: the process exits normally, or is making progress.

        A record that repeatedly crashes the process becomes the oldest in the queue sooner or later, and then no other
        record ends before it.
        """
        self._has_ended = True
        for record in list(self.kept.all.values()):
            if record.status == "running":
                self.store.forget_attempt(record)

    def close(self) -> None:
        """Wait until all finished songs are written. The engine has ended."""
        self._writer.shutdown(wait=True)

    def reserve(self, record: Record, works: Sequence[Work], client: str) -> None:
        """Count works as waiting before they are in the queue."""
        with self._lock:
            self._works[record.id], self._clients[record.id] = list(works), client

    def release(self, record: Record) -> None:
        """Cancel a reservation."""
        with self._lock:
            self._forget(record)

    def enter(self, record: Record, works: Sequence[Work], places: Sequence[int]) -> None:
        """Put the works of a record into the queue.

        Args:
            places: the song index of each work.
        """
        if not works:
            with self.kept.ending:
                self.kept.end(record, _outcome(record))
            return
        with self._lock:
            self._works[record.id] = list(works)
            for work, place in zip(works, places, strict=True):
                self._places[id(work)] = record, place
                work.owner = record.id
            self.kept.put(record)
        self.engine.submit(works)

    def cancel(self, record: Record) -> None:
        """Stop the unfinished songs of a record; do nothing if it has ended."""
        with self.kept.ending:
            if record.final:
                return
            with self._lock:
                for song in record.songs:
                    if song.status not in ("done", "failed"):
                        song.status = "cancelled"
                works = self._forget(record)
            self.engine.cancel(works)
            self.kept.end(record, "cancelled")
            self._on_end(record)

    def works(self, record: Record) -> list[Work]:
        """Return the engine's works of an unfinished record."""
        with self._lock:
            return list(self._works.get(record.id, ()))

    def waiting(self, client: str | None = None) -> list[Work]:
        """Return the waiting works of a client, or of all."""
        with self._lock:
            mine = [one for one in self._works if client is None or self._clients.get(one) == client]
            found = [work for one in mine for work in self._works[one] if work.stage == "queued"]
        return found + self.operations.waiting(client)

    def changed(self, work: Work) -> None:
        if not work.is_song:
            self.operations.changed(work)
            return
        with self._lock:
            if (place := self._places.get(id(work))) is None:
                return
            record, i = place
            record.songs[i].status = "running"
            begins = record.status == "queued"
            if begins:
                record.status, record.started = "running", now()
        if begins and not self._has_ended:
            self.store.attempt(record)
        self.kept.touch(record)

    def planned(self, work: Work, plan: Plan) -> None:
        if not work.is_song:
            self.operations.planned(work, plan)
            return
        with self._lock:
            if (place := self._places.get(id(work))) is None:
                return
            record, i = place
            record.songs[i].plan = plan.to_dict()
        try:
            self.store.keep_plan(record, i)
        except OSError:
            logger.exception("%s: its plan could not be stored; it is planned again after a restart", record.id)
        self.kept.touch(record)

    def noted(self, work: Work, note: str) -> None:
        with self._lock:
            if (place := self._places.get(id(work))) is not None and note not in place[0].notes:
                place[0].notes.append(note)
                self.kept.touch(place[0])

    def done(self, work: Work, song: Song) -> None:
        self._unwritten.acquire()
        self._writer.submit(self._write, work, song)

    def failed(self, work: Work, message: str) -> None:
        if work.is_song:
            self._finish(work, "failed", message)
        else:
            self.operations.failed(work, message)

    def stopped(self, work: Work) -> None:
        """Do nothing: `cancel` has ended the record."""

    def reported(self, report: BatchReport) -> None:
        shape = report.program.shape
        logger.info(
            "%s of %d (size %d, %d frames)%s: %.2f s; %d wait; %s",
            *(
                "plans" if report.plans else "batch",
                len(report.works),
                report.program.size,
                shape.frames,
                ", compiled" if report.first else "",
            ),
            *(report.seconds, report.waiting, " ".join(work.owner for work in report.works)),
        )
        self._on_report(report)

    def died(self, error: BaseException) -> None:
        self._on_death()

    def _write(self, work: Work, song: Song) -> None:
        """Store a song; runs in the writer's thread."""
        try:
            with self._lock:
                place = self._places.get(id(work))
            if place is None:  # cancelled meanwhile
                return
            record, i = place
            assert song.audio is not None
            try:
                if song.timestamps is not None:  # the audio comes last: if it exists, the song is complete
                    write_lrc(self.store.song_path(record, i, LRC), song.timestamps, overwrite=True)
                sounds.write_latents(self.store.song_path(record, i, ".latents"), song.latents)
                audio.write(self.store.song_path(record, i), song.audio, song.sample_rate, overwrite=True)
            except Exception as problem:  # a full disk fails the song, not the server
                self._finish(work, "failed", f"cannot be stored: {message_of(problem)}")
            else:
                seconds = song.audio.shape[1] / song.sample_rate
                self._finish(work, "done", seconds=seconds, lrc=song.timestamps is not None)
        except Exception:
            logger.exception("a song was not stored")
        finally:
            self._unwritten.release()

    def _finish(
        self,
        work: Work,
        status: str,
        message: str | None = None,
        seconds: float | None = None,
        lrc: bool | None = None,
    ) -> None:
        """Store the outcome of a song, and forget its work; end its record after the last one."""
        with self.kept.ending:
            with self._lock:
                if (place := self._places.pop(id(work), None)) is None:  # cancelled meanwhile
                    return
                record, i = place
                song = record.songs[i]
                if message is not None:
                    paths = {field: self.store.upload_path(record, field) for field in record.files}
                    song.error = message_for_client(message, paths, record.extra.get("names", {}), self.store.folder)
                song.status, song.seconds, song.lrc = status, seconds, lrc
                self._works[record.id] = left = [one for one in self._works[record.id] if one is not work]
                if not left:
                    self._forget(record)
            if left:
                self.kept.touch(record)
            else:
                self.kept.end(record, _outcome(record))
                if not self._has_ended:
                    self.forget_attempts()
                self._on_end(record)

    def _forget(self, record: Record) -> list[Work]:
        """Forget the works of a record and return them. Called with the lock held."""
        works = self._works.pop(record.id, [])
        for work in works:
            self._places.pop(id(work), None)
        self._clients.pop(record.id, None)
        return works


def _outcome(record: Record) -> str:
    return "done" if any(song.status == "done" for song in record.songs) else "failed"
