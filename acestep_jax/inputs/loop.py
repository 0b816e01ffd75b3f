"""From a batch, its noise and its latents to the inputs of the denoising loop."""

from collections.abc import Sequence

import jax
import numpy as np

from acestep_jax.diffusion import dcw, flow_edit
from acestep_jax.diffusion.denoise import Condition, Inputs, Method
from acestep_jax.diffusion.solvers import STOCHASTIC
from acestep_jax.inputs.collate import Batch, Schedule, blend_weights
from acestep_jax.inputs.prepare import Job
from acestep_jax.request import Sampling

AUTO_MASK = 2.0  # the chunk mask of the mode "auto", everywhere


def loop_inputs(
    jobs: Sequence[Job],
    batch: Batch,
    sampling: Sampling,
    schedule: Schedule,
    noise: np.ndarray,
    latents: tuple[np.ndarray, np.ndarray],
    conditions: tuple[Condition, Condition | None, Condition | None],
    keys: jax.Array,
    method: Method,
) -> Inputs:
    """Return the inputs of a batch.

    Args:
        sampling: settled, see `inputs.settings`.
        noise: [B, T, C] float32.
        latents: as `source_latents` returns them.
        conditions: as `sources.conditions` returns them.
        keys: [B], the keys of the songs.
    """
    (times, guided, scale), (clean, source), (condition, plain, described) = schedule, latents, conditions
    steps, edited = len(times) - 1, bool(method.edit_draws)
    kept = batch.keeps_source[:, None] & ~batch.mask
    keeps = bool(kept.any())
    injected = round((sampling.repaint_injection_ratio or 0.0) * steps) if keeps else 0
    blended = (sampling.repaint_latent_crossfade_frames or 0) if keeps else 0
    # Turbo models end with their prediction of x0, which upstream does not change.
    last = steps - 1 if method.euler_end else steps
    bands = dcw.scales(sampling.dcw_mode, times, sampling.dcw_scaler, sampling.dcw_high_scaler)
    window = flow_edit.window(sampling.flow_edit_n_min, sampling.flow_edit_n_max, steps)
    x = noise
    if edited:
        x = clean
    elif sampling.cover_noise_strength:
        x = times[0] * noise + (1 - times[0]) * clean
    return Inputs(
        x=x,
        lengths=batch.lengths,
        condition=condition,
        source=source,
        silent=batch.silent,
        mask=np.full(batch.mask.shape, AUTO_MASK, np.float32) if sampling.chunk_mask_mode == "auto" else batch.mask,
        times=times,
        guided=guided,
        guidance_scale=np.float32(scale),
        keys=keys if edited or sampling.solver in STOCHASTIC else None,
        plain_condition=plain,
        cover_strength=None if plain is None else batch.cover_strength,
        kept=kept if injected else None,
        clean=clean if injected or blended or edited else None,
        noise=noise if injected else None,
        injected_steps=np.int32(min(injected, last)) if injected else None,
        made=blend_weights(jobs, batch.frames, blended) if blended else None,
        dcw=bands if sampling.dcw_enabled and not edited and bands.any() else None,
        velocity_norm=np.float32(sampling.velocity_norm_threshold) if sampling.velocity_norm_threshold else None,
        velocity_ema=np.float32(sampling.velocity_ema_factor) if sampling.velocity_ema_factor else None,
        edited=described,
        edit_window=np.array(window, np.int32) if edited else None,
    )
