"""Coroutines that wait for records, for protocols that respond when a song is finished, or stream its progress."""

import asyncio
import time
from collections.abc import AsyncIterator

from acestep_jax.serve.errands import Errand
from acestep_jax.serve.service import Service
from acestep_jax.serve.store import Record

TIMEOUT = 600.0  # seconds that a client without streaming waits
RETRY_SECONDS = 30  # after which a stopping server may be available again


async def changes(service: Service, record: Record | Errand, pause: float) -> AsyncIterator[bool]:
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


async def ended(service: Service, record: Record | Errand, seconds: float, connected=None) -> bool:
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


def cancel_soon(service: Service, record: Record) -> None:
    """Cancel a record in a thread, because this writes to the disk and the calling coroutine may not wait."""
    asyncio.get_running_loop().run_in_executor(None, service.cancel, record)
