"""Plans as data: checked, kept as JSON, and turned into requests."""

import dataclasses
import json

import numpy as np
import pytest

from acestep_jax import InputError, Plan, Request
from acestep_jax.inputs.keywords import requests_of

pytestmark = pytest.mark.unit

PLAN = Plan(
    caption="slow piano ballad",
    lyrics="[Verse]\nthe sea",
    audio_duration=30,
    vocal_language="en",
    bpm=70,
    keyscale="A minor",
    timesignature="4",
    audio_codes=np.array([0, 5, 63999], np.int32),
    prompt="a sad song about the sea",
    lm_seed=7,
)


def test_a_file_gives_the_plan_back(tmp_path):
    path = PLAN.save(tmp_path / "plan.json")
    assert Plan.load(path) == PLAN and PLAN.audio_codes == (0, 5, 63999)
    assert json.loads(path.read_text())["version"] == 1
    assert len(path.read_text().splitlines()) == 14  # so that it can be read and changed by hand
    with pytest.raises(InputError, match="already exists"):
        PLAN.save(path)
    PLAN.save(path, overwrite=True)


def test_a_plan_becomes_a_request():
    request = PLAN.request()
    assert (
        request.prompt == PLAN.caption and request.audio_codes == "<|audio_code_0|><|audio_code_5|><|audio_code_63999|>"
    )
    assert (request.bpm, request.keyscale, request.timesignature) == (70, "A minor", "4")
    assert PLAN.request(Request("x", seed=3, reference_audio="a.wav")).seed == 3
    assert dataclasses.replace(PLAN, audio_codes=()).request().audio_codes is None


def test_what_is_given_beside_a_plan_takes_its_place():
    (request,), _, _ = requests_of(dict(prompt=PLAN, bpm=80, seed=3))
    assert (request.bpm, request.seed, request.keyscale, request.lyrics) == (80, 3, "A minor", PLAN.lyrics)


BAD = {
    "plan.json: version: expected a plan of version 1, found 2": dict(version=2),
    "plan.json: bpm: expected 30 to 300": dict(bpm=999),
    "plan.json: audio_codes: expected whole numbers from 0 to 63999": dict(audio_codes=[64000]),
    "plan.json: audio_codes: expected a list": dict(audio_codes="<|audio_code_1|>"),
    "plan.json: captions: unknown key; did you mean caption": dict(captions="x"),
    "plan.json: keyscale: expected A to G": dict(keyscale="banana"),
    "plan.json: score: expected a number": dict(score="good"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_files(tmp_path, message):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(PLAN.to_dict() | BAD[message]))
    with pytest.raises(InputError, match=message):
        Plan.load(path)


def test_files_that_are_no_plan(tmp_path):
    path = tmp_path / "plan.json"
    for text, message in (
        ("{", "not a plan in JSON"),
        ("[1]", "expected a JSON object"),
        ('{"version": 1}', "caption: missing"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            Plan.load(path)
