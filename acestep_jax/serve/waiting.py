"""Waiting for records, for protocols that respond when a song is finished, or stream its progress."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping

from fastapi import HTTPException, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from acestep_jax.serve.operations import Operation
from acestep_jax.serve.service import Service
from acestep_jax.serve.store import Record

BEAT = 2.0  # seconds between heartbeats of a stream
TIMEOUT = 600.0  # seconds that a client without streaming waits
RETRY_SECONDS = 30  # after which a stopping server may be available again


async def changes(service: Service, record: Record | Operation, pause: float) -> AsyncIterator[bool]:
    """Yield true at once and after each change of a record, and false after `pause` seconds without one.

    It ends after the last change: a stopping server still finishes the songs that it has started.
    """
    loop, wake = asyncio.get_running_loop(), asyncio.Event()

    def notify() -> None:
        loop.call_soon_threadsafe(wake.set)

    with service.watched(record, notify):
        changed = True
        while True:
            ended = service.is_over(record)  # checked before yielding, so that later changes are yielded again
            wake.clear()
            yield changed
            if ended:
                return
            try:
                await asyncio.wait_for(wake.wait(), pause)
                changed = True
            except TimeoutError:
                changed = False


async def ended(service: Service, record: Record | Operation, seconds: float, connected=None) -> bool:
    """Wait until a record has ended; return false if it has not within `seconds`, or the client has disconnected.

    Args:
        connected: called every second; returns whether the client is still connected.
    """
    end = time.monotonic() + seconds
    async for _ in changes(service, record, 1.0):
        if record.final:
            return True
        if time.monotonic() > end or connected is not None and not await connected():
            return False
    return record.final


async def await_end(
    service: Service, record: Record | Operation, request: Request, *, stopping: str, late: str
) -> None:
    """Wait for a record. A disconnect cancels it, and so does a stopping server if it would not survive that.

    Args:
        stopping, late: what the client is told if the server stops, or the record takes too long.

    Raises:
        HTTPException: 503 if the server stops first, 504 if the record takes too long.
    """

    async def connected() -> bool:
        return not await request.is_disconnected()

    is_kept = isinstance(record, Record)
    try:
        if await ended(service, record, TIMEOUT, connected):
            return
    except BaseException:
        if not (is_kept and service.closing):
            cancel_soon(service, record)
        raise
    is_over = service.is_over(record)
    if not (is_kept and is_over):
        await run_in_threadpool(_cancel, service, record)
    if is_over:
        raise HTTPException(503, stopping, {"retry-after": str(RETRY_SECONDS)})
    raise HTTPException(504, late)


class EventStream(StreamingResponse):
    """Server-sent events about a record. It is cancelled if the response ends before it, because the client has
    disconnected or, if the record would not survive that, the server is stopping.

    `events` cannot do this itself: a client may leave before its first event, and then none of its code runs.
    """

    def __init__(
        self,
        service: Service,
        record: Record | Operation,
        events: AsyncIterator[str],
        headers: Mapping[str, str] | None = None,
    ):
        own = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=own | dict(headers or {}))
        self.service, self.record = service, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            is_kept = isinstance(self.record, Record) and self.service.closing
            if not (self.record.final or is_kept):
                cancel_soon(self.service, self.record)


def cancel_soon(service: Service, record: Record | Operation) -> None:
    """Cancel a record in a thread, because this writes to the disk and the calling coroutine may not wait."""
    asyncio.get_running_loop().run_in_executor(None, _cancel, service, record)


def _cancel(service: Service, record: Record | Operation) -> None:
    if isinstance(record, Record):
        service.cancel(record)
    else:
        service.operations.cancel(record)
