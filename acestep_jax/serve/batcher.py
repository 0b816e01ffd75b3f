"""The choice of the next batch. Pure functions: no JAX, no threads, no HTTP.

Compiling a new shape takes longer than generating a short song, so there are few shapes: batch sizes are powers of two,
and a batch is padded with copies of its last song. The group of the oldest song goes next, so no song starves.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar


class Shape(NamedTuple):
    """The lengths that a batch is padded to, all of which are buckets."""

    frames: int
    prompt_tokens: int
    lyric_tokens: int

    def covers(self, other: "Shape") -> bool:
        """Return whether a song of the other shape fits into a batch of this shape without extending it."""
        return all(own >= its for own, its in zip(self, other, strict=True))


class Program(NamedTuple):
    """The static properties of a batch, which determine its compiled program.

    Attributes:
        kind: everything else that determines the program, such as the model and the sampling.
        size: number of songs in the batch.
    """

    kind: Hashable
    shape: Shape
    size: int


class Waiting(Protocol):
    """A waiting song. Songs of the same `group` may share a batch; songs of the same `kind` share compiled programs."""

    @property
    def group(self) -> Hashable: ...
    @property
    def kind(self) -> Hashable: ...
    @property
    def shape(self) -> Shape: ...


W = TypeVar("W", bound=Waiting)


def next_batch(
    queue: Sequence[W],
    compiled: Collection[Program],
    max_batch: int,
    limits: Mapping[tuple[Hashable, Shape], int] | None = None,
) -> tuple[list[W], Program]:
    """Return the songs to make next and the program to make them with.

    Songs with the group and shape of the oldest song come first, in order of arrival; then shorter songs of the group,
    of at least half its length, which save a batch of their own. Compiled sizes are preferred: three songs run as four
    if there is a program for four, else as two and, later, one.

    Args:
        queue: waiting songs, oldest first; not empty.
        limits: the largest size that fits in memory, where it is known to be less than `max_batch`.
    """
    oldest = queue[0]
    limit = max(1, min(max_batch, (limits or {}).get((oldest.kind, oldest.shape), max_batch)))
    alike = [song for song in queue if song.group == oldest.group]
    equal = [song for song in alike if song.shape == oldest.shape]
    shorter = [
        song
        for song in alike
        if song.shape != oldest.shape
        and oldest.shape.covers(song.shape)
        and 2 * song.shape.frames >= oldest.shape.frames
    ]
    chosen = [*equal, *shorter][: _power_below(limit)]
    size = _power_below(len(chosen))
    if size < len(chosen) and Program(oldest.kind, oldest.shape, 2 * size) in compiled:
        size *= 2
    return chosen[:size], Program(oldest.kind, oldest.shape, size)


def batches(
    queue: Sequence[W],
    compiled: Collection[Program],
    max_batch: int,
    limits: Mapping[tuple[Hashable, Shape], int] | None = None,
) -> list[tuple[list[W], Program]]:
    """Return all batches of a queue that gets no more songs, in order."""
    found, rest = [], list(queue)
    compiled = set(compiled)
    while rest:
        songs, program = next_batch(rest, compiled, max_batch, limits)
        found.append((songs, program))
        compiled.add(program)
        taken = {id(song) for song in songs}
        rest = [song for song in rest if id(song) not in taken]
    return found


def _power_below(n: int) -> int:
    """Return the largest power of two that is at most n."""
    return 1 << (n.bit_length() - 1)
