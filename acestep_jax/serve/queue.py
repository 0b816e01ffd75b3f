"""The queue of waiting works, shared by the engines in `serve.local` and `serve.replicas`."""

import threading
from collections.abc import Sequence
from typing import Any

from acestep_jax.serve.engine import Listener, Work


class QueueingEngine:
    """The queue of an engine.

    Attributes:
        _changed: condition that is held while the queue or the engine's state changes, and notified for its threads.
        _version: version of the queue.
        _listener: listener of the engine, set when it starts.
    """

    def __init__(self) -> None:
        self._queue: list[Work] = []
        self._changed = threading.Condition()
        self._version = 0
        self._listener: Listener | Any = None

    def submit(self, works: Sequence[Work]) -> None:
        """See `Engine`."""
        with self._changed:
            self._set_queue([*self._queue, *(work for work in works if not work.cancelled)])

    def cancel(self, works: Sequence[Work]) -> None:
        """See `Engine`. The works leave the queue now, not when the current batch ends."""
        with self._changed:
            for work in works:
                work.cancelled = True
            dropped = [work for work in self._queue if work.cancelled]
            self._set_queue([work for work in self._queue if not work.cancelled])
        if self._listener is not None:
            for work in dropped:
                self._listener.stopped(work)

    def ahead(self, works: Sequence[Work]) -> int:
        """See `Engine`."""
        own = set(map(id, works))
        with self._changed:
            return next((i for i, work in enumerate(self._queue) if id(work) in own), 0)

    def put_first(self, works: Sequence[Work]) -> int:
        """Put works that are not cancelled at the head of the queue; return the new length of the queue."""
        with self._changed:
            self._set_queue([*(work for work in works if not work.cancelled), *self._queue])
            return len(self._queue)

    def _take(self, works: Sequence[Work]) -> None:
        """Remove works from the queue. Called with the lock held."""
        taken = set(map(id, works))
        self._set_queue([work for work in self._queue if id(work) not in taken])

    def _set_queue(self, queue: list[Work]) -> None:
        """Replace the queue, and wake the threads that wait for works. Called with the lock held."""
        self._queue = queue
        self._version += 1
        self._changed.notify_all()
