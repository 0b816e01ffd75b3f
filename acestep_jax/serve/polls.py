"""Polls: repeated requests for the state of a record are answered from cached bytes, before routing.

A response is built by the same function as in its route, once for all clients until the record changes. All other
requests go on to the routes: unknown ids, results, forms, and failures, so that errors have the format of their
protocol.

Most polls are answered as soon as they are read, see `serve.http`; those from other origins, or read by h11, by the
middleware.
"""

import functools
import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from acestep_jax.serve.authors import MOST_IDS
from acestep_jax.serve.envelope import envelope
from acestep_jax.serve.http import RawResponse
from acestep_jax.serve.security import SAFE
from acestep_jax.serve.service import Service
from acestep_jax.serve.store import Record

logger = logging.getLogger(__name__)

FRESH_SECONDS = 0.2  # lifetime for an active record, whose queue position and remaining time change on their own
FINAL_SECONDS = 600.0  # lifetime for a finished record; signed links in it are valid for longer
KEPT = 1024  # records whose responses are cached; at least those of one poll
LARGEST = 2**16  # bytes of the largest body that is parsed here
SONG_PATH = re.compile(r"/v1/songs/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")
JOB_QUERY = re.compile(rb"id=([0-9a-f]{16})")
JSON_TYPE = (b"content-type", b"application/json")
OK, UNCHANGED = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 304 Not Modified\r\n"
PRIVATE = (b"cache-control", b"private, no-cache")


class CachedResponse(NamedTuple):
    """A cached response for a record, its expiry by the monotonic clock, and the version of the record.

    Attributes:
        response, plain, unchanged: the responses of `Polls.quick`: with the ETag, without it, and 304.
    """

    body: bytes
    etag: bytes
    response: RawResponse
    plain: RawResponse
    unchanged: RawResponse
    version: int
    until: float


class CachedResponses:
    """The cached responses for records in one protocol.

    Args:
        build: function from a record to its JSON values.
    """

    def __init__(self, build: Callable[[Record], Any]):
        self._build = build
        self._kept: dict[str, CachedResponse] = {}
        self._lock = threading.Lock()

    def of(self, record: Record) -> CachedResponse:
        """Return the response for a record."""
        now, found = time.monotonic(), self._kept.get(record.id)
        if found is not None and found.version == record.version and now < found.until:
            return found
        version = record.version  # read first, so that later changes give a new response
        until = now + (FINAL_SECONDS if record.final else FRESH_SECONDS)
        body = encoded(self._build(record))
        etag = b'"' + hashlib.blake2b(body, digest_size=12).hexdigest().encode() + b'"'
        head, tags = _head(body), _tags(etag)
        unchanged = RawResponse(UNCHANGED + tags + SAFE, b"")
        found = CachedResponse(
            body, etag, RawResponse(head + tags, body), RawResponse(head, body), unchanged, version, until
        )
        with self._lock:
            self._kept.pop(record.id, None)  # the newest come last
            self._kept[record.id] = found
            if len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
        return found

    def forget(self, record: Record) -> None:
        """Drop the response for a removed record; called from any thread."""
        with self._lock:
            self._kept.pop(record.id, None)


class Polls:
    """The middleware that answers polls, inside `security.Guard`.

    Args:
        songs, tasks, jobs: build the responses of `/v1/songs/ID`, of one task of `/query_result`, and of `/job?id=`.
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
        self._songs, self._tasks, self._jobs = CachedResponses(songs), CachedResponses(tasks), CachedResponses(jobs)
        service.kept.on_remove += [answers.forget for answers in (self._songs, self._tasks, self._jobs)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            method, path = scope["method"], scope["path"]
            if method == "GET":
                if (record := self._by_path(path)) and (answer := self._built(self._songs, record)):
                    await _conditional(scope, send, answer)
                    return
                if (record := self._by_job(path, scope["query_string"])) and (
                    answer := self._built(self._jobs, record)
                ):
                    await _send(send, answer.body)
                    return
            elif method == "POST" and path == "/query_result" and _is_small_json(scope):
                message = await _received(receive)
                if (whole := _single_part(message)) is not None and (body := self._results(whole)) is not None:
                    await _send(send, body)
                    return
                receive = _replayed(message, receive)
        await self.app(scope, receive, send)

    def quick(self, scope: Scope, given: Mapping[bytes, str], body: bytes) -> RawResponse | None:
        """Return the answer to a poll that is completely received, as the middleware gives it; None for anything else.

        Args:
            given: its headers.
        """
        path, respond = scope["path"], None
        if scope["method"] == "GET" and not body:
            if (record := self._by_path(path)) is not None:
                respond = functools.partial(
                    self._respond_song, record, given.get(b"if-none-match", "").encode("latin-1")
                )
            elif (record := self._by_job(path, scope["query_string"])) is not None:
                respond = functools.partial(self._respond_job, record)
        elif scope["method"] == "POST" and path == "/query_result" and _is_small_json(scope):
            respond = functools.partial(self._respond_results, body)
        response = None if respond is None else respond()
        return None if response is None else response._replace(repeat=respond)

    def _respond_song(self, record: Record, etag: bytes) -> RawResponse | None:
        """Return the answer to the path of a record, which may have been removed since it was found."""
        answer = self._built(self._songs, record) if self.service.records.get(record.id) is record else None
        if answer is None:
            return None
        return answer.unchanged if etag == answer.etag else answer.response

    def _respond_job(self, record: Record) -> RawResponse | None:
        answer = self._built(self._jobs, record) if self.service.records.get(record.id) is record else None
        return None if answer is None else answer.plain

    def _respond_results(self, body: bytes) -> RawResponse | None:
        found = self._results(body)
        return None if found is None else RawResponse(_head(found), found)

    def _by_path(self, path: str) -> Record | None:
        """Return the record of a path of `/v1/songs`; None if it is none of a record."""
        found = SONG_PATH.fullmatch(path)
        return self.service.records.get(found[1]) if found else None

    def _by_job(self, path: str, query: bytes) -> Record | None:
        """Return the record that `/job` is polled for; None if it is no poll of a record."""
        found = JOB_QUERY.fullmatch(query) if path == "/job" else None
        return self.service.kept.find_short(found[1].decode()) if found else None

    def _built(self, answers: CachedResponses, record: Record) -> CachedResponse | None:
        """Return the response for a record; log an error and return None if it cannot be built."""
        try:
            return answers.of(record)
        except Exception:
            logger.exception("%s: a poll could not be answered from the cache", record.id)
            return None

    def _results(self, body: bytes) -> bytes | None:
        """Return the response to a body of `/query_result` that names only records; None for any other."""
        try:
            ids = json.loads(body)["task_id_list"]
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


def _head(body: bytes) -> bytes:
    """Return the status line and the headers of JSON, as `_send` sends them."""
    return OK + b"content-length: %d\r\n" % len(body) + _line(*JSON_TYPE) + SAFE


def _tags(etag: bytes) -> bytes:
    return _line(b"etag", etag) + _line(*PRIVATE)


def _line(name: bytes, value: bytes) -> bytes:
    return name + b": " + value + b"\r\n"


def _is_small_json(scope: Scope) -> bool:
    """Return whether a request was authorised by its headers and has a small JSON body."""
    if not scope.get("state", {}).get("authorised", False):  # the key may be in the body
        return False
    headers = dict(reversed(scope["headers"]))
    length = headers.get(b"content-length", b"")
    return headers.get(b"content-type") == JSON_TYPE[1] and length.isdigit() and int(length) <= LARGEST


async def _received(receive: Receive) -> Message | HTTPException:
    """Return a message, or the error of a body that does not arrive, which the application handles."""
    try:
        return await receive()
    except HTTPException as error:
        return error


def _single_part(message: Message | HTTPException) -> bytes | None:
    """Return a body that has come in one piece; None for any other."""
    if isinstance(message, HTTPException) or message["type"] != "http.request" or message.get("more_body", False):
        return None
    return message.get("body", b"")


def _replayed(first: Message | HTTPException, receive: Receive) -> Receive:
    """Return a receive function that replays a message or an error, and then returns the following messages."""
    waiting = [first]

    async def replay() -> Message:
        message = waiting.pop() if waiting else await receive()
        if isinstance(message, HTTPException):
            raise message
        return message

    return replay


async def _conditional(scope: Scope, send: Send, answer: CachedResponse) -> None:
    """Send a response, or 304 to a client that has it already."""
    headers = [(b"etag", answer.etag), PRIVATE]
    if any(name == b"if-none-match" and value == answer.etag for name, value in scope["headers"]):
        await send({"type": "http.response.start", "status": 304, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
        return
    await _send(send, answer.body, headers)


async def _send(send: Send, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    own = [(b"content-length", b"%d" % len(body)), JSON_TYPE, *(headers or ())]
    await send({"type": "http.response.start", "status": 200, "headers": own})
    await send({"type": "http.response.body", "body": body})
