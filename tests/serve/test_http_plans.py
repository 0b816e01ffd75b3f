"""The planner in the server, over real HTTP: before songs, for itself, and in each protocol."""

import asyncio
import json
import pkgutil
import socket
import threading

import numpy as np
import pytest

from acestep_jax.errors import InputError
from acestep_jax.planner.plans import write_plans
from acestep_jax.planner.writer import Planner
from acestep_jax.request import Planning, Request
from acestep_jax.serve.submission import Limits
from tests.planner import small
from tests.serve.fake import FakePipeline, wait_until
from tests.serve.test_http_native import SONG, wav

PLANNER = "acestep-5Hz-lm-tiny"
WORDS = dict(prompt="piano", num_inference_steps=2, seed=5)


def post(client, path="/v1/songs", **body):
    response = client.post(path, json=body)
    assert response.status_code in (200, 202), response.text
    return response.json()


def test_a_song_is_planned_where_there_is_a_planner(http, finished):
    client = http(planner=PLANNER)
    record = finished(client, post(client, **WORDS, variations=2)["id"])
    assert record["status"] == "done" and record["notes"] == []
    first, second = record["songs"]
    assert first["plan"]["caption"] == "generate of piano" and first["plan"]["bpm"] == 70
    assert first["seconds"] == 12.0 and "audio_codes" not in first["plan"]
    plans = [client.get(song["plan_file"]).json() for song in (first, second)]
    assert [plan["audio_codes"] for plan in plans] == [[5] * 60, [6] * 60]  # each song has its own seed
    assert [plan["lm_seed"] for plan in plans] == [5, 6]
    assert client.service.pipe.planner.asked == [("generate", ["piano", "piano"], [5, 6])]  # one batch
    assert client.service.pipe.batches[0][0] == [5, 6]
    figures = client.get("/metrics").text
    assert "acestep_plans_written_total 2.0" in figures and "acestep_songs_made_total 2.0" in figures


def test_which_songs_are_not_planned(http, finished):
    client = http(planner=PLANNER)
    upload = dict(src_audio=("a.wav", wav(4.0)))
    asked = SONG | dict(task_type="repaint", repainting_start=1.0, repainting_end=2.0, thinking=True)
    del asked["audio_duration"]
    repaint = client.post("/v1/songs", data=dict(request=json.dumps(asked)), files=upload).json()
    quiet, other = post(client, **SONG, thinking=False), post(client, **SONG, model="other", thinking=True)
    diffusers = post(client, **SONG, compat="diffusers")
    found = [finished(client, one["id"]) for one in (repaint, quiet, other, diffusers)]
    assert [one["status"] for one in found] == ["done"] * 4
    assert all("plan" not in one["songs"][0] for one in found) and client.service.pipe.planner.asked == []
    assert found[0]["notes"] == ["thinking: the planner supports only text2music without a source; made without it"]
    assert found[2]["notes"] == ["thinking: this server has no planner for the model; ignored"]
    assert found[1]["notes"] == found[3]["notes"] == []


def test_a_plan_is_written_changed_and_made(http, finished):
    client = http(planner=PLANNER)
    plan = post(client, "/v1/plans", wish="a sad song about the sea", bpm=90, seed=3)
    assert plan["caption"] == "inspire of a sad song about the sea" and plan["bpm"] == 90 and plan["lm_seed"] == 3
    assert plan["lyrics"].startswith("[Verse]") and plan["audio_codes"] == [3] * 60
    changed = plan | dict(caption="my own words", lyrics="[Verse]\nmine")
    anew = post(client, "/v1/plans", plan=changed, seed=4)
    assert anew["caption"] == "my own words" and anew["lyrics"] == "[Verse]\nmine" and anew["audio_codes"] == [4] * 60
    assert anew["prompt"] == "a sad song about the sea"
    record = finished(client, post(client, plan=anew, seed=1, num_inference_steps=2, keyscale="C major")["id"])
    (song,) = record["songs"]
    assert record["status"] == "done" and song["seconds"] == 12.0 and song["plan"]["caption"] == "my own words"
    assert record["request"]["prompt"] == "my own words" and record["request"]["keyscale"] == "A minor"
    assert record["notes"] == ["keyscale: the plan's value was used"]
    assert record["request"]["audio_codes"].count("<|audio_code_4|>") == 60
    assert len(client.service.pipe.planner.asked) == 2  # a plan is not planned again
    words = post(client, "/v1/plans", prompt="piano", lyrics="[Verse]\nla", codes=False)
    assert words["audio_codes"] == [] and words["lyrics"] == "[Verse]\nla"
    assert post(client, "/v1/plans", prompt="piano", rewrite=True)["caption"] == "format of piano"
    whole = post(client, "/v1/plans", prompt="rain", lyrics="", variations=2, num_inference_steps=4, thinking=True)
    assert whole["caption"] == "inspire of rain"  # a request for a song, without lyrics
    quiet = post(client, "/v1/plans", wish="rain", instrumental=True)
    assert quiet["lyrics"] == "[Instrumental]"


def test_progress_of_a_plan_and_its_end(http):
    client = http(pipe=FakePipeline(delay=0.01), planner=PLANNER)
    headers = {"accept": "text/event-stream"}
    with client.stream("POST", "/v1/plans", json=dict(wish="rain"), headers=headers) as response:
        found = [
            (block.splitlines()[0].removeprefix("event: "), json.loads(block.splitlines()[1].removeprefix("data: ")))
            for block in "".join(response.iter_text()).split("\n\n")
            if block.startswith("event")
        ]
    assert found[-1][0] == "done" and found[-1][1]["plan"]["caption"] == "inspire of rain"
    steps = [data["step"] for name, data in found if name == "running" and data["stage"] == "planning"]
    assert max(steps) > 5


def test_planning_is_told_and_can_be_cancelled(http, finished):
    client = http(pipe=FakePipeline(delay=0.02), planner=PLANNER)
    record = post(client, **WORDS)
    with client.stream("GET", f"/v1/songs/{record['id']}/events") as response:
        for line in response.iter_lines():
            if line.startswith("data:"):
                data = json.loads(line.removeprefix("data:"))
                if data["stage"] == "planning" and data["step"] > 2:
                    assert 0 < data["progress"] < 0.3 and data["eta_seconds"] is None
                    break
    assert client.post(f"/v1/songs/{record['id']}/cancel").json()["status"] == "cancelled"
    wait_until(lambda: not client.service.engine._running)
    assert client.service.pipe.batches == []


def test_a_client_that_goes_cancels_its_plan(http):
    import httpx

    client = http(pipe=FakePipeline(delay=0.1), planner=PLANNER)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/plans", json=dict(wish="rain"), timeout=0.5)
    wait_until(lambda: [one.status for one in client.service.operations.all.values()] == ["cancelled"])
    wait_until(lambda: not client.service.engine._running)


def in_event_loop():
    try:
        return asyncio.get_running_loop() is not None
    except RuntimeError:
        return False


def leave(client, accept):
    """Request a plan, and disconnect once it is in the queue and, if events are accepted, the first one has come."""
    known, body = len(client.service.operations.all), b'{"wish": "rain"}'
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as connection:
        head = f"POST /v1/plans HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nAccept: {accept}\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: len(client.service.operations.all) > known)
        answer = b""
        while accept == "text/event-stream" and b"event: queued" not in answer:
            answer += connection.recv(4096)


def test_the_event_loop_does_not_cancel(http, monkeypatch):
    """Cancelling waits for a lock and removes files."""
    client = http(started=False, planner=PLANNER)
    operations, cancelled = client.service.operations, []
    cancel = operations.cancel
    monkeypatch.setattr(operations, "cancel", lambda operation: (cancel(operation), cancelled.append(in_event_loop())))
    task = post(client, "/release_task", prompt="a", analysis_only=True)["data"]["task_id"]
    assert post(client, "/cancel_task", task_id=task)["data"]["status"] == "cancelled"
    for accept in ("*/*", "text/event-stream"):
        leave(client, accept)
    wait_until(lambda: len(cancelled) == 3)
    assert not any(cancelled) and {one.status for one in operations.all.values()} == {"cancelled"}


@pytest.mark.parametrize(
    ("place", "path", "body"),
    [
        ("native.submission_of", "/v1/songs", WORDS),
        ("plans.work_of", "/v1/plans", dict(wish="rain")),
        ("authors_request.submission", "/release_task", dict(prompt="rain")),
        ("authors_analysis.work", "/release_task", dict(prompt="rain", analysis_only=True)),
        ("authors_analysis.rewriting", "/format_input", dict(prompt="rain")),
        ("chat_request.submission", "/v1/chat/completions", dict(messages=[dict(role="user", content="rain")])),
        ("chat._music", "/v1/audio/music/generations", dict(prompt="rain")),
        ("cpp.Cpp.submission", "/synth", dict(caption="rain")),
        ("cpp.Cpp.complete", "/lm", dict(caption="rain")),
        ("page.count_tokens", "/v1/tokens", dict(prompt="rain")),
    ],
)
def test_the_event_loop_does_not_build_requests(http, monkeypatch, place, path, body):
    """Long texts take long to check."""
    client, built = http(planner=PLANNER), []
    place = f"acestep_jax.serve.{place}"
    build = pkgutil.resolve_name(place)
    monkeypatch.setattr(place, lambda *args, **options: (built.append(in_event_loop()), build(*args, **options))[1])
    post(client, path, **body)
    assert built == [False]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/plans", dict(wish="rain")),
        ("/v1/chat/completions", dict(messages=[dict(role="user", content="rain")], stream=True)),
    ],
)
def test_a_client_that_leaves_before_the_first_event_cancels(http, path, body):
    """Its buffer is full, from an earlier response, so the head of this one waits until it disconnects."""
    client = http(started=False, planner=PLANNER)
    messages = iter([dict(type="http.request", body=json.dumps(body).encode(), more_body=False)])

    async def receive():
        return next(messages, dict(type="http.disconnect"))

    async def send(message):
        await asyncio.Event().wait()

    headers = dict(host="localhost", accept="text/event-stream") | {"content-type": "application/json"}
    scope = dict(
        type="http",
        asgi=dict(version="3.0", spec_version="2.3"),
        http_version="1.1",
        method="POST",
        scheme="http",
        path=path,
        raw_path=path.encode(),
        root_path="",
        query_string=b"",
        headers=[(name.encode(), value.encode()) for name, value in headers.items()],
        client=("127.0.0.1", 1),
        server=("127.0.0.1", 80),
    )
    asyncio.run(asyncio.wait_for(client.app(scope, receive, send), 30))  # it ends after all threads of its executor
    found = [*client.service.operations.all.values(), *client.service.records.values()]
    assert [one.status for one in found] == ["cancelled"]


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "path", ["/v1/songs", "/v1/plans", "/release_task", "/v1/chat/completions", "/lm", "/v1/tokens"]
)
def test_json_is_limited_by_what_takes_long_to_parse(http, path):
    from acestep_jax.serve import uploads

    client = http(started=False)
    limit = f"JSON with more than {uploads.MAX_MARKS} commas and opening brackets"
    for mark in ",[{":
        answer = client.post(path, content="[" + mark * uploads.MAX_MARKS, headers=JSON)
        assert answer.status_code == 413 and limit in answer.text, (mark, answer.text)


@pytest.mark.parametrize(
    ("path", "field"), [("/v1/songs", "request"), ("/synth", "request"), ("/release_task", "param_obj")]
)
@pytest.mark.parametrize("files", [{}, dict(src_audio=("a.wav", b"x"))])
def test_json_in_a_form_is_limited_as_well(http, path, field, files):
    from acestep_jax.serve import uploads

    client = http(started=False)
    answer = client.post(path, data={field: "[" + "," * uploads.MAX_MARKS}, files=files)
    assert answer.status_code == 413 and "commas" in answer.text
    assert not list(client.service.store.incoming.iterdir())


def test_the_longest_requests_are_within_the_limits_of_json(http):
    """Of all protocols, acestep.cpp's has the longest ones."""
    client, limits = http(started=False), Limits()
    song = dict(
        caption="\U0001d11e" * limits.prompt, lyrics="\U0001d11e, " * (limits.lyrics // 3), audio_codes="1," * 3000
    )
    job = client.post("/lm", content=json.dumps([song] * 9), headers=JSON)
    assert job.status_code == 200, job.text


def test_a_planner_that_fails(http, finished):
    """The song is made without where nobody asked for the plan, and fails where somebody did."""
    client = http(planner=PLANNER)

    def failing():
        raise InputError("lyrics: too long for the planner")

    client.service.pipe.planner.failing = failing
    quiet, asked = post(client, **SONG), post(client, **SONG, thinking=True)
    done, failed = finished(client, quiet["id"]), finished(client, asked["id"])
    assert done["status"] == "done"
    assert done["notes"] == ["thinking: made without the planner (lyrics: too long for the planner)"]
    assert failed["status"] == "failed" and failed["error"] == "lyrics: too long for the planner"
    answer = client.post("/v1/plans", json=dict(wish="rain"))
    assert answer.status_code == 400 and answer.json()["detail"] == "lyrics: too long for the planner"


def test_a_plan_that_fails_by_an_error_of_the_server_is_no_bad_request(http):
    client = http(planner=PLANNER)

    def failing():
        raise ZeroDivisionError

    client.service.pipe.planner.failing = failing
    answer = client.post("/v1/plans", json=dict(wish="rain"))
    assert answer.status_code == 500 and "internal error" in answer.json()["detail"]
    answer = client.post("/format_input", json=dict(prompt="rain")).json()
    assert answer["code"] == 500 and "internal error" in answer["error"]


def test_no_plan_is_longer_than_the_server_allows(http, finished):
    client = http(planner=PLANNER, limits=Limits(duration=11.0))  # the planner chooses 12 s
    (song,) = finished(client, post(client, **WORDS)["id"])["songs"]
    assert song["seconds"] == 11.0 and song["plan"]["audio_duration"] == 11.0
    assert len(client.get(song["plan_file"]).json()["audio_codes"]) == 55
    assert post(client, "/v1/plans", wish="rain")["audio_duration"] == 11.0
    job = post(client, "/lm", caption="rain")["id"]
    wait_until(lambda: client.get("/job", params=dict(id=job)).json()["status"] == "done")
    (completed,) = client.get("/job", params=dict(id=job, result=1)).json()
    assert completed["duration"] == 11.0 and completed["audio_codes"].count(",") == 54

    def failing():
        raise InputError("lyrics: too long for the planner")

    client.service.pipe.planner.failing = failing
    (song,) = finished(client, post(client, **WORDS)["id"])["songs"]
    assert song["seconds"] == 11.0 and "plan" not in song
    codes = [1] * 56
    text = "".join(f"<|audio_code_{code}|>" for code in codes)
    for path, body in (
        ("/v1/plans", dict(wish="rain", audio_duration=20)),
        ("/lm", dict(caption="rain", duration=20)),
        ("/format_input", dict(prompt="rain", audio_duration=20)),
        ("/understand", dict(audio_codes=",".join(map(str, codes)))),
        ("/v1/songs", WORDS | dict(audio_codes=text)),
        ("/v1/songs", WORDS | dict(audio_duration=20)),
        ("/v1/songs", WORDS | dict(thinking=False)),  # 120 s by default
        ("/v1/songs", dict(plan=dict(caption="rain", audio_duration=20))),
        ("/v1/songs", dict(plan=dict(caption="rain", audio_duration=11, audio_codes=codes))),
        ("/synth", dict(caption="rain", audio_codes=",".join(map(str, codes)))),
        ("/release_task", dict(prompt="rain", audio_code_string=text)),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 400, (path, body, answer.text)
        assert "at most" in answer.text or "limit of 11 s" in answer.text, (path, body, answer.text)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "wish, prompt, plan: expected one of them, found none"),
        (dict(wish="a", prompt="b"), "wish, prompt, plan: expected one of them, found wish and prompt"),
        (dict(wish="a", colour="b"), "colour: unknown field"),
        (dict(prompt="a", task_type="cover"), "task_type: the planner supports text2music"),
        (dict(wish="a", bpm=1000), "bpm: expected"),
        (dict(wish="a", lm_temperature="hot"), "lm_temperature: expected"),
        (dict(wish="a", instrumental="yes"), "instrumental: expected true or false"),
        (dict(wish="a", lyrics="la", instrumental=True), "instrumental, lyrics: expected one of them"),
        (dict(wish="x" * 5000), "prompt: expected at most 4096 characters"),
        (dict(wish=["a"]), "prompt: expected"),
        (dict(plan=dict(caption="a", colour="b")), "plan: colour: unknown key"),
        (dict(plan=dict(caption="a", audio_codes=[-1])), "plan: audio_codes: expected whole numbers"),
        (dict(plan="a"), "plan: expected an object"),
        (dict(wish="a", model="none"), "model: expected one of small, other"),
        (dict(wish="a", model={}), "model: expected one of small, other"),
    ],
)
def test_what_is_no_request_for_a_plan(http, body, message):
    client = http(planner=PLANNER, started=False)
    response = client.post("/v1/plans", json=body)
    assert response.status_code == 400 and message in response.json()["detail"], response.text


def test_plans_without_a_planner_and_in_a_full_queue(http):
    client = http(started=False)
    assert client.post("/v1/plans", json=dict(wish="a")).status_code == 501
    assert client.get("/v1/server").json()["planner"] is False
    strict = http(folder=client.service.store.folder.parent / "strict", started=False, strict=True)
    refused = strict.post("/v1/songs", json=SONG | dict(thinking=True))
    assert refused.status_code == 400 and "started with --strict" in refused.json()["detail"]
    full = http(
        folder=client.service.store.folder.parent / "full", started=False, planner=PLANNER, limits=Limits(queue=1)
    )
    thread = threading.Thread(target=lambda: full.post("/v1/plans", json=dict(wish="a"), timeout=2), daemon=True)
    thread.start()
    wait_until(lambda: full.service.waiting() == 1)
    busy = full.post("/v1/plans", json=dict(wish="a"))
    assert busy.status_code == 429 and busy.headers["retry-after"]
    full.service.close(0)
    thread.join(10)


def test_a_restart_plans_again_with_the_same_seed(service):
    from acestep_jax.serve.planner_task import PlannerTask, Planning
    from acestep_jax.serve.submission import Submission, variations

    first = service(started=False, planner=PLANNER)
    planner_task = PlannerTask(planning=Planning(lm_seed=8, lm_temperature=0.5), required=True)
    songs = variations(dict(prompt="piano", seed=1, num_inference_steps=1), 2)
    record = first.accept(Submission(songs=songs, api="native", planner_task=planner_task))
    first.store.close()
    again = service(planner=PLANNER)
    wait_until(lambda: again.records[record.id].final)
    found = again.records[record.id]
    assert found.status == "done" and [song.plan["lm_seed"] for song in found.songs] == [8, 9]
    assert again.pipe.planner.sampling.temperature == 0.5
    again.close(0)
    again.store.close()
    third = service(started=False, planner=PLANNER)
    third.start()
    assert [song.plan["lm_seed"] for song in third.records[record.id].songs] == [8, 9]


def test_a_plan_that_was_written_before_the_end_is_not_written_again(service):
    from acestep_jax.serve.planner_task import PlannerTask
    from acestep_jax.serve.submission import Submission, variations

    first = service(FakePipeline(delay=0.02), planner=PLANNER)
    songs = variations(dict(prompt="piano", seed=1), 1)
    record = first.accept(Submission(songs=songs, api="native", planner_task=PlannerTask(required=True)))
    wait_until(lambda: record.songs[0].plan is not None)
    first.close(0)
    first.store.close()
    again = service(planner=PLANNER)
    wait_until(lambda: again.records[record.id].final)
    found = again.records[record.id]
    assert found.status == "done" and found.songs[0].plan == record.songs[0].plan and found.songs[0].seconds == 12.0
    assert again.pipe.planner.asked == []


def test_a_restart_without_the_planner(service):
    from acestep_jax.serve.planner_task import PlannerTask
    from acestep_jax.serve.submission import Submission, variations

    first = service(started=False, planner=PLANNER)
    songs = variations(dict(prompt="piano", seed=1, num_inference_steps=1, audio_duration=10.0), 2)
    record = first.accept(Submission(songs=songs, api="native", planner_task=PlannerTask(required=True)))
    kept = json.loads((first.store.folder_of(record) / "request.json").read_text())
    assert kept["songs"][0].keys() == {"request", "sampling", "thought"}  # the keys of earlier versions
    first.store.close()
    again = service()
    wait_until(lambda: again.records[record.id].final)
    found = again.records[record.id]
    assert found.status == "done" and found.notes == ["thinking: this server has no planner for the model; ignored"]


def test_audio_codes_of_a_song(http):
    client = http()
    sent = client.post("/v1/codes", files=dict(audio=("a.wav", wav())))
    assert sent.status_code == 200 and sent.json() == dict(audio_codes=list(range(50)))
    assert not list(client.service.store.incoming.iterdir())
    assert client.post("/v1/codes", files=dict(audio=("a.wav", b"nothing"))).status_code == 400
    assert client.post("/v1/codes", data=dict(model="small")).status_code == 400
    assert client.post("/v1/codes", files=dict(audio=("a.wav", wav())), data=dict(model="x")).status_code == 400
    assert not list(client.service.store.incoming.iterdir())


def results(client, task_id):
    """Wait for a task of the authors' protocol; return its parsed result."""

    def poll():
        return client.post("/query_result", json=dict(task_id_list=[task_id])).json()["data"][0]

    wait_until(lambda: poll()["status"] != 0)
    return json.loads(poll()["result"])


def released(client, **body):
    response = client.post("/release_task", json=dict(prompt="piano", batch_size=1, inference_steps=2) | body)
    assert response.status_code == 200, response.text
    return results(client, response.json()["data"]["task_id"])


@pytest.mark.parametrize(
    ("body", "mode", "caption", "codes"),
    [
        (dict(thinking=True), "generate", "piano", True),
        (dict(), "generate", "piano", False),
        (dict(sample_query="a song of rain", thinking=True), "inspire", "a song of rain", True),
        (dict(sample_mode=True), "inspire", "piano", False),
        (dict(use_format=True, lyrics="la"), "format", "piano", False),
        (dict(format="true", lyrics="la"), "format", "piano", False),
    ],
)
def test_the_authors_flags(http, body, mode, caption, codes):
    client = http(planner=PLANNER)
    (result,) = released(client, **body)
    assert result["status"] == 1 and result["lm_model"] == PLANNER and result["prompt"] == f"{mode} of {caption}"
    assert result["metas"]["bpm"] == 70 and result["metas"]["duration"] == 12.0 and result["metas"]["genres"] == "N/A"
    record = list(client.service.records.values())[-1]
    assert bool(record.songs[0].plan["audio_codes"]) == codes and record.songs[0].seconds == 12.0
    assert client.service.pipe.planner.asked[0][:2] == (mode, [caption])
    assert result["lyrics"] == ("[Instrumental]" if mode == "generate" else "[Verse]\nwritten by the planner")


def test_an_instrumental_wish_of_the_authors(http):
    (result,) = released(http(planner=PLANNER), sample_query="rain", lyrics="[inst]")
    assert result["lyrics"] == "[Instrumental]" and result["prompt"] == "inspire of rain"


def test_the_authors_flags_that_switch_the_planner_off(http):
    client = http(planner=PLANNER)
    (result,) = released(client, use_cot_caption=False, use_cot_language="false", audio_duration=10)
    assert result["lm_model"] == "" and result["prompt"] == "piano" and client.service.pipe.planner.asked == []
    (result,) = released(
        client, thinking=True, use_cot_caption=False, lm_temperature="0.3", lm_top_k=5, audio_duration=10
    )
    assert result["prompt"] == "piano" and client.service.pipe.planner.sampling.temperature == 0.3
    assert client.service.pipe.planner.sampling.cfg_scale == 2.5 and client.service.pipe.planner.sampling.top_k == 5


def test_the_authors_analyses(http):
    client = http(planner=PLANNER)
    kind = dict(files=dict(src_audio=("a.wav", wav())))
    for flag in ("extract_codes_only", "full_analysis_only"):
        sent = client.post("/release_task", data={flag: "true"}, **kind)
        assert sent.status_code == 200, sent.text
        (result,) = results(client, sent.json()["data"]["task_id"])
        assert result["status"] == 1 and result["audio_codes"].startswith("<|audio_code_0|><|audio_code_1|>")
    assert result["metas"]["bpm"] == 70 and json.loads(result["generation_info"])["key_scale"] == "A minor"
    (result,) = released(client, analysis_only=True)
    assert result["prompt"] == "generate of piano" and result["audio_codes"] == "" and result["file"] == ""
    assert client.post("/release_task", json=dict(extract_codes_only=True)).status_code == 400
    formatted = post(client, "/format_input", prompt="piano", lyrics="la", param_obj='{"bpm": 99}', temperature=0.4)
    assert formatted["code"] == 200 and formatted["data"]["caption"] == "format of piano"
    assert formatted["data"]["bpm"] == 99 and client.service.pipe.planner.sampling.temperature == 0.4
    inventory = client.get("/v1/model_inventory").json()["data"]
    assert inventory["lm_models"] == [dict(name=PLANNER, is_loaded=True)] and inventory["llm_initialized"]
    assert client.get("/health").json()["data"]["loaded_lm_model"] == PLANNER
    assert post(client, "/v1/init", init_llm=True)["data"]["llm_initialized"] is True
    assert not list(client.service.store.incoming.iterdir())


def test_codes_need_no_planner_and_descriptions_do(http):
    client = http()
    kind = dict(files=dict(src_audio=("a.wav", wav())))
    sent = client.post("/release_task", data=dict(extract_codes_only="true"), **kind)
    assert sent.status_code == 200
    assert results(client, sent.json()["data"]["task_id"])[0]["lm_model"] == ""
    assert client.post("/release_task", data=dict(full_analysis_only="true"), **kind).status_code == 501
    assert client.post("/format_input", json=dict(prompt="x")).json()["code"] == 501


def test_a_wish_in_a_chat(http):
    client = http(planner=PLANNER)
    body = dict(messages=[dict(role="user", content="a song about rain")], temperature=0.6)
    answer = post(client, "/v1/chat/completions", **body)
    assert "**Caption:** inspire of a song about rain" in answer["choices"][0]["message"]["content"]
    assert "written by the planner" in answer["choices"][0]["message"]["content"]
    assert client.service.pipe.planner.sampling.temperature == 0.6
    post(client, "/v1/chat/completions", **body, audio_config=dict(instrumental=True))
    assert list(client.service.records.values())[-1].songs[0].plan["lyrics"] == "[Instrumental]"


def test_lm_then_synth(http):
    from tests.serve.test_http_cpp import result

    client = http(planner=PLANNER)
    assert client.get("/props").json()["models"]["lm"] == [PLANNER]

    def complete(**body):
        job = post(client, "/lm", **body)["id"]
        wait_until(lambda: client.get(f"/job?id={job}").json()["status"] == "done")
        return client.get(f"/job?id={job}&result=1").json()

    first, second = complete(caption="rain", lm_batch_size=2, synth_batch_size=1, inference_steps=2)
    assert first["caption"] == "inspire of rain" and first["lyrics"].startswith("[Verse]") and first["bpm"] == 70
    assert len(first["audio_codes"].split(",")) == 60 and first["audio_codes"] != second["audio_codes"]
    assert first["inference_steps"] == 2 and first["lm_batch_size"] == 1
    parts = result(client, post(client, "/synth", **first | dict(seed=3))["id"])
    assert len(parts) == 2 and client.service.pipe.batches[-1][0] == [3]
    (kept,) = complete(caption="rain", lyrics="la", bpm=99, lm_mode="format", lm_temperature=0.2)
    assert kept["audio_codes"] == "" and kept["bpm"] == 99 and kept["caption"] == "format of rain"
    assert client.service.pipe.planner.sampling.temperature == 0.2
    (kept,) = complete(caption="rain", lyrics="la", audio_codes="1,2,3")
    assert kept["audio_codes"] == "1,2,3" and kept["caption"] == "rain"
    assert client.post("/lm", json=dict(caption="x", lm_mode="odd")).status_code == 400


def test_understand_and_cancel(http):
    client = http(planner=PLANNER)
    job = client.post("/understand", files=dict(audio=("a.wav", wav()))).json()["id"]
    wait_until(lambda: client.get(f"/job?id={job}").json()["status"] == "done")
    sent = client.get(f"/job?id={job}&result=1")
    assert sent.headers["content-type"].startswith("multipart/mixed") and "Content-Type: application/json" in sent.text
    (found,) = json.loads(sent.content.split(b"\r\n\r\n")[1].split(b"\r\n")[0])
    assert found["bpm"] == 70 and found["audio_codes"].startswith("0,1,2,")
    assert np.unique(np.frombuffer(sent.content.split(b"\r\n\r\n")[2].split(b"\r\n--")[0], "<f4")).tolist() == [0.5]
    assert client.post("/understand", json={}).status_code == 400
    slow = http(folder=client.service.store.folder.parent / "slow", pipe=FakePipeline(delay=0.1), planner=PLANNER)
    job = slow.post("/lm", json=dict(caption="rain")).json()["id"]
    assert slow.get(f"/job?id={job}").json() == dict(status="running")
    assert slow.get(f"/job?id={job}&result=1").status_code == 404
    assert slow.post(f"/job?id={job}&cancel=1").json() == dict(status="cancelled")
    wait_until(lambda: not slow.service.engine._running)


def test_a_real_planner(http, finished):
    """A language model without a transformer, with the planner's own loops, grammar and tokenizer."""
    planner = Planner(small.Recurrent.random(), small.tokenizer())
    pipe = FakePipeline()
    pipe.planner = planner
    client = http(pipe=pipe, planner=PLANNER)
    asked = dict(prompt="piano", audio_duration=10, bpm=90, seed=5)
    record = finished(client, post(client, **asked, num_inference_steps=1)["id"])
    assert record["status"] == "done" and record["notes"] == [], record
    plan = client.get(record["songs"][0]["plan_file"]).json()
    (expected,) = write_plans(planner, [Request(**asked)], Planning())
    assert plan == expected.to_dict() and plan["bpm"] == 90 and len(plan["audio_codes"]) == 50
    assert record["songs"][0]["plan"]["caption"] == expected.caption
