"""An engine of several processes, each with its own devices and model, that make the songs of one queue.

However the processes are started (`serve.ray_engine`: by Ray), each has a thread here, called a dispatcher. The
dispatchers take batches from the queue like the single thread of `LocalEngine`, and pass them to their processes. If a
process dies during a batch, a new one is started, and the songs are made again.
"""

import heapq
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from acestep_jax.planner.plan import Plan
from acestep_jax.serve.analysis import AnalysisResult
from acestep_jax.serve.batch_message import Outcome, encode_batch
from acestep_jax.serve.batcher import Program, batches, next_batch
from acestep_jax.serve.engine import BatchReport, EngineLost, Listener, Work
from acestep_jax.serve.local import LocalEngine
from acestep_jax.serve.models import Model
from acestep_jax.serve.queue import QueueingEngine
from acestep_jax.serve.replica import Progress, Remote
from acestep_jax.serve.timings import Timings
from acestep_jax.song import Song

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # between progress checks of a batch
STARTS = 3  # attempts to start a process before its dispatcher is given up
START_PAUSE = 10.0  # seconds between these attempts
PATIENCE = 30.0  # seconds of starting, after which a warning is logged
LOST_TWICE = "the process that made this song died twice; the server's log has the details"


class NotStarted(EngineLost):
    """A process does not start, so its dispatcher is given up; its songs are back in the queue."""


class Dispatcher(LocalEngine):
    """A thread that passes batches from the shared queue to one replica."""

    def __init__(self, engine: "ReplicaEngine", index: int, warm: Sequence[float]):
        models = list(engine.models.values())
        super().__init__(models, adapters=engine.adapters, max_batch=engine.max_batch, warm=warm)
        self.index = index
        self._engine = engine
        self._remote: Remote | None = None
        self._warmed = False  # false until there is a replica
        self._settled: set[int] = set()  # works of the current batch, by `id`, that were reported or queued again

    @property
    def living(self) -> bool:
        """Whether it can still make songs."""
        return self._error is None

    def current_batch(self) -> tuple[list[Work], float | None]:
        """Return the works of the current batch, and its remaining seconds, None if unknown."""
        with self._changed:
            running, current = list(self._running), self._current
            began, first_step = self._began, self._first_step
        if not running or current is None:
            return running, 0.0
        return running, self._left(running, current, began, first_step)

    def songs(self, works: list[Work], program: Program) -> list[Song]:
        """See `LocalEngine`."""
        return self._run_remote(works, program)

    def plans(self, works: list[Work], program: Program) -> list[Plan | AnalysisResult]:
        """See `LocalEngine`."""
        return self._run_remote(works, program)

    def take(self, queue: Sequence[Work], most: int) -> tuple[list[Work], Program]:
        """Return the next batch of a queue, with at most `most` works; called with the queue's lock held."""
        known = self.timings
        works, program = next_batch(queue, known.compiled, min(most, self.max_batch), known.limits)
        with self._changed:
            self._running = works
        return works, program

    def close(self) -> None:
        """End the replica."""
        remote, self._remote = self._remote, None
        if remote is not None:
            remote.close()

    def _run_remote(self, works: list[Work], program: Program) -> list[Any]:
        """Let the replica make a batch. If the batch is over, it is told so repeatedly, because the batch may not have
        started when it was told first."""
        assert self._remote is not None
        self._remote.begin(encode_batch(works, program))
        told: Progress | None = None
        while not isinstance(found := self._remote.look(POLL_SECONDS), Outcome):
            if found.stage != "queued" and (told is None or found[:3] != told[:3]):
                if found.stage == "denoising":
                    self._first_step = time.monotonic() - found.seconds
                for work in works:
                    work.step = found.step
                    work.steps = found.steps or work.steps  # for a song, they are known here
                self._tell(works, found.stage)
                told = found
            if self._is_over(works):
                self._remote.halt()
        for work in works:
            work.step = found.step
        self._second_step, self._last_step, self._aligning = 0.0, found.stepping, found.aligning
        return found.result()

    def _compile_ahead(self) -> None:
        self._connect()
        super()._compile_ahead()

    def _next(self) -> tuple[list[Work], Program] | None:
        with self._changed:
            self._running, self._current = [], None
        self._settled.clear()
        return self._engine.next_of(self)

    def put_first(self, works: Sequence[Work]) -> int:
        return self._engine.put_first(works)

    def _make(self, works: list[Work], program: Program, *, quiet: bool = False) -> None:
        try:
            super()._make(works, program, quiet=quiet)  # may call this method for parts of the batch
        except NotStarted:  # raised for a part of this batch: the other parts are not at fault, and return to the queue
            if not quiet:
                self._engine.again([work for work in works if id(work) not in self._settled])
                self._settled.update(map(id, works))
            raise
        except EngineLost as error:
            logger.warning("replica %d died during a batch of %d: %s", self.index, len(works), error)
            with self._changed:
                self._running, self._current = [], None
            if not quiet:
                self._engine.lost(works)
                self._settled.update(map(id, works))
            self._connect()
        else:
            self._settled.update(map(id, works))

    def _connect(self) -> None:
        """Start the replica, and retry if that fails.

        Raises:
            NotStarted: if it fails `STARTS` times, or the engine stops.
        """
        self.close()
        self.timings.forget_compiled()
        for start in range(1, STARTS + 1):
            try:
                self._remote = self._engine.start_replica()
                self._wait_for(self._remote)
                return
            except EngineLost as error:
                self.close()
                if start == STARTS or self._stopping is not None:
                    raise NotStarted(str(error)) from error
                logger.warning("replica %d does not start: %s; trying again", self.index, error)
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping is not None, START_PAUSE)

    def _wait_for(self, remote: Remote) -> None:
        began, told = time.monotonic(), False
        while self._stopping is None and not remote.ready(1.0):
            if not told and time.monotonic() - began > PATIENCE:
                told = True
                logger.warning("replica %d has not started in %g s; are there resources for it?", self.index, PATIENCE)


class ReplicaEngine(QueueingEngine):
    """Makes songs in several replicas, see the module.

    Args:
        models, adapters, max_batch, warm: see `LocalEngine`; nothing is loaded in this process.
        start: function that starts a process.
        replicas: number of replicas.
    """

    def __init__(
        self,
        models: Sequence[Model],
        start: Callable[[], Remote],
        replicas: int,
        *,
        adapters: Mapping[str, str] | None = None,
        max_batch: int = 4,
        warm: Sequence[float] = (),
    ):
        super().__init__()
        self.models: Mapping[str, Model] = {model.name: model for model in models}
        self.adapters: dict[str, str] = dict(adapters or {})
        self.max_batch = max_batch
        self.start_replica = start
        self._idle = 0  # dispatchers that wait for songs
        self._planned: tuple[int, list[tuple[set[int], float | None]]] = -1, []
        self._stopping = False
        self._died = False
        self.dispatchers = [Dispatcher(self, index, warm) for index in range(replicas)]

    # Called by the server, see `Engine`

    @property
    def ready(self) -> bool:
        """See `Engine`."""
        living = [dispatcher for dispatcher in self.dispatchers if dispatcher.living]
        return not self._died and bool(living) and all(dispatcher.ready for dispatcher in living)

    def check(self, work: Work) -> None:
        """See `Engine`."""
        self.dispatchers[0].check(work)

    def start(self, listener: Listener) -> None:
        """See `Engine`."""
        self._listener = listener
        for dispatcher in self.dispatchers:
            dispatcher.start(self)

    def remaining(self, works: Sequence[Work]) -> float | None:
        """See `Engine`. Each batch of the queue is assigned to the dispatcher that is free first."""
        own = set(map(id, works))
        with self._changed:
            queue, version = list(self._queue), self._version
        pending = {id(work) for work in queue} & own
        free: list[float] = []
        end = 0.0
        for dispatcher in self.dispatchers:
            running, left = dispatcher.current_batch()
            mine = bool({id(work) for work in running} & own)
            if left is None and (mine or pending):
                return None
            if mine:
                end = max(end, left or 0.0)
            if dispatcher.living:
                heapq.heappush(free, left or 0.0)
        if not pending:
            return end
        for batch, seconds in self._batches(queue, version):
            if seconds is None or not free:
                return None
            at = heapq.heappop(free) + seconds
            heapq.heappush(free, at)
            if batch & own:
                end = max(end, at)
                pending -= batch
            if not pending:
                break
        return end

    def stop(self, grace: float) -> None:
        """See `Engine`."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        with ThreadPoolExecutor(len(self.dispatchers)) as pool:
            list(pool.map(lambda dispatcher: dispatcher.stop(grace), self.dispatchers))
        for dispatcher in self.dispatchers:
            dispatcher.close()

    def _batches(self, queue: Sequence[Work], version: int) -> list[tuple[set[int], float | None]]:
        """Return the works of each batch of a queue, by their `id`, and its seconds. This is called often, so the
        result is cached for each version of the queue."""
        known, found = self._planned
        if known == version:
            return found
        compiled: set[Program] = set()
        limits: dict[Any, int] = {}
        for dispatcher in self.dispatchers:
            programs, sizes = dispatcher.timings.known()
            compiled.update(programs)
            limits |= sizes
        found = []
        for works, program in batches(queue, compiled, self.max_batch, limits):
            seconds = self._first_known(lambda known: known.estimate(program, works[0].steps))  # noqa: B023
            songs = self._first_known(lambda known: known.after_plans(works))  # noqa: B023  (both are called at once)
            whole = None if seconds is None or songs is None else seconds + songs
            found.append(({id(work) for work in works}, whole))
        self._planned = version, found
        return found

    def _first_known(self, ask: Callable[[Timings], float | None]) -> float | None:
        """Return the result of the first dispatcher whose measurements give one; None: no dispatcher has one."""
        answers = (ask(dispatcher.timings) for dispatcher in self.dispatchers)
        return next((one for one in answers if one is not None), None)

    # Called by the dispatchers

    def next_of(self, dispatcher: Dispatcher) -> tuple[list[Work], Program] | None:
        """Wait for songs; take those of a dispatcher's next batch from the queue and return them; None: the engine
        stops.

        If several dispatchers are idle, each takes a part of the waiting songs, instead of one taking all of them.
        """
        with self._changed:
            self._idle += 1
            try:
                while not self._queue and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return None
                works, program = dispatcher.take(self._queue, math.ceil(len(self._queue) / self._idle))
                self._take(works)
                return works, program
            finally:
                self._idle -= 1

    def lost(self, works: Sequence[Work]) -> None:
        """Return the songs of a lost batch to the queue, except those that were lost before."""
        once_more = []
        for work in works:
            if work.losses and not work.cancelled:
                self._listener.failed(work, LOST_TWICE)
            else:
                work.losses += 1
                once_more.append(work)
        self.again(once_more)

    def again(self, works: Sequence[Work]) -> None:
        """Return songs that a dispatcher cannot make to the queue, except cancelled ones."""
        waiting = []
        for work in works:
            if work.cancelled:
                self._listener.stopped(work)
            else:
                work.stage, work.step = "queued", 0
                waiting.append(work)
        self.put_first(waiting)
        for work in waiting:
            self._listener.changed(work)

    # Events from the dispatchers, see `Listener`

    def changed(self, work: Work) -> None:
        """See `Listener`."""
        self._listener.changed(work)

    def planned(self, work: Work, plan: Plan) -> None:
        """See `Listener`."""
        self._listener.planned(work, plan)

    def noted(self, work: Work, note: str) -> None:
        """See `Listener`."""
        self._listener.noted(work, note)

    def done(self, work: Work, song: Song) -> None:
        """See `Listener`."""
        self._listener.done(work, song)

    def failed(self, work: Work, message: str) -> None:
        """See `Listener`."""
        self._listener.failed(work, message)

    def stopped(self, work: Work) -> None:
        """See `Listener`."""
        self._listener.stopped(work)

    def reported(self, report: BatchReport) -> None:
        """See `Listener`."""
        with self._changed:
            self._version += 1
        self._listener.reported(report)

    def died(self, error: BaseException) -> None:
        """See `Listener`: a dispatcher has ended. The others continue, unless it had its own error or was the last."""
        living = sum(dispatcher.living for dispatcher in self.dispatchers)
        if self._stopping and isinstance(error, EngineLost):
            return
        if isinstance(error, EngineLost) and living:
            logger.critical("%d of %d replicas are left", living, len(self.dispatchers))
            return
        self._died = True
        self._listener.died(error)
