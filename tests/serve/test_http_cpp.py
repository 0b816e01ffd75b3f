"""acestep.cpp's protocol, as its own page and scripts use it, over real HTTP."""

import email
import io
import json

import numpy as np
import pytest
import soundfile

from tests.serve.fake import FakePipeline, wait_until
from tests.serve.test_http_native import wav

SONG = dict(caption="lofi piano", duration=10, lyrics="[Instrumental]")


def result(client, job_id):
    """Wait for a job; return (Content-Type, body) of each part of its result."""
    wait_until(lambda: client.get("/job", params=dict(id=job_id)).json()["status"] != "running")
    response = client.get("/job", params=dict(id=job_id, result=1))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "multipart/mixed; boundary=ace-batch-boundary"
    head = f"Content-Type: {response.headers['content-type']}\r\n\r\n".encode()
    parts = email.message_from_bytes(head + response.content).get_payload()
    return [(part.get_content_type(), part.get_payload(decode=True)) for part in parts]


def test_lm_then_synth_then_result(http):
    client = http()
    job_id = client.post("/lm", json=dict(caption="lofi", duration=10, seed=3, synth_batch_size=2)).json()["id"]
    assert client.get(f"/job?id={job_id}").json() == dict(status="done")
    (request,) = client.get(f"/job?id={job_id}&result=1").json()
    assert request["audio_codes"] == "" and request["lyrics"] == "[Instrumental]" and request["repainting_end"] == -1
    job_id = client.post("/synth", json=request).json()["id"]
    assert len(job_id) == 16 and int(job_id, 16) >= 0
    parts = result(client, job_id)
    assert [kind for kind, _ in parts] == ["audio/mpeg", "application/octet-stream"] * 2
    assert np.unique(np.frombuffer(parts[3][1], "<f4")).tolist() == [4.0]  # of seed 3 + 1
    assert soundfile.info(io.BytesIO(parts[0][1])).duration == pytest.approx(10, abs=0.1)


def test_an_array_and_a_form(http):
    client = http()
    job_id = client.post("/synth", json=[SONG | dict(seed=1), SONG | dict(seed=9, duration=12)]).json()["id"]
    latents = [np.frombuffer(data, "<f4").reshape(-1, 4) for _, data in result(client, job_id)[1::2]]
    assert [len(one) for one in latents] == [250, 300] and latents[1][0, 0] == 9
    asked = dict(SONG, task_type="repaint", repainting_start=0.5, repainting_end=1, output_format="wav24")
    sent = client.post("/synth", data=dict(request=json.dumps(asked)), files=dict(audio=("a.wav", wav())))
    assert sent.status_code == 200, sent.text
    (kind, data), _ = result(client, sent.json()["id"])
    assert kind == "audio/wav" and soundfile.info(io.BytesIO(data)).subtype == "PCM_24"


@pytest.mark.parametrize(
    "asked, expected",
    [
        ({}, dict(dcw_enabled=False)),
        (dict(dcw_scaler=0.1), dict(dcw_enabled=True, dcw_mode="low", dcw_scaler=0.1)),
        (dict(dcw_high_scaler=0.1), dict(dcw_enabled=False)),
        (
            dict(dcw_high_scaler=0.1, dcw_mode="double"),
            dict(dcw_enabled=True, dcw_mode="double", dcw_scaler=0.0, dcw_high_scaler=0.1),
        ),
        (dict(dcw_scaler=0.1, solver="sde"), dict(dcw_enabled=False)),
    ],
)
def test_correction_of_steps(http, asked, expected):
    client = http(started=False)
    assert client.post("/synth", json=SONG | asked).status_code == 200
    (record,) = client.service.records.values()
    found = record.songs[0].sampling
    assert {name: value for name, value in found.items() if name.startswith("dcw")} == expected
    assert client.post("/synth", json=SONG | dict(dcw_scaler=0.1, dcw_mode="odd")).status_code == 400


def test_cancel(http):
    client = http(pipe=FakePipeline(delay=0.05))
    job_id = client.post("/synth", json=SONG).json()["id"]
    assert client.get(f"/job?id={job_id}").json() == dict(status="running")
    not_ready = client.get(f"/job?id={job_id}&result=1")
    assert not_ready.status_code == 404 and not_ready.json() == dict(error="Result not ready")
    assert client.post(f"/job?id={job_id}&cancel=1").json() == dict(status="cancelled")
    assert client.get(f"/job?id={job_id}").json() == dict(status="cancelled")


def test_errors_have_its_shape(http):
    client = http(started=False)
    missing = client.get("/job?id=0123456789abcdef")
    assert missing.status_code == 404 and missing.json() == dict(error="Job not found")
    for body, message in (
        (dict(SONG, solver="stork4"), "solver: expected one of"),
        (dict(SONG, task_type="lego", track="KAZOO"), "track_name: unknown track 'kazoo'"),
        (dict(SONG, audio_codes="1,x"), "audio_codes: expected numbers"),
        (dict(SONG, adapter="jazz"), "adapters: unknown adapter"),
        ([SONG, dict(SONG, output_format="wav24")], "output_format: expected one for all songs of an array"),
        ([dict(SONG, adapter="jazz"), SONG], "adapter: expected one for all songs of an array"),
        ([], "request: expected an object"),
        ("x", "request: expected an object"),
    ):
        response = client.post("/synth", json=body)
        assert response.status_code == 400 and message in response.json()["error"], response.text
    for query in ("", "id=x", "id=0123456789abcdef&result=x", "id=0123456789abcdef&cancel=2"):
        response = client.request("POST" if "cancel" in query else "GET", f"/job?{query}")
        assert response.status_code in (400, 404) and list(response.json()) == ["error"], response.text
    assert client.post("/understand", json={}).status_code == 501
    props = client.get("/props").json()
    assert props["models"]["dit"] == ["small", "other"] and props["models"]["lm"] == []
    assert props["default"]["caption"] == "" and props["presets"]["turbo"]["inference_steps"] == 8
    assert client.get("/health").json()["status"] == "ok"
