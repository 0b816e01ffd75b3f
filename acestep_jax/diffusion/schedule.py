"""Schedules: the times at which the velocity is evaluated, from t = 1 (noise) to t = 0 (music)."""

from collections.abc import Sequence

import numpy as np

from acestep_jax.errors import InputError


def schedule(num_steps: int, shift: float = 1.0) -> np.ndarray:
    """Return [num_steps + 1] float32 from 1 to 0: t = s u / (1 + (s - 1) u) for u = 1, 1 - 1/N, ..., 0.

    A shift s above 1 moves steps towards the noise. Source: ACE-Step 1.5; Esser et al., arXiv 2403.03206.

    Raises:
        InputError: if num_steps < 1 or shift <= 0.
    """
    if num_steps < 1:
        raise InputError(f"num_inference_steps: expected at least 1, found {num_steps}")
    if not (shift > 0 and np.isfinite(shift)):
        raise InputError(f"shift: expected a number above 0, found {shift}")
    u = np.linspace(1.0, 0.0, num_steps + 1, dtype=np.float32)
    return np.float32(shift) * u / (1 + (np.float32(shift) - 1) * u)


def custom_schedule(timesteps: Sequence[float]) -> np.ndarray:
    """Return [N + 1] float32: the given times and the final 0.

    Raises:
        InputError: if there are none, or they are not strictly decreasing within (0, 1].
    """
    t = np.asarray(timesteps, np.float32).reshape(-1)
    if t.size and t[-1] == 0.0:
        t = t[:-1]
    if not t.size or not ((t > 0) & (t <= 1)).all() or (np.diff(t) >= 0).any():
        raise InputError(f"timesteps: expected strictly decreasing numbers within (0, 1], found {list(timesteps)}")
    return np.append(t, np.float32(0.0))


def late_start(times: np.ndarray, noise_level: float) -> np.ndarray:
    """Return the part of the schedule that starts at the time nearest to `noise_level`, or at the earlier of two
    equally near times. It has at least one step.

    Raises:
        InputError: if the noise level is not within [0, 1].
    """
    if not 0 <= noise_level <= 1:
        raise InputError(f"cover_noise_strength: expected 0 to 1, found {1 - noise_level:g}")
    return times[np.argmin(np.abs(times[:-1] - noise_level)) :]
