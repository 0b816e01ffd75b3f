"""What the server knows of an engine, whatever makes the songs: this process (`serve.local`), several processes with
models of their own (`serve.replicas`), or several hosts with one (`serve.slices`)."""

import dataclasses
import logging
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Protocol

import jax

from acestep_jax.errors import InputError
from acestep_jax.planner.plan import Plan
from acestep_jax.request import Request, Sampling
from acestep_jax.serve.batcher import Program, Shape
from acestep_jax.serve.models import Model
from acestep_jax.serve.thinking import Thought
from acestep_jax.song import Song

logger = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Work:
    """One song to make: what was requested, and how far it is.

    Attributes:
        adapters: (name, scale) of each, sorted.
        group, kind, shape: set by `Engine.check`, see `serve.batcher`.
        stage: "queued", "loading", "planning", "encoding", "denoising", "decoding" or "aligning".
        step, steps: of planning or denoising.
        cancelled: whether nobody wants it any more.
        owner: the id of what it belongs to, for the log.
        thought: what the planner still has to write; then the song is made of that.
        plan: what it wrote.
        is_song: whether a song is made at all; else the plan is all that is wanted.
        losses: how often the process that made it has gone, see `serve.replicas`.
        lrc: whether the song is told with the times of its lyrics, see `Song.timestamps`.
        is_refused: whether it failed by an error of the request; else it is the server that could not make it.
    """

    request: Request
    sampling: Sampling
    model: str
    adapters: tuple[tuple[str, float], ...] = ()
    group: Hashable = None
    kind: Hashable = None
    shape: Shape = Shape(0, 0, 0)
    stage: str = "queued"
    step: int = 0
    steps: int = 0
    cancelled: bool = False
    owner: str = ""
    thought: Thought | None = None
    plan: Plan | None = None
    is_song: bool = True
    losses: int = 0
    lrc: bool = False
    is_refused: bool = False


@dataclasses.dataclass(frozen=True)
class BatchReport:
    """What is known of a batch that was made, for the log and for metrics."""

    works: Sequence[Work]
    program: Program
    seconds: float
    first: bool  # whether this program ran for the first time, so that it was compiled or read from the disk
    waiting: int  # songs that still wait
    plans: bool = False  # whether plans were written, and no songs made


class ServerError(InputError):
    """What the server cannot do, in words for the client, whose request is right."""


class EngineLost(BaseException):
    """What makes the songs has gone. That is no error of a song: what handles those does not catch it."""


class Listener(Protocol):
    """Whom the engine tells what happens, from its own thread."""

    def changed(self, work: Work) -> None:
        """A song has begun, or come further."""
        ...

    def planned(self, work: Work, plan: Plan) -> None:
        """What the planner wrote is there. If `is_song`, the song comes later."""
        ...

    def noted(self, work: Work, note: str) -> None:
        """A song is made otherwise than it was requested; the note is a sentence, for the user."""
        ...

    def done(self, work: Work, song: Song) -> None:
        """A song is there."""
        ...

    def failed(self, work: Work, message: str) -> None:
        """A song cannot be made; the message is one line, for the user."""
        ...

    def stopped(self, work: Work) -> None:
        """A song was cancelled while it was made, or before."""
        ...

    def reported(self, report: BatchReport) -> None:
        """A batch is finished."""
        ...

    def died(self, error: BaseException) -> None:
        """The engine's thread has ended by an error of its own; no song will be made."""
        ...


class Engine(Protocol):
    """What makes songs."""

    @property
    def models(self) -> Mapping[str, Model]:
        """The models by name; the first is the default."""
        ...

    @property
    def adapters(self) -> Collection[str]:
        """Names of the adapters that a song may use."""
        ...

    @property
    def ready(self) -> bool:
        """Whether it runs, and has compiled what it was told to compile ahead."""
        ...

    def check(self, work: Work) -> None:
        """Raise InputError if a song cannot be made; set what decides about its batch."""
        ...

    def start(self, listener: Listener) -> None:
        """Begin to make songs."""
        ...

    def submit(self, works: Sequence[Work]) -> None:
        """Add songs to the queue."""
        ...

    def cancel(self, works: Sequence[Work]) -> None:
        """Take songs out of the queue, or stop them after the current step."""
        ...

    def remaining(self, works: Sequence[Work]) -> float | None:
        """Return the estimated seconds until songs are finished; None if nothing alike was measured yet."""
        ...

    def ahead(self, works: Sequence[Work]) -> int:
        """Return how many other songs wait before the first of these that waits."""
        ...

    def stop(self, grace: float) -> None:
        """End: the songs under way get `grace` seconds, those that wait stay undone."""
        ...


def refuse(works: Sequence[Work], error: Exception) -> None:
    """Set of works that failed whether that is an error of the request."""
    for work in works:
        work.is_refused = isinstance(error, InputError) and not isinstance(error, ServerError)


def message_of(error: Exception) -> str:
    """Return one line for the user; the traceback of what is not the user's error goes to the log, and so do names of
    the server's files."""
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    logger.error("not an error of the input", exc_info=error)
    if isinstance(error, OSError):
        return f"a file of the server: {error.strerror or type(error).__name__}"
    return f"internal error ({type(error).__name__}); the server's log has the details"


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that the device has too little memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
