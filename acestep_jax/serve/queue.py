"""The works that wait, which every engine has: those of `serve.local`, and of `serve.replicas`."""

import threading
from collections.abc import Sequence
from typing import Any

from acestep_jax.serve.engine import Listener, Work


class QueueingEngine:
    """The part of an engine that is its queue.

    Attributes:
        _changed: held while the queue, or what the engine does, changes; told when that matters to its threads.
        _version: of the queue.
        _listener: whom the engine tells; there is one once it has started.
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
        """See `Engine`. They leave their places in the queue now, not when the batch that is running ends."""
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
        """Put works at the head of the queue, but for those that nobody wants any more; return how many wait then."""
        with self._changed:
            self._set_queue([*(work for work in works if not work.cancelled), *self._queue])
            return len(self._queue)

    def _take(self, works: Sequence[Work]) -> None:
        """Let works leave the queue. Called with the lock."""
        taken = set(map(id, works))
        self._set_queue([work for work in self._queue if id(work) not in taken])

    def _set_queue(self, queue: list[Work]) -> None:
        """Change the queue, and wake those who wait for works. Called with the lock."""
        self._queue = queue
        self._version += 1
        self._changed.notify_all()
