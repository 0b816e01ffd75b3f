"""What the server asks the planner for: before a song, or for itself."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from acestep_jax.inputs.prepare import codebook_size
from acestep_jax.inputs.tasks import codes_from_text
from acestep_jax.planner.metadata import CODEBOOK_SIZE
from acestep_jax.planner.plan import Plan
from acestep_jax.planner.plans import describe_codes, write_plans
from acestep_jax.planner.writer import Progress
from acestep_jax.request import MAX_DURATION, MIN_DURATION, Planning, Request

WRITING = ("generate", "inspire", "format")  # see `planner.plans.write_plans`
LISTENING = ("describe", "codes")  # caption, lyrics and metadata of a song that exists; its audio codes alone


@dataclasses.dataclass(frozen=True)
class Thought:
    """What is asked for one song.

    Attributes:
        mode: one of `WRITING`, or of `LISTENING`: then the request has a source, or audio codes.
        planning: how the planner samples.
        codes: whether it writes audio codes, too.
        instrumental: whether nothing is to be sung, for a wish.
        required: whether the song fails without; else it is made without, and a note says so.
        longest: seconds of a song whose duration the planner chooses.
    """

    mode: str = "generate"
    planning: Planning = Planning()  # noqa: RUF009  (frozen)
    codes: bool = True
    instrumental: bool = False
    required: bool = False
    longest: float = MAX_DURATION

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads, ready for JSON."""
        default, fields = Planning(), dataclasses.asdict(self.planning)
        given = {name: value for name, value in fields.items() if value != getattr(default, name)}
        return dataclasses.asdict(self) | dict(planning=given)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return what a dictionary holds; raise InputError or TypeError if it is of another version."""
        return cls(**{**values, "planning": Planning(**values["planning"])})

    @property
    def alike(self) -> "Thought":
        """The thought without its seed: what songs that are planned together have in common."""
        return dataclasses.replace(self, planning=dataclasses.replace(self.planning, lm_seed=None))

    def within(self, seconds: float) -> "Thought":
        """Return the thought of a server whose songs may have so many seconds."""
        return dataclasses.replace(self, longest=min(MAX_DURATION, max(MIN_DURATION, seconds)))

    def forgone(self, request: Request, seconds: float) -> Request:
        """Return the request of a song that is made without its plan.

        Args:
            seconds: of a song whose duration is open.
        """
        is_open = request.audio_duration is None and seconds > self.longest
        return dataclasses.replace(request, audio_duration=self.longest) if is_open else request

    def of_song(self, i: int) -> "Thought":
        """Return the thought of song i of a request: each has its own seed."""
        seed = self.planning.lm_seed
        if seed is None:
            return self
        return dataclasses.replace(self, planning=dataclasses.replace(self.planning, lm_seed=(seed + i) % 2**32))

    def seed(self, request: Request) -> int:
        """Return the seed of the plan: that of the song if it has none of its own."""
        seed = request.seed if self.planning.lm_seed is None else self.planning.lm_seed
        assert isinstance(seed, int)
        return seed


def think(
    pipe: Any,
    requests: Sequence[Request],
    thoughts: Sequence[Thought],
    *,
    on_progress: Progress,
    should_stop: Callable[[], bool],
) -> list[Plan]:
    """Return a plan for each request, of thoughts that are `alike`.

    Args:
        pipe: an `AceStepPipeline`.
        on_progress: called now and then with the number of steps made, and of steps at most.
        should_stop: asked now and then; if it returns true, the work ends.

    Raises:
        InputError: if there is no planner, or a text is too long.
        Cancelled: if `should_stop` said so.
    """
    first = thoughts[0].alike
    watched: dict[str, Any] = dict(on_progress=on_progress, should_stop=should_stop)
    if first.mode in LISTENING:
        return [_listen(pipe, *each, **watched) for each in zip(requests, thoughts, strict=True)]
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
            seeds=[thought.seed(request) for thought, request in zip(thoughts, requests, strict=True)],
            **watched,
        )
    pipe.free_if_needed()
    return plans


def _listen(pipe: Any, request: Request, thought: Thought, **watched: Any) -> Plan:
    """Return what is heard in a song: its audio codes and, as asked, what it is."""
    if request.audio_codes is not None:
        codes = [int(code) for code in codes_from_text(request.audio_codes, CODEBOOK_SIZE)]
    else:
        codes = [int(code) for code in pipe.song_to_codes(request.src_audio)]
    if thought.mode == "codes":
        return Plan(caption="", audio_codes=codes)
    planning = dataclasses.replace(thought.planning, lm_seed=thought.seed(request))
    with pipe.on_mesh():
        plan = describe_codes(pipe.planner, codes, planning, **watched)
    pipe.free_if_needed()
    return plan
