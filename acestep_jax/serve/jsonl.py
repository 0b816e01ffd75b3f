"""Many songs from a JSONL file: packed into batches, written as a sound file and its settings each, resumable."""

import codecs
import dataclasses
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from acestep_jax import preemption
from acestep_jax.distributed import spans_processes
from acestep_jax.errors import InputError, Preempted
from acestep_jax.inputs.prepare import Job
from acestep_jax.io import audio
from acestep_jax.io.files import as_path, check_writable, identity, is_remote, publish_file
from acestep_jax.pipeline import AceStepPipeline
from acestep_jax.planner.plan import Plan
from acestep_jax.request import FILES, Arguments, Planning, Request, Sampling, arguments, split, unknown_name
from acestep_jax.song import Song

logger = logging.getLogger(__name__)

MAX_NAME = 255  # bytes, the limit of common file systems
PENDING_BYTES = 2 * 2**30  # maximum size of sources and references in batches that are not full yet
# If memory holds either the planner or a song: how many songs are planned before they are made, and for how many
# seconds. Loading the planner takes a small part of that time, and an interrupted run loses at most this many plans.
PLANNED_AHEAD = 256
PLANNING_SECONDS = 300.0


@dataclasses.dataclass(frozen=True)
class BatchItem:
    """One line of the file.

    Attributes:
        place: location for messages, such as "requests.jsonl:3".
        path: path of the sound file; its settings are next to it, with the suffix .json.
        values: all requested values, as they are stored with the song.
        plan: the plan for it; None: no plan, or not yet.
    """

    place: str
    path: Path
    values: dict[str, Any]
    request: Request
    planning: Planning
    sampling: Sampling
    plan: Plan | None = None

    @property
    def settings_path(self) -> Path:
        return self.path.with_suffix(".json")


def read(path: str | Path, out_dir: str | Path, defaults: dict[str, Any]) -> tuple[list[BatchItem], list[str]]:
    """Return the lines of a file with one JSON object per line, and the errors of invalid lines.

    Keys are the fields of `Request`, `Planning` and `Sampling`, and `name`, the name of the sound file in `out_dir`: by
    default the line number, with .wav if there is no suffix. Paths of sound files are relative to the folder of `path`.

    Args:
        defaults: values for lines that do not have their own.

    Raises:
        InputError: if the file is not UTF-8, or has no request.
        OSError: if it cannot be read.
    """
    path, out_dir = as_path(path), as_path(out_dir)
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")  # not at Unicode's other line separators
    songs, errors, names = [], [], {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            song = _song(line.decode(), place, path.parent, out_dir, defaults, number)
            if (earlier := names.setdefault(song.settings_path, place)) != place:
                raise InputError(f"name: {song.path.stem} is already used by {earlier}; give another")
            if identity(song.settings_path) == identity(path):
                raise InputError(f"name: {song.settings_path} is the file of requests itself; give another")
            songs.append(song)
        except Exception as error:  # one bad line does not stop the others
            errors.append(f"{place}: {_message(error)}")
    if not songs and errors and not any(_is_utf8(line) for line in lines if line.strip()):
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8")
    if not songs and not errors:
        raise InputError(f"{path}: holds no request; expected a JSON object on each line")
    return songs, errors


def _song(line: str, place: str, folder: Path, out_dir: Path, defaults: dict, number: int) -> BatchItem:
    try:
        own = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f'not JSON ({error}); expected an object such as {{"prompt": "lofi piano"}}') from None
    if not isinstance(own, dict):
        raise InputError(f"expected a JSON object, found {line.strip()[:40]}")
    name = own.pop("name", f"{number:05}")
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name:
        raise InputError(f"name: expected the name of a file, without folders, found {name!r}")
    _check_name(name)
    known = {name for name, (_, about) in arguments(Arguments).items() if about.json}
    for key in own:
        if key not in known:
            raise InputError(unknown_name(key, {*known, "name"}, "key"))
    values = defaults | own
    for key in FILES:
        if key in own and own[key] is not None:
            if not isinstance(own[key], str):
                raise InputError(f"{key}: expected the name of a file, found {own[key]!r}")
            values[key] = own[key] if is_remote(own[key]) else str(folder / own[key])
    if "prompt" not in values:
        raise InputError("prompt: missing; describe the music in a few words")
    requested, planned, sampled = split(values)
    request, planning, sampling = Request(**requested), Planning(**planned), Sampling(**sampled)
    suffix = "" if Path(name).suffix.lower() in audio.FORMATS else ".wav"
    path = out_dir / f"{name}{suffix}"
    for source in (getattr(request, name) for name in FILES):
        if isinstance(source, str | Path) and identity(source) == identity(path):
            raise InputError(f"name: {path} is a source or reference of the song itself; give another")
    return BatchItem(place, path, values, request, planning, sampling)


def _check_name(name: str) -> None:
    """Raise InputError if the name is not valid for a file, with the suffix of the song or of its settings."""
    try:
        size = max(len(os.fsencode(name + suffix)) for suffix in (".wav", ".json"))
    except UnicodeEncodeError:
        raise InputError(f"name: holds half a character, as of a cut emoji, found {name!r}; give another") from None
    if size > MAX_NAME:
        raise InputError(
            f"name: {size} bytes with its suffix, but a file name has at most {MAX_NAME}; give a shorter one"
        )


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _message(error: Exception) -> str:
    """Return the error to report for a line; log the traceback if the input is not at fault."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text ({error}); save it as UTF-8"
    if isinstance(error, InputError | OSError | jax.errors.JaxRuntimeError):
        return str(error)
    logger.error("not an error of the input", exc_info=error)
    return f"{type(error).__name__}: {error}"


def generate(
    pipe: AceStepPipeline,
    lines: Sequence[BatchItem],
    batch_size: int,
    about: dict[str, Any],
    *,
    overwrite: bool = False,
) -> Iterator[tuple[BatchItem, str | None]]:
    """Generate the songs that do not exist yet; yield each line with None, or with an error message.

    Songs with the same sampling and bucket of frames form a batch, which is made as soon as it is full. The audio is
    written after the settings, so a song that has both is finished.

    Several processes on one mesh make all songs together: the first decides which songs to make, and writes them.
    Otherwise each makes every n-th line, independently of the others.

    Args:
        about: other values that the songs depend on, such as the checkpoint; stored with the settings.
        overwrite: whether to make finished songs again.

    Raises:
        Preempted: after SIGTERM, when the current batch is written.
    """
    joint = spans_processes(pipe.mesh)
    if not joint:
        lines = lines[jax.process_index() :: jax.process_count()]
    numbers = itertools.count()

    def check() -> None:
        if preemption.requested_at(next(numbers)) if joint else preemption.requested():
            raise Preempted

    def make(members: list[tuple[BatchItem, Job]]) -> Iterator[tuple[BatchItem, str | None]]:
        check()
        return _make(pipe, members, about, overwrite, writes=not joint or jax.process_index() == 0)

    decisions = [_unfinished(line, about, overwrite) for line in lines]
    groups: dict[tuple[Sampling, int, bool], list[tuple[BatchItem, Job]]] = {}
    unfinished = []
    for line, error in zip(lines, _agree(decisions) if joint else decisions, strict=True):
        if error is None:
            unfinished.append(line)
        else:
            yield line, error or None
    for line, job in _prepared(pipe, unfinished, batch_size, check):
        if isinstance(job, str):
            yield line, job
            continue
        group = line.sampling, job.program_key.frames, job.edited
        groups.setdefault(group, []).append((line, job))
        if len(groups[group]) == batch_size:
            yield from make(groups.pop(group))
        elif sum(_bytes(job) for members in groups.values() for _, job in members) > PENDING_BYTES:
            largest = max(groups, key=lambda key: sum(_bytes(job) for _, job in groups[key]))
            yield from make(groups.pop(largest))
    for _, members in sorted(groups.items(), key=lambda item: item[0][1]):
        yield from make(members)


def _prepared(
    pipe: AceStepPipeline, lines: Sequence[BatchItem], batch_size: int, check: Callable[[], None]
) -> Iterator[tuple[BatchItem, Job | str]]:
    """Yield each line with its job, or with an error message. Consecutive lines with the same `Planning` are planned as
    one batch. If memory holds either the planner or a song, but not both, many lines are planned before the first of
    them is yielded, so that the planner is loaded only once for them.

    Args:
        check: called before each further batch is planned; it may raise.
    """
    ahead: list[tuple[BatchItem, Request]] = []  # planned, without jobs yet, since these may hold audio
    began = time.monotonic()
    for (planning, sampling), group in itertools.groupby(lines, key=lambda line: (line.planning, line.sampling)):
        waiting = list(group)
        for i in range(0, len(waiting), batch_size):
            if ahead:
                check()
            usable = []
            for line in waiting[i : i + batch_size]:
                try:
                    usable.append((line, pipe.prepare(line.request, sampling)))
                except Exception as error:
                    yield line, _message(error)
            if not usable:
                continue
            for line, made in _planned(pipe, usable, planning, sampling):
                if isinstance(made, str):
                    yield line, made
                elif pipe.needs_memory_of_planner():
                    began = began if ahead else time.monotonic()
                    ahead.append((line, made.request))
                else:
                    yield line, made
            # Several processes must take the same branch, but their clocks differ.
            is_long = jax.process_count() == 1 and time.monotonic() - began > PLANNING_SECONDS
            if len(ahead) >= PLANNED_AHEAD or ahead and is_long:
                yield from _released(pipe, ahead)
                ahead = []
    if ahead:
        yield from _released(pipe, ahead)


def _released(
    pipe: AceStepPipeline, ahead: Sequence[tuple[BatchItem, Request]]
) -> Iterator[tuple[BatchItem, Job | str]]:
    """Free the planner's memory, and yield the planned lines with their jobs."""
    pipe.free_if_needed()
    for line, request in ahead:
        try:
            yield line, pipe.prepare(request, line.sampling)
        except Exception as error:
            yield line, _message(error)


def _planned(
    pipe: AceStepPipeline, members: list[tuple[BatchItem, Job]], planning: Planning, sampling: Sampling
) -> Iterator[tuple[BatchItem, Job | str]]:
    """Plan lines as one batch, or individually if that fails; yield them with their jobs."""
    try:
        # Each line gets the same plan as by itself, whatever else is in the file.
        seeds = None if planning.lm_seed is None else [planning.lm_seed] * len(members)
        planned = pipe.planned([job.request for _, job in members], planning, sampling, seeds=seeds, keep=True)
        jobs = [
            job if plan is None else pipe.prepare(request, sampling)
            for (_, job), (request, plan) in zip(members, planned, strict=True)
        ]
    except Exception as error:
        if len(members) > 1:
            for member in members:
                yield from _planned(pipe, [member], planning, sampling)
        else:
            yield members[0][0], _message(error)
        return
    for (line, _), job, (_, plan) in zip(members, jobs, planned, strict=True):
        yield dataclasses.replace(line, plan=plan), job


def _bytes(job: Job) -> int:
    """Return the size of a job's audio in memory."""
    held = (job.source, job.reference, job.source_latents, job.reference_latents)
    return sum(0 if one is None else one.nbytes for one in held)


def _unfinished(song: BatchItem, about: dict, overwrite: bool) -> str | None:
    """Return None for a song to make, "" for a finished one, or the reason why it cannot be written."""
    try:
        if not overwrite and _is_finished(song, about):
            return ""
        audio.check_output(song.path, overwrite=overwrite)
        check_writable(song.settings_path)
    except Exception as error:
        return _message(error)
    return None


def _agree(decisions: list[str | None]) -> list[str | None]:
    """Return the decisions of process 0, which writes the songs; the other processes follow them."""
    codes = np.array([{None: 0, "": 1}.get(decision, 2) for decision in decisions], np.int32)
    words = [None, "", "not made, see the first process"]
    return [words[code] for code in multihost_utils.broadcast_one_to_all(codes)]


def _make(
    pipe: AceStepPipeline, members: list[tuple[BatchItem, Job]], about: dict, overwrite: bool, *, writes: bool
) -> Iterator[tuple[BatchItem, str | None]]:
    """Make one batch; if it fails, make its songs individually, so that one does not stop the others."""
    try:
        songs = pipe.run([job for _, job in members], members[0][0].sampling)
    except Exception as error:
        if len(members) > 1:
            for member in members:
                yield from _make(pipe, [member], about, overwrite, writes=writes)
        else:
            yield members[0][0], _message(error)
        return
    for (line, _), song in zip(members, songs, strict=True):
        try:
            if writes:
                _write(line, song, about, overwrite)
        except Exception as error:
            yield line, _message(error)
        else:
            yield line, None


def _write(line: BatchItem, song: Song, about: dict, overwrite: bool) -> None:
    """Write a song, settings first: if the audio exists too, the song is finished, even after an interruption. When
    replacing a song, write the audio first, so that the existing one is kept until there is a new one."""
    assert song.audio is not None
    settings = dict(
        request=line.values,
        seed=song.seed,
        retake_seed=song.retake_seed,
        seconds=song.audio.shape[1] / song.sample_rate,
        sample_rate=song.sample_rate,
    )
    if line.plan is not None:
        settings["plan"] = line.plan.to_dict()

    def write_settings() -> None:
        with publish_file(line.settings_path) as temporary:
            temporary.write_text(json.dumps(settings | about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def write_sound() -> None:
        song.save(line.path, overwrite=overwrite)

    for write in (write_sound, write_settings) if overwrite else (write_settings, write_sound):
        write()


def _is_finished(song: BatchItem, about: dict) -> bool:
    """Return whether the song exists; raise InputError if a file with its name was made with other settings."""
    found = {}
    if song.settings_path.exists():
        try:
            found = json.loads(song.settings_path.read_text(encoding="utf-8"))
            if found["request"] == song.values and all(found[key] == about[key] for key in about if key != "version"):
                return song.path.exists()
        except (ValueError, KeyError, TypeError):
            found = {}
        if not song.path.exists() and "request" in found:  # left over from an unfinished song
            return False
        raise InputError(
            f"{song.settings_path}: already exists, made with other settings; remove it and the song, give another "
            "name, or allow it to be overwritten"
        )
    return False
