"""Checks of a submission: all of it is validated before it is accepted."""

import math
import secrets
from pathlib import Path
from typing import Any

from acestep_jax.errors import InputError
from acestep_jax.inputs.settings import compat_of
from acestep_jax.planning import can_be_planned
from acestep_jax.request import LATENTS, Request, Sampling, split
from acestep_jax.serve import sounds
from acestep_jax.serve.engine import Engine, Work, check_adapters, message_of
from acestep_jax.serve.planner_task import PlannerTask
from acestep_jax.serve.store import SongRecord
from acestep_jax.serve.submission import (
    MAX_SEED,
    Limits,
    Submission,
    check_values,
    model_named,
    request_and_sampling,
    with_fields,
)

SOURCES = {"src_audio", "src_latents"}  # which say how long a song is


def check(submission: Submission, engine: Engine, limits: Limits) -> tuple[list[SongRecord], list[Work]]:
    """Return the songs of a submission as records and as works for the engine.

    Raises:
        InputError: naming the field that cannot be used.
    """
    model = model_named(engine.models, submission.model)
    if not 1 <= len(submission.songs) <= limits.variations:
        raise InputError(f"variations: expected 1 to {limits.variations}, found {len(submission.songs)}")
    sounds.check_format(submission.format)
    _check_adapters(submission, engine)
    files = {field: (submission.uploads or Path()) / field for field in submission.files}
    for field, path in files.items():
        vae = engine.models[model].configs["vae"]
        sounds.check_upload(path, field, limits.duration, vae if field in LATENTS else None)
    songs: list[SongRecord] = []
    works: list[Work] = []
    given_plan = None if submission.plan is None else submission.plan.to_dict()
    for i, given in enumerate(submission.songs):
        check_values(given, limits)
        values = {name: value for name, value in given.items() if value is not None}
        if (values.get("retake_variance") or 0) and "retake_seed" not in values:
            values["retake_seed"] = secrets.randbelow(MAX_SEED)
        request, sampling = request_and_sampling(values, files)
        task = _planner_task(submission, request, sampling, i)
        if task is not None:
            task = task.within(limits.duration)
        elif request.audio_duration is None and request.audio_codes is None and not files.keys() & SOURCES:
            _check_open(engine.models[model].seconds(sampling), limits)
        work = Work(request, sampling, model, tuple(sorted(submission.adapters.items())), planner_task=task)
        work.lrc = submission.lrc
        if works and not _differ(values, submission.songs[0]):
            first = works[0]
            work.group, work.kind, work.shape, work.steps = first.group, first.kind, first.shape, first.steps
        else:
            try:
                engine.check(work)
            except (InputError, OSError) as error:
                raise InputError(with_fields(message_of(error), files)) from None
        works.append(work)
        requested, _, sampled = split(values)
        songs.append(SongRecord(requested, sampled, None if task is None else task.to_dict(), given_plan))
    return songs, works


def _planner_task(submission: Submission, request: Request, sampling: Sampling, i: int) -> PlannerTask | None:
    """Return the planner's task for song i; None: no planning, such as for a cover."""
    task = submission.planner_task
    if task is None:
        return None
    if not can_be_planned(request):
        note = "thinking: the planner supports only text2music without a source; made without it"
        if task.required and note not in submission.notes:
            submission.notes.append(note)
        return None
    return task.for_song(i) if task.required or compat_of(sampling).thinking else None


def _check_open(seconds: float, limits: Limits) -> None:
    """Raise InputError if a song without a given duration would be too long."""
    if seconds > limits.duration:
        raise InputError(
            f"audio_duration: missing; the default, {seconds:g} s, exceeds this server's limit of {limits.duration:g} s"
        )


def _check_adapters(submission: Submission, engine: Engine) -> None:
    check_adapters(submission.adapters, engine.adapters)
    for name, scale in submission.adapters.items():
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise InputError(f"adapters: expected a finite number as the scale of {name}, found {scale!r:.80}")


def _differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two songs differ in anything besides their seeds."""
    seeds = ("seed", "retake_seed")
    return {k: v for k, v in one.items() if k not in seeds} != {
        k: v for k, v in other.items() if k not in seeds and v is not None
    }
