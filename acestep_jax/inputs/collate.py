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
from acestep_jax.inputs.buckets import BUCKETS, Buckets
from acestep_jax.inputs.prepare import Job, check_accepted
from acestep_jax.models.registry import SamplingDefaults
from acestep_jax.request import Sampling

logger = logging.getLogger(__name__)

# Padding that is attended to must be diffusers': to the longest of the batch only.
UNPADDED = dataclasses.replace(BUCKETS, prompt=1, lyrics=1)


A = TypeVar("A")  # np.ndarray, or jax.Array within a program


class Tokens(NamedTuple, Generic[A]):
    """Token ids of a batch, padded on the right: [B, S] int32, and which are tokens: [B, S] bool."""

    ids: A
    mask: A


class Batch(NamedTuple):
    """Jobs as arrays on the host; T is the bucket of the longest."""

    lengths: np.ndarray  # [B] int32, latent frames
    prompt: Tokens[np.ndarray]
    lyrics: Tokens[np.ndarray]
    plain: Tokens[np.ndarray] | None  # the prompts as those of text2music, where a cover of the batch is partial
    silent: np.ndarray  # [B, T] bool, true in the padding
    mask: np.ndarray  # [B, T] bool, true in the padding
    keeps_source: np.ndarray  # [B] bool
    cover_strength: np.ndarray  # [B] float32

    @property
    def frames(self) -> int:
        """T, latent frames."""
        return self.mask.shape[1]


def collate(jobs: Sequence[Job], *, pad: int | None = None) -> Batch:
    """Return the arrays of a batch.

    Args:
        pad: the token to pad with, where padding is attended to, as in diffusers; None: padding is masked.
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


def check_sampling(jobs: Sequence[Job], sampling: Sampling) -> None:
    """Raise InputError if a job's task does not accept a value that the sampling has."""
    for job in jobs:
        check_accepted(sampling, job.task_type, job.task)


def warn_of_padding(jobs: Sequence[Job], window: int) -> None:
    """Warn where the padding of lyrics, which reads the lyrics before it, is more than `window` tokens from them: the
    torch model makes the mean of everything of padding that reads nothing, which is not computed here."""
    lengths = [len(job.lyric_ids) for job in jobs]
    if (difference := max(lengths) - min(lengths)) > window:
        logger.warning(
            "attend_to_padding: lyrics differ by %d tokens, more than the window of %d: not exactly what diffusers "
            "computes",
            difference,
            window,
        )


def sampling_schedule(
    sampling: Sampling, defaults: SamplingDefaults, *, turbo: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return times [N + 1] float32, at which of them guidance acts [N + 1] bool, and the guidance scale.

    Args:
        defaults: of the model's variant.
        turbo: whether guidance is distilled into the weights, so that the scale is 1.

    Raises:
        InputError: if the steps, the shift or the times are out of range.
    """
    if sampling.timesteps is not None:
        times = custom_schedule(sampling.timesteps)
    else:
        steps, shift = sampling.num_inference_steps, sampling.shift
        times = schedule(
            defaults.num_inference_steps if steps is None else steps, defaults.shift if shift is None else shift
        )
    if sampling.cover_noise_strength:
        times = late_start(times, 1 - sampling.cover_noise_strength)
    # In double precision, because a time may lie right on a border.
    t = times.astype(np.float64)
    place = t if sampling.cfg_interval_in == "t" else 1.0 - t
    guided = (sampling.cfg_interval_start <= place) & (place <= sampling.cfg_interval_end)
    scale = defaults.guidance_scale if sampling.guidance_scale is None else sampling.guidance_scale
    if turbo and scale > 1:
        logger.warning("guidance_scale %s is ignored: guidance is distilled into turbo models", scale)
        scale = 1.0
    return times, guided, float(scale)


def draw_seeds(jobs: Sequence[Job], *, needed: bool) -> tuple[list[int | None], jax.Array]:
    """Return the seeds, with new ones for songs that have none, and the keys of all [B].

    A seed is None where a key was given, or noise.

    Args:
        needed: whether keys are used besides for the initial noise.
    """
    fresh = secrets.randbelow(2**32 - len(jobs))
    if jax.process_count() > 1:
        fresh = int(multihost_utils.broadcast_one_to_all(np.uint32(fresh)))
    seeds: list[int | None] = []
    keys = []
    for i, job in enumerate(jobs):
        seed = job.request.seed
        if isinstance(seed, jax.Array) and is_key(seed):
            seeds.append(None)
            keys.append(seed)
            continue
        if seed is None and (job.request.latents is None or needed):
            seed = fresh + i
        seeds.append(None if seed is None else int(seed))
        keys.append(noise.key(seeds[-1] or 0))
    return seeds, jnp.stack(keys)


def initial_noise(
    jobs: Sequence[Job],
    seeds: Sequence[int | None],
    keys: jax.Array,
    kind: str,
    *,
    frames: int,
    channels: int,
    dtype: str,
) -> np.ndarray:
    """Return [B, frames, channels] float32 on the host, from where it may go to any device, mesh or process.

    The noise of a song does not depend on the others, nor on the bucket.

    Args:
        kind: see `Sampling.noise`.
        dtype: of the network, in which PyTorch draws.

    Raises:
        InputError: if a song's own noise has another shape, or PyTorch's noise is requested for a key.
    """
    drawn = np.array(noise.normal(keys, (frames, channels)))
    for row, job, seed in zip(drawn, jobs, seeds, strict=True):
        size = (job.frames, channels)
        if job.request.latents is not None:
            own = np.asarray(job.request.latents, np.float32)
            if own.shape != size:
                raise InputError(
                    f"latents: expected {list(size)} (frames, channels) for each song, found {list(own.shape)}"
                )
        elif kind == "jax":
            continue
        elif seed is None:
            raise InputError("noise: PyTorch's is drawn from numbers; give a number as the seed, not a key")
        else:
            own = noise.cuda_normal(seed, math.prod(size), noise.gpu_threads(kind)).reshape(size)
            own = own.astype(jnp.dtype(dtype)).astype(np.float32)
        row[: job.frames], row[job.frames :] = own, 0
    return drawn


def _rows(jobs: Sequence[Job], name: str, frames: int) -> np.ndarray:
    """Return [B, frames] bool: a field of all jobs, true in the padding."""
    rows = np.ones((len(jobs), frames), bool)
    for row, job in zip(rows, jobs, strict=True):
        row[: job.frames] = getattr(job, name)
    return rows
