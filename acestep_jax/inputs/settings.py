"""Defaults for fields of `Sampling` that are None, from `Sampling.compat`, the model's variant and the checkpoint."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from acestep_jax.models.config import TransformerConfig
from acestep_jax.models.registry import FAMILY, Compat, SamplingDefaults
from acestep_jax.request import Sampling

logger = logging.getLogger(__name__)

FRAMES = 25  # latent frames of the widest blend of result and source, which is one second
TOLERANCE = 1e-3  # for comparing times, which may have been rounded to bfloat16


def compat_of(sampling: Sampling) -> Compat:
    """Return the switches and defaults of `sampling.compat`."""
    return FAMILY.compat[sampling.compat]


def defaults_of(
    sampling: Sampling, config: TransformerConfig | None, own: Mapping[str, Any] | None = None
) -> SamplingDefaults:
    """Return the defaults of a model.

    Args:
        config: the transformer's config; None: a turbo model's.
        own: defaults of the checkpoint, which override those of its variant.
    """
    defaults = compat_of(sampling).defaults
    config = config or TransformerConfig(is_turbo=True)
    if (found := defaults.get(config.variant)) is None:
        alike = defaults["turbo" if config.turbo else "base"]
        found = SamplingDefaults(
            num_inference_steps=alike.num_inference_steps, guidance_scale=alike.guidance_scale, shift=alike.shift
        )
    return dataclasses.replace(found, **(own or {}))


def settled(sampling: Sampling, config: TransformerConfig | None, defaults: SamplingDefaults | None = None) -> Sampling:
    """Return the sampling with the defaults of `compat` and the model in place of None.

    Args:
        config: the transformer's config; None: defaults that depend on it are a base model's.
        defaults: see `defaults_of`; None: steps, guidance scale and shift are not filled in.
    """
    compat = compat_of(sampling)
    turbo = config is not None and config.turbo
    stems = config is not None and config.is_lego_sft
    injection, frames = repaint_settings(sampling.repaint_mode or compat.repaint_mode, sampling.repaint_strength)
    values: dict[str, Any] = dict(
        cover_mode=compat.cover_mode,
        cfg_interval_in=compat.cfg_interval_in,
        attend_to_padding=compat.attend_to_padding,
        chunk_mask_mode=compat.stems_chunk_mask_mode if stems else compat.chunk_mask_mode,
        repaint_mode=compat.repaint_mode,
        repaint_injection_ratio=injection,
        repaint_latent_crossfade_frames=frames,
        snap_timesteps=compat.snap_timesteps,
        dcw_enabled=compat.dcw_enabled and turbo,
    )
    if defaults is not None:
        values |= {name: getattr(defaults, name) for name in ("num_inference_steps", "guidance_scale", "shift")}
    missing = {name: value for name, value in values.items() if getattr(sampling, name) is None}
    return dataclasses.replace(sampling, **missing)


def repaint_settings(mode: str, strength: float) -> tuple[float, int]:
    """Return the fraction of the steps after which the source is restored, and the number of latent frames outside of
    the regions over which the result fades into it.

    | mode         | fraction     | frames          |
    |--------------|--------------|-----------------|
    | conservative | 1            | 25              |
    | balanced     | 1 - strength | 25 (1 - strength), rounded |
    | aggressive   | 0            | 0               |

    Source: ACE-Step 1.5, `_resolve_repaint_config` of acestep/core/generation/handler/generate_music.py.
    """
    fraction = {"conservative": 1.0, "balanced": 1.0 - strength, "aggressive": 0.0}[mode]
    return fraction, round(FRAMES * fraction)


def trained_times(times: np.ndarray, *, snap: bool, steps_given: bool) -> np.ndarray:
    """Return the schedule of a turbo model, [N + 1] float32; warn if the model was not trained at some of its times.

    Args:
        times: [N + 1] float32, decreasing to 0.
        snap: whether to replace each time with the nearest trained one. Times that become equal are merged into one
            step, because a step must have a length.
        steps_given: whether `times` were computed from a number of steps and a shift, which the warning then names.
    """
    trained = np.array(FAMILY.turbo_times)
    nearest = trained[np.argmin(np.abs(trained - times[:-1, None]), axis=1)].astype(np.float32)
    far = np.abs(nearest - times[:-1]) > TOLERANCE
    if snap:
        nearest = nearest[np.append(True, np.diff(nearest) < 0)]
        if far.any():
            logger.warning(
                "timesteps: %s became %s, the times that turbo models were trained at; snap_timesteps=False keeps them",
                _listed(times[:-1]),
                _listed(nearest),
            )
        return np.append(nearest, np.float32(0))
    if far.any() or len(times) - 1 > len(trained):
        subject = "num_inference_steps, shift" if steps_given else "timesteps"
        logger.warning(
            "%s: turbo models were trained at eight steps with a shift of 1, 2 or 3; found %d steps, of which %d at "
            "times that are not among those (%s)",
            subject,
            len(times) - 1,
            far.sum(),
            _listed(times[:-1][far]),
        )
    return times


def _listed(times: np.ndarray) -> str:
    shown = ", ".join(f"{t:.3g}" for t in times[:8])
    return f"{shown}, ..." if len(times) > 8 else shown
