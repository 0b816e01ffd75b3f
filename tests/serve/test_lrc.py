"""Songs with the times of their lyrics."""

import time

import jax
import pytest

from acestep_jax import Request, Sampling
from acestep_jax.serve import sounds
from acestep_jax.serve.engine import Work
from acestep_jax.serve.local import LocalEngine
from tests.serve.fake import FakePipeline, RecordingListener, model, sung, wait_until
from tests.serve.test_http_native import SONG

LYRICS = "[Verse]\nla la\nlu lu"


@pytest.fixture
def server(http):
    def make(**options):
        pipe = FakePipeline()
        client = http(engine=LocalEngine([model(pipe), sung(pipe)]), **options)
        client.pipe = pipe
        return client

    return make


def test_a_file_says_when_lines_are_sung(server, http, finished, tmp_path):
    client = server(folder=tmp_path / "songs")
    asked = SONG | dict(model="sung", lyrics=LYRICS, lrc=True, variations=2, seed=5)
    client.pipe.unsung = 6
    record_id = client.post("/v1/songs", json=asked).json()["id"]
    found = finished(client, record_id)
    first, second = found["songs"]
    assert found["status"] == "done" and found["lrc"]
    answer = client.get(first["lrc"])
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text == "[00:00.00][Verse]\n[00:01.00]la la\n[00:02.00]lu lu\n"
    assert "lrc" not in second and second["status"] == "done"  # the song is there all the same
    assert found["notes"] == ["lrc: the timestamps of its lyrics could not be computed"]
    assert client.get(f"/v1/songs/{record_id}/1.lrc").status_code == 404
    client.service.close(0)
    client.service.store.close()
    again = server(folder=tmp_path / "songs")
    assert again.get(f"/v1/songs/{record_id}").json()["songs"][0]["lrc"] == first["lrc"]


def test_without_lrc_nothing_is_timed(server, finished):
    client = server()
    found = finished(client, client.post("/v1/songs", json=SONG | dict(model="sung", lyrics=LYRICS)).json()["id"])
    assert "lrc" not in found["songs"][0] and found["lrc"] is False


@pytest.mark.parametrize(
    "given, field, message",
    [
        (dict(lyrics=LYRICS), "lrc", "the alignment heads of small, which follow the lyrics, are unknown"),
        (dict(lyrics="[Verse]", model="sung"), "lyrics", "this song has no lyrics"),
        (dict(lyrics=LYRICS, model="sung", lrc="yes"), "lrc", "expected true or false, found 'yes'"),
    ],
)
def test_what_cannot_be_timed_is_refused(server, given, field, message):
    client = server()
    answer = client.post("/v1/songs", json=SONG | dict(lrc=True) | given)
    assert answer.status_code == 400 and answer.json()["field"] == field and message in answer.json()["detail"]
    models = {one["name"]: one["lrc"] for one in client.get("/v1/server").json()["models"]}
    assert models == dict(small=False, sung=True)


def sung_songs(engine, *seeds):
    found = [Work(Request("piano", LYRICS, audio_duration=10.0, seed=s), Sampling(), "sung", lrc=True) for s in seeds]
    for work in found:
        engine.check(work)
    return found


@pytest.mark.unit
@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 5 GB"), MemoryError(), KeyError(1)])
def test_songs_are_there_though_their_times_cannot_be_found(error, monkeypatch, caplog):
    """Whatever the reason: no song is made twice, and the size of batches stays."""
    pipe, told = FakePipeline(), RecordingListener()
    engine = LocalEngine([sung(pipe)])
    whole, measured = pipe.timestamps, []

    def timestamps(song, request, sampling):
        time.sleep(0.2)
        if request.seed == 1:
            raise error
        return whole(song, request, sampling)

    monkeypatch.setattr(pipe, "timestamps", timestamps)
    monkeypatch.setattr(engine.timings, "ran", lambda program, seconds, *_: measured.append(seconds))
    songs = sung_songs(engine, 0, 1)
    engine.submit(songs)
    engine.start(told)
    wait_until(lambda: told.reports)
    engine.stop(0)
    assert [seeds for seeds, *_ in pipe.batches] == [[0, 1]] and not engine.timings.limits and not told.errors
    assert told.songs[songs[0]].timestamps is not None and told.songs[songs[1]].timestamps is None
    assert told.notes == {songs[1]: "lrc: the timestamps of its lyrics could not be computed"}
    assert type(error).__name__ in caplog.text  # the traceback
    assert measured[0] + 0.4 <= told.reports[0].seconds  # what is learnt is without the times


def test_what_is_cancelled_while_it_is_written_has_no_times(server, monkeypatch):
    client, whole = server(), sounds.write_latents

    def write(path, latents):
        whole(path, latents)
        monkeypatch.setattr(sounds, "write_latents", whole)
        assert client.post(f"/v1/songs/{path.parent.name}/cancel").json()["status"] == "cancelled"

    monkeypatch.setattr(sounds, "write_latents", write)
    first = client.post("/v1/songs", json=SONG | dict(model="sung", lyrics=LYRICS, lrc=True)).json()["id"]
    again = client.post("/v1/songs", json=SONG | dict(model="sung", lyrics=LYRICS, lrc=True)).json()["id"]
    wait_until(lambda: client.service.records[again].final)
    told = client.get(f"/v1/songs/{first}").json()
    assert told["status"] == "cancelled" and "lrc" not in told["songs"][0]


@pytest.mark.unit
def test_songs_that_nobody_wants_any_more_are_not_timed(monkeypatch):
    pipe, told, timed = FakePipeline(), RecordingListener(), []
    engine = LocalEngine([sung(pipe)])
    songs = sung_songs(engine, 0, 1, 2, 3)

    def timestamps(song, request, sampling):
        timed.append(request.seed)
        engine.cancel(songs[1:2] if request.seed == 0 else songs)

    monkeypatch.setattr(pipe, "timestamps", timestamps)
    engine.submit(songs)
    engine.start(told)
    wait_until(lambda: len(told.cancelled) == 4)
    engine.stop(0)
    assert timed == [0, 2] and not told.songs and [seeds for seeds, *_ in pipe.batches] == [[0, 1, 2, 3]]
