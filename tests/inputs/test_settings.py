"""What `compat` makes of settings that are left open, and the times of turbo models."""

import logging

import numpy as np
import pytest

from acestep_jax import InputError, Sampling
from acestep_jax.diffusion.schedule import custom_schedule, schedule
from acestep_jax.inputs.collate import sampling_schedule
from acestep_jax.inputs.settings import defaults_of, repaint_settings, settled, trained_times
from acestep_jax.models.config import TransformerConfig

pytestmark = pytest.mark.unit

TURBO, BASE = TransformerConfig(is_turbo=True), TransformerConfig(model_version="base")
STEMS = TransformerConfig(model_version="sft", is_lego_sft=True)

# The compat, the model and what is given; what becomes of it.
SETTLED = {
    "turbo": ("ace-step", TURBO, {}, dict(num_inference_steps=8, guidance_scale=1.0, shift=3.0, dcw_enabled=True)),
    "base": ("ace-step", BASE, {}, dict(num_inference_steps=32, guidance_scale=7.0, shift=3.0, dcw_enabled=False)),
    "sft on stems": (
        *("ace-step", STEMS, {}),
        dict(num_inference_steps=50, shift=3.0, dcw_enabled=False, chunk_mask_mode="auto"),
    ),
    "turbo as diffusers": (
        *("diffusers", TURBO, {}),
        dict(num_inference_steps=8, dcw_enabled=False, cover_mode="blend", cfg_interval_in="progress"),
    ),
    "base as diffusers": (
        *("diffusers", BASE, {}),
        dict(num_inference_steps=8, guidance_scale=7.0, attend_to_padding=True, repaint_injection_ratio=0.0),
    ),
    "songs with regions": (
        *("ace-step", TURBO, {}),
        dict(repaint_mode="balanced", repaint_injection_ratio=0.5, repaint_latent_crossfade_frames=12),
    ),
    "masks": ("ace-step", TURBO, {}, dict(chunk_mask_mode="explicit", cover_mode="switch", cfg_interval_in="t")),
    "single switches": (
        *("ace-step", TURBO, dict(dcw_enabled=False, repaint_mode="conservative", chunk_mask_mode="auto", shift=1.5)),
        dict(dcw_enabled=False, repaint_injection_ratio=1.0, chunk_mask_mode="auto", shift=1.5),
    ),
    "one part of a mode": (
        *("ace-step", BASE, dict(repaint_strength=0.2, repaint_latent_crossfade_frames=3, dcw_enabled=True)),
        dict(repaint_injection_ratio=0.8, repaint_latent_crossfade_frames=3, dcw_enabled=True),
    ),
}


@pytest.mark.parametrize("case", SETTLED)
def test_settled(case):
    compat, config, given, expected = SETTLED[case]
    sampling = Sampling(compat=compat, **given)
    found = settled(sampling, config, defaults_of(sampling, config))
    assert {name: getattr(found, name) for name in expected} == expected


def test_checkpoints_have_their_own_defaults():
    own = dict(num_inference_steps=20, vocal_language="de")
    found = defaults_of(Sampling(), BASE, own)
    assert (found.num_inference_steps, found.shift, found.vocal_language) == (20, 3.0, "de")


def test_models_of_other_names_speak_as_training_here_does():
    from acestep_jax.train.sidecars import LANGUAGE

    found = defaults_of(Sampling(), TransformerConfig(model_version="small"))
    assert (found.num_inference_steps, found.audio_duration, found.vocal_language) == (32, 60.0, LANGUAGE)


def test_repaint_settings():
    """Rounded half to even, as Python's `round` does there."""
    assert repaint_settings("conservative", 0.9) == (1.0, 25)
    assert repaint_settings("aggressive", 0.1) == (0.0, 0)
    assert repaint_settings("balanced", 0.5) == (0.5, 12)
    assert repaint_settings("balanced", 0.0) == (1.0, 25)
    assert repaint_settings("balanced", 1.0) == (0.0, 0)


# Times of turbo models


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_trained_times_stay(shift, caplog):
    times = schedule(8, shift)
    for snap in (True, False):
        np.testing.assert_array_equal(trained_times(times, snap=snap, steps_given=True), times)
    assert not caplog.records


def test_times_snap_to_trained_ones(caplog):
    """The times that ACE-Step's documentation gives as an example."""
    times = custom_schedule([0.97, 0.76, 0.615, 0.5, 0.395, 0.28, 0.18, 0.085])
    found = trained_times(times, snap=True, steps_given=False)
    expected = [0.9545455, 0.7692308, 0.625, 0.5, 0.4, 0.3, 0.2222222, 0.125, 0.0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert "timesteps: 0.97, 0.76, 0.615, 0.5" in caplog.text and "snap_timesteps=False keeps them" in caplog.text


def test_times_that_become_one_are_one_step():
    found = trained_times(custom_schedule([1.0, 0.99, 0.5]), snap=True, steps_given=False)
    np.testing.assert_allclose(found, [1.0, 0.5, 0.0])


def test_untrained_times_warn(caplog):
    times = schedule(12, 3.0)
    np.testing.assert_array_equal(trained_times(times, snap=False, steps_given=True), times)
    assert "num_inference_steps, shift: turbo models were trained at eight steps" in caplog.text


def test_schedules_of_models(caplog):
    """Only turbo models snap, and only times that were given; compat and single switches say whether."""
    given = [0.97, 0.5]
    for compat, config, snap, first in (
        ("ace-step", TURBO, None, 0.9545455),
        ("ace-step", TURBO, False, 0.97),
        ("ace-step", BASE, None, 0.97),
        ("diffusers", TURBO, None, 0.97),
        ("diffusers", TURBO, True, 0.9545455),
    ):
        sampling = Sampling(compat=compat, timesteps=given, snap_timesteps=snap, guidance_scale=1.0)
        sampling = settled(sampling, config, defaults_of(sampling, config))
        times, _, _ = sampling_schedule(sampling, turbo=config.turbo)
        assert times[0] == pytest.approx(first)
    caplog.set_level(logging.WARNING)
    caplog.clear()
    sampling_schedule(settled(Sampling(), BASE, defaults_of(Sampling(), BASE)), turbo=False)
    assert not caplog.records


@pytest.mark.parametrize(
    "message, values",
    {
        "compat: expected one of ace-step, diffusers, found 'comfyui'": dict(compat="comfyui"),
        "dcw_mode: expected one of low, high, double, pix": dict(dcw_mode="both"),
        "dcw_wavelet: expected one of haar, db2, db4, sym4, sym8, coif2": dict(dcw_wavelet="db3"),
        "dcw_scaler: expected at least 0, found -1": dict(dcw_scaler=-1.0),
        "chunk_mask_mode: expected one of explicit, auto": dict(chunk_mask_mode="none"),
        "repaint_mode: expected one of conservative, balanced, aggressive": dict(repaint_mode="soft"),
        "repaint_strength: expected 0 to 1, found 2": dict(repaint_strength=2.0),
        "velocity_ema_factor: expected 0 to 1": dict(velocity_ema_factor=1.5),
        "flow_edit_n_min, flow_edit_n_max: expected min <= max": dict(flow_edit_n_min=0.5, flow_edit_n_max=0.4),
        "posterior: expected one of mean, sample": dict(posterior="mode"),
    }.items(),
)
def test_bad_settings(message, values):
    with pytest.raises(InputError, match=message):
        Sampling(**values)
