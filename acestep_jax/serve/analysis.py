"""Analysis of existing songs: their description, audio codes, latents or timestamps, and the sound of latents."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from acestep_jax.errors import Cancelled, InputError
from acestep_jax.inputs.tasks import codes_from_text
from acestep_jax.planner.metadata import CODEBOOK_SIZE
from acestep_jax.planner.plan import Plan
from acestep_jax.planner.plans import describe_codes
from acestep_jax.planner.timestamps import Timestamps
from acestep_jax.planner.writer import ProgressCallback
from acestep_jax.request import Request
from acestep_jax.serve.planner_task import PlannerTask
from acestep_jax.song import Song

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class AnalysisResult:
    """What was found; as much of it as was requested.

    Attributes:
        plan: with caption, lyrics and metadata, or empty but for audio codes.
        latents: [frames, C] float32.
        audio: [channels, samples] float32, at `sample_rate` Hz.
        timestamps: when its lyrics are sung; None also if that is not known.
    """

    plan: Plan
    latents: np.ndarray | None = None
    audio: np.ndarray | None = None
    sample_rate: int = 0
    timestamps: Timestamps | None = None


def analyse(
    pipe: Any,
    requests: Sequence[Request],
    tasks: Sequence[PlannerTask],
    *,
    on_progress: ProgressCallback,
    should_stop: Callable[[], bool],
) -> list[AnalysisResult]:
    """Return what is found of the source of each request; see `planner_task.run_planner`."""
    found = []
    for request, task in zip(requests, tasks, strict=True):
        if should_stop():
            raise Cancelled
        found.append(_analyse_one(pipe, request, task, on_progress=on_progress, should_stop=should_stop))
    return found


def _analyse_one(pipe: Any, request: Request, task: PlannerTask, **watched: Any) -> AnalysisResult:
    if task.mode == "decode":
        made = pipe.latents_to_song(request.src_latents)
        return AnalysisResult(Plan(caption=""), audio=made, sample_rate=pipe.sample_rate)
    if task.mode == "encode":
        return AnalysisResult(Plan(caption=""), latents=pipe.song_to_latents(request.src_audio))
    latents = None
    if request.audio_codes is not None:
        codes = codes_from_text(request.audio_codes, CODEBOOK_SIZE)
    elif task.mode == "codes":
        codes = pipe.song_to_codes(request.src_audio)
    else:
        latents = request.src_latents if request.src_audio is None else pipe.song_to_latents(request.src_audio)
        codes = pipe.latents_to_codes(latents)
    codes = [int(code) for code in codes]
    if task.mode == "codes":
        return AnalysisResult(Plan(caption="", audio_codes=codes))
    planning = dataclasses.replace(task.planning, lm_seed=task.seed(request))
    with pipe.on_mesh():
        plan = describe_codes(pipe.planner, codes, planning, **watched)
    pipe.free_if_needed()
    if not isinstance(latents, np.ndarray):  # what was sent is not sent back
        return AnalysisResult(plan)
    return AnalysisResult(
        plan,
        latents=latents if task.mode == "understand" else None,
        timestamps=_timestamps(pipe, latents, plan) if task.mode == "transcribe" else None,
    )


def _timestamps(pipe: Any, latents: np.ndarray, plan: Plan) -> Timestamps | None:
    """Return when the lyrics of a song are sung; None, with a line in the log, if they cannot be found."""
    # The audio codes say how long the song is: its last code may reach beyond it. A duration that the planner hears
    # would be another length.
    frames = len(plan.audio_codes) * pipe.configs["audio_tokenizer"].pool_window_size
    latents = np.pad(latents[:frames], ((0, max(0, frames - len(latents))), (0, 0)), mode="edge")
    try:
        request = dataclasses.replace(plan.request(), audio_duration=None)
        return pipe.timestamps(Song(None, latents, pipe.sample_rate, None), request)
    except InputError as error:  # no lyrics, or it is not known which heads follow them
        logger.info("no times of what was transcribed: %s", error)
        return None
