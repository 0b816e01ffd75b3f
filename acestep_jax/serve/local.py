"""The engine of one process: a thread that owns the device, and makes waiting songs in batches of equal programs."""

import logging
import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax

from acestep_jax.errors import Cancelled, InputError
from acestep_jax.request import Request, Sampling
from acestep_jax.serve.batcher import Program, Shape, batches, next_batch
from acestep_jax.serve.engine import BatchReport, Listener, Work, message_of
from acestep_jax.serve.models import Model
from acestep_jax.song import Song

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = (
    "the device has too little memory for this song; try a shorter one, or start the server with --dtype bfloat16 or "
    "several devices (--mesh)"
)
RECENT = 0.3  # weight of the newest measurement in a moving mean


class LocalEngine:
    """Songs on the devices of this process.

    Args:
        models: the first is the default.
        adapters: folders or files by name.
        max_batch: most songs made at once.
        warm: durations in seconds that are compiled, for batches of one and of `max_batch`, before `ready`.
    """

    def __init__(
        self,
        models: Sequence[Model],
        *,
        adapters: Mapping[str, str] | None = None,
        max_batch: int = 4,
        warm: Sequence[float] = (),
    ):
        self.models = {model.name: model for model in models}
        self.adapters = dict(adapters or {})
        self.max_batch = max_batch
        self.compiled: set[Program] = set()
        self._warm = tuple(warm)
        self._warmed = not warm
        self._queue: list[Work] = []
        self._running: list[Work] = []
        self._current: Program | None = None
        self._began = self._first_step = 0.0
        self._changed = threading.Condition()
        self._stopping: float | None = None  # when the songs under way are stopped
        self._limits: dict[tuple[Hashable, Shape], int] = {}
        self._seconds: dict[Program, float] = {}  # moving means, without compilation
        self._loaded: tuple[str, Any] | None = None
        self._listener: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._guarded, name="engine", daemon=True)

    @property
    def ready(self) -> bool:
        """See `Engine`."""
        return self._warmed and self._error is None and self._stopping is None and self._thread.is_alive()

    def check(self, work: Work) -> None:
        """See `Engine`. The files of the request are read, and dropped again: a queue of sources would fill memory."""
        model = self.models[work.model]
        for name, _ in work.adapters:
            if name not in self.adapters:
                raise InputError(f"adapters: unknown adapter {name!r}; expected one of {', '.join(self.adapters)}")
        job = model.prepare(work.request, work.sampling)
        work.steps = model.steps(job, work.sampling)
        key = job.program_key
        rest = key._replace(frames=0, prompt_tokens=0, lyric_tokens=0)
        work.group = (work.model, work.adapters, work.sampling, job.task_type, rest)
        names = tuple(name for name, _ in work.adapters)
        work.kind = (work.model, names, work.sampling, job.task_type, rest)
        work.shape = Shape(key.frames, key.prompt_tokens, key.lyric_tokens)

    def start(self, listener: Listener) -> None:
        """See `Engine`."""
        self._listener = listener
        self._thread.start()

    def submit(self, works: Sequence[Work]) -> None:
        """See `Engine`."""
        with self._changed:
            self._queue.extend(works)
            self._changed.notify_all()

    def cancel(self, works: Sequence[Work]) -> None:
        """See `Engine`."""
        with self._changed:
            for work in works:
                work.cancelled = True
            # They leave their places in the queue now, not when the batch that is running ends.
            dropped = [work for work in self._queue if work.cancelled]
            self._queue = [work for work in self._queue if not work.cancelled]
            self._changed.notify_all()
        if self._listener is not None:  # which there is once the engine has started
            for work in dropped:
                self._listener.stopped(work)

    def ahead(self, works: Sequence[Work]) -> int:
        """See `Engine`."""
        own = set(map(id, works))
        with self._changed:
            place = next((i for i, work in enumerate(self._queue) if id(work) in own), 0)
        return place

    def remaining(self, works: Sequence[Work]) -> float | None:
        """See `Engine`."""
        own = set(map(id, works))
        with self._changed:
            queue, running = list(self._queue), list(self._running)
            current, began, first_step = self._current, self._began, self._first_step
        total = 0.0
        if running and current is not None:
            left = self._left(running[0], current, began, first_step)
            if left is None:
                return None
            total = left
        pending = {id(work) for work in queue} & own
        if not pending:
            return total if {id(work) for work in running} & own else 0.0
        for songs, program in batches(queue, self.compiled, self.max_batch, self._limits):
            seconds = self._estimate(program)
            if seconds is None:
                return None
            total += seconds
            pending -= {id(song) for song in songs}
            if not pending:
                break
        return total

    def stop(self, grace: float) -> None:
        """See `Engine`."""
        with self._changed:
            self._stopping = time.monotonic() + grace
            self._changed.notify_all()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(grace + 60)

    def _left(self, work: Work, program: Program, began: float, first_step: float) -> float | None:
        """Return how long a batch under way still takes: by its own steps, or by earlier batches of its program."""
        now = time.monotonic()
        whole = self._seconds.get(program)
        if work.step >= 2 and work.steps > work.step:
            each = (now - first_step) / work.step
            # What comes after the steps took that part of earlier batches which is not steps; unknown ones get nothing.
            after = max(0.0, whole - each * work.steps) if whole is not None else 0.0
            return each * (work.steps - work.step) + after
        return None if whole is None else max(0.0, whole - (now - began))

    def _estimate(self, program: Program) -> float | None:
        """Return the seconds of a batch, by the same program or one of another length or size."""
        if program in self._seconds:
            return self._seconds[program]
        known = [(other, seconds) for other, seconds in list(self._seconds.items()) if other.kind == program.kind]
        if not known:
            return None
        other, seconds = known[-1]
        return seconds * program.shape.frames * program.size / (other.shape.frames * other.size)

    def _guarded(self) -> None:
        try:
            self._compile_ahead()
            self._loop()
        except BaseException as error:
            self._error = error
            logger.critical("the engine has ended", exc_info=error)
            self._listener.died(error)

    def _compile_ahead(self) -> None:
        model = next(iter(self.models))
        for seconds in self._warm:
            request = Request("piano", lyrics="[Instrumental]", audio_duration=seconds, seed=0)
            work = Work(request, Sampling(), model)
            self.check(work)
            for size in sorted({1, 1 << (self.max_batch.bit_length() - 1)}):
                if self._stopping is not None:
                    return
                self._make([work], Program(work.kind, work.shape, size), quiet=True)
        self._warmed = True

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._running, self._current = [], None
                gone = [work for work in self._queue if work.cancelled]
                self._queue = [work for work in self._queue if not work.cancelled]
                works: list[Work] = []
                if self._stopping is not None:
                    return
                if self._queue:
                    works, program = next_batch(self._queue, self.compiled, self.max_batch, self._limits)
                    taken = set(map(id, works))
                    self._queue = [work for work in self._queue if id(work) not in taken]
                    self._running = works
                elif not gone:
                    self._changed.wait()
                    continue
            for work in gone:
                self._listener.stopped(work)
            if works:
                self._make(works, program)

    def _make(self, works: list[Work], program: Program, *, quiet: bool = False) -> None:
        """Make one batch; report each of its songs."""
        began = time.monotonic()
        first = program not in self.compiled
        with self._changed:
            self._running, self._current, self._began, self._first_step = works, program, began, began
        try:
            songs = self._songs(works, program)
        except Cancelled:
            self._after_cancel(works)
            return
        except Exception as error:
            failure = message_of(error), _is_out_of_memory(error)
        else:
            failure = None
        if failure is not None:  # outside of the handler: what the error's frames hold on the device is free now
            self._after_error(works, program, *failure, quiet=quiet)
            return
        seconds = time.monotonic() - began
        self.compiled.add(program)
        if not first:
            mean = self._seconds.get(program, seconds)
            self._seconds[program] = (1 - RECENT) * mean + RECENT * seconds
        if quiet:
            return
        for work, song in zip(works, songs, strict=False):
            if work.cancelled:
                self._listener.stopped(work)
            else:
                self._listener.done(work, song)
        with self._changed:
            waiting = len(self._queue)
        self._listener.reported(BatchReport(works, program, seconds, first, waiting))

    def _songs(self, works: list[Work], program: Program) -> list[Song]:
        model = self.models[works[0].model]
        self._tell(works, "loading" if self._loaded is None or self._loaded[0] != model.name else "encoding")
        pipe = self._pipeline(model, works[0].adapters)
        jobs = [model.prepare(work.request, work.sampling) for work in works]
        jobs += [jobs[-1]] * (program.size - len(jobs))
        self._tell(works, "encoding")
        counted = 0

        def should_stop() -> bool:
            nonlocal counted
            if counted == 0:
                self._first_step = time.monotonic()
            for work in works:
                work.step = counted
            counted += 1
            self._tell(works, "denoising")
            late = self._stopping is not None and time.monotonic() > self._stopping
            return late or all(work.cancelled for work in works)

        return pipe.run(jobs, works[0].sampling, should_stop=should_stop)

    def _tell(self, works: Sequence[Work], stage: str) -> None:
        for work in works:
            work.stage = stage
            self._listener.changed(work)

    def _pipeline(self, model: Model, adapters: Sequence[tuple[str, float]]) -> Any:
        """Return the model with these adapters; only one is loaded at a time, and changes between batches."""
        if self._loaded is None or self._loaded[0] != model.name:
            self._loaded = None
            self._loaded = model.name, model.load()
        pipe = self._loaded[1]
        scales = dict(adapters)
        if set(pipe.adapters) != set(scales):
            pipe.unload_lora()
            for name in scales:
                pipe.load_lora(self.adapters[name], 1.0, name=name)
        if scales and dict(pipe.adapters) != scales:
            pipe.set_adapters(scales)
        return pipe

    def _after_cancel(self, works: Sequence[Work]) -> None:
        """Report the songs that were cancelled; the others were stopped with the server, and stay undone."""
        for work in works:
            if work.cancelled:
                self._listener.stopped(work)

    def _after_error(self, works: list[Work], program: Program, message: str, memory: bool, *, quiet: bool) -> None:
        """Make the songs of a failed batch in smaller ones, so that one does not stop the others."""
        if quiet and not (memory and program.size > 1):
            logger.error("not compiled ahead: %s", message)
            return
        if memory and program.size > 1:
            half = program.size // 2
            self._limits[program.kind, program.shape] = half
            logger.warning("out of memory with %d songs at once; from now on %d", program.size, half)
        elif len(works) == 1:
            self._listener.failed(works[0], OUT_OF_MEMORY if memory else message)
            return
        else:
            half = 1
        for i in range(0, len(works), half):
            part = [work for work in works[i : i + half] if not work.cancelled]
            for work in works[i : i + half]:
                if work.cancelled:
                    self._listener.stopped(work)
            if part and not (self._stopping is not None and time.monotonic() > self._stopping):
                self._make(part, program._replace(size=half), quiet=quiet)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
