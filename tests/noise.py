"""The initial noise of songs, as the pipeline draws it."""

from types import SimpleNamespace

from acestep_jax import Request
from acestep_jax.inputs.buckets import BUCKETS
from acestep_jax.inputs.collate import draw_seeds, initial_noise


def drawn(seeds, frames, *, channels=8, kind="jax", dtype="float32", needed=False):
    """Return the seeds, the keys and the noise [B, bucket, channels] of songs of `frames` frames with these seeds."""
    jobs = [SimpleNamespace(request=Request("x", seed=seed), frames=frames) for seed in seeds]
    found, keys = draw_seeds(jobs, needed=needed)
    size = dict(frames=BUCKETS.frames_of(frames), channels=channels, dtype=dtype)
    return found, keys, initial_noise(jobs, found, keys, kind, **size)
