"""The engine of one process: a thread that owns the device and makes waiting songs in batches."""

import dataclasses
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from acestep_jax.errors import Cancelled, InputError
from acestep_jax.placement import is_out_of_memory
from acestep_jax.planner.plan import Plan
from acestep_jax.planner.timestamps import check_alignment
from acestep_jax.request import Request, Sampling
from acestep_jax.serve.analysis import AnalysisResult, analyse
from acestep_jax.serve.batcher import Program, Shape
from acestep_jax.serve.engine import BatchReport, Listener, Work, check_adapters, message_of, refuse
from acestep_jax.serve.loading import Loading
from acestep_jax.serve.models import Model
from acestep_jax.serve.planner_task import ANALYSIS_MODES, run_planner
from acestep_jax.serve.queue import QueueingEngine
from acestep_jax.serve.timings import Timings
from acestep_jax.song import Song

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = (
    "the device has too little memory for this song; try a shorter one, or start the server with --dtype bfloat16 or "
    "several devices (--mesh)"
)


class LocalEngine(QueueingEngine):
    """Makes songs on the devices of this process.

    Args:
        models: the models; the first is the default.
        adapters: folders or files by name.
        max_batch: maximum number of songs in a batch.
        warm: durations in seconds to compile, for batches of one and of `max_batch`, before `ready`.

    Attributes:
        is_single_process: whether no other process runs the same programs, so that this one may skip some.
    """

    is_single_process = True

    def __init__(
        self,
        models: Sequence[Model],
        *,
        adapters: Mapping[str, str] | None = None,
        max_batch: int = 4,
        warm: Sequence[float] = (),
    ):
        super().__init__()
        self.models = {model.name: model for model in models}
        self.adapters = dict(adapters or {})
        self.max_batch = max_batch
        self.timings = Timings(max_batch)
        self._warm = tuple(warm)
        self._warmed = not warm
        self._running: list[Work] = []
        self._current: Program | None = None
        self._began = self._first_step = self._second_step = self._last_step = 0.0
        self._aligning = 0.0  # seconds of the batch spent on timestamps of lyrics
        self._stopping: float | None = None  # when the songs in progress are stopped
        self._loading = Loading(self.adapters)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._guarded, name="engine", daemon=True)

    @property
    def ready(self) -> bool:
        """See `Engine`."""
        return self._warmed and self._error is None and self._stopping is None and self._thread.is_alive()

    def check(self, work: Work) -> None:
        """See `Engine`. The request's files are read but not kept, because a queue of sources would fill memory."""
        model, task = self.models[work.model], work.planner_task
        check_adapters([name for name, _ in work.adapters], self.adapters)
        if work.is_song:
            job = model.prepare(work.request, work.sampling)
            work.steps = model.steps(job, work.sampling)
            if work.lrc and not model.has_alignment:
                raise InputError(
                    f"lrc: the alignment heads of {model.name}, which follow the lyrics, are unknown (they are known "
                    "for the 2B models); leave it out"
                )
            if work.lrc:
                check_alignment(model.configs["transformer"], job)
            key = job.program_key
            rest = key._replace(frames=0, prompt_tokens=0, lyric_tokens=0)
            work.group = (work.model, work.adapters, work.sampling, job.task_type, rest)
            names = tuple(name for name, _ in work.adapters)
            work.kind = (work.model, names, work.sampling, job.task_type, rest)
            work.shape = Shape(key.frames, key.prompt_tokens, key.lyric_tokens)
        if task is not None:
            work.group = work.kind = (work.model, task.batch_key)
            work.shape = Shape(max(1, work.shape.frames), 0, 0)

    def start(self, listener: Listener) -> None:
        """See `Engine`."""
        self._listener = listener
        self._thread.start()

    def remaining(self, works: Sequence[Work]) -> float | None:
        """See `Engine`."""
        own = set(map(id, works))
        with self._changed:
            queue, running, version = list(self._queue), list(self._running), self._version
            current, began, first_step = self._current, self._began, self._first_step
        left = 0.0
        if running and current is not None:
            left = self._left(running, current, began, first_step)
            if left is None:
                return None
        places = [i for i, work in enumerate(queue) if id(work) in own]
        if not places:
            return left if {id(work) for work in running} & own else 0.0
        ends = self.timings.ends(queue, version)
        seconds = [ends[id(queue[i])] for i in places]
        known, songs = [one for one in seconds if one is not None], self.timings.after_plans(queue[: places[-1] + 1])
        return left + max(known) + songs if songs is not None and len(known) == len(seconds) else None

    def stop(self, grace: float) -> None:
        """See `Engine`."""
        with self._changed:
            self._stopping = time.monotonic() + grace
            self._changed.notify_all()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(grace + 60)

    def _left(self, works: Sequence[Work], program: Program, began: float, first_step: float) -> float | None:
        """Return the remaining seconds of the current batch, including the songs of its plans, estimated from its own
        steps or from earlier batches; None: unknown."""
        now, work = time.monotonic(), works[0]
        whole, songs = self.timings.estimate(program, work.steps), self.timings.after_plans(works)
        if songs is None or work.stage == "aligning":  # its duration is unknown, and the song is finished
            return songs
        if work.step >= 2 and work.steps > work.step:
            each = (now - first_step) / work.step
            # The time after the steps is the time of earlier batches without their steps; 0 if there are none.
            after = max(0.0, whole - each * work.steps) if whole is not None else 0.0
            return each * (work.steps - work.step) + after + songs
        return None if whole is None else max(0.0, whole - (now - began)) + songs

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
        while (batch := self._next()) is not None:
            self._make(*batch)

    def _next(self) -> tuple[list[Work], Program] | None:
        """Wait for works; take those of the next batch from the queue and return them; None: the engine stops."""
        with self._changed:
            self._running, self._current = [], None
            while not self._queue and self._stopping is None:
                self._changed.wait()
            if self._stopping is not None:
                return None
            works, program = self.timings.next_batch(self._queue)
            self._take(works)
            self._running = works
            return works, program

    def _make(self, works: list[Work], program: Program, *, quiet: bool = False) -> None:
        """Make one batch of songs or plans, and report each of its works."""
        began = time.monotonic()
        first = program not in self.timings.compiled
        with self._changed:
            self._running, self._current, self._began, self._first_step = works, program, began, began
        plans: list[Plan | AnalysisResult] = []
        songs: list[Song] = []
        try:
            if works[0].planner_task is not None:
                plans = self.plans(works, program)
            else:
                songs = self.songs(works, program)
        except Cancelled:
            self._after_cancel(works)
            return
        except Exception as error:
            failure = message_of(error), is_out_of_memory(error)
            refuse(works, error)
        else:
            failure = None
        if failure is not None:  # outside of the handler, so that device memory held by the error's frames is free
            self._after_error(works, program, *failure, quiet=quiet)
            return
        seconds = time.monotonic() - began
        steps = 0 if plans else works[0].step - 1
        # Songs with and without timestamps of their lyrics share a program.
        self.timings.ran(program, seconds - self._aligning, steps, self._last_step - self._second_step)
        if quiet:
            return
        again = []
        for i, work in enumerate(works):
            if work.cancelled:
                self._listener.stopped(work)
            elif plans:
                found, work.planner_task = plans[i], None
                work.plan, work.analysis = (found.plan, found) if isinstance(found, AnalysisResult) else (found, None)
                again += self._with_plan(work)
            else:
                if work.lrc and songs[i].timestamps is None:
                    self._listener.noted(work, "lrc: the timestamps of its lyrics could not be computed")
                self._listener.done(work, songs[i])
        waiting = self.put_first(again)
        self._listener.reported(BatchReport(works, program, seconds, first, waiting, bool(plans)))

    def _with_plan(self, work: Work) -> list[Work]:
        """Report a plan; return the work if it also needs a song."""
        assert work.plan is not None
        self._listener.planned(work, work.plan)
        if not work.is_song:
            return []
        work.request = work.plan.request(work.request)
        return self._checked(work)

    def _checked(self, work: Work) -> list[Work]:
        """Return a work that waits for its song, if the song can still be made."""
        work.stage, work.step = "queued", 0
        try:
            self.check(work)
        except Exception as error:
            self._listener.failed(work, message_of(error))
            return []
        return [work]

    def plans(self, works: list[Work], program: Program) -> list[Plan | AnalysisResult]:
        """Return the plans of a batch, or what is found about existing songs; see `songs`."""
        model, self._aligning = self.models[works[0].model], 0.0
        self._tell(works, "planning" if self._loading.has(model) else "loading")
        pipe = self._loading.pipeline(model)
        self._tell(works, "planning")

        def on_progress(done: int, total: int) -> None:
            for work in works:
                work.step, work.steps = done, total
            self._tell(works, "planning")

        is_analysis = works[0].planner_task is not None and works[0].planner_task.mode in ANALYSIS_MODES
        filled = works if is_analysis else [*works, *[works[-1]] * (program.size - len(works))]
        tasks = [work.planner_task for work in filled if work.planner_task is not None]
        requests, watched = [work.request for work in filled], dict(should_stop=lambda: self._is_over(works))
        return list(
            (analyse if is_analysis else run_planner)(pipe, requests, tasks, on_progress=on_progress, **watched)
        )

    def _is_over(self, works: Sequence[Work]) -> bool:
        """Return whether all works of a batch are cancelled, or the server's grace period has ended."""
        late = self._stopping is not None and time.monotonic() > self._stopping
        return late or all(work.cancelled for work in works)

    def songs(self, works: list[Work], program: Program) -> list[Song]:
        """Return the songs of a batch, made in this thread; there may be more songs than works.

        Raises:
            Cancelled: if all works were cancelled, or the engine stops.
        """
        model, self._aligning = self.models[works[0].model], 0.0
        self._tell(works, "encoding" if self._loading.has(model) else "loading")
        pipe = self._loading.pipeline(model, works[0].adapters)
        jobs = [model.prepare(work.request, work.sampling) for work in works]
        jobs += [jobs[-1]] * (program.size - len(jobs))
        self._tell(works, "encoding")
        counted = 0

        def should_stop() -> bool:
            nonlocal counted
            self._last_step = time.monotonic()
            if counted == 0:
                self._first_step = self._last_step
            if counted == 1:
                self._second_step = self._last_step
            for work in works:
                work.step = counted
            counted += 1
            self._tell(works, "denoising")
            return self._is_over(works)

        songs = list(pipe.run(jobs, works[0].sampling, should_stop=should_stop))
        if any(work.lrc for work in works):
            self._tell(works, "aligning")
            began = time.monotonic()
            for i, work in enumerate(works):
                if work.lrc:
                    songs[i] = self._aligned(pipe, work, songs[i], works)
            self._aligning = time.monotonic() - began
        return songs

    def _aligned(self, pipe: Any, work: Work, song: Song, works: Sequence[Work]) -> Song:
        """Return a song of a batch with the timestamps of its lyrics, or without them if they cannot be computed: no
        error here may lose the song.

        All processes of a slice do the same here, because they learn of a cancellation at different times, and a device
        error may occur in only one of them.

        Raises:
            Cancelled: see `songs`.
        """
        if self.is_single_process and self._is_over(works):
            raise Cancelled
        if self.is_single_process and work.cancelled:
            return song
        try:
            return dataclasses.replace(song, timestamps=pipe.timestamps(song, work.request, work.sampling))
        except InputError as error:
            logger.warning("%s: no timestamps of its lyrics: %s", work.owner, error)
        except Exception:
            if not self.is_single_process:
                raise
            logger.exception("%s: no timestamps of its lyrics", work.owner)
        return song

    def _tell(self, works: Sequence[Work], stage: str) -> None:
        for work in works:
            work.stage = stage
            if self._listener is not None:
                self._listener.changed(work)

    def _after_cancel(self, works: Sequence[Work]) -> None:
        """Report the cancelled songs; the others were stopped by the server, and stay unfinished."""
        for work in works:
            if work.cancelled:
                self._listener.stopped(work)

    def _after_error(self, works: list[Work], program: Program, message: str, memory: bool, *, quiet: bool) -> None:
        """Make the songs of a failed batch in smaller batches, so that one song does not stop the others."""
        if quiet and not (memory and program.size > 1):
            logger.error("not compiled ahead: %s", message)
            return
        if memory and program.size > 1:
            half = program.size // 2
            self.timings.does_not_fit(program, half)
            logger.warning("out of memory with a batch of %d songs; from now on %d", program.size, half)
        elif len(works) == 1:
            self._without(works[0], OUT_OF_MEMORY if memory else message)
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

    def _without(self, work: Work, message: str) -> None:
        """Report a failed work; if only its optional plan has failed, make the song without it."""
        task = work.planner_task
        if task is None or task.required or not work.is_song:
            self._listener.failed(work, message)
            return
        self._listener.noted(work, f"thinking: made without the planner ({message})")
        work.planner_task, seconds = None, self.models[work.model].seconds(work.sampling)
        work.request = task.without_plan(work.request, seconds)
        self.put_first(self._checked(work))
