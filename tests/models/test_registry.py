"""What the entry of a family says, against the code that it was taken from."""

import inspect
import string

import numpy as np
import pytest

from acestep_jax.diffusion.schedule import schedule
from acestep_jax.inputs.prompt import lyric_text, prompt_text
from acestep_jax.models.config import NetworkConfig, TransformerConfig
from acestep_jax.models.registry import ACE_STEP_1_5 as FAMILY
from acestep_jax.models.registry import SamplingDefaults


def fields(template):
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def test_templates_are_what_the_encoders_read():
    assert fields(FAMILY.prompt) == {"instruction", "caption", "bpm", "timesignature", "keyscale", "duration"}
    assert fields(FAMILY.lyrics) == {"language", "lyrics"}
    found = FAMILY.prompt.format(
        instruction="Do this:", caption="{x} %s", bpm=80, timesignature="3", keyscale="F# minor", duration=30
    )
    assert found == (
        "# Instruction\nDo this:\n\n# Caption\n{x} %s\n\n# Metas\n- bpm: 80\n- timesignature: 3\n- keyscale: F# minor\n"
        "- duration: 30 seconds\n<|endoftext|>\n"
    )
    arguments = dict(audio_duration=30.0, bpm=80, keyscale="F# minor", timesignature=3, instruction="Do this:")
    assert found == prompt_text("{x} %s", **arguments)
    assert FAMILY.lyrics.format(language="en", lyrics="[Verse]\n{la}") == lyric_text("[Verse]\n{la}", "en")


def test_every_variant_has_its_defaults():
    steps = {"ace-step": dict(turbo=8, base=32, sft=50), "diffusers": dict(turbo=8, base=8, sft=8)}
    assert FAMILY.compat.keys() == steps.keys()
    for name, compat in FAMILY.compat.items():
        assert dict(compat.defaults) == {
            variant: SamplingDefaults(
                num_inference_steps=count,
                guidance_scale=1.0 if variant == "turbo" else 7.0,
                shift=3.0,
                audio_duration=120.0 if name == "ace-step" else 60.0,
                vocal_language="unknown" if name == "ace-step" else "en",
            )
            for variant, count in steps[name].items()
        }
        for config in (TransformerConfig(), TransformerConfig(is_turbo=True), TransformerConfig(model_version="sft")):
            assert config.variant in compat.defaults


def test_defaults_of_diffusers():
    """The signature of the pipeline that the tests compare with."""
    pipeline = pytest.importorskip("diffusers").AceStepPipeline
    theirs = {name: p.default for name, p in inspect.signature(pipeline.__call__).parameters.items()}
    compat = FAMILY.compat["diffusers"]
    for name in ("num_inference_steps", "guidance_scale", "shift", "audio_duration", "vocal_language"):
        assert getattr(compat.defaults["base"], name) == theirs[name]


def test_times_of_turbo_models():
    """The times of eight steps at the three shifts that they were trained with."""
    assert len(FAMILY.turbo_times) == 20
    for shift in (1.0, 2.0, 3.0):
        far = np.abs(schedule(8, shift)[:-1, None] - np.array(FAMILY.turbo_times)).min(axis=1)
        assert far.max() < 1e-6


@pytest.mark.parametrize("name", FAMILY.networks)
def test_networks(name):
    _, config = FAMILY.networks[name]
    assert issubclass(config, NetworkConfig)


def test_optional_networks_are_networks():
    assert set(FAMILY.optional) < FAMILY.networks.keys()
