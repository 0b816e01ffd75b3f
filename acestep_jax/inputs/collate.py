"""From jobs to the padded host arrays and the noise of a batch, and from `Sampling` to its schedule."""

import dataclasses
import logging
import math
import secrets
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from acestep_jax.arguments import is_key
from acestep_jax.diffusion import noise
from acestep_jax.diffusion.schedule import custom_schedule, late_start, schedule
from acestep_jax.errors import InputError
from acestep_jax.inputs import settings
from acestep_jax.inputs.buckets import BUCKETS, Buckets
from acestep_jax.inputs.prepare import Job, check_accepted
from acestep_jax.request import Sampling

logger = logging.getLogger(__name__)

# If padding is attended to, as in diffusers, it must be as in diffusers: up to the longest text of the batch.
UNPADDED = dataclasses.replace(BUCKETS, prompt=1, lyrics=1)


A = TypeVar("A")  # np.ndarray, or jax.Array within a program


class Tokens(NamedTuple, Generic[A]):
    """Token ids of a batch, padded on the right, [B, S] int32, and their mask, [B, S] bool."""

    ids: A
    mask: A


class Batch(NamedTuple):
    """The jobs of a batch as arrays on the host; T is the bucket of the longest song."""

    lengths: np.ndarray  # [B] int32, latent frames
    prompt: Tokens[np.ndarray]
    lyrics: Tokens[np.ndarray]
    plain: Tokens[np.ndarray] | None  # the prompts for text2music, if the batch has a partial cover
    edited: tuple[Tokens[np.ndarray], Tokens[np.ndarray]] | None  # prompts and lyrics of sources, for FlowEdit
    silent: np.ndarray  # [B, T] bool, true in the padding
    mask: np.ndarray  # [B, T] bool, true in generated frames and in the padding
    keeps_source: np.ndarray  # [B] bool
    cover_strength: np.ndarray  # [B] float32

    @property
    def frames(self) -> int:
        """T, latent frames."""
        return self.mask.shape[1]


class Schedule(NamedTuple):
    """The steps of the loop, see `sampling_schedule`."""

    times: np.ndarray  # [N + 1] float32, decreasing to 0
    guided: np.ndarray  # [N + 1] bool, whether guidance applies
    scale: float  # of guidance; 1 for none


def collate(jobs: Sequence[Job], *, pad: int | None = None) -> Batch:
    """Return the arrays of a batch.

    Args:
        pad: token to pad with if padding is attended to, as in diffusers; None: padding is masked.
    """
    buckets: Buckets = BUCKETS if pad is None else UNPADDED
    frames = buckets.frames_of(max(job.frames for job in jobs))
    partial = any(job.partial_cover for job in jobs)
    tokens = [
        pad_tokens([getattr(job, name) for job in jobs], multiple, pad or 0)
        for name, multiple in (
            ("prompt_ids", buckets.prompt),
            ("lyric_ids", buckets.lyrics),
            ("plain_ids", buckets.prompt),
        )
    ]
    return Batch(
        lengths=np.array([job.frames for job in jobs], np.int32),
        prompt=tokens[0],
        lyrics=tokens[1],
        plain=tokens[2] if partial else None,
        edited=_edited(jobs, buckets, pad or 0) if jobs[0].edited else None,
        silent=_rows(jobs, "silent", frames),
        mask=_rows(jobs, "mask", frames),
        keeps_source=np.array([job.keeps_source for job in jobs]),
        cover_strength=np.array([job.request.audio_cover_strength for job in jobs], np.float32),
    )


def pad_tokens(rows: Sequence[np.ndarray], multiple: int, pad: int) -> Tokens[np.ndarray]:
    """Return token ids padded on the right to a multiple of `multiple` with the token `pad`."""
    size = -(-max(map(len, rows)) // multiple) * multiple
    ids = np.full((len(rows), size), pad, np.int32)
    mask = np.zeros((len(rows), size), bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return Tokens(ids, mask)


def _edited(jobs: Sequence[Job], buckets: Buckets, pad: int) -> tuple[Tokens[np.ndarray], Tokens[np.ndarray]]:
    prompts = [job.edited_ids for job in jobs if job.edited_ids is not None]
    lyrics = [job.edited_lyric_ids for job in jobs if job.edited_lyric_ids is not None]
    return pad_tokens(prompts, buckets.prompt, pad), pad_tokens(lyrics, buckets.lyrics, pad)


def check_sampling(jobs: Sequence[Job], sampling: Sampling) -> None:
    """Raise InputError if a job's task does not accept a field of the sampling, or only some jobs use FlowEdit."""
    for job in jobs:
        check_accepted(sampling, job.task_type, job.task)
        if job.compat != sampling.compat:
            logger.warning(
                "compat: a song was prepared with %s and is sampled with %s; give `prepare` the same sampling",
                job.compat,
                sampling.compat,
            )
    if len({job.edited for job in jobs}) > 1:
        raise InputError("flow_edit_morph: expected the same value for all songs of a batch, found both")
    if jobs[0].edited:
        for name, value, expected in (
            ("solver", sampling.solver, "euler"),
            ("guidance", sampling.guidance, "apg"),
            ("cover_noise_strength", sampling.cover_noise_strength, 0.0),
            ("dcw_enabled", bool(sampling.dcw_enabled), False),
        ):
            if value != expected:
                raise InputError(f"{name}: expected {expected} with flow_edit_morph, found {value}")


def warn_of_padding(jobs: Sequence[Job], window: int) -> None:
    """Warn if lyrics have padding more than `window` tokens after their end, which attends to no valid token: there
    the torch model takes the mean of all values, which is not reproduced here."""
    lengths = [len(job.lyric_ids) for job in jobs]
    if (difference := max(lengths) - min(lengths)) > window:
        logger.warning(
            "attend_to_padding: lyrics differ by %d tokens, more than the window of %d: not exactly what diffusers "
            "computes",
            difference,
            window,
        )


def sampling_schedule(sampling: Sampling, *, turbo: bool) -> Schedule:
    """Return the times of the steps, where guidance applies, and its scale.

    Args:
        sampling: settled, see `inputs.settings`.
        turbo: whether guidance is distilled into the weights, so that the scale is 1.

    Raises:
        InputError: if the steps, the shift or the times are out of range.
    """
    assert sampling.num_inference_steps is not None and sampling.shift is not None
    assert sampling.guidance_scale is not None
    given = sampling.timesteps is not None
    if sampling.timesteps is not None:
        times = custom_schedule(sampling.timesteps)
    else:
        times = schedule(sampling.num_inference_steps, sampling.shift)
    if turbo:
        times = settings.trained_times(times, snap=given and bool(sampling.snap_timesteps), steps_given=not given)
    if sampling.cover_noise_strength:
        times = late_start(times, 1 - sampling.cover_noise_strength)
    # In double precision, because a time may be exactly at the start or the end of the interval.
    t = times.astype(np.float64)
    place = t if sampling.cfg_interval_in == "t" else 1.0 - t
    guided = (sampling.cfg_interval_start <= place) & (place <= sampling.cfg_interval_end)
    scale = sampling.guidance_scale
    if turbo and scale > 1:
        logger.warning("guidance_scale %s is ignored: guidance is distilled into turbo models", scale)
        scale = 1.0
    return Schedule(times, guided, float(scale))


def blend_weights(jobs: Sequence[Job], frames: int, width: int) -> np.ndarray:
    """Return [B, frames] float32, the weight of the result in the final latents: 1 where a song is generated, and
    everywhere if it keeps nothing. Outside of each region, it falls to 0 over `width` frames, or fewer at the song's
    ends.

    Source: ACE-Step 1.5, `_repaint_boundary_blend` of its modelling files.
    """
    rows = np.ones((len(jobs), frames), np.float32)
    for row, job in zip(rows, jobs, strict=True):
        if not job.keeps_source or job.mask.all():
            continue
        row[: job.frames] = job.mask
        edges = np.flatnonzero(np.diff(job.mask.astype(np.int8), prepend=0, append=0))
        for start, end in edges.reshape(-1, 2):
            first, last = max(start - width, 0), min(end + width, job.frames)
            before = np.arange(1, start - first + 1) / (start - first + 1)
            after = np.arange(last - end, 0, -1) / (last - end + 1)
            row[first:start] = np.maximum(row[first:start], before)
            row[end:last] = np.maximum(row[end:last], after)
    return rows


def new_seed(count: int, *, joint: bool = False) -> int:
    """Return the first of `count` consecutive random seeds.

    Args:
        joint: whether all processes generate the same songs and so need the same seeds; then all must call this.
    """
    seed = secrets.randbelow(2**32 - count)
    return int(multihost_utils.broadcast_one_to_all(np.uint32(seed))) if joint else seed


def draw_seeds(jobs: Sequence[Job], *, needed: bool, joint: bool = False) -> tuple[list[int | None], jax.Array]:
    """Return the seed of each song, random if none was given, and the keys of all songs, [B].

    A seed is None if a key or noise was given instead.

    Args:
        needed: whether keys are used for anything but the initial noise.
        joint: see `new_seed`.
    """
    fresh = new_seed(len(jobs), joint=joint)
    seeds: list[int | None] = []
    keys = []
    for i, job in enumerate(jobs):
        seed = job.request.seed
        if isinstance(seed, jax.Array) and is_key(seed):
            seeds.append(None)
            keys.append(noise.own_key(seed))
            continue
        if seed is None and (job.request.latents is None or needed):
            seed = fresh + i
        seeds.append(None if seed is None else int(seed))
        keys.append(noise.key(seeds[-1] or 0))
    return seeds, jnp.stack(keys)


def draw_retake_seeds(jobs: Sequence[Job], *, joint: bool = False) -> list[int | None]:
    """Return the seed of each song's second noise, random if none was given; None for a song without a second noise.
    `joint`: see `new_seed`."""
    if not any(job.request.retake_variance for job in jobs):
        return [None] * len(jobs)
    fresh = new_seed(len(jobs), joint=joint)
    seeds = [fresh + i if job.request.retake_seed is None else job.request.retake_seed for i, job in enumerate(jobs)]
    return [seed if job.request.retake_variance else None for seed, job in zip(seeds, jobs, strict=True)]


def initial_noise(
    jobs: Sequence[Job],
    seeds: Sequence[int | None],
    keys: jax.Array,
    kind: str,
    *,
    frames: int,
    channels: int,
    dtype: str,
    retake_seeds: Sequence[int | None] | None = None,
) -> np.ndarray:
    """Return [B, frames, channels] float32 on the host, to be copied to any device, mesh or process.

    The noise of a song does not depend on the other songs or on the bucket.

    Args:
        kind: see `Sampling.noise`.
        dtype: dtype of the network, which PyTorch's noise is drawn in.
        retake_seeds: see `draw_retake_seeds`; None: no song has a second noise.

    Raises:
        InputError: if a song's own noise has another shape, or PyTorch's noise is requested for a key.
    """
    drawn = np.array(noise.normal(keys, (frames, channels)))
    for row, job, seed, retake in zip(drawn, jobs, seeds, retake_seeds or [None] * len(jobs), strict=True):
        size = (job.frames, channels)
        if job.request.latents is not None:
            own = np.asarray(job.request.latents, np.float32)
            if own.shape != size:
                raise InputError(
                    f"latents: expected {list(size)} (frames, channels) for each song, found {list(own.shape)}"
                )
        elif kind == "jax":
            own = row[: job.frames].copy()
        elif seed is None:
            raise InputError("noise: PyTorch's noise needs a number as the seed, not a key")
        else:
            own = _torch_noise(seed, size, kind, dtype)
        if retake is not None:
            angle = job.request.retake_variance * math.pi / 2
            own = np.float32(math.cos(angle)) * own + np.float32(math.sin(angle)) * _retake(retake, kind, size, dtype)
        row[: job.frames] = own
        if kind != "jax" or job.request.latents is not None:
            row[job.frames :] = 0
    return drawn


def _retake(seed: int, kind: str, size: tuple[int, int], dtype: str) -> np.ndarray:
    """Return the noise of `Request.retake_seed`, which equals the noise of a song with this seed."""
    if kind != "jax":
        return _torch_noise(seed, size, kind, dtype)
    return np.array(noise.normal(noise.key(seed)[None], size))[0]


def _torch_noise(seed: int, size: tuple[int, int], kind: str, dtype: str) -> np.ndarray:
    drawn = noise.cuda_normal(seed, math.prod(size), noise.gpu_threads(kind)).reshape(size)
    return drawn.astype(jnp.dtype(dtype)).astype(np.float32)


def _rows(jobs: Sequence[Job], name: str, frames: int) -> np.ndarray:
    """Return [B, frames] bool: a field of all jobs, true in the padding."""
    rows = np.ones((len(jobs), frames), bool)
    for row, job in zip(rows, jobs, strict=True):
        row[: job.frames] = getattr(job, name)
    return rows
