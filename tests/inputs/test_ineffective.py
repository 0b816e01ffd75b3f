"""Arguments that another one or the model makes ineffective: a warning names them, and nothing else."""

from types import SimpleNamespace

import numpy as np
import pytest

from acestep_jax import AceStepPipeline, Request, Sampling
from acestep_jax.arguments import arguments
from acestep_jax.inputs import ineffective
from acestep_jax.inputs.prepare import prepare
from acestep_jax.inputs.settings import defaults_of, settled
from acestep_jax.io import checkpoint
from acestep_jax.models.config import TransformerConfig

TURBO, BASE = TransformerConfig(is_turbo=True), TransformerConfig(model_version="base")
NOISE = np.zeros((4, 8), np.float32)

# What is given, which of it has no effect, and what gives it one.
REQUESTS = [
    (dict(retake_seed=3), ["retake_seed"], dict(retake_variance=0.5)),
    (dict(retake_seed=0), ["retake_seed"], dict(retake_variance=1.0)),
    (dict(complete_track_classes=["bass"], track_name="drums"), ["complete_track_classes"], dict(track_name=None)),
    (dict(track_name="drums", instruction="Do it:"), ["track_name"], dict(instruction=None)),
    (dict(global_caption="a waltz", instruction="Generate a segment:"), ["global_caption"], dict(instruction=None)),
]
REGIONS = dict(keeps_source=True, mask=np.arange(4) < 2)
SAMPLINGS = [
    (TURBO, {}, dict(shift=2.0, num_inference_steps=4, timesteps=[1.0, 0.5]), ["num_inference_steps", "shift"]),
    (TURBO, {}, dict(shift=2.0, num_inference_steps=4, timesteps=None), []),
    (BASE, {}, dict(snap_timesteps=True, timesteps=[1.0, 0.5]), ["snap_timesteps"]),
    (TURBO, {}, dict(snap_timesteps=False), ["snap_timesteps"]),
    (TURBO, {}, dict(snap_timesteps=False, timesteps=[1.0, 0.5]), []),
    (TURBO, {}, dict(guidance="adg", cfg_interval_start=0.2), ["guidance", "cfg_interval_start"]),
    (BASE, {}, dict(guidance="adg", cfg_interval_end=0.7, cfg_interval_in="t"), []),
    (BASE, {}, dict(guidance="cfg", cfg_interval_end=0.7, guidance_scale=1), ["guidance", "cfg_interval_end"]),
    (BASE, {}, dict(cfg_interval_in="progress"), ["cfg_interval_in"]),
    (BASE, {}, dict(cover_mode="blend"), ["cover_mode"]),
    (BASE, dict(partial_cover=True), dict(cover_mode="blend"), []),
    (BASE, {}, dict(repaint_mode="conservative", repaint_strength=0.1), ["repaint_mode", "repaint_strength"]),
    (BASE, REGIONS, dict(repaint_mode="conservative"), []),
    (BASE, REGIONS, dict(repaint_mode="conservative", repaint_strength=0.1), ["repaint_strength"]),
    (BASE, REGIONS, dict(repaint_strength=0.1, repaint_injection_ratio=0.5), []),
    (
        *(BASE, REGIONS),
        dict(repaint_strength=0.1, repaint_injection_ratio=0.5, repaint_latent_crossfade_frames=2),
        ["repaint_strength"],
    ),
    (
        *(BASE, {}),
        dict(repaint_injection_ratio=0.5, repaint_latent_crossfade_frames=0),
        ["repaint_injection_ratio", "repaint_latent_crossfade_frames"],
    ),
    (BASE, {}, dict(dcw_mode="low", dcw_scaler=0.1, dcw_wavelet="db4"), ["dcw_mode", "dcw_scaler", "dcw_wavelet"]),
    (BASE, {}, dict(dcw_mode="low", dcw_scaler=0.1, dcw_wavelet="db4", dcw_enabled=True), []),
    (TURBO, {}, dict(dcw_mode="low", dcw_scaler=0.1), []),
    (TURBO, {}, dict(dcw_scaler=0.1, compat="diffusers"), ["dcw_scaler"]),
    (TURBO, {}, dict(dcw_mode="pix", dcw_high_scaler=0.1, dcw_wavelet="db4"), ["dcw_high_scaler", "dcw_wavelet"]),
    (TURBO, dict(edited=True), dict(dcw_scaler=0.1), ["dcw_scaler"]),
    (TURBO, {}, dict(flow_edit_n_min=0.2, flow_edit_n_avg=2), ["flow_edit_n_min", "flow_edit_n_avg"]),
    (TURBO, {}, dict(flow_edit_n_max=0.2), ["flow_edit_n_max"]),
    (TURBO, dict(edited=True), dict(flow_edit_n_min=0.2, flow_edit_n_max=0.8, flow_edit_n_avg=2), []),
    (TURBO, {}, dict(posterior="sample"), ["posterior"]),
    (TURBO, dict(reference=NOISE), dict(posterior="sample"), []),
    (TURBO, dict(edited=True), dict(noise="torch"), ["noise"]),
    (TURBO, dict(request=Request("x", latents=NOISE)), dict(noise="torch"), ["noise"]),
    (TURBO, dict(request=Request("x", latents=NOISE, retake_variance=0.1)), dict(noise="torch"), []),
    (TURBO, dict(request=Request("x", latents=NOISE, seed=0)), {}, ["seed"]),
    (TURBO, dict(request=Request("x", latents=NOISE, seed=0)), dict(solver="sde"), []),
    (TURBO, dict(request=Request("x", latents=NOISE)), {}, []),
    (TURBO, {}, {}, []),
]


def warned(caplog):
    """Return the arguments that the warnings name; each says what they need."""
    assert all("has no effect here; it needs " in message for message in caplog.messages)
    return [message.partition(":")[0] for message in caplog.messages]


@pytest.mark.unit
@pytest.mark.parametrize("given, named, mended", REQUESTS)
def test_requests(given, named, mended, caplog):
    ineffective.warn_of_request(Request("x", **given))
    assert warned(caplog) == named
    caplog.clear()
    ineffective.warn_of_request(Request("x", **given | mended))
    assert not caplog.messages


def job(**values):
    plain = dict(request=Request("x"), edited=False, partial_cover=False, keeps_source=False, mask=np.ones(4, bool))
    return SimpleNamespace(**plain | dict(source=None, reference=None) | values)


@pytest.mark.unit
@pytest.mark.parametrize("config, about, given, named", SAMPLINGS)
def test_samplings(config, about, given, named, caplog):
    """Of several songs, one on which it has an effect is enough."""
    sampling = Sampling(**given)
    known = settled(sampling, config, defaults_of(sampling, config))
    ineffective.warn_of_sampling(ineffective.Batch([job(**about)], sampling, known, config.turbo))
    assert warned(caplog) == named
    if about == REGIONS:
        caplog.clear()
        ineffective.warn_of_sampling(ineffective.Batch([job(), job(**about)], sampling, known, config.turbo))
        assert warned(caplog) == named


@pytest.mark.unit
def test_every_rule_is_of_arguments_and_is_tried():
    for rules, kind, tried in (
        (ineffective.OF_REQUESTS, Request, [named for _, named, _ in REQUESTS]),
        (ineffective.OF_SAMPLING, Sampling, [named for *_, named in SAMPLINGS]),
    ):
        names = {name for rule in rules for name in rule.names}
        assert names <= arguments(kind).keys()
        assert names <= {name for named in tried for name in named}


@pytest.mark.unit
def test_preparing_warns(caplog):
    configs = checkpoint.read_manifest(checkpoint.SMALL_MODEL).configs
    tokenizer = checkpoint.load_tokenizer(checkpoint.SMALL_MODEL)
    prepare(Request("x", retake_seed=3, audio_duration=10), configs, tokenizer)
    assert warned(caplog) == ["retake_seed"]


def test_running_warns(tiny_base, caplog):
    """Once for a batch, and not of what compat or the model decide."""
    pipe = AceStepPipeline.from_checkpoint(tiny_base[1])
    arguments = dict(audio_duration=10.24, seed=3, output_type="latent", guidance_scale=1.0, num_inference_steps=1)
    pipe("x", **arguments)
    assert not caplog.messages
    pipe("x", **arguments, dcw_scaler=0.3, flow_edit_n_avg=2, repaint_mode="balanced")
    assert warned(caplog) == ["repaint_mode", "dcw_scaler", "flow_edit_n_avg"]
