"""The interface of an engine, which generates the songs: in this process (`serve.local`), in several processes with a
model each (`serve.replicas`), or on several hosts that share one (`serve.slices`)."""

import dataclasses
import logging
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from acestep_jax.errors import InputError
from acestep_jax.planner.plan import Plan
from acestep_jax.request import Request, Sampling
from acestep_jax.serve.batcher import Program, Shape
from acestep_jax.serve.models import Model
from acestep_jax.serve.planner_task import PlannerTask
from acestep_jax.song import Song

if TYPE_CHECKING:
    from acestep_jax.serve.analysis import AnalysisResult

logger = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Work:
    """One song to make: its request and its progress.

    Attributes:
        adapters: (name, scale) of each adapter, sorted.
        group, kind, shape: set by `Engine.check`, see `serve.batcher`.
        stage: "queued", "loading", "planning", "encoding", "denoising", "decoding" or "aligning".
        step, steps: progress of planning or denoising.
        cancelled: whether it was cancelled.
        owner: id of the record or operation that it belongs to, for the log.
        planner_task: the planner's task, which comes before the song; None: no planning, or done.
        plan: the finished plan.
        analysis: what was found about an existing song, besides the plan.
        is_song: whether to make a song; else only the plan is requested.
        losses: how often the process that was making it died, see `serve.replicas`.
        lrc: whether to compute the timestamps of the lyrics, see `Song.timestamps`.
        is_refused: whether it failed because of an error in the request; else the server was at fault.
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
    planner_task: PlannerTask | None = None
    plan: Plan | None = None
    analysis: "AnalysisResult | None" = None
    is_song: bool = True
    losses: int = 0
    lrc: bool = False
    is_refused: bool = False


@dataclasses.dataclass(frozen=True)
class BatchReport:
    """The report of a finished batch, for the log and the metrics."""

    works: Sequence[Work]
    program: Program
    seconds: float
    first: bool  # whether this program ran for the first time, so that it was compiled or read from the cache
    waiting: int  # number of waiting songs
    plans: bool = False  # whether it was a batch of plans, not of songs


class ServerError(InputError):
    """A failure of the server for a valid request, with a message for the client."""


class EngineLost(BaseException):
    """The process that makes the songs is gone. This is not an error of a song, so handlers for those do not apply."""


class Listener(Protocol):
    """Receives the engine's events, in the engine's own thread."""

    def changed(self, work: Work) -> None:
        """A song has started or made progress."""
        ...

    def planned(self, work: Work, plan: Plan) -> None:
        """A plan is finished. If `is_song`, the song comes later."""
        ...

    def noted(self, work: Work, note: str) -> None:
        """A song deviates from its request; the note is a sentence for the user."""
        ...

    def done(self, work: Work, song: Song) -> None:
        """A song is finished."""
        ...

    def failed(self, work: Work, message: str) -> None:
        """A song has failed; the message is one line for the user."""
        ...

    def stopped(self, work: Work) -> None:
        """A song was cancelled, while it was made or before."""
        ...

    def reported(self, report: BatchReport) -> None:
        """A batch is finished."""
        ...

    def died(self, error: BaseException) -> None:
        """The engine's thread has ended because of its own error; no more songs will be made."""
        ...


class Engine(Protocol):
    """Makes songs."""

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
        """Whether it is running and has finished compiling ahead."""
        ...

    def check(self, work: Work) -> None:
        """Raise InputError if a song cannot be made; set the attributes that determine its batch."""
        ...

    def start(self, listener: Listener) -> None:
        """Start making songs."""
        ...

    def submit(self, works: Sequence[Work]) -> None:
        """Add songs to the queue."""
        ...

    def cancel(self, works: Sequence[Work]) -> None:
        """Remove songs from the queue, or stop them after the current step."""
        ...

    def remaining(self, works: Sequence[Work]) -> float | None:
        """Return the estimated seconds until songs are finished; None if nothing comparable was measured yet."""
        ...

    def ahead(self, works: Sequence[Work]) -> int:
        """Return the number of other songs in the queue before the first of these."""
        ...

    def stop(self, grace: float) -> None:
        """Stop: songs in progress get `grace` seconds, waiting songs are not started."""
        ...


def check_adapters(names: Iterable[str], known: Collection[str]) -> None:
    """Raise InputError if there is no adapter of one of the names."""
    for name in names:
        if name not in known:
            expected = ", ".join(known) or "none, the server was started without --lora"
            raise InputError(f"adapters: unknown adapter {str(name)[:80]!r}; expected one of {expected}")


def refuse(works: Sequence[Work], error: Exception) -> None:
    """Set `is_refused` of failed works, by whether the request was at fault."""
    for work in works:
        work.is_refused = isinstance(error, InputError) and not isinstance(error, ServerError)


def message_of(error: Exception) -> str:
    """Return one line for the user. Tracebacks of errors that are not the user's, and names of the server's files, go
    only to the log."""
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    logger.error("not an error of the input", exc_info=error)
    if isinstance(error, OSError):
        return f"a file of the server: {error.strerror or type(error).__name__}"
    return f"internal error ({type(error).__name__}); the server's log has the details"
