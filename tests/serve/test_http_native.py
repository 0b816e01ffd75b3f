"""The server's own protocol, over real HTTP."""

import asyncio
import io
import json
import threading

import numpy as np
import pytest
import soundfile

from acestep_jax.arguments import arguments
from acestep_jax.request import Request, Sampling
from acestep_jax.serve.submission import Limits
from tests.serve.fake import FakePipeline, sound, wait_until
from tests.serve.test_service import submit

SONG = dict(prompt="lofi piano", audio_duration=10.0)


def wav(seconds=2.0, rate=48_000, kind="WAV"):
    data = io.BytesIO()
    soundfile.write(data, 0.1 * np.sin(np.arange(int(seconds * rate)) / 20), rate, format=kind)
    return data.getvalue()


def events(response):
    """Return (id, name, data) of each event."""
    found = []
    for block in response.read().decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines["id"], lines["event"], json.loads(lines["data"])))
    return found


def test_from_a_request_to_its_sound(http, finished):
    client = http()
    response = client.post("/v1/songs", json=SONG | dict(seed=5, variations=2, format="wav"))
    assert response.status_code == 202
    record = response.json()
    assert response.headers["location"] == f"/v1/songs/{record['id']}" and record["status"] in ("queued", "running")
    done = finished(client, record["id"])
    assert done["status"] == "done" and [song["seed"] for song in done["songs"]] == [5, 6]
    assert done["progress"] == 1 and done["request"] == SONG | dict(seed=5)
    url = done["songs"][1]["audio"]
    assert url == f"/v1/songs/{record['id']}/1.wav"
    sent = client.get(url)
    assert sent.headers["content-type"] == "audio/wav" and sent.headers["accept-ranges"] == "bytes"
    audio, rate = soundfile.read(io.BytesIO(sent.content), dtype="float32")
    assert rate == 48_000 and np.abs(audio.T - sound(6, 480_000)).max() < 1e-4
    part = client.get(url, headers={"range": "bytes=100-199"})
    assert part.status_code == 206 and part.content == sent.content[100:200]
    assert client.get(url, headers={"range": "bytes=99999999-"}).status_code == 416
    latents = client.get(done["songs"][1]["latents"])
    assert np.frombuffer(latents.content, "<f4").shape == (250 * 4,)
    assert client.get(f"/v1/songs/{record['id']}/1.json").json()["seed"] == 6


@pytest.mark.parametrize("form", ["flac", "wav", "mp3", "ogg", "opus", "wav24", "wav32"])
def test_every_format_can_be_read(http, finished, form):
    client = http()
    record = client.post("/v1/songs", json=SONG | dict(seed=1)).json()
    finished(client, record["id"])
    sent = client.get(f"/v1/songs/{record['id']}/0.{form}")
    assert sent.status_code == 200 and sent.headers["content-type"].startswith("audio/")
    audio, rate = soundfile.read(io.BytesIO(sent.content))
    assert rate == 48_000 and abs(len(audio) - 480_000) < 5000 and np.abs(audio[:48_000]).max() > 0.2


@pytest.mark.parametrize("name", ["", None])
def test_no_name_of_a_model_means_the_default(http, name):
    from acestep_jax.serve.plans import work_of

    client = http(started=False, planner="acestep-5Hz-lm-tiny")
    record = client.post("/v1/songs", json=SONG | dict(model=name))
    assert record.status_code == 202 and record.json()["model"] == "small", record.text
    assert client.post("/v1/tokens", json=dict(prompt="a", model=name)).status_code == 200
    assert client.post("/synth", json=dict(caption="a", synth_model=name)).status_code == 200
    work, _ = work_of(client.service, dict(wish="a", model=name))
    assert work.model == "small"


@pytest.mark.parametrize("name", [0, False, [], {}])
def test_only_text_is_the_name_of_a_model(http, name):
    client = http(started=False)
    for path in ("/v1/songs", "/v1/tokens"):
        answer = client.post(path, json=SONG | dict(model=name))
        assert answer.status_code == 400 and "model: expected one of small, other" in answer.text, (path, answer.text)


def test_events_tell_each_step_and_end(http):
    client = http(pipe=FakePipeline(delay=0.005))
    record = client.post("/v1/songs", json=SONG | dict(num_inference_steps=20)).json()
    with client.stream("GET", f"/v1/songs/{record['id']}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        found = events(response)
    names = [name for _, name, _ in found]
    assert names[-1] == "done" and "running" in names and set(names) <= {"queued", "running", "done"}
    steps = [data["step"] for _, name, data in found if name == "running"]
    assert steps == sorted(steps) and max(steps) > 10
    ids = [event_id for event_id, _, _ in found]
    versions = [int(event_id.partition("-")[2]) for event_id in ids]
    assert versions == sorted(set(versions))
    last = {"last-event-id": ids[-1]}
    with client.stream("GET", f"/v1/songs/{record['id']}/events", headers=last) as response:
        assert events(response) == []
    with client.stream("GET", f"/v1/songs/{record['id']}/events", headers={"last-event-id": "1"}) as response:
        assert [name for _, name, _ in events(response)] == ["done"]
    # What an earlier process called its events says nothing of this one's.
    last = {"last-event-id": f"0-{versions[-1]}"}
    with client.stream("GET", f"/v1/songs/{record['id']}/events", headers=last) as response:
        assert [name for _, name, _ in events(response)] == ["done"]


def test_an_end_that_comes_while_an_event_is_written_is_told(service, monkeypatch):
    """A record that ends after it was looked at, and before the event is sent, is told again."""
    pytest.importorskip("fastapi")
    from acestep_jax.serve import native
    from acestep_jax.serve.security import Keys

    made = service(started=False)
    record = submit(made)
    whole = native.view

    def view(*given):
        values = whole(*given)
        if not record.final:
            with made.kept.ending:
                made.kept.end(record, "done")
        return values

    monkeypatch.setattr(native, "view", view)

    async def told():
        return [event async for event in native._events(made, Keys(None, b""), record, "")]

    first, last = asyncio.run(told())
    assert "\nevent: queued\n" in first and "\nevent: done\n" in last
    assert json.loads(last.partition("data: ")[2])["status"] == "done"


def test_cancel_and_delete(http, finished):
    client = http(pipe=FakePipeline(delay=0.02), max_batch=1)
    first, second = (client.post("/v1/songs", json=SONG | dict(num_inference_steps=150)).json()["id"] for _ in "ab")
    assert client.get(f"/v1/songs/{second}").json()["position"] == 1
    assert client.delete(f"/v1/songs/{second}").json() == dict(id=second, status="cancelled")
    assert client.post(f"/v1/songs/{first}/cancel").json()["status"] == "cancelled"
    assert finished(client, first)["songs"][0]["status"] == "cancelled"
    assert client.get(f"/v1/songs/{first}/0.flac").status_code == 404
    assert client.delete(f"/v1/songs/{first}").json() == dict(id=first, status="removed")
    for response in (client.get(f"/v1/songs/{first}"), client.delete(f"/v1/songs/{first}")):
        assert response.status_code == 404
    third = client.post("/v1/songs", json=SONG | dict(num_inference_steps=1)).json()["id"]
    assert finished(client, third)["status"] == "done"


def test_history(http, finished):
    client = http()
    ids = [client.post("/v1/songs", json=SONG | dict(seed=i)).json()["id"] for i in range(5)]
    first = client.get("/v1/songs?limit=2").json()
    assert [record["id"] for record in first["songs"]] == ids[:2:-1] and first["before"] == ids[3]
    second = client.get("/v1/songs", params=dict(limit=10, before=first["before"])).json()
    assert [record["id"] for record in second["songs"]] == ids[2::-1] and second["before"] is None
    assert client.get("/v1/songs?before=nothing").status_code == 400


def test_a_source_is_uploaded_or_named_by_its_link(http, finished):
    client = http()
    request = json.dumps(dict(prompt="strings", task_type="repaint", repainting_start=0.5, repainting_end=1.5))
    sent = client.post("/v1/songs", data=dict(request=request), files=dict(src_audio=("../../x.wav", wav())))
    assert sent.status_code == 202, sent.text
    done = finished(client, sent.json()["id"])
    assert done["status"] == "done" and done["uploads"] == ["src_audio"]
    folder = client.service.store.songs / done["id"]
    assert (folder / "src_audio").read_bytes() == wav()
    link = done["songs"][0]["audio"]
    again = client.post("/v1/songs", json=dict(prompt="choir", task_type="cover", src_audio=link))
    assert again.status_code == 202, again.text
    client.delete(f"/v1/songs/{done['id']}")  # the copy stays
    assert finished(client, again.json()["id"])["status"] == "done"
    assert not list(client.service.store.incoming.iterdir())


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        (dict(prompt="x", duration=10), "duration", "use audio_duration=SECONDS"),
        (dict(prompt="x", sed=1), "sed", "unknown field; did you mean seed?"),
        (dict(prompt="x", bpm="fast"), "bpm", "expected 30 to 300 beats per minute, found 'fast'"),
        (dict(prompt="x", audio_duration=1), "audio_duration", "expected 10 to 600 s"),
        (dict(prompt="x", solver="magic"), "solver", "expected one of"),
        (dict(prompt="x", variations=100), "variations", "expected 1 to 9"),
        (dict(prompt="x", variations=True), "variations", "expected 1 to 9"),
        (dict(prompt="x", format="mp5"), "format", "expected one of"),
        (dict(prompt="x", model="gpt"), "model", "expected one of small, other"),
        (dict(prompt="x", adapters=dict(jazz=1)), "adapters", "unknown adapter"),
        (dict(prompt="x", adapters=[1]), "adapters", "expected an object"),
        (dict(prompt="x", src_audio="/etc/passwd", task_type="cover"), "src_audio", "paths are not opened"),
        (dict(prompt="x", task_type="cover"), "src_audio", "the task cover needs a source"),
        (dict(prompt=3), "prompt", "expected text"),
        ({}, "prompt", "missing"),
        ([], None, "expected a JSON object"),
        ("text", None, "expected a JSON object"),
    ],
)
def test_what_is_refused_is_named(http, body, field, message):
    client = http(started=False)
    response = client.post("/v1/songs", json=body)
    assert response.status_code == 400, response.text
    assert response.json().get("field") == field and message in response.json()["detail"]
    assert client.service.records == {} and not list(client.service.store.incoming.iterdir())


def test_an_unknown_model_is_named_before_what_it_would_do(http):
    """With --strict, planning fields of a model without a planner are an error."""
    client = http(strict=True, started=False)
    response = client.post("/v1/songs", json=dict(prompt="x", model="gpt", lm_temperature=0.5))
    assert response.status_code == 400
    assert response.json()["detail"] == "model: expected one of small, other, found 'gpt'"


def test_sound_that_cannot_be_read(http):
    client = http(started=False, limits=Limits(duration=30))
    request = json.dumps(dict(prompt="x", task_type="cover"))
    for data, message in (
        (b"no sound at all", "src_audio: not a sound file that can be read"),
        (b"", "src_audio: not a sound file that can be read"),
        (wav(0.5), "src_audio: expected 1 to 600 s of music, found 0.5"),
        (wav(40), "src_audio: 40 s, expected at most 30 s"),
        (wav(31, kind="OGG"), "src_audio: 31 s, expected at most 30 s"),
    ):
        response = client.post("/v1/songs", data=dict(request=request), files=dict(src_audio=("a.wav", data)))
        assert response.status_code == 400 and message in response.json()["detail"], response.text
        assert str(client.service.store.folder) not in response.text
    assert not list(client.service.store.incoming.iterdir())


def test_a_full_queue_and_its_recovery(http, finished):
    client = http(pipe=FakePipeline(delay=0.005), limits=Limits(queue=3), max_batch=1)
    responses = [client.post("/v1/songs", json=SONG | dict(num_inference_steps=10)) for _ in range(12)]
    refused = [response for response in responses if response.status_code == 429]
    assert refused and all(int(response.headers["retry-after"]) >= 1 for response in refused)
    accepted = [response.json()["id"] for response in responses if response.status_code == 202]
    assert {finished(client, record_id)["status"] for record_id in accepted} == {"done"}
    assert client.post("/v1/songs", json=SONG).status_code == 202


def test_health_readiness_and_figures(http, finished):
    client = http(started=False)
    assert client.get("/health").json()["status"] == "ok" and client.get("/ready").status_code == 503
    client.service.start()
    wait_until(lambda: client.get("/ready").status_code == 200)
    finished(client, client.post("/v1/songs", json=SONG | dict(variations=3)).json()["id"])
    text = client.get("/metrics").text
    for line in ('acestep_records{status="done"} 1.0', "acestep_songs_made_total 3.0", "acestep_songs_waiting 0.0"):
        assert line in text, text
    client.service.closing = True
    assert client.get("/ready").status_code == 503
    response = client.post("/v1/songs", json=SONG)
    assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
    client.service.dead = True
    assert client.get("/ready").status_code == client.get("/health").status_code == 500


def test_streams_end_when_the_server_stops(http):
    client = http(pipe=FakePipeline(delay=0.05))
    record = client.post("/v1/songs", json=SONG | dict(num_inference_steps=200)).json()
    closer = threading.Timer(0.3, client.service.close, [0])
    closer.start()
    with client.stream("GET", f"/v1/songs/{record['id']}/events") as response:
        text = response.read().decode()
    closer.join()
    assert text.endswith(": closing\n\n") and "event: running" in text


def test_the_planner_s_fields_are_accepted_without_one_and_the_answer_says_so(http):
    body = SONG | dict(thinking=True, lm_temperature=0.5, best_of=None)
    record = http(started=False).post("/v1/songs", json=body).json()
    assert record["notes"] == [
        f"{name}: this server has no planner for the model; ignored" for name in ("thinking", "lm_temperature")
    ]
    assert "thinking" not in record["request"]


def test_openapi_has_every_argument(http):
    client = http(started=False)
    described = client.get("/openapi.json").json()
    body = described["paths"]["/v1/songs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    hidden = {"latents", "max_text_length", "max_lyric_length"}
    assert (arguments(Request) | arguments(Sampling)).keys() - hidden <= body["properties"].keys()
    assert body["properties"]["bpm"]["maximum"] == 300 and "euler" in body["properties"]["solver"]["enum"]
    assert client.get("/docs").status_code == 200
    about = client.get("/v1/server").json()
    assert [model["name"] for model in about["models"]] == ["small", "other"] and not about["planner"]


def test_favourites_are_kept_and_not_removed_to_make_room(http, finished, tmp_path):
    client = http(folder=tmp_path / "songs", limits=Limits(keep_records=1))
    first = client.post("/v1/songs", json=SONG | dict(variations=2)).json()["id"]
    finished(client, first)
    path = f"/v1/songs/{first}"
    assert client.put(f"{path}/1/favourite").status_code == 204
    assert [song["favourite"] for song in client.get(path).json()["songs"]] == [False, True]
    for _ in range(3):
        last = client.post("/v1/songs", json=SONG).json()["id"]
        finished(client, last)
    wait_until(lambda: list(client.service.records) == [first, last])
    client.service.close(0)
    client.service.store.close()
    again = http(folder=tmp_path / "songs")
    assert [song["favourite"] for song in again.get(path).json()["songs"]] == [False, True]
    assert again.delete(f"{path}/1/favourite").status_code == 204
    assert not again.get(path).json()["songs"][1]["favourite"]
    for method, index in (("PUT", 2), ("DELETE", -1), ("PUT", 9999)):
        assert again.request(method, f"{path}/{index}/favourite").status_code == 404
    assert again.put(f"{path}/x/favourite").status_code == 422


@pytest.mark.parametrize("seconds", [1.5, 8.0])  # not UTF-8; larger than a text
def test_a_misspelt_upload_is_an_error(http, seconds):
    """Otherwise the song would be made without its source."""
    client = http(started=False)
    request = dict(request=json.dumps(SONG))
    response = client.post("/v1/songs", data=request, files=dict(source_audio=("a.wav", wav(seconds, 96_000))))
    assert response.status_code == 400 and response.json()["field"] == "source_audio"
    assert response.json()["detail"] == "source_audio: unknown file; did you mean src_audio?"
    assert client.service.records == {} and not list(client.service.store.incoming.iterdir())
    text = client.post("/v1/songs", files=dict(request=("request.json", json.dumps(SONG))))
    assert text.status_code == 202, text.text
