"""An engine of several processes, each with devices and a model of its own, that make the songs of one queue.

Whatever starts the processes (`serve.ray_engine`: Ray), each of them has a thread here, a lane. The lanes take batches
from the queue as the only thread of `LocalEngine` does, and hand them on. Where a process has gone in a batch, another
one is started, and the songs are made once more.
"""

import heapq
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from acestep_jax.planner.plan import Plan
from acestep_jax.serve.batcher import Program, batches, next_batch
from acestep_jax.serve.engine import BatchReport, EngineLost, Listener, Work
from acestep_jax.serve.experience import Experience
from acestep_jax.serve.local import LocalEngine
from acestep_jax.serve.models import Model
from acestep_jax.serve.parcel import Outcome, pack
from acestep_jax.serve.queue import QueueingEngine
from acestep_jax.serve.replica import Progress, Remote
from acestep_jax.song import Song

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # between looks at a batch under way
STARTS = 3  # of a process, before its lane is given up
START_PAUSE = 10.0  # seconds between them
PATIENCE = 30.0  # seconds of starting, after which the log says so
LOST_TWICE = "the process that made this song has ended twice; the server's log has the details"


class NotStarted(EngineLost):
    """A process does not start, so that its lane is given up; its songs are in the queue again."""


class Lane(LocalEngine):
    """A thread that has one replica make batches of the common queue."""

    def __init__(self, engine: "ReplicaEngine", index: int, warm: Sequence[float]):
        models = list(engine.models.values())
        super().__init__(models, adapters=engine.adapters, max_batch=engine.max_batch, warm=warm)
        self.index = index
        self._engine = engine
        self._remote: Remote | None = None
        self._warmed = False  # until there is a replica
        self._settled: set[int] = set()  # works of the batch under way, by `id`, that were reported or wait again

    @property
    def living(self) -> bool:
        """Whether it may still make songs."""
        return self._error is None

    def under_way(self) -> tuple[list[Work], float | None]:
        """Return the works of the batch under way, and how many seconds it still takes; None if that is not known."""
        with self._changed:
            running, current = list(self._running), self._current
            began, first_step = self._began, self._first_step
        if not running or current is None:
            return running, 0.0
        return running, self._left(running, current, began, first_step)

    def songs(self, works: list[Work], program: Program) -> list[Song]:
        """See `LocalEngine`."""
        return self._far(works, program)

    def plans(self, works: list[Work], program: Program) -> list[Plan]:
        """See `LocalEngine`."""
        return self._far(works, program)

    def take(self, queue: Sequence[Work], most: int) -> tuple[list[Work], Program]:
        """Return the next batch of a queue, of at most so many works; called with the queue's lock."""
        known = self.experience
        works, program = next_batch(queue, known.compiled, min(most, self.max_batch), known.limits)
        with self._changed:
            self._running = works
        return works, program

    def close(self) -> None:
        """End the replica."""
        remote, self._remote = self._remote, None
        if remote is not None:
            remote.close()

    def _far(self, works: list[Work], program: Program) -> list[Any]:
        """Have the replica make a batch. It is told again and again that a batch is over, as it may not have begun
        when it was told first."""
        assert self._remote is not None
        self._remote.begin(pack(works, program))
        told: Progress | None = None
        while not isinstance(found := self._remote.look(POLL_SECONDS), Outcome):
            if found.stage != "queued" and (told is None or found[:3] != told[:3]):
                if found.stage == "denoising":
                    self._first_step = time.monotonic() - found.seconds
                for work in works:
                    work.step = found.step
                    work.steps = found.steps or work.steps  # a song's are known here
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
            super()._make(works, program, quiet=quiet)  # which may call this method, for parts of the batch
        except NotStarted:  # while a part of this batch was made: the other parts are not to blame, and wait again
            if not quiet:
                self._engine.again([work for work in works if id(work) not in self._settled])
                self._settled.update(map(id, works))
            raise
        except EngineLost as error:
            logger.warning("replica %d has gone in a batch of %d: %s", self.index, len(works), error)
            with self._changed:
                self._running, self._current = [], None
            if not quiet:
                self._engine.lost(works)
                self._settled.update(map(id, works))
            self._connect()
        else:
            self._settled.update(map(id, works))

    def _connect(self) -> None:
        """Start the replica, and once more if that fails.

        Raises:
            NotStarted: if it has failed `STARTS` times, or the engine stops.
        """
        self.close()
        self.experience.forget_compiled()
        for start in range(1, STARTS + 1):
            try:
                self._remote = self._engine.start_replica()
                self._wait_for(self._remote)
                return
            except EngineLost as error:
                self.close()
                if start == STARTS or self._stopping is not None:
                    raise NotStarted(str(error)) from error
                logger.warning("replica %d does not start: %s; it is tried again", self.index, error)
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping is not None, START_PAUSE)

    def _wait_for(self, remote: Remote) -> None:
        began, told = time.monotonic(), False
        while self._stopping is None and not remote.ready(1.0):
            if not told and time.monotonic() - began > PATIENCE:
                told = True
                logger.warning("replica %d has not started in %g s; is there room for it?", self.index, PATIENCE)


class ReplicaEngine(QueueingEngine):
    """Songs by several replicas, see the module.

    Args:
        models, adapters, max_batch, warm: see `LocalEngine`; nothing is loaded here.
        start: starts a process.
        replicas: how many there are.
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
        self._idle = 0  # lanes that wait for songs
        self._planned: tuple[int, list[tuple[set[int], float | None]]] = -1, []
        self._stopping = False
        self._died = False
        self.lanes = [Lane(self, index, warm) for index in range(replicas)]

    # What the server calls, see `Engine`

    @property
    def ready(self) -> bool:
        """See `Engine`."""
        living = [lane for lane in self.lanes if lane.living]
        return not self._died and bool(living) and all(lane.ready for lane in living)

    def check(self, work: Work) -> None:
        """See `Engine`."""
        self.lanes[0].check(work)

    def start(self, listener: Listener) -> None:
        """See `Engine`."""
        self._listener = listener
        for lane in self.lanes:
            lane.start(self)

    def remaining(self, works: Sequence[Work]) -> float | None:
        """See `Engine`. Each batch of the queue is given to the lane that is free first."""
        own = set(map(id, works))
        with self._changed:
            queue, version = list(self._queue), self._version
        pending = {id(work) for work in queue} & own
        free: list[float] = []
        end = 0.0
        for lane in self.lanes:
            running, left = lane.under_way()
            mine = bool({id(work) for work in running} & own)
            if left is None and (mine or pending):
                return None
            if mine:
                end = max(end, left or 0.0)
            if lane.living:
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
        with ThreadPoolExecutor(len(self.lanes)) as pool:
            list(pool.map(lambda lane: lane.stop(grace), self.lanes))
        for lane in self.lanes:
            lane.close()

    def _batches(self, queue: Sequence[Work], version: int) -> list[tuple[set[int], float | None]]:
        """Return the works of each batch of a queue, by their `id`, and its seconds. Many ask, and the answer is
        computed once for each version."""
        known, found = self._planned
        if known == version:
            return found
        compiled: set[Program] = set()
        limits: dict[Any, int] = {}
        for lane in self.lanes:
            programs, sizes = lane.experience.known()
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

    def _first_known(self, ask: Callable[[Experience], float | None]) -> float | None:
        """Return what the first lane answers that has learnt enough of it; None: no lane has."""
        answers = (ask(lane.experience) for lane in self.lanes)
        return next((one for one in answers if one is not None), None)

    # What the lanes call

    def next_of(self, lane: Lane) -> tuple[list[Work], Program] | None:
        """Wait for songs, and return those of a lane's next batch, which leave the queue; None: the engine stops.

        Where several lanes are idle, each takes its share of the songs that wait, rather than one all of them.
        """
        with self._changed:
            self._idle += 1
            try:
                while not self._queue and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return None
                works, program = lane.take(self._queue, math.ceil(len(self._queue) / self._idle))
                self._take(works)
                return works, program
            finally:
                self._idle -= 1

    def lost(self, works: Sequence[Work]) -> None:
        """Let the songs of a lost batch be made again, but for those that were lost before."""
        once_more = []
        for work in works:
            if work.losses and not work.cancelled:
                self._listener.failed(work, LOST_TWICE)
            else:
                work.losses += 1
                once_more.append(work)
        self.again(once_more)

    def again(self, works: Sequence[Work]) -> None:
        """Let songs wait again whose lane will not make them, but for those that nobody wants any more."""
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

    # What a lane tells, see `Listener`

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
        """See `Listener`: a lane has ended. The others go on, unless it had an error of its own, or was the last."""
        living = sum(lane.living for lane in self.lanes)
        if self._stopping and isinstance(error, EngineLost):
            return
        if isinstance(error, EngineLost) and living:
            logger.critical("%d of %d replicas are left", living, len(self.lanes))
            return
        self._died = True
        self._listener.died(error)
