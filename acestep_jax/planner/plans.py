"""Requests to plans: the planner's input for a request, its output, and the choice among several plans."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from acestep_jax.arguments import is_key
from acestep_jax.errors import InputError
from acestep_jax.inputs.collate import new_seed
from acestep_jax.inputs.fields import UNKNOWN_LANGUAGE
from acestep_jax.planner.metadata import CODES_PER_SECOND, Known, Metadata
from acestep_jax.planner.plan import Plan
from acestep_jax.planner.sampling import LanguageSampling
from acestep_jax.planner.scores import pmi_score
from acestep_jax.planner.writer import Planner, ProgressCallback
from acestep_jax.request import MAX_DURATION, MIN_DURATION, Planning, Request

STRIDE = 0x9E3779B1  # between the seeds of candidates, so that they differ from those of other songs in a batch
CODES_TOP_P = 0.9  # for codes and captions; other text is sampled from all tokens, as in ACE-Step's application


def known_of(request: Request, *, instrumental: bool = False) -> Known:
    """Return the values that the user gave, in the planner's form."""
    return Known(
        caption=request.prompt,
        lyrics=request.lyrics,
        bpm=request.bpm,
        keyscale=request.keyscale,
        timesignature=request.timesignature,
        duration=request.audio_duration,
        language=request.vocal_language,
        instrumental=instrumental,
    )


def sampling_of(planning: Planning, mode: str = "generate") -> LanguageSampling:
    """Return the planner's sampling settings in a mode, see `Planner.write_metadata`."""
    top_p = CODES_TOP_P if mode == "generate" else 1.0
    return LanguageSampling(
        temperature=planning.lm_temperature,
        cfg_scale=planning.lm_cfg_scale,
        top_k=planning.lm_top_k,
        top_p=top_p if planning.lm_top_p is None else planning.lm_top_p,
        repetition_penalty=planning.lm_repetition_penalty,
        negative_prompt=planning.lm_negative_prompt,
    )


def seeds_of(requests: Sequence[Request], planning: Planning, *, joint: bool = False) -> list[int]:
    """Return the seed of each plan: `lm_seed` + i, or the song's seed, or a new one.

    Args:
        joint: see `new_seed`.
    """
    if planning.lm_seed is not None:
        return [(planning.lm_seed + i) % 2**32 for i in range(len(requests))]
    first = new_seed(len(requests), joint=joint)
    return [first + i if r.seed is None else _number(r.seed) for i, r in enumerate(requests)]


def _number(seed: Any) -> int:
    return int(np.asarray(jax.random.key_data(seed)).ravel()[-1]) if is_key(seed) else int(seed)


def write_plans(
    planner: Planner,
    requests: Sequence[Request],
    planning: Planning,
    *,
    mode: str = "generate",
    instrumental: bool = False,
    codes: bool = True,
    seeds: Sequence[int] | None = None,
    joint: bool = False,
    longest: float | None = None,
    on_progress: ProgressCallback | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Plan]:
    """Return a plan for each request. Values of a request are kept; the planner writes the rest to match.

    Args:
        mode: "generate": the prompt is a caption, and the request has the lyrics; "inspire": the prompt is a wish for
            which the planner writes a caption and lyrics; "format": it rewrites both.
        instrumental: whether the song has no vocals.
        codes: whether to write audio codes, too.
        seeds: one for each request; None: see `seeds_of`.
        joint: see `new_seed`.
        longest: upper limit, in seconds and at least 10, for durations that the planner chooses, applied before codes
            are written; None: 600. Durations in a request are kept.
        on_progress: called regularly with the number of text tokens or codes written so far, and the maximum.
        should_stop: called regularly; if it returns true, the work stops.

    Raises:
        InputError: if a text is too long, or `best_of` is above 1 without codes.
        Cancelled: if `should_stop` returned true.
    """
    if (count := planning.best_of) > 1 and not codes:
        raise InputError(f"best_of: plans are compared by their codes; expected 1 without codes, found {count}")
    first = seeds_of(requests, planning, joint=joint) if seeds is None else list(seeds)
    found: list[list[Plan]] = []
    for i in range(count):  # one at a time, as together they need the memory of a larger batch
        plans = _write(
            planner,
            requests,
            planning,
            [(seed + i * STRIDE) % 2**32 for seed in first],
            mode=mode,
            instrumental=instrumental,
            codes=codes,
            longest=longest,
            on_progress=on_progress,
            should_stop=should_stop,
        )
        if count > 1:
            plans = [dataclasses.replace(plan, score=pmi_score(planner, plan)) for plan in plans]
        found.append(plans)
    return [max(candidates, key=lambda plan: plan.score or 0.0) for candidates in zip(*found, strict=True)]


def _write(
    planner: Planner,
    requests: Sequence[Request],
    planning: Planning,
    seeds: Sequence[int],
    *,
    mode: str,
    instrumental: bool,
    codes: bool,
    longest: float | None,
    **watched: Any,
) -> list[Plan]:
    known = [known_of(request, instrumental=instrumental) for request in requests]
    written = planner.write_metadata(
        known,
        mode=mode,
        seeds=seeds,
        sampling=sampling_of(planning, mode),
        rewrite_caption=planning.use_cot_caption is not False,
        **watched,
    )
    if longest is not None:
        written = [
            dataclasses.replace(one, duration=longest)
            if request.audio_duration is None and one.duration is not None and one.duration > longest
            else one
            for request, one in zip(requests, written, strict=True)
        ]
    plans = [_plan(*values) for values in zip(requests, written, seeds, strict=True)]
    if not codes:
        return plans
    if mode != "generate":  # its text becomes the request, as if the user had written it
        known = [known_of(plan.request()) for plan in plans]
    rows = planner.write_codes(
        known, written, seeds=seeds, sampling=sampling_of(planning), attempts=planning.lm_attempts, **watched
    )
    return [dataclasses.replace(plan, audio_codes=row) for plan, row in zip(plans, rows, strict=True)]


def describe_codes(
    planner: Planner,
    codes: Sequence[int] | np.ndarray,
    planning: Planning,
    *,
    on_progress: ProgressCallback | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Plan:
    """Return the planner's description of audio codes: caption, lyrics and metadata.

    Args:
        on_progress, should_stop: see `write_plans`.

    Raises:
        InputError: if there are no codes, more than the planner can read, or one is out of range.
        Cancelled: if `should_stop` returned true.
    """
    if len(codes) == 0:
        raise InputError("audio_codes: expected at least one code, found none")
    seed = planning.lm_seed or 0
    known = Known(codes=[int(code) for code in codes])
    mode = "understand"
    (written,) = planner.write_metadata(
        [known],
        mode=mode,
        seeds=[seed],
        sampling=sampling_of(planning, mode),
        on_progress=on_progress,
        should_stop=should_stop,
    )
    plan = _plan(Request(""), written, seed)
    seconds = len(known.codes) / CODES_PER_SECOND
    if MIN_DURATION <= seconds <= MAX_DURATION:  # the number of codes gives it
        plan = dataclasses.replace(plan, audio_duration=seconds)
    return dataclasses.replace(plan, audio_codes=known.codes)


def _plan(request: Request, written: Metadata, seed: int) -> Plan:
    language = written.language
    return Plan(
        caption=written.caption or request.prompt,
        lyrics=written.lyrics,
        audio_duration=written.duration,
        vocal_language=None if language == UNKNOWN_LANGUAGE else language,
        bpm=written.bpm,
        keyscale=written.keyscale,
        timesignature=written.timesignature,
        prompt=request.prompt,
        lm_seed=seed,
    )
