"""Polls: what clients ask again and again while a song is made is answered from bytes that are kept, before any route.

An answer is built by the function that its route builds it with, once for all who ask until the record changes. What is
no plain poll of a record goes on to the routes: unknown ids, results, forms, and what fails, so that errors have the
shape of their protocol.
"""

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from acestep_jax.serve.authors import MOST_IDS
from acestep_jax.serve.envelope import envelope
from acestep_jax.serve.service import Service
from acestep_jax.serve.store import Record

logger = logging.getLogger(__name__)

FRESH_SECONDS = 0.2  # of a record under way: places in the queue and remaining times change without it
FINAL_SECONDS = 600.0  # of one that has ended: signed links in it are valid for longer
KEPT = 1024  # records whose answers are kept; at least those of one poll
LARGEST = 2**16  # bytes of a body that is looked at here
SONG_PATH = re.compile(r"/v1/songs/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")
JOB_QUERY = re.compile(rb"id=([0-9a-f]{16})")
JSON_TYPE = (b"content-type", b"application/json")


class Answer(NamedTuple):
    """What a record is told as, until when by the monotonic clock, and what version of the record that was."""

    body: bytes
    etag: bytes
    version: int
    until: float


class Answers:
    """The answers about records in one protocol.

    Args:
        build: returns what JSON holds of a record.
    """

    def __init__(self, build: Callable[[Record], Any]):
        self._build = build
        self._kept: dict[str, Answer] = {}
        self._lock = threading.Lock()

    def of(self, record: Record) -> Answer:
        """Return the answer about a record."""
        now, found = time.monotonic(), self._kept.get(record.id)
        if found is not None and found.version == record.version and now < found.until:
            return found
        version = record.version  # before it is looked at: what changes meanwhile is told again
        until = now + (FINAL_SECONDS if record.final else FRESH_SECONDS)
        body = encoded(self._build(record))
        found = Answer(body, b'"' + hashlib.blake2b(body, digest_size=12).hexdigest().encode() + b'"', version, until)
        with self._lock:
            self._kept.pop(record.id, None)  # the newest stand last
            self._kept[record.id] = found
            if len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
        return found

    def forget(self, record: Record) -> None:
        """Drop the answer about a record, which is removed; called from any thread."""
        with self._lock:
            self._kept.pop(record.id, None)


class Polls:
    """The middleware that answers polls; within `security.Guard`.

    Args:
        songs, tasks, jobs: build the answers of `/v1/songs/ID`, of one task of `/query_result`, and of `/job?id=`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        service: Service,
        songs: Callable[[Record], Any],
        tasks: Callable[[Record], Any],
        jobs: Callable[[Record], Any],
    ):
        self.app, self.service = app, service
        self._songs, self._tasks, self._jobs = Answers(songs), Answers(tasks), Answers(jobs)
        service.kept.on_remove += [answers.forget for answers in (self._songs, self._tasks, self._jobs)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            method, path = scope["method"], scope["path"]
            if method == "GET":
                if (found := SONG_PATH.fullmatch(path)) and (record := self.service.records.get(found[1])):
                    if answer := self._built(self._songs, record):
                        await _conditional(scope, send, answer)
                        return
                elif path == "/job" and (found := JOB_QUERY.fullmatch(scope["query_string"])):
                    record = self.service.kept.find_short(found[1].decode())
                    if record and (answer := self._built(self._jobs, record)):
                        await _send(send, answer.body)
                        return
            elif method == "POST" and path == "/query_result" and _is_small_json(scope):
                message = await _received(receive)
                if not isinstance(message, HTTPException) and (body := self._results(message)) is not None:
                    await _send(send, body)
                    return
                receive = _again(message, receive)
        await self.app(scope, receive, send)

    def _built(self, answers: Answers, record: Record) -> Answer | None:
        """Return the answer about a record; None if it cannot be built, which the log says."""
        try:
            return answers.of(record)
        except Exception:
            logger.exception("%s: a poll could not be answered from what is kept", record.id)
            return None

    def _results(self, message: Message) -> bytes | None:
        """Return the answer to a body of `/query_result` that names records alone; None for any other."""
        if message["type"] != "http.request" or message.get("more_body", False):
            return None
        try:
            ids = json.loads(message.get("body", b""))["task_id_list"]
            ids = json.loads(ids) if isinstance(ids, str) else ids
            records = [self.service.records[one] for one in ids] if isinstance(ids, list) else []
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if not 0 < len(records) <= MOST_IDS:
            return None
        tasks = []
        for record in records:
            if (answer := self._built(self._tasks, record)) is None:
                return None
            tasks.append(answer.body)
        return encoded(envelope([])).replace(b"[]", b"[" + b",".join(tasks) + b"]", 1)


def encoded(value: Any) -> bytes:
    """Return JSON as `starlette.responses.JSONResponse` writes it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _is_small_json(scope: Scope) -> bool:
    """Return whether a request whose key was in its headers has a small body of JSON."""
    if not scope.get("state", {}).get("authorised", False):  # else the key is in the body
        return False
    headers = dict(reversed(scope["headers"]))
    length = headers.get(b"content-length", b"")
    return headers.get(b"content-type") == JSON_TYPE[1] and length.isdigit() and int(length) <= LARGEST


async def _received(receive: Receive) -> Message | HTTPException:
    """Return a message, or the error of a body that does not come, which the application answers."""
    try:
        return await receive()
    except HTTPException as error:
        return error


def _again(first: Message | HTTPException, receive: Receive) -> Receive:
    """Return a function that gives a message, or raises an error, once more, and then gives those that follow it."""
    waiting = [first]

    async def again() -> Message:
        message = waiting.pop() if waiting else await receive()
        if isinstance(message, HTTPException):
            raise message
        return message

    return again


async def _conditional(scope: Scope, send: Send, answer: Answer) -> None:
    """Send an answer; 304 to a client that has it already."""
    headers = [(b"etag", answer.etag), (b"cache-control", b"private, no-cache")]
    if any(name == b"if-none-match" and value == answer.etag for name, value in scope["headers"]):
        await send({"type": "http.response.start", "status": 304, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
        return
    await _send(send, answer.body, headers)


async def _send(send: Send, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    own = [(b"content-length", b"%d" % len(body)), JSON_TYPE, *(headers or ())]
    await send({"type": "http.response.start", "status": 200, "headers": own})
    await send({"type": "http.response.body", "body": body})
