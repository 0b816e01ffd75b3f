"""The REST API of ACE-Step's application: the shapes that its documentation and its clients use, over real HTTP."""

import dataclasses
import io
import json

import pytest
import soundfile

from acestep_jax.errors import InputError
from acestep_jax.serve.local import LocalEngine
from tests.serve.fake import FakePipeline, model, wait_until
from tests.serve.test_http_native import wav


def poll(client, task_id):
    """Wait for a task as clients do; return its status and parsed result."""

    def answer():
        return client.post("/query_result", json=dict(task_id_list=[task_id])).json()["data"][0]

    wait_until(lambda: answer()["status"] != 0)
    return answer()["status"], json.loads(answer()["result"])


def submit(client, **body):
    response = client.post("/release_task", json=dict(prompt="lofi", audio_duration=10) | body)
    assert response.status_code == 200, response.text
    return response


def test_submit_poll_fetch_as_documented(http):
    client = http()
    answer = submit(client, lyrics="[inst]", bpm="90", key_scale="Am", time_signature="4/4").json()
    assert answer.keys() == {"data", "code", "error", "timestamp", "extra"} and answer["code"] == 200
    task = answer["data"]
    assert task["status"] == "queued" and task["queue_position"] >= 1
    status, result = poll(client, task["task_id"])
    assert status == 1 and len(result) == 2  # the batch size that is not given is two
    needed = (
        "file wave status create_time env prompt lyrics metas generation_info seed_value lm_model dit_model progress"
    )
    assert set(needed.split()) <= result[0].keys() and result[0]["stage"] == "succeeded"
    seeds = result[0]["seed_value"].split(",")
    assert int(seeds[1]) == int(seeds[0]) + 1 and result[1]["seed_value"] == result[0]["seed_value"]
    assert result[0]["metas"]["bpm"] == "90" and result[0]["metas"]["genres"] == "N/A"
    assert result[0]["lyrics"] == "[Instrumental]" and result[0]["file"].startswith("/v1/audio?path=%2F")
    sound = client.get(result[1]["file"])
    assert sound.headers["content-type"] == "audio/mpeg" and soundfile.info(io.BytesIO(sound.content)).format == "MP3"
    stats = client.get("/v1/stats").json()["data"]
    assert stats["jobs"]["succeeded"] == 1 and stats["queue_maxsize"] == 200


# Bodies that clients send, and the fields that they mean.
BODIES = [
    ("json", dict(caption="lofi", duration=10), dict(prompt="lofi", audio_duration=10)),
    (
        "json",
        dict(prompt="a", targetDuration="12.5", inferenceSteps="7"),
        dict(audio_duration=12.5, num_inference_steps=7),
    ),
    ("json", dict(prompt="a", audio_duration=10, bpm="fast", shift="x"), dict(bpm=None, shift=None)),
    ("json", dict(prompt="a", metas=dict(bpm=99, keyscale="C major", duration=11)), dict(bpm=99, audio_duration=11)),
    (
        "json",
        dict(prompt="a", param_obj='{"duration": 13, "language": "zh"}'),
        dict(audio_duration=13, vocal_language="zh"),
    ),
    ("json", dict(prompt="a", duration=None, user_metadata=dict(duration=14)), dict(audio_duration=14)),
    ("json", dict(prompt="a", audio_duration=-1), dict(audio_duration=60)),
    ("json", dict(prompt="a"), dict(audio_duration=60, lyrics="[Instrumental]", vocal_language="en")),
    ("json", dict(prompt="a", audio_duration=10, infer_method="sde"), dict(solver="sde")),
    (
        "json",
        dict(prompt="a", audio_duration=10, sampler_mode="heun", use_adg="yes"),
        dict(solver="heun", guidance="adg"),
    ),
    ("json", dict(prompt="a", audio_duration=10, timesteps="0.97, 0.5,0"), dict(timesteps=[0.97, 0.5])),
    (
        "json",
        dict(prompt="a", audio_duration=10, repainting_start=0, audio_cover_strength=0.3),
        dict(task_type="text2music"),
    ),
    ("form", dict(prompt="lofi", audio_duration="10", batch_size="1"), dict(audio_duration=10, prompt="lofi")),
    ("text", dict(prompt="lofi", audio_duration=10), dict(audio_duration=10)),
]


@pytest.mark.parametrize(("kind", "body", "meant"), BODIES)
def test_every_spelling_of_a_request(http, kind, body, meant):
    client = http(started=False)
    if kind == "form":
        response = client.post("/release_task", data=body)
    elif kind == "text":  # no, or a wrong, Content-Type
        response = client.post("/release_task", content=json.dumps(body), headers={"content-type": "text/plain"})
    else:
        response = client.post("/release_task", json=body)
    assert response.status_code == 200, response.text
    song = client.service.records[response.json()["data"]["task_id"]].songs[0]
    values = song.request | song.sampling
    assert {name: values.get(name) for name in meant} == meant


def test_seeds(http):
    client = http(started=False)

    def seeds(**body):
        task_id = submit(client, **body).json()["data"]["task_id"]
        return [song.seed for song in client.service.records[task_id].songs]

    assert seeds(seed=42, use_random_seed=False) == [42, 43]
    assert seeds(seed="42,123", use_random_seed="false", batch_size=2) == [42, 123]
    assert seeds(seed=42) != [42, 43] and seeds(seed=-1, use_random_seed=False) != seeds(seed=-1, use_random_seed=False)
    assert len(seeds(batch_size=50)) == 8 and len(seeds(batch_size=1)) == 1
    response = client.post("/release_task", json=dict(prompt="a", seed=2**32, use_random_seed=False))
    assert response.status_code == 400 and response.json()["field"] == "seed"


def test_repaint_with_an_upload_and_with_what_the_server_made(http):
    client = http()
    asked = dict(prompt="drums", task_type="repaint", repainting_start="0.5", repainting_end="0", batch_size="1")
    sent = client.post("/release_task", data=asked, files=dict(ctx_audio=("a.wav", wav())))
    status, result = poll(client, sent.json()["data"]["task_id"])
    assert status == 1
    song = client.service.records[sent.json()["data"]["task_id"]].songs[0].request
    assert (song["repainting_start"], song["repainting_end"]) == (0.5, -1.0)
    for path in (result[0]["file"], str(client.base_url).rstrip("/") + result[0]["file"]):
        again = dict(prompt="choir", task_type="cover", src_audio_path=path, batch_size=1)
        sent = client.post("/release_task", json=again)
        assert sent.status_code == 200, sent.text
        status, _ = poll(client, sent.json()["data"]["task_id"])
        assert status == 1
    sent = client.post("/release_task", data=dict(prompt="a", audio_duration="10"), files=dict(src_audio=("a", wav())))
    assert poll(client, sent.json()["data"]["task_id"])[0] == 1  # text2music with a source that it does not take


def test_what_needs_the_language_model(http):
    client = http(pipe=FakePipeline())
    response = submit(client, thinking=True, use_cot_caption=True, lm_temperature=0.5)
    assert response.headers["x-acestep-ignored"] == "thinking"
    _, result = poll(client, response.json()["data"]["task_id"])
    assert "thinking: there is no language model here" in result[0]["generation_info"]
    response = submit(client, prompt="", sample_query="a sad song")
    assert response.headers["x-acestep-ignored"] == "sample_query"
    assert poll(client, response.json()["data"]["task_id"])[1][0]["prompt"] == "a sad song"
    for name in ("use_format", "format", "full_analysis_only"):
        refused = client.post("/release_task", json={"prompt": "a", name: True})
        assert refused.status_code == 501 and refused.json()["code"] == 501 and refused.json()["data"] is None
    assert client.post("/format_input", json=dict(prompt="a")).json()["code"] == 501
    assert "caption" in client.post("/create_random_sample", json={}).json()["data"]


def test_strict(http):
    client = http(strict=True, started=False)
    response = client.post("/release_task", json=dict(prompt="a", thinking=True))
    assert response.status_code == 400 and response.json()["field"] == "thinking"


def test_ids_that_are_not_there(http):
    client = http(pipe=FakePipeline(delay=0.05), max_batch=1)
    running, waiting = (submit(client).json()["data"]["task_id"] for _ in range(2))
    found = client.post("/query_result", data=dict(task_id_list=json.dumps([waiting, "never", running]))).json()["data"]
    assert [one["task_id"] for one in found] == [waiting, "never", running]
    assert [one["status"] for one in found] == [0, 0, 0] and found[1]["result"] == "[]"
    assert json.loads(found[0]["result"])[0]["stage"] == "queued"
    assert client.post("/cancel_task", json=dict(task_id=waiting)).json()["data"]["status"] == "cancelled"
    status, result = poll(client, waiting)
    assert status == 2 and result[0]["stage"] == "cancelled"
    client.delete(f"/v1/songs/{waiting}")
    status, result = poll(client, waiting)
    assert status == 2 and result[0]["error"] == "expired"
    client.post("/cancel_task", json=dict(task_id=running))


def test_a_song_that_fails_has_one_line(http):
    pipe = FakePipeline()
    pipe.failing = lambda seeds: 1 / 0
    client = http(pipe=pipe)
    status, result = poll(client, submit(client).json()["data"]["task_id"])
    assert status == 2 and result[0]["error"].startswith("internal error") and "Traceback" not in result[0]["error"]


def test_models_and_adapters(http):
    client = http(adapters={"jazz": "/nowhere"})
    inventory = client.get("/v1/model_inventory").json()["data"]
    assert inventory["default_model"] == "small" and not inventory["llm_initialized"]
    assert [model["is_default"] for model in inventory["models"]] == [True, False]
    assert client.post("/v1/init", json=dict(model="gone")).json()["code"] == 400
    assert client.post("/v1/init", json=dict(model="other")).json()["data"]["loaded_model"] == "other"
    assert client.post("/v1/lora/load", json=dict(lora_path="/etc/passwd")).status_code == 400
    client.post("/v1/lora/load", json=dict(lora_path="jazz"))
    client.post("/v1/lora/scale", json=dict(scale=0.5))
    assert client.post("/v1/lora/scale", json=dict(scale=3)).json()["code"] == 400
    status = client.get("/v1/lora/status").json()["data"]
    assert status["lora_loaded"] and status["lora_scale"] == 0.5 and status["adapters"] == ["jazz"]
    poll(client, submit(client, model="nothing").json()["data"]["task_id"])
    client.post("/v1/lora/toggle", json=dict(use_lora=False))
    poll(client, submit(client).json()["data"]["task_id"])
    used = [(record.model, record.adapters) for record in client.service.records.values()]
    assert used == [("other", {"jazz": 0.5}), ("other", {})]
    assert [adapters for *_, adapters in client.service.pipe.batches] == [{"jazz": 0.5}, {}]
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["acestep/small", "acestep/other"]


@pytest.mark.parametrize(
    "path",
    [
        *("/release_task", "/query_result", "/cancel_task", "/format_input", "/v1/init", "/v1/lora/load"),
        *("/v1/audio/music/generations", "/lm", "/synth", "/vae", "/v1/transcribe"),
    ],
)
def test_an_unknown_upload_is_noted_or_with_strict_an_error(http, path, tmp_path):
    body = dict(prompt="a", audio_duration="10", request='{"caption": "a", "duration": 10}')
    client = http(started=False)
    strict = http(strict=True, started=False, folder=tmp_path / "strict")
    files = dict(source_audio=("a.wav", wav()))
    response = strict.post(path, data=body, files=files)
    assert response.status_code == 400 and "source_audio: unknown file" in response.text
    assert not list(strict.service.store.incoming.iterdir())
    if path in ("/release_task", "/synth"):
        assert client.post(path, data=body, files=files).status_code == 200
        (record,) = client.service.records.values()
        assert record.notes == ["source_audio: unknown file; ignored"]


def test_the_caption_of_the_whole_song(http, tmp_path):
    """For models fine-tuned on stems; elsewhere it is noted, because it would be an error of the library."""
    stems = model(FakePipeline())
    config = dataclasses.replace(stems.configs["transformer"], is_lego_sft=True)
    stems.configs = {**stems.configs, "transformer": config}
    found = {}
    for name, options in dict(stems=dict(engine=LocalEngine([stems])), plain={}).items():
        client = http(started=False, folder=tmp_path / name, **options)
        response = submit(client, global_caption="a slow waltz")
        (record,) = client.service.records.values()
        noted = response.headers.get("x-acestep-ignored")
        found[name] = record.songs[0].request.get("global_caption"), noted
    assert found == dict(stems=("a slow waltz", None), plain=(None, "global_caption"))


def test_errors_name_what_the_client_sent(http):
    pipe = FakePipeline()

    def failing(seeds):
        raise InputError("src_audio: too quiet")

    pipe.failing = failing
    client = http(pipe=pipe)
    sent = client.post("/release_task", data=dict(task_type="cover"), files=dict(ctx_audio=("a.wav", wav())))
    status, result = poll(client, sent.json()["data"]["task_id"])
    assert status == 2 and result[0]["error"] == "ctx_audio: too quiet"
    path = "/v1/songs/01234567-0123-0123-0123-0123456789ab/0.flac"  # there is no such song
    for name in ("src_audio_path", "source_audio_path", "ctx_audio_path"):
        response = client.post("/release_task", json={"task_type": "cover", name: path})
        assert response.status_code == 400 and response.json()["field"] == name, response.text


def test_the_place_of_an_analysis_in_the_queue(http):
    client = http(started=False, planner="acestep-5Hz-lm-tiny")
    for _ in range(2):
        submit(client, batch_size=2)
    assert submit(client, analysis_only=True).json()["data"]["queue_position"] == 5
