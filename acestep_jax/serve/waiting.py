"""Coroutines that wait for records, for the protocols that answer when a song is there or tell how far it is."""

import asyncio
import time
from collections.abc import AsyncIterator

from acestep_jax.serve.service import Service
from acestep_jax.serve.store import Record


async def changes(service: Service, record: Record, pause: float) -> AsyncIterator[bool]:
    """Yield at once and after each change of a record: true; or false if `pause` seconds went by without one.

    It ends when the record has ended, after that was told, or the server is stopping.
    """
    loop, wake = asyncio.get_running_loop(), asyncio.Event()

    def notify() -> None:
        loop.call_soon_threadsafe(wake.set)

    with service.watched(record, notify):
        changed = True
        while True:
            ended = record.final or service.closing  # before it is told: what changes meanwhile is told again
            wake.clear()
            yield changed
            if ended:
                return
            try:
                await asyncio.wait_for(wake.wait(), pause)
                changed = True
            except TimeoutError:
                changed = False


async def ended(service: Service, record: Record, seconds: float, connected=None) -> bool:
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
