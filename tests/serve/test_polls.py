"""Polls that are answered from what is kept: the same answers as those of the routes, never an old one."""

import asyncio
import json
import time

import pytest

from acestep_jax.serve.authors import MOST_IDS
from acestep_jax.serve.polls import FRESH_SECONDS, KEPT, CachedResponses
from acestep_jax.serve.store import Record, SongRecord
from tests.serve.conftest import KEY
from tests.serve.fake import FakePipeline, wait_until
from tests.serve.test_http_native import SONG


def record(record_id="a", status="running"):
    return Record(record_id, 0.0, "native", "small", {}, [SongRecord({}, {})], status=status)


@pytest.mark.unit
def test_an_answer_is_built_once_until_its_record_changes(monkeypatch):
    built = []
    answers = CachedResponses(lambda one: built.append(one.version) or dict(version=one.version))
    one, now = record(), [100.0]
    monkeypatch.setattr("acestep_jax.serve.polls.time.monotonic", lambda: now[0])
    first = answers.of(one)
    assert answers.of(one) is first and json.loads(first.body) == dict(version=1)
    one.version += 1
    assert json.loads(answers.of(one).body) == dict(version=2) and built == [1, 2]
    now[0] += FRESH_SECONDS  # remaining times change by themselves
    answers.of(one)
    assert built == [1, 2, 2] and answers.of(one).etag != first.etag


@pytest.mark.unit
def test_what_changes_while_an_answer_is_built_is_told_again():
    one = record()

    def build(found):
        told = dict(version=found.version)
        found.version = 2
        return told

    answers = CachedResponses(build)
    assert json.loads(answers.of(one).body) == dict(version=1)
    assert json.loads(answers.of(one).body) == dict(version=2)


@pytest.mark.unit
def test_the_answers_of_few_records_are_kept():
    answers = CachedResponses(lambda one: one.id)
    for i in range(KEPT + 5):
        answers.of(record(str(i), "done"))
    assert len(answers._kept) == KEPT and "4" not in answers._kept and "5" in answers._kept


def test_polls_of_all_protocols_are_those_of_the_routes(http, finished):
    """A query that a poll has not, or a form, goes to the route; the answers are equal to the byte, but for times."""
    import httpx

    client = http(origins=["http://page.example"])
    record_id = client.post("/v1/songs", json=SONG).json()["id"]
    finished(client, record_id)
    path = f"/v1/songs/{record_id}"
    kept = client.get(path, headers={"origin": "http://page.example"})
    assert "etag" in kept.headers and kept.json()["status"] == "done"
    assert kept.headers["access-control-allow-origin"] == "http://page.example"

    async def from_the_route():
        within = httpx.ASGITransport(app=client.app.front.app.app)  # behind `Guard` and `Polls`
        async with httpx.AsyncClient(transport=within, base_url=client.base_url) as inner:
            return await inner.get(path)

    routed = asyncio.run(from_the_route())
    assert "etag" not in routed.headers and routed.content == kept.content
    assert routed.headers["content-type"] == kept.headers["content-type"]
    assert kept.headers["x-content-type-options"] == "nosniff" and "content-security-policy" in kept.headers
    again = client.get(path, headers={"if-none-match": kept.headers["etag"]})
    assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == kept.headers["etag"]
    assert client.get(path, headers={"if-none-match": '"other"'}).content == kept.content

    ids = [record_id, record_id]
    polled = client.post("/query_result", json=dict(task_id_list=ids))
    as_text = client.post("/query_result", json=dict(task_id_list=json.dumps(ids)))
    routed = client.post("/query_result", data=dict(task_id_list=json.dumps(ids)))
    assert polled.json() | dict(timestamp=0) == routed.json() | dict(timestamp=0) == as_text.json() | dict(timestamp=0)
    assert [one["status"] for one in polled.json()["data"]] == [1, 1]
    mixed = client.post("/query_result", json=dict(task_id_list=[record_id, "unknown"])).json()["data"]
    assert [one["status"] for one in mixed] == [1, 0]
    assert client.post("/query_result", json=[]).status_code == 400
    assert client.post("/query_result", json=dict(task_id_list=[[]])).status_code == 200  # as text, an unknown id

    job = record_id.replace("-", "")[:16]
    assert client.get(f"/job?id={job}").json() == client.get(f"/job?id={job}&result=0").json() == dict(status="done")
    assert client.get(f"/job?id={'0' * 16}").status_code == 404
    assert client.get("/v1/songs/" + "0" * 8 + record_id[8:]).status_code == 404
    polls = client.app.front.app
    answers = [polls._songs, polls._tasks, polls._jobs]
    assert all(record_id in one._kept for one in answers)
    assert client.delete(path).status_code == 200 and client.get(path).status_code == 404
    assert not any(one._kept for one in answers)


def test_as_many_ids_as_the_route_takes(http, finished):
    client = http()
    record_id = client.post("/v1/songs", json=SONG).json()["id"]
    finished(client, record_id)
    asked = [client.post("/query_result", json=dict(task_id_list=[record_id] * n)) for n in (MOST_IDS, MOST_IDS + 1)]
    assert [answer.status_code for answer in asked] == [200, 400] and len(asked[0].json()["data"]) == MOST_IDS
    assert MOST_IDS <= KEPT and "at most 1000 ids" in asked[1].json()["detail"]


def test_an_error_of_a_poll_has_the_shape_of_its_protocol(http, finished, monkeypatch, caplog):
    client = http()
    record_id = client.post("/v1/songs", json=SONG).json()["id"]
    finished(client, record_id)
    monkeypatch.setattr(CachedResponses, "of", lambda self, record: 1 / 0)
    path, ids = f"/v1/songs/{record_id}", dict(task_id_list=[record_id])
    job = record_id.replace("-", "")[:16]
    answers = [client.get(path), client.post("/query_result", json=ids), client.get(f"/job?id={job}")]
    assert [answer.status_code for answer in answers] == [200] * 3 and answers[0].json()["id"] == record_id
    assert caplog.text.count("a poll could not be answered") >= 3
    monkeypatch.setattr(client.service, "progress", lambda record: 1 / 0)
    assert client.get(path).json()["detail"] == "internal error; the server's log has the details"


def test_every_step_and_the_end_are_told_at_once(http):
    client = http(pipe=FakePipeline(delay=0.02))
    record_id = client.post("/v1/songs", json=SONG | dict(num_inference_steps=20)).json()["id"]
    record, steps = client.service.records[record_id], set()
    while (found := client.get(f"/v1/songs/{record_id}").json())["status"] in ("queued", "running"):
        steps.add(found["step"])
    assert record.final and len(steps) > 10
    assert client.post(f"/v1/songs/{record_id}/cancel").json()["status"] == "done"


def test_an_answer_with_signed_links_stays_the_same(http, monkeypatch):
    client = http(key=KEY)
    record_id = client.post("/v1/songs", json=SONG).json()["id"]
    wait_until(lambda: client.service.records[record_id].final)
    monkeypatch.setattr("acestep_jax.serve.polls.FINAL_SECONDS", 0.0)  # it is built each time
    now = time.time() // 3600 * 3600 + 100
    etags = []
    for seconds in (0, 5):
        monkeypatch.setattr("acestep_jax.serve.security.time.time", lambda: now + seconds)  # noqa: B023
        answer = client.get(f"/v1/songs/{record_id}")
        etags.append(answer.headers["etag"])
        assert "sig=" in answer.json()["songs"][0]["audio"]
    assert etags[0] == etags[1]


def test_polls_need_the_key(http, finished):
    client = http(key=KEY)
    record_id = client.post("/v1/songs", json=SONG).json()["id"]
    wait_until(lambda: client.service.records[record_id].final)
    for headers, status in (({"authorization": "Bearer no"}, 401), ({"authorization": f"Bearer {KEY}"}, 200)):
        assert client.get(f"/v1/songs/{record_id}", headers=headers).status_code == status
        asked = dict(task_id_list=[record_id])
        assert client.post("/query_result", json=asked, headers=headers).status_code == status
    del client.headers["authorization"]
    assert client.get(f"/v1/songs/{record_id}").status_code == 401
    assert client.post("/query_result", json=asked).status_code == 401
    assert client.post("/query_result", json=asked | dict(ai_token=KEY)).json()["data"][0]["status"] == 1
