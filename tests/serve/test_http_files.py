"""Files that are removed while they are requested, over real HTTP: 404, with the message of later requests."""

import json
import os

import pytest

from tests.serve.fake import wait_until
from tests.serve.test_http_latents import latents
from tests.serve.test_http_native import SONG, wav


@pytest.fixture(params=["before it is measured", "before it is opened"])
def removed(request, monkeypatch):
    """Remove each file of the server that is sent, after it was looked up."""
    from fastapi.responses import FileResponse

    name = dict(zip(("before it is measured", "before it is opened"), ("__init__", "set_stat_headers"), strict=True))
    method = getattr(FileResponse, name[request.param])

    def removing(self, *args, **options):
        method(self, *args, **options)
        os.unlink(self.path)

    def remove():
        monkeypatch.setattr(FileResponse, name[request.param], removing)

    return remove


@pytest.mark.parametrize("name", ["0.flac", "0.mp3", "0.latents", "uploads/src_audio", "uploads/src_latents"])
def test_a_song(http, finished, removed, name):
    client = http()
    source = dict(src_latents=("a", latents().tobytes())) if "latents" in name else dict(src_audio=("a.wav", wav()))
    asked = dict(request=json.dumps(dict(prompt="x", task_type="cover", num_inference_steps=1)))
    record = client.post("/v1/songs", data=asked, files=source).json()
    assert finished(client, record["id"])["status"] == "done"
    removed()
    answer = client.get(f"/v1/songs/{record['id']}/{name}")
    assert answer.status_code == 404 and answer.json()["detail"] == "there is no song of that id"
    part = client.get(f"/v1/songs/{record['id']}/0.wav", headers={"range": "bytes=10-19"})
    assert part.status_code == 404


def test_a_song_of_the_authors_api(http, removed):
    client = http()
    task = client.post("/release_task", json=dict(prompt="x", audio_duration=10)).json()["data"]["task_id"]
    wait_until(lambda: client.service.records[task].final)
    (result, _) = json.loads(
        client.post("/query_result", json=dict(task_id_list=[task])).json()["data"][0]["result"],
    )
    removed()
    answer = client.get(result["file"])
    assert answer.status_code == 404 and answer.json()["detail"] == "Audio file not found"


@pytest.mark.parametrize("sent", [dict(src_latents=("a", latents().tobytes())), dict(audio=("a.wav", wav()))])
def test_a_conversion(http, removed, sent):
    client = http()
    job = client.post("/vae", files=sent).json()["id"]
    wait_until(lambda: client.get(f"/job?id={job}").json()["status"] == "done")
    removed()
    answer = client.get(f"/job?id={job}&result=1")
    assert answer.status_code == 404 and answer.json()["error"] == "Job not found"


def test_a_source(http, finished, monkeypatch):
    from acestep_jax.serve import records

    client = http()
    record = finished(client, client.post("/v1/songs", json=SONG).json()["id"])
    link = os.link

    def removing(source, target):
        source.unlink()
        link(source, target)

    monkeypatch.setattr(records.os, "link", removing)
    answer = client.post("/v1/songs", json=dict(prompt="x", task_type="cover", src_audio=record["songs"][0]["audio"]))
    assert (
        answer.status_code == 400 and answer.json()["detail"] == f"src_audio: song 0 of {record['id']} is not finished"
    )


def test_a_description(http):
    client = http(planner="acestep-5Hz-lm-tiny")
    job = client.post("/understand", files=dict(audio=("a.wav", wav()))).json()["id"]
    wait_until(lambda: client.get(f"/job?id={job}").json()["status"] == "done")
    (operation,) = client.service.operations.all.values()
    for path in operation.files.iterdir():
        path.unlink()
    answer = client.get(f"/job?id={job}&result=1")
    assert answer.status_code == 404 and answer.json()["error"] == "Job not found"


def test_what_is_read_and_not_sent(http, finished, monkeypatch):
    """The waveform and the kind of an upload; the songs in a chat and of the music endpoint."""
    client = http()
    asked = dict(request=json.dumps(SONG | dict(num_inference_steps=1)))
    record = client.post("/v1/songs", data=asked, files=dict(reference_audio=("a.wav", wav()))).json()
    assert finished(client, record["id"])["status"] == "done"
    sound = client.service.sound

    def removing(*args):
        path = sound(*args)
        path.unlink()
        return path

    monkeypatch.setattr(client.service, "sound", removing)
    client.service.store.upload_path(client.service.records[record["id"]], "reference_audio").unlink()
    for path in ("0/peaks", "uploads/reference_audio"):
        answer = client.get(f"/v1/songs/{record['id']}/{path}")
        assert answer.status_code == 404 and answer.json()["detail"] == "there is no song of that id", path
    music, chat = "/v1/audio/music/generations", "/v1/chat/completions"
    said = dict(messages=[dict(role="user", content="<prompt>lofi</prompt>")], audio_config=dict(duration=10))
    for path, body in (
        (music, dict(prompt="lofi", duration=10, response_format="mp3")),
        (music, dict(prompt="lofi", duration=10, response_format="b64_json")),
        (chat, said),
        (chat, said | dict(modalities=["audio"], audio={})),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 404 and answer.json()["detail"] == "the song has been deleted", (path, body)
