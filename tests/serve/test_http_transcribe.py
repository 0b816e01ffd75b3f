"""`/v1/transcribe` of the authors' API, by the planner, over real HTTP."""

import numpy as np
import pytest

from acestep_jax import Sampling
from acestep_jax.errors import InputError
from tests.serve.fake import FakePipeline
from tests.serve.test_http_native import SONG, wav

PLANNER = "acestep-5Hz-lm-tiny"


@pytest.fixture
def served(http, finished):
    """Return a function that makes a server: (client, the link of a song of it)."""

    def make(**options):
        client = http(pipe=FakePipeline(), **options)
        song = finished(client, client.post("/v1/songs", json=SONG).json()["id"])
        return client, song["songs"][0]["audio"]

    return make


def test_what_is_sung_and_when(served):
    """As the authors' clients ask, of a song of the server, and with an upload."""
    client, link = served(planner=PLANNER)
    for asked in (dict(json=dict(audio_path=link, language="en")), dict(files=dict(audio=("a.wav", wav())))):
        answer = client.post("/v1/transcribe", **asked)
        assert answer.status_code == 200 and answer.json()["code"] == 200, answer.text
        found = answer.json()["data"]
        assert found["lyrics_text"] == "[Verse]\nwritten by the planner"
        assert found["lrc_text"] == "[00:00.00][Verse]\n[00:01.00]written by the planner\n"
        assert found["words"][1] == dict(word="written by the planner", start=1.0, end=2.0)
    assert not list(client.service.store.incoming.iterdir())


def test_without_known_heads_there_are_no_times(served):
    client, link = served(planner=PLANNER)

    def timestamps(*_):
        raise InputError("timestamps: not known")

    client.service.pipe.timestamps = timestamps
    found = client.post("/v1/transcribe", json=dict(audio_path=link)).json()["data"]
    assert found == dict(words=[], lrc_text="", lyrics_text="[Verse]\nwritten by the planner")


@pytest.mark.parametrize("frames, codes", [(53, 11), (50, 10), (53, 10), (253, 51)])
def test_times_of_a_song_whose_last_code_reaches_beyond_it(served, frames, codes):
    """Songs have any number of frames, codes are of five; `align` compares the latents with the job's frames."""
    client, link = served(planner=PLANNER)
    pipe, given = client.service.pipe, []
    timestamps, (small, *_) = pipe.timestamps, client.service.engine.models.values()
    own = np.arange(frames, dtype=np.float32)[:, None] * np.ones(64, np.float32)

    def exact(song, request):
        job = small.prepare(request, Sampling())
        if len(song.latents) != job.frames:
            raise InputError(f"latents: expected the song's {job.frames} frames, found {len(song.latents)}")
        given.append(song.latents)
        return timestamps(song, request)

    pipe.song_to_latents, pipe.timestamps = lambda _: own, exact
    pipe.latents_to_codes = lambda _: np.arange(codes, dtype=np.int32)
    found = client.post("/v1/transcribe", json=dict(audio_path=link)).json()["data"]
    assert found["words"] and found["lrc_text"]
    assert given[0][:, 0].tolist() == [*range(min(frames, 5 * codes)), *[frames - 1] * (5 * codes - frames)]


def test_what_is_refused(served):
    client, link = served()
    answer = client.post("/v1/transcribe", json=dict(audio_path=link))
    assert answer.status_code == 501 and "no planner" in answer.json()["detail"]
    for path in ("/etc/passwd", "../a.wav", "a.wav"):
        answer = client.post("/v1/transcribe", json=dict(audio_path=path))
        assert answer.status_code == 400 and "file paths" in answer.json()["detail"], answer.text
    assert not list(client.service.store.incoming.iterdir())


def test_a_source_is_needed(served):
    client, _ = served(planner=PLANNER)
    for body in ({}, dict(audio_path=""), dict(audio_path=["a"])):
        answer = client.post("/v1/transcribe", json=body)
        assert answer.status_code == 400 and "src_audio: missing" in answer.json()["detail"]
