"""A batch that is sent to another process, as JSON and the bytes of its files, and its outcome there."""

import dataclasses
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from acestep_jax.errors import Cancelled, InputError
from acestep_jax.placement import is_out_of_memory
from acestep_jax.request import FILES, Request, Sampling
from acestep_jax.serve.batcher import Program, Shape
from acestep_jax.serve.engine import ServerError, Work
from acestep_jax.serve.local import LocalEngine
from acestep_jax.serve.planner_task import PlannerTask

logger = logging.getLogger(__name__)


class BatchMessage(NamedTuple):
    """A batch without paths, ready to be sent.

    Attributes:
        about: values that JSON can hold.
        files: the bytes of sound and latents, in the order of `about`.
    """

    about: dict[str, Any]
    files: list[bytes]


class ReceivedBatch(NamedTuple):
    """A received batch.

    Attributes:
        works: its songs; of `program`, only `Program.size` is set.
        names: the original names of the files, by their path here.
    """

    works: list[Work]
    program: Program
    names: dict[str, str]


def encode_batch(works: Sequence[Work], program: Program) -> BatchMessage:
    """Pack a batch for sending.

    Raises:
        OSError: if a file cannot be read.
    """
    songs, files = [], []
    for work in works:
        values = {field.name: getattr(work.request, field.name) for field in dataclasses.fields(work.request)}
        named = {name: str(values.pop(name)) for name in FILES if values[name] is not None}
        planner_task = None if work.planner_task is None else work.planner_task.to_dict()
        songs.append(dict(request=values, files=named, thought=planner_task, lrc=work.lrc))
        files += [Path(path).read_bytes() for path in named.values()]
    first = works[0]
    about = dict(
        model=first.model,
        adapters=[list(adapter) for adapter in first.adapters],
        sampling=dataclasses.asdict(first.sampling),
        size=program.size,
        songs=songs,
    )
    return BatchMessage(about, files)


def decode_batch(message: BatchMessage, folder: str | Path) -> ReceivedBatch:
    """Unpack a received batch, and write its files to a folder.

    Raises:
        OSError: if a file cannot be written.
    """
    about, waiting = message.about, iter(message.files)
    sampling = Sampling(**about["sampling"])
    adapters = tuple((name, scale) for name, scale in about["adapters"])
    works, names = [], {}
    for i, song in enumerate(about["songs"]):
        paths = {}
        for name, original in song["files"].items():
            path = Path(folder) / f"{i}-{name}"
            path.write_bytes(next(waiting))
            paths[name], names[str(path)] = str(path), original
        planner_task = None if song["thought"] is None else PlannerTask.from_dict(song["thought"])
        request = Request(**song["request"], **paths)
        works.append(Work(request, sampling, about["model"], adapters, planner_task=planner_task, lrc=song["lrc"]))
    return ReceivedBatch(works, Program(None, Shape(0, 0, 0), about["size"]), names)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a batch in another process.

    Attributes:
        kind: "done" or "cancelled"; "input" (the request is invalid) or "server" (it is valid but cannot be made here),
            with a message for the user; "memory" or "internal", with a message for the log.
        made: the songs or plans.
        step, stepping: the last step, and the seconds from the first step to the last.
        aligning: seconds spent on timestamps of lyrics.
    """

    kind: str
    message: str = ""
    made: Sequence[Any] = ()
    step: int = 0
    stepping: float = 0.0
    aligning: float = 0.0

    def result(self) -> list[Any]:
        """Return the songs or plans, or raise the error from the other process."""
        if self.kind == "done":
            return list(self.made)
        if self.kind == "cancelled":
            raise Cancelled
        if self.kind == "input":
            raise InputError(self.message)
        if self.kind == "server":
            raise ServerError(self.message)
        if self.kind == "memory":
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {self.message}")
        raise RuntimeError(self.message)


def outcome_of(make: Callable[[], Sequence[Any]], names: Mapping[str, str]) -> Outcome:
    """Make a batch; return its outcome, with the file names from `decode_batch`."""
    try:
        return Outcome("done", made=list(make()))
    except Cancelled:
        return Outcome("cancelled")
    except InputError as error:
        return Outcome("server" if isinstance(error, ServerError) else "input", with_names(error, names))
    except Exception as error:
        if is_out_of_memory(error):
            return Outcome("memory", str(error))
        logger.error("a batch has failed", exc_info=error)
        return Outcome("internal", "".join(traceback.format_exception(error)))


def with_names(error: Exception, names: Mapping[str, str]) -> str:
    """Return the message of an error, with the file names from `decode_batch`."""
    message = str(error)
    for path, original in names.items():
        message = message.replace(path, original)
    return message


def made_by(engine: LocalEngine, works: list[Work], program: Program) -> Sequence[Any]:
    """Return the songs of a batch, or its plans if these are requested."""
    return engine.songs(works, program) if works[0].planner_task is None else engine.plans(works, program)
