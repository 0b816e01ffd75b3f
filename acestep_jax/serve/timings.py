"""Measurements of an engine's programs: which are compiled, which sizes fit in memory, and how long they take."""

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from acestep_jax.serve.batcher import Program, Shape, Waiting, batches, next_batch

MAX_ENTRIES = 256  # maximum number of programs, and of kinds of songs, that are remembered
EMA_WEIGHT = 0.3  # weight of the newest measurement in a moving average

K = TypeVar("K")
V = TypeVar("V")


class Song(Waiting, Protocol):
    """A waiting song with its number of denoising steps."""

    @property
    def steps(self) -> int: ...


S = TypeVar("S", bound=Song)


class Newest(OrderedDict[K, V]):
    """A dictionary that keeps the `MAX_ENTRIES` newest entries, because keys chosen by clients must not fill memory."""

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > MAX_ENTRIES:
            self.popitem(last=False)


class Timings:
    """The measurements. The engine's thread adds to them, other threads call the methods.

    Attributes:
        compiled: the programs that have run, as keys; other threads read them, and the limits, through `known`.
        limits: the largest size that fits, where it is known to be less than `max_batch`.
    """

    def __init__(self, max_batch: int):
        self.max_batch = max_batch
        self.compiled: Newest[Program, None] = Newest()
        self.limits: Newest[tuple[Hashable, Shape], int] = Newest()
        self._seconds: Newest[Program, float] = Newest()  # moving averages, without compilation
        self._rate: float | None = None  # seconds per step, frame and song, for any program
        self._lock = threading.Lock()
        self._ends: tuple[object, dict[int, float | None]] = None, {}
        self._version = 0

    def next_batch(self, queue: Sequence[S]) -> tuple[list[S], Program]:
        """Return the songs to make next, see `batcher.next_batch`."""
        return next_batch(queue, self.compiled, self.max_batch, self.limits)

    def does_not_fit(self, program: Program, size: int) -> None:
        """Record that a program ran out of memory, and that the next attempt should have `size` songs."""
        with self._lock:
            self.limits[program.kind, program.shape] = size
            self._version += 1

    def known(self) -> tuple[list[Program], dict[tuple[Hashable, Shape], int]]:
        """Return copies of `compiled` and `limits`, for threads other than the engine's."""
        with self._lock:
            return list(self.compiled), dict(self.limits)

    def forget_compiled(self) -> None:
        """Record that no program is compiled any more."""
        with self._lock:
            self.compiled.clear()
            self._version += 1

    def ran(self, program: Program, seconds: float, steps: int, stepping: float) -> None:
        """Record a batch.

        Args:
            seconds: total time; it is ignored in the first run of a program, which includes compilation.
            steps, stepping: number of steps after the first one, and their time, which includes no compilation.
        """
        size = max(1, program.shape.frames * program.size)
        with self._lock:
            if program in self.compiled:
                self._seconds[program] = _mean(self._seconds.get(program), seconds)
            if steps > 0:
                self._rate = _mean(self._rate, stepping / (steps * size))
            self.compiled[program] = None
            self._version += 1

    def estimate(self, program: Program, steps: int) -> float | None:
        """Return the seconds of a batch, estimated from the same program, or one of another length or size, or the time
        per step of any program; None if nothing was measured yet."""
        with self._lock:
            known, rate = dict(self._seconds), self._rate
        size = program.shape.frames * program.size
        if program in known:
            return known[program]
        for other, seconds in reversed(known.items()):
            if other.kind == program.kind:
                return seconds * size / max(1, other.shape.frames * other.size)
        return None if rate is None else rate * steps * size

    def after_plans(self, works: Iterable[Any]) -> float | None:
        """Return the seconds of the songs that follow the plans of works, each made individually; None: unknown."""
        songs = [work for work in works if work.planner_task is not None and work.is_song]
        found = [self.estimate(Program(None, song.shape, 1), song.steps) for song in songs]
        known = [one for one in found if one is not None]
        return sum(known) if len(known) == len(found) else None

    def ends(self, queue: Sequence[S], version: Hashable) -> dict[int, float | None]:
        """Return the seconds until each song of a queue is finished, by its `id`, from the start of the first batch;
        None: unknown. This is called often, so the result is cached for each version of the queue."""
        with self._lock:
            asked = version, self._version
            known, found = self._ends
        if known == asked:
            return found
        compiled, limits = self.known()
        found, total = {}, 0.0
        for songs, program in batches(queue, compiled, self.max_batch, limits):
            seconds = None if total is None else self.estimate(program, songs[0].steps)
            total = None if total is None or seconds is None else total + seconds
            found |= {id(song): total for song in songs}
        with self._lock:
            self._ends = asked, found
        return found


def _mean(mean: float | None, new: float) -> float:
    return new if mean is None else (1 - EMA_WEIGHT) * mean + EMA_WEIGHT * new
