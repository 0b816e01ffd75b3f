"""Coroutines that wait for records, for the protocols that answer when a song is there or tell how far it is."""

import asyncio
import time
from collections.abc import AsyncIterator

from acestep_jax.serve.errands import Errand
from acestep_jax.serve.service import Service
from acestep_jax.serve.store import Record

TIMEOUT = 600.0  # seconds that a client waits which does not stream
RETRY_SECONDS = 30  # after which a stopping server may be there again


async def changes(service: Service, record: Record | Errand, pause: float) -> AsyncIterator[bool]:
    """Yield at once and after each change of a record: true; or false if `pause` seconds went by without one.

    It ends when nothing will change any more, after that was told: a server that is stopping still makes what it has
    begun.
    """
    loop, wake = asyncio.get_running_loop(), asyncio.Event()

    def notify() -> None:
        loop.call_soon_threadsafe(wake.set)

    with service.watched(record, notify):
        changed = True
        while True:
            ended = service.is_over(record)  # before it is told: what changes meanwhile is told again
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
    """Wait until a record has ended; return false if it has not within `seconds`, or the client has gone.

    Args:
        connected: asked every second whether there still is somebody who waits.
    """
    end = time.monotonic() + seconds
    async for _ in changes(service, record, 1.0):
        if record.final:
            return True
        if time.monotonic() > end or connected is not None and not await connected():
            return False
    return record.final


def cancel_soon(service: Service, record: Record) -> None:
    """Cancel a record from a coroutine that may not wait, as one that is ended itself: that writes to the disk."""
    asyncio.get_running_loop().run_in_executor(None, service.cancel, record)
