"""What the server finds of a song that exists: what it is, its audio codes, and its sound or latents from the other."""

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
from acestep_jax.planner.writer import Progress
from acestep_jax.request import Request
from acestep_jax.serve.thinking import Thought
from acestep_jax.song import Song

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Heard:
    """What was found; as much of it as was asked for.

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


def hear(
    pipe: Any,
    requests: Sequence[Request],
    thoughts: Sequence[Thought],
    *,
    on_progress: Progress,
    should_stop: Callable[[], bool],
) -> list[Heard]:
    """Return what is found of the source of each request; see `thinking.think`."""
    found = []
    for request, thought in zip(requests, thoughts, strict=True):
        if should_stop():
            raise Cancelled
        found.append(_heard(pipe, request, thought, on_progress=on_progress, should_stop=should_stop))
    return found


def _heard(pipe: Any, request: Request, thought: Thought, **watched: Any) -> Heard:
    if thought.mode == "decode":
        made = pipe.latents_to_song(request.src_latents)
        return Heard(Plan(caption=""), audio=made, sample_rate=pipe.sample_rate)
    if thought.mode == "encode":
        return Heard(Plan(caption=""), latents=pipe.song_to_latents(request.src_audio))
    latents = None
    if request.audio_codes is not None:
        codes = codes_from_text(request.audio_codes, CODEBOOK_SIZE)
    elif thought.mode == "codes":
        codes = pipe.song_to_codes(request.src_audio)
    else:
        latents = request.src_latents if request.src_audio is None else pipe.song_to_latents(request.src_audio)
        codes = pipe.latents_to_codes(latents)
    codes = [int(code) for code in codes]
    if thought.mode == "codes":
        return Heard(Plan(caption="", audio_codes=codes))
    planning = dataclasses.replace(thought.planning, lm_seed=thought.seed(request))
    with pipe.on_mesh():
        plan = describe_codes(pipe.planner, codes, planning, **watched)
    pipe.free_if_needed()
    if not isinstance(latents, np.ndarray):  # what was sent is not sent back
        return Heard(plan)
    return Heard(
        plan,
        latents=latents if thought.mode == "understand" else None,
        timestamps=_timestamps(pipe, latents, plan) if thought.mode == "transcribe" else None,
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
