"""Latents over real HTTP: `/vae` and `/synth` of acestep.cpp's protocol, and sources of `/v1/songs`."""

import io
import json

import numpy as np
import pytest
import soundfile

from acestep_jax.errors import InputError
from acestep_jax.io.checkpoint import SMALL_MODEL
from acestep_jax.pipeline import AceStepPipeline
from acestep_jax.serve import operations
from acestep_jax.serve.cpp_latents import MAX_FRAMES
from acestep_jax.serve.local import LocalEngine
from acestep_jax.serve.models import Model
from tests.parity import assert_close
from tests.serve.fake import FakePipeline, wait_until
from tests.serve.test_http_cpp import SONG, result
from tests.serve.test_http_native import wav

CHANNELS = 64


def latents(frames=50, value=7.0):
    return np.full((frames, CHANNELS), value, np.float32)


def fetch(client, job_id):
    """Wait for a job; return its answer."""
    wait_until(lambda: client.get(f"/job?id={job_id}").json()["status"] != "running", 60)
    return client.get(f"/job?id={job_id}&result=1")


def test_vae_both_ways(http):
    client = http()
    job = client.post("/vae", files=dict(audio=("a.wav", wav()))).json()["id"]
    assert len(job) == 16
    encoded = fetch(client, job)
    assert encoded.headers["content-type"] == "application/octet-stream"
    assert np.unique(np.frombuffer(encoded.content, "<f4")).tolist() == [0.5] and len(encoded.content) == 50 * 256
    sent = dict(src_latents=("a.vae", latents().tobytes()))
    decoded = fetch(client, client.post("/vae", files=sent).json()["id"])
    assert decoded.headers["content-type"] == "audio/mpeg"
    job = client.post("/vae", files=sent, data=dict(request='{"output_format": "wav32"}')).json()["id"]
    for _ in range(2):
        decoded = fetch(client, job)
        assert decoded.headers["content-type"] == "audio/wav"
        about = soundfile.info(io.BytesIO(decoded.content))
        assert about.subtype == "FLOAT" and about.frames == 50 * 1920 and about.samplerate == 48_000
    assert not list(client.service.store.songs.iterdir())  # they are no songs of the history
    assert not [folder for folder in client.service.store.incoming.iterdir() if (folder / "src_latents").exists()]


def test_files_of_conversions_are_forgotten(http, monkeypatch):
    client = http()
    sent = dict(src_latents=("a.vae", latents().tobytes()))
    jobs = []
    for most in (operations.KEPT_BYTES, 1, 1):
        monkeypatch.setattr(operations, "KEPT_BYTES", most)
        jobs.append(client.post("/vae", files=sent).json()["id"])
        assert fetch(client, jobs[-1]).status_code == 200
    assert [client.get(f"/job?id={job}").status_code for job in jobs] == [404, 404, 200]
    (left,) = [one for one in client.service.operations.all.values() if one.status == "done"]
    assert left.size == sum(path.stat().st_size for path in left.files.iterdir()) and len([*left.files.iterdir()]) == 2
    cancelled = client.post("/vae", files=sent).json()["id"]
    client.post(f"/job?id={cancelled}&cancel=1")
    assert client.get(f"/job?id={cancelled}&result=1").status_code in (200, 404)


@pytest.mark.parametrize("error", [InputError("{}: no room"), MemoryError(), OSError(28, "No space left", "{}")])
def test_what_cannot_be_stored_fails_alone(http, monkeypatch, error):
    """Its message does not tell where the server's files are, and the engine goes on."""
    client = http()
    folder, sent = str(client.service.store.folder), dict(src_latents=("a.vae", latents().tobytes()))
    error.args = tuple(str(one).replace("{}", folder) for one in error.args)
    with monkeypatch.context() as patched:
        patched.setattr(operations.audio, "write", lambda *_: (_ for _ in ()).throw(error))
        answer = fetch(client, client.post("/vae", files=sent).json()["id"])
    assert answer.status_code == 500 and "cannot be stored" in answer.text and folder not in answer.text
    assert fetch(client, client.post("/vae", files=sent).json()["id"]).status_code == 200
    assert not client.service.dead


@pytest.mark.parametrize(
    "files, status, message",
    [
        ({}, 400, "expected exactly one of them as a file of multipart/form-data, found neither"),
        (dict(audio=wav(), src_latents=latents().tobytes()), 400, "found both"),
        (dict(src_latents=b"x" * 300), 400, "src_latents: expected latents in float32, 256 bytes for each frame"),
        (dict(src_latents=bytes((MAX_FRAMES + 1) * 256)), 413, "src_latents: exceeds max frames, 15000"),
        (dict(src_latents=latents(value=np.nan).tobytes()), 400, "src_latents: holds NaN or infinities"),
        (dict(src_latents=latents(24).tobytes()), 400, "src_latents: expected 1 to 600 s of music, found 0.96 s"),
        (dict(audio=wav(0.5)), 400, "audio: expected 1 to 600 s of music, found 0.5 s"),
        (dict(audio=b"no sound"), 400, "audio: not a sound file that can be read"),
    ],
    ids=["none", "both", "half a frame", "too long", "no numbers", "few frames", "short", "no sound"],
)
def test_what_vae_refuses(http, files, status, message):
    client = http(started=False)
    body = dict(files={name: ("x", data) for name, data in files.items()}) if files else dict(json={})
    answer = client.post("/vae", **body)
    assert answer.status_code == status and message in answer.json()["error"]
    assert not list(client.service.store.incoming.iterdir())
    if list(files) == ["src_latents"]:
        synth = client.post("/synth", data=dict(request=json.dumps(dict(SONG, task_type="cover-nofsq"))), **body)
        assert synth.status_code == status and message in synth.json()["error"]


def test_errors_name_what_the_client_sent(http):
    """As its protocol calls it, where it is checked, and where the song's request is."""
    client = http(started=False, planner="acestep-5Hz-lm-tiny")
    short, asked = latents(20).tobytes(), json.dumps(dict(SONG, task_type="cover-nofsq"))
    for path, name, data in (
        ("/synth", "ref_latents", short),
        ("/synth", "ref_audio", wav(0.5)),
        ("/synth", "audio", b"no sound"),
        ("/understand", "audio", wav(0.5)),
        ("/v1/transcribe", "src_audio", wav(0.5)),
        ("/v1/transcribe", "audio", wav(0.5)),
        ("/v1/codes", "audio", wav(0.5)),
        ("/release_task", "ctx_audio", wav(0.5)),
        ("/v1/songs", "reference_audio", wav(0.5)),
    ):
        body = dict(prompt="x", task_type="cover") if path == "/release_task" else dict(request=asked)
        if path == "/v1/songs":
            body = dict(request=json.dumps(dict(prompt="x")))
        answer = client.post(path, data=body, files={name: ("x", data)})
        found = answer.json()
        assert answer.status_code == 400 and (found.get("error") or found["detail"]).startswith(f"{name}: "), found
    both = dict(audio=("a", wav()), ref_latents=("b", bytes((MAX_FRAMES + 1) * 256)))
    answer = client.post("/synth", data=dict(request=asked), files=both)
    assert answer.status_code == 413 and answer.json()["error"].startswith("ref_latents: exceeds")
    plain = client.post("/synth", data=dict(request=json.dumps(SONG)), files=dict(audio=("a", wav())))
    assert plain.status_code == 400 and "audio" in plain.json()["error"] and "src_audio" not in plain.json()["error"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("path", ["/vae", "/understand"])
def test_references_are_only_of_songs(http, strict, path):
    client = http(started=False, strict=strict, planner="acestep-5Hz-lm-tiny")
    files = dict(audio=("a", wav()), ref_latents=("b", latents().tobytes()))
    answer = client.post(path, files=files)
    assert answer.status_code == (400 if strict else 200), answer.text
    if strict:
        assert answer.json()["error"].startswith("ref_latents: expected audio or src_latents alone")
        assert not list(client.service.store.incoming.iterdir())


def test_latents_win_over_sound_and_survive_a_restart(http, tmp_path):
    client = http(pipe=FakePipeline(delay=0.2), folder=tmp_path / "songs")
    asked = dict(SONG, task_type="cover-nofsq", inference_steps=50)
    own = dict(src_latents=("a", latents().tobytes()), ref_latents=("b", latents(60).tobytes()))
    job = client.post("/synth", data=dict(request=json.dumps(asked)), files=own | dict(audio=("a.wav", wav())))
    assert job.status_code == 200, job.text
    (record,) = client.service.records.values()
    assert sorted(record.files) == ["reference_latents", "src_latents"]
    (work,) = client.service.works(record)
    assert work.request.src_latents.endswith("src_latents") and work.request.src_audio is None
    client.service.close(0)
    client.service.store.close()
    again = http(folder=tmp_path / "songs")
    wait_until(lambda: again.service.records[record.id].final)
    assert again.service.records[record.id].status == "done" and again.service.pipe.batches


def test_songs_take_latents(http, finished, tmp_path):
    """As an upload, and of another song of the server; in FLAC they are not sent."""
    client = http()
    asked = dict(prompt="x", task_type="cover", num_inference_steps=2, seed=1)
    sent = client.post(
        "/v1/songs", data=dict(request=json.dumps(asked)), files=dict(src_latents=("a", latents().tobytes()))
    )
    found = finished(client, sent.json()["id"])
    assert found["status"] == "done" and found["uploads"] == ["src_latents"], found
    sent = client.get(f"/v1/songs/{found['id']}/uploads/src_latents")
    assert sent.content == latents().tobytes() and sent.headers["content-type"] == "application/octet-stream"
    (client.service.store.song_path(client.service.records[found["id"]], 0, ".latents")).write_bytes(
        latents(70).tobytes()
    )
    linked = client.post("/v1/songs", json=asked | dict(src_latents=f"/v1/songs/{found['id']}/0.latents"))
    record = client.service.records[linked.json()["id"]]
    assert client.service.store.upload_path(record, "src_latents").stat().st_size == 70 * 256
    both = client.post(
        "/v1/songs",
        data=dict(request=json.dumps(asked)),
        files=dict(src_latents=("a", latents().tobytes()), src_audio=("b", wav())),
    )
    assert both.status_code == 400 and "src_audio, src_latents: expected one of them" in both.json()["detail"]
    long = http(folder=tmp_path / "short", started=False)
    long.service.limits = type(long.service.limits)(duration=1.0)
    sent = dict(data=dict(request=json.dumps(asked)), files=dict(src_latents=("a", latents().tobytes())))
    answer = long.post("/v1/songs", **sent)
    assert answer.status_code == 400 and "src_latents: 2 s, expected at most 1 s" in answer.json()["detail"]


def test_the_small_model(http):
    """What /synth gives is what /vae makes of its latents, /vae encodes as the library does, and a cover of latents is
    the library's."""
    pipe = AceStepPipeline.from_pretrained()
    client = http(engine=LocalEngine([Model("small", SMALL_MODEL, load=lambda: pipe)]))
    asked = dict(SONG, seed=3, inference_steps=2, output_format="wav32")
    job = client.post("/synth", json=asked).json()["id"]
    fetch(client, job)
    (_, sound), (_, made) = result(client, job)
    decoded = fetch(
        client,
        client.post(
            "/vae", files=dict(src_latents=("a.vae", made)), data=dict(request='{"output_format": "wav32"}')
        ).json()["id"],
    )
    expected, _ = soundfile.read(io.BytesIO(sound), dtype="float32")
    found, _ = soundfile.read(io.BytesIO(decoded.content), dtype="float32")
    assert_close(found, expected)
    encoded = fetch(client, client.post("/vae", files=dict(audio=("a.wav", sound))).json()["id"])
    found = np.frombuffer(encoded.content, "<f4").reshape(-1, CHANNELS)
    assert_close(found, pipe.song_to_latents(expected.T))
    cover = dict(asked, task_type="cover-nofsq", caption="strings")
    files = dict(src_latents=("a.vae", made))
    job = client.post("/synth", data=dict(request=json.dumps(cover)), files=files).json()["id"]
    fetch(client, job)
    _, (_, covered) = result(client, job)
    source = np.frombuffer(made, "<f4").reshape(-1, CHANNELS)
    (record,) = [one for one in client.service.records.values() if one.files]
    values = record.songs[0].request | record.songs[0].sampling
    (song,) = pipe(**values, src_latents=source)
    assert_close(np.frombuffer(covered, "<f4").reshape(-1, CHANNELS), song.latents)
