"""The HTTP protocol of the server: uvicorn's, with a size limit for heads, and polls answered during parsing.

For each request, uvicorn creates objects, a task and two writes, which takes five times as long as answering a poll. So
a poll takes a shorter path:

    bytes -> parsed by httptools -> `Guard.quick` (access) -> `Polls.quick` (cached response) -> one write
    the next equal bytes on the same connection -> `RawResponse.repeat` -> one write

The second line relies on an invariant: the same bytes on the same connection request the same, with the same key in a
header. A key does not expire, so access need not be checked again; `repeat` looks up whether the record still exists
and has changed. Cookies and signed links expire, so with them the response has no `repeat`. All other requests go to
uvicorn and the application.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

MAX_HEAD = 2**16  # bytes of the largest head; h11 has the same limit
MAX_BODY = 2**16  # bytes of the largest body passed to `quick`
HEAD_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class RawRequest(NamedTuple):
    """A completely received request.

    Attributes:
        method: "GET" or "POST".
        target: path and query, as sent.
        headers: names in lower case.
        body: empty for GET.
    """

    method: str
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class RawResponse(NamedTuple):
    """A response.

    Attributes:
        head: status line and headers, each with its line end, without the empty line that follows them.
        repeat: function that returns the response if the same bytes arrive again on this connection, or None if the
            application must respond; None: the bytes are parsed again.
    """

    head: bytes
    body: bytes
    repeat: "Callable[[], RawResponse | None] | None" = None


Quick = Callable[[RawRequest], RawResponse | None]


@dataclasses.dataclass(slots=True)
class RepeatCache:
    """What answers equal bytes on one connection.

    Attributes:
        data: the last request, if these bytes held nothing else; None: there is no such request.
        repeat: see `RawResponse`; for `data`.
        time: time of the last repeated response, by the loop's clock.
        response, defaults, sent: the last response, uvicorn's own headers, and both as sent.
    """

    data: bytes | None = None
    repeat: Callable[[], RawResponse | None] | None = None
    time: float = 0.0
    response: RawResponse | None = None
    defaults: Any = None
    sent: bytes = b""


def protocol(quick: Quick) -> Any:
    """Return uvicorn's `http` setting: a protocol with httptools, or "h11" if that is not installed. h11 has its own
    limit for heads, and passes all requests to the application.

    The limit counts the bytes received outside of bodies since the last complete head, so that no path, header or
    trailer can fill memory.

    Args:
        quick: function that returns the response to a request, or None if the application must respond.
    """
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "h11"

    class Protocol(HttpToolsProtocol):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self._loose = 0
            self._held: bytearray | None = None  # body of a request not yet passed to uvicorn
            self._cache = RepeatCache()
            self._begun = self._ended = 0  # numbers of requests; equal between requests

        def data_received(self, data: bytes) -> None:
            cache = self._cache
            if data == cache.data and self._begun == self._ended and self._is_free() and cache.repeat is not None:
                if (response := cache.repeat()) is not None:
                    cache.time = self.loop.time()  # read by `timeout_keep_alive_handler`
                    self._write(response)
                    return
            self._loose += len(data)
            cache.repeat, begun, is_between = None, self._begun, self._begun == self._ended
            super().data_received(data)
            is_one = is_between and self._begun == self._ended == begun + 1
            cache.data = data if is_one and cache.repeat is not None else None
            if self._held is not None and not self.transport.is_closing():
                try:
                    self._pass_on()  # the rest of the body arrives later
                except Exception:  # such as an invalid URL; elsewhere uvicorn handles it as a parser error
                    self.send_400_response("Invalid HTTP request received.")
                    return
            if self._loose > MAX_HEAD and not self.transport.is_closing():
                if self.cycle is None or self.cycle.response_complete:  # otherwise a response may be in progress
                    self.transport.write(HEAD_TOO_LARGE)
                self.transport.close()

        def on_message_begin(self) -> None:
            self._begun += 1
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._loose = 0
            parser: Any = self.parser
            if (
                self._is_free()
                and parser.get_method() in (b"GET", b"POST")
                and parser.get_http_version() == "1.1"
                and parser.should_keep_alive()
                and not parser.should_upgrade()
                and not self.expect_100_continue
            ):
                self._held = bytearray()
            else:
                self._unset_keepalive_if_required()  # set by the response to a poll in the same bytes
                super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._loose = 0
            if self._held is not None:
                if len(self._held) + len(body) <= MAX_BODY:
                    self._held += body
                    return
                self._pass_on()
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._loose = 0
            self._ended += 1
            if self._held is None:
                super().on_message_complete()
                return
            parser: Any = self.parser
            request = RawRequest(parser.get_method().decode(), self.url, self.headers, bytes(self._held))
            try:
                response = quick(request)
            except Exception:
                logger.exception("a request could not be answered at once")
                response = None
            if response is None:
                self._pass_on()
                super().on_message_complete()
                return
            self._held, self._cache.repeat = None, response.repeat
            self._write(response)
            self.on_response_complete()

        def _is_free(self) -> bool:
            """Return whether a response can be written now, with none in progress or queued before it."""
            cycle = self.cycle
            return (cycle is None or cycle.response_complete) and not self.pipeline and not self.flow.write_paused

        def _write(self, response: RawResponse) -> None:
            cache, defaults = self._cache, self.server_state.default_headers  # a new list every second
            if response is cache.response and defaults is cache.defaults:
                self.transport.write(cache.sent)
                return
            parts = [response.head]
            for name, value in defaults:
                parts += [name, b": ", value, b"\r\n"]
            sent = b"".join([*parts, b"\r\n", response.body])
            self.transport.write(sent)
            if len(sent) <= MAX_BODY:
                cache.response, cache.defaults, cache.sent = response, defaults, sent

        def timeout_keep_alive_handler(self) -> None:
            left = self._cache.time + self.timeout_keep_alive - self.loop.time()
            if left > 0:
                self.timeout_keep_alive_task = self.loop.call_later(left, self.timeout_keep_alive_handler)
            else:
                super().timeout_keep_alive_handler()

        def _pass_on(self) -> None:
            """Pass the held request on to uvicorn."""
            body, self._held = bytes(self._held or b""), None
            self._unset_keepalive_if_required()  # see `on_headers_complete`
            super().on_headers_complete()
            if body:
                super().on_body(body)

    return Protocol
