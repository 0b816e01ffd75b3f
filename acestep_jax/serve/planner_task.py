"""The planner's tasks in the server: planning before a song, or by itself."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from acestep_jax.inputs.prepare import codebook_size
from acestep_jax.planner.plan import Plan
from acestep_jax.planner.plans import write_plans
from acestep_jax.planner.writer import ProgressCallback
from acestep_jax.request import MAX_DURATION, MIN_DURATION, Planning, Request

WRITING = ("generate", "inspire", "format")  # see `planner.plans.write_plans`
# About an existing song: its caption, lyrics and metadata; these with its latents; these with timestamps of the lyrics;
# only its audio codes; only its latents; the sound of its latents. See `serve.analysis`.
ANALYSIS_MODES = ("describe", "understand", "transcribe", "codes", "encode", "decode")


@dataclasses.dataclass(frozen=True)
class PlannerTask:
    """The planner's task for one song.

    Attributes:
        mode: one of `WRITING`, or one of `ANALYSIS_MODES`, for which the request has a source, latents or audio codes.
        planning: sampling settings of the planner.
        codes: whether to write audio codes, too.
        instrumental: whether the song has no vocals, for a wish.
        required: whether the song fails without a plan; else it is made without one, with a note.
        longest: maximum duration in seconds that the planner may choose.
    """

    mode: str = "generate"
    planning: Planning = Planning()  # noqa: RUF009  (frozen)
    codes: bool = True
    instrumental: bool = False
    required: bool = False
    longest: float = MAX_DURATION

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary for `from_dict` that is ready for JSON."""
        default, fields = Planning(), dataclasses.asdict(self.planning)
        given = {name: value for name, value in fields.items() if value != getattr(default, name)}
        return dataclasses.asdict(self) | dict(planning=given)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the task in a dictionary; raise InputError or TypeError if it has another version's format."""
        return cls(**{**values, "planning": Planning(**values["planning"])})

    @property
    def batch_key(self) -> "PlannerTask":
        """The task without its seed, which must be equal for songs that are planned together."""
        return dataclasses.replace(self, planning=dataclasses.replace(self.planning, lm_seed=None))

    def within(self, seconds: float) -> "PlannerTask":
        """Return the task limited to songs of at most `seconds`."""
        return dataclasses.replace(self, longest=min(MAX_DURATION, max(MIN_DURATION, seconds)))

    def without_plan(self, request: Request, seconds: float) -> Request:
        """Return the request of a song that is made without a plan.

        Args:
            seconds: duration of a song whose duration is not given.
        """
        is_open = request.audio_duration is None and seconds > self.longest
        return dataclasses.replace(request, audio_duration=self.longest) if is_open else request

    def for_song(self, i: int) -> "PlannerTask":
        """Return the task for song i of a request, with its own seed."""
        seed = self.planning.lm_seed
        if seed is None:
            return self
        return dataclasses.replace(self, planning=dataclasses.replace(self.planning, lm_seed=(seed + i) % 2**32))

    def seed(self, request: Request) -> int:
        """Return the seed of the plan: its own, or the song's."""
        seed = request.seed if self.planning.lm_seed is None else self.planning.lm_seed
        assert isinstance(seed, int)
        return seed


def run_planner(
    pipe: Any,
    requests: Sequence[Request],
    tasks: Sequence[PlannerTask],
    *,
    on_progress: ProgressCallback,
    should_stop: Callable[[], bool],
) -> list[Plan]:
    """Return a plan for each request. Their tasks must have the same `batch_key`.

    Args:
        pipe: an `AceStepPipeline`.
        on_progress: called regularly with the number of steps so far and the maximum number of steps.
        should_stop: called regularly; if it returns true, the work stops.

    Raises:
        InputError: if there is no planner, or a text is too long.
        Cancelled: if `should_stop` returned true.
    """
    first = tasks[0].batch_key
    watched: dict[str, Any] = dict(on_progress=on_progress, should_stop=should_stop)
    has_codes = first.codes and codebook_size(pipe.configs) is not None
    planning = first.planning if has_codes else dataclasses.replace(first.planning, best_of=1)
    with pipe.on_mesh():
        plans = write_plans(
            pipe.planner,
            requests,
            planning,
            mode=first.mode,
            instrumental=first.instrumental,
            codes=has_codes,
            longest=first.longest,
            seeds=[task.seed(request) for task, request in zip(tasks, requests, strict=True)],
            **watched,
        )
    pipe.free_if_needed()
    return plans
