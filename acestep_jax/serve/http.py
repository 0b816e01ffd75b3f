"""How uvicorn reads HTTP here: heads have a limit, and polls are answered before there is a request.

uvicorn makes objects, a task and two writes of each request, which take five times as long as the answer to a poll. So
the protocol asks `quick` first, with what the parser has found, and writes its answer as it is.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

MAX_HEAD = 2**16  # bytes of a head, as h11 has it
MAX_BODY = 2**16  # bytes of a body that `quick` is asked with; it has come with its head
HEAD_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Asked(NamedTuple):
    """A request that has come whole.

    Attributes:
        method: "GET" or "POST".
        target: path and query, as they were sent.
        headers: names in small letters.
        body: empty for GET.
    """

    method: str
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Told(NamedTuple):
    """An answer.

    Attributes:
        head: the status line and headers, each with its line end; not the empty line after them.
        again: returns the answer to the same bytes later, on the same connection, or None if the application answers
            them; None: they are looked at anew.
    """

    head: bytes
    body: bytes
    again: "Callable[[], Told | None] | None" = None


Quick = Callable[[Asked], Told | None]


def protocol(quick: Quick) -> Any:
    """Return what reads HTTP, as uvicorn takes it: httptools, or h11 where that is not installed, which has a limit on
    heads of its own, and asks the application alone.

    The limit here is on the bytes that come without being the end of a head or a part of a body, so that no path,
    header or trailer fills memory.

    Args:
        quick: returns the answer to a request, or None if the application answers it.
    """
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "h11"

    class Protocol(HttpToolsProtocol):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self._loose = 0
            self._held: bytearray | None = None  # the body of a request that uvicorn does not know of yet
            self._known: bytes | None = None  # a whole request, which a client that polls sends again and again
            self._again: Callable[[], Told | None] | None = None
            self._begun = self._ended = 0  # requests; as many where the parser waits for the next
            self._last = 0.0  # when that was answered last, by the loop's clock
            self._told: Told | None = None  # the last answer, the headers that uvicorn adds, and both as they are sent
            self._defaults: Any = None
            self._sent = b""

        def data_received(self, data: bytes) -> None:
            if data == self._known and self._begun == self._ended and self._is_free() and self._again is not None:
                if (told := self._again()) is not None:
                    self._last = self.loop.time()  # the timer of `on_response_complete` goes on
                    self._write(told)
                    return
            self._loose += len(data)
            self._again, begun, is_between = None, self._begun, self._begun == self._ended
            super().data_received(data)
            is_one = is_between and self._begun == self._ended == begun + 1
            self._known = data if is_one and self._again is not None else None
            if self._held is not None and not self.transport.is_closing():
                try:
                    self._pass_on()  # the rest comes later, and is waited for as for any other
                except Exception:  # such as an address of no meaning, which the parser reports as its own elsewhere
                    self.send_400_response("Invalid HTTP request received.")
                    return
            if self._loose > MAX_HEAD and not self.transport.is_closing():
                if self.cycle is None or self.cycle.response_complete:  # else an answer may be under way
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
                self._unset_keepalive_if_required()  # of an answer to a poll in the same bytes
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
            asked = Asked(parser.get_method().decode(), self.url, self.headers, bytes(self._held))
            try:
                told = quick(asked)
            except Exception:
                logger.exception("a request could not be answered at once")
                told = None
            if told is None:
                self._pass_on()
                super().on_message_complete()
                return
            self._held, self._again = None, told.again
            self._write(told)
            self.on_response_complete()

        def _is_free(self) -> bool:
            """Return whether nothing is under way that an answer must wait for."""
            cycle = self.cycle
            return (cycle is None or cycle.response_complete) and not self.pipeline and not self.flow.write_paused

        def _write(self, told: Told) -> None:
            defaults = self.server_state.default_headers  # another list each second
            if told is self._told and defaults is self._defaults:
                self.transport.write(self._sent)
                return
            parts = [told.head]
            for name, value in defaults:
                parts += [name, b": ", value, b"\r\n"]
            sent = b"".join([*parts, b"\r\n", told.body])
            self.transport.write(sent)
            if len(sent) <= MAX_BODY:
                self._told, self._defaults, self._sent = told, defaults, sent

        def timeout_keep_alive_handler(self) -> None:
            left = self._last + self.timeout_keep_alive - self.loop.time()
            if left > 0:
                self.timeout_keep_alive_task = self.loop.call_later(left, self.timeout_keep_alive_handler)
            else:
                super().timeout_keep_alive_handler()

        def _pass_on(self) -> None:
            """Let uvicorn make a request of what was held."""
            body, self._held = bytes(self._held or b""), None
            self._unset_keepalive_if_required()  # see `on_headers_complete`
            super().on_headers_complete()
            if body:
                super().on_body(body)

    return Protocol
