"""What the entry of a family says, against the code that it was taken from."""

import string

import pytest

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
    guided = SamplingDefaults(num_inference_steps=50, guidance_scale=7.0, shift=1.0)
    turbo = SamplingDefaults(num_inference_steps=8, guidance_scale=1.0, shift=3.0)
    assert dict(FAMILY.defaults) == {"turbo": turbo, "base": guided, "sft": guided}
    for config in (TransformerConfig(), TransformerConfig(is_turbo=True), TransformerConfig(model_version="sft")):
        assert config.variant in FAMILY.defaults


@pytest.mark.parametrize("name", FAMILY.networks)
def test_networks(name):
    _, config = FAMILY.networks[name]
    assert issubclass(config, NetworkConfig)


def test_optional_networks_are_networks():
    assert set(FAMILY.optional) < FAMILY.networks.keys()
