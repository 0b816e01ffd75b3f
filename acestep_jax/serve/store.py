"""The server's data folder: requests, their uploads and their results.

    DATA/songs/<id>/request.json    the accepted request, with its seeds
    DATA/songs/<id>/src_audio       an upload, under the name of its field
    DATA/songs/<id>/0.flac          a song, with 0.latents; other formats are converted on request
    DATA/songs/<id>/0.plan          its plan
    DATA/songs/<id>/0.lrc           the timestamps of its lyrics
    DATA/songs/<id>/0.favourite     marks a favourite
    DATA/songs/<id>/result.json     the outcome
    DATA/songs/<id>/attempts        a byte for each process that died while it made this, before finishing any record
    DATA/incoming/                  uploads that are not accepted yet

All files are written atomically, and `result.json` last: a request without one is queued again, even after `kill -9`.
"""

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from acestep_jax.io.files import publish_file

logger = logging.getLogger(__name__)

MAX_REMOVED = 100_000  # maximum number of remembered ids of removed records
PLAN, LRC, FAVOURITE = ".plan", ".lrc", ".favourite"  # suffixes
SECRET_BYTES = 32
FINAL = ("done", "failed", "cancelled")
# Keys of a song in `request.json`, with its attributes.
KEYS = {"request": "request", "sampling": "sampling", "thought": "planner_task", "plan": "plan"}
ENDED = ("status", "error", "seconds", "lrc")  # fields of a song's outcome


@dataclasses.dataclass
class SongRecord:
    """One song of a record: the given fields of `Request` and `Sampling`, with its seed, and its state.

    Attributes:
        planner_task: the planner's task, see `planner_task.PlannerTask.to_dict`; None: no planning.
        plan: the plan from the planner or the client, see `Plan.to_dict`.
        lrc: whether there is a file with timestamps of its lyrics.
        favourite: whether the user has marked it, so that it is not removed to make room.
    """

    request: dict[str, Any]
    sampling: dict[str, Any]
    planner_task: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    status: str = "queued"
    error: str | None = None
    seconds: float | None = None
    lrc: bool | None = None
    favourite: bool = False

    @property
    def seed(self) -> int | None:
        """The seed of the noise."""
        return self.request.get("seed")


@dataclasses.dataclass
class Record:
    """One submission: songs that were requested together.

    Attributes:
        created, started, finished: seconds since 1970.
        api: the protocol of the request.
        format: the requested format of the sound file, see `serve.sounds`.
        notes: sentences about ignored or replaced parts of the request.
        extra: data specific to its protocol; `names`, if there are uploads that the client calls otherwise, see
            `uploads.Body`.
        files: the fields that have an upload.
        lrc: see `Submission`.
        status: "queued", "running", "done", "failed" or "cancelled".
        version: increases with every change, for watchers.
    """

    id: str
    created: float
    api: str
    model: str
    adapters: dict[str, float]
    songs: list[SongRecord]
    format: str = "flac"
    notes: list[str] = dataclasses.field(default_factory=list)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: list[str] = dataclasses.field(default_factory=list)
    lrc: bool = False
    status: str = "queued"
    started: float | None = None
    finished: float | None = None
    version: int = 1

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.status in FINAL

    @property
    def error(self) -> str | None:
        """The error of the first failed song."""
        return next((song.error for song in self.songs if song.error), None)


class Store:
    """The data folder of the server. One process owns it.

    Raises:
        OSError: if the folder cannot be written, or another server uses it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser().absolute()
        self.songs, self.incoming = self.folder / "songs", self.folder / "incoming"
        for path in (self.songs, self.incoming):
            path.mkdir(parents=True, exist_ok=True)
        self._owner = _lock(self.folder / "lock")
        for path in self.incoming.iterdir():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        self._removed = self.folder / "removed"
        self._writing = threading.Lock()
        removed = self._removed.read_text().split()[-MAX_REMOVED:] if self._removed.exists() else []
        self.removed = dict.fromkeys(removed)

    def close(self) -> None:
        """Release the folder for other processes."""
        self._owner.release()

    def secret(self) -> bytes:
        """Return the key for signing links and cookies, which is kept in a file that only the owner can read.

        A damaged file is replaced, with a warning: all that is lost are links and sessions of at most a day.
        """
        path = self.folder / "secret"
        if path.exists():
            with contextlib.suppress(ValueError):
                found = bytes.fromhex(path.read_text(encoding="ascii").strip())
                if len(found) >= SECRET_BYTES:
                    return found
            logger.warning("%s: damaged; it is replaced, so links and sessions from before are no longer valid", path)
        made = secrets.token_bytes(SECRET_BYTES)
        with publish_file(path, 0o600) as temporary:
            temporary.write_text(made.hex(), encoding="ascii")
        return made

    def new_folder(self) -> Path:
        """Return a new folder for the uploads of a request."""
        return Path(tempfile.mkdtemp(dir=self.incoming))

    def new_id(self) -> str:
        """Return the id of a new record."""
        return str(uuid.uuid4())

    def folder_of(self, record: Record) -> Path:
        """Return the folder of a record."""
        return self.songs / record.id

    def song_path(self, record: Record, index: int, suffix: str = ".flac") -> Path:
        """Return the file of a song."""
        return self.folder_of(record) / f"{index}{suffix}"

    def upload_path(self, record: Record, field: str) -> Path:
        """Return the file of an upload."""
        return self.folder_of(record) / field

    def accept(self, record: Record, uploads: Path | None) -> None:
        """Store a new record with the folder of its uploads: from now on it survives the process."""
        folder = uploads or self.new_folder()
        values = dataclasses.asdict(record)
        for name in ("status", "started", "finished", "version"):
            values.pop(name)
        values["songs"] = [
            {key: getattr(song, name) for key, name in KEYS.items() if getattr(song, name) is not None}
            for song in record.songs
        ]
        _write_json(folder / "request.json", values)
        folder.chmod(0o755)
        os.rename(folder, self.folder_of(record))
        _sync(self.songs)

    def keep_plan(self, record: Record, index: int) -> None:
        """Store the plan of a song, so that it is made from the same plan after a restart."""
        plan = record.songs[index].plan
        assert plan is not None
        _write_json(self.song_path(record, index, PLAN), plan)

    def keep_favourite(self, record: Record, index: int, favourite: bool) -> None:
        """Store whether a song is a favourite."""
        path = self.song_path(record, index, FAVOURITE)
        if favourite:
            path.touch()
        else:
            path.unlink(missing_ok=True)

    def finish(self, record: Record) -> None:
        """Store the outcome of a record."""
        values = dict(
            status=record.status,
            started=record.started,
            finished=record.finished,
            notes=record.notes,
            songs=[{name: getattr(song, name) for name in ENDED} for song in record.songs],
        )
        _write_json(self.folder_of(record) / "result.json", values)
        self._attempts(record).unlink(missing_ok=True)

    def remove(self, record: Record) -> None:
        """Delete a record with its files, and remember its id."""
        gone = self.incoming / f"gone-{record.id}"
        try:
            os.rename(self.folder_of(record), gone)
        except FileNotFoundError:
            return
        shutil.rmtree(gone, ignore_errors=True)
        with self._writing:
            self.removed[record.id] = None
            with self._removed.open("a") as file:
                file.write(record.id + "\n")

    def attempt(self, record: Record) -> None:
        """Record an attempt to make a record, so that one that crashes the process is not tried forever."""
        with contextlib.suppress(OSError), self._attempts(record).open("ab") as file:
            file.write(b".")

    def forget_attempt(self, record: Record) -> None:
        """Forget the last attempt, because the process exits normally."""
        with contextlib.suppress(OSError):
            os.truncate(self._attempts(record), max(0, self.attempts(record) - 1))

    def attempts(self, record: Record) -> int:
        """Return the number of processes that died while they made a record."""
        try:
            return self._attempts(record).stat().st_size
        except OSError:
            return 0

    def _attempts(self, record: Record) -> Path:
        return self.folder_of(record) / "attempts"

    def load(self) -> Iterator[Record]:
        """Yield the records of earlier processes, oldest first; skip unreadable ones with a warning."""
        found = []
        for folder in self.songs.iterdir():
            try:
                found.append(self._read(folder))
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.warning("%s: not a readable record (%s); skipped", folder, error)
        yield from sorted(found, key=lambda record: record.created)

    def size(self, record: Record) -> int:
        """Return the size of a record's files in bytes."""
        with os.scandir(self.folder_of(record)) as files:
            return sum(file.stat().st_size for file in files)

    def _read(self, folder: Path) -> Record:
        values = json.loads((folder / "request.json").read_text(encoding="utf-8"))
        songs = [SongRecord(**{KEYS[key]: value for key, value in song.items()}) for song in values.pop("songs")]
        record = Record(songs=songs, **values)
        if record.id != folder.name:
            raise ValueError(f"it is called {record.id}")
        for i, song in enumerate(record.songs):
            if (plan := folder / f"{i}{PLAN}").exists():
                song.plan = json.loads(plan.read_text(encoding="utf-8"))
            song.favourite = (folder / f"{i}{FAVOURITE}").exists()
        result = folder / "result.json"
        if result.exists():
            ended: Mapping[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            record.status, record.started, record.finished = ended["status"], ended["started"], ended["finished"]
            record.notes = ended.get("notes", record.notes)
            for song, values in zip(record.songs, ended["songs"], strict=True):
                for name in ENDED:
                    setattr(song, name, values.get(name))
        return record


def now() -> float:
    """Return the seconds since 1970."""
    return time.time()


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with publish_file(path) as temporary:
        temporary.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _lock(path: Path) -> Any:
    """Lock the folder for this process; raise OSError if another process has locked it."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OSError(f"{path.parent}: another server uses this folder; give each its own with --data") from None
    return lock


def _sync(folder: Path) -> None:
    """Sync a folder, so that a new name in it is durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
