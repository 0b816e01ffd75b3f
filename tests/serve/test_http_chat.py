"""The chat API and the music endpoint, over real HTTP."""

import base64
import io
import json
import threading

import pytest
import soundfile

from acestep_jax.errors import InputError
from tests.serve.fake import FakePipeline, wait_until
from tests.serve.test_http_native import wav

CONFIG = dict(duration=10, format="mp3", instrumental=True)
VERSE = "[verse]\nthe sea is deep\nand I am small"


def ask(client, content, **body):
    return client.post(
        "/v1/chat/completions",
        json=dict(model="acestep/small", messages=[dict(role="user", content=content)], audio_config=CONFIG) | body,
    )


def decoded(url):
    kind, _, data = url.partition(";base64,")
    assert kind == "data:audio/mpeg"
    return soundfile.info(io.BytesIO(base64.b64decode(data)))


def chunks(text):
    """Return the parsed events of a stream, which ends as it should."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines[:-1]]


def test_an_answer_with_all_songs(http):
    client = http()
    response = ask(client, "<prompt>lofi piano</prompt> warm", seed="5,9", batch_size=2)
    assert response.status_code == 200, response.text
    answer = response.json()
    message = answer["choices"][0]["message"]
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["choices"][0]["finish_reason"] == "stop" and "usage" in answer
    assert "**Caption:** lofi piano\nwarm" in message["content"] and "**Duration:** 10s" in message["content"]
    assert [one["type"] for one in message["audio"]] == ["audio_url"] * 2
    assert decoded(message["audio"][0]["audio_url"]["url"]).duration == pytest.approx(10, abs=0.1)
    (record,) = client.service.records.values()
    assert [song.seed for song in record.songs] == [5, 9]


@pytest.mark.parametrize(
    ("content", "body", "prompt", "lyrics"),
    [
        ("<prompt>folk</prompt><lyrics>la la</lyrics>", {}, "folk", "la la"),
        (VERSE, {}, "music", VERSE),
        ("one line\ntwo lines\nthree\nfour", {}, "music", "one line\ntwo lines\nthree\nfour"),
        ("upbeat folk", dict(lyrics="la la"), "upbeat folk", "la la"),
        ("a song about the sea", {}, "a song about the sea", "[Instrumental]"),
        ([dict(type="text", text="<prompt>jazz</prompt>")], {}, "jazz", "[Instrumental]"),
    ],
)
def test_what_a_text_means(http, content, body, prompt, lyrics):
    client = http()
    response = ask(client, content, **body, audio_config=dict(duration=10))
    assert response.status_code == 200, response.text
    (record,) = client.service.records.values()
    request = record.songs[0].request
    assert (request["prompt"], request["lyrics"]) == (prompt, lyrics)
    wish = content == "a song about the sea"
    assert response.headers.get("x-acestep-ignored") == ("sample_query" if wish else None)
    assert ("no language model" in response.json()["choices"][0]["message"]["content"]) is wish


def test_a_stream_shows_that_it_lives_and_what_comes_of_it(http, monkeypatch):
    monkeypatch.setattr("acestep_jax.serve.chat.BEAT", 0.1)
    client = http(pipe=FakePipeline(delay=0.01))
    found = chunks(ask(client, "<prompt>lofi</prompt>", stream=True).text)
    contents = [choice["delta"].get("content") for choice in found]
    assert contents[0] == "Generating music" and found[0]["delta"]["role"] == "assistant" and contents.count(".") >= 2
    (audio,) = [choice["delta"]["audio"] for choice in found if "audio" in choice["delta"]]
    assert decoded(audio[0]["audio_url"]["url"]).format == "MP3"
    assert [choice["finish_reason"] for choice in found][-2:] == [None, "stop"]


def test_openai_s_shape_where_a_client_asks_for_it(http):
    client = http()
    asked = dict(modalities=["text", "audio"], audio=dict(format="mp3", voice="none"))
    message = ask(client, "<prompt>lofi</prompt>", **asked).json()["choices"][0]["message"]
    assert message["audio"].keys() == {"id", "data", "expires_at", "transcript"}
    whole = base64.b64decode(message["audio"]["data"])
    found = chunks(ask(client, "<prompt>lofi</prompt>", stream=True, **asked).text)
    pieces = [choice["delta"]["audio"]["data"] for choice in found if "audio" in choice["delta"]]
    assert len(pieces) > 1 and max(map(len, pieces)) <= 65536
    streamed = soundfile.info(io.BytesIO(b"".join(map(base64.b64decode, pieces))))
    assert streamed.frames == soundfile.info(io.BytesIO(whole)).frames


def test_audio_parts(http):
    client = http()
    data = base64.b64encode(wav()).decode()
    part = dict(type="input_audio", input_audio=dict(data=f"data:audio/wav;base64,{data}", format="wav"))
    text = dict(type="text", text="<prompt>strings</prompt>")
    assert ask(client, [text, part]).status_code == 200
    assert ask(client, [text, part, part], task_type="cover").status_code == 200
    files = [(record.songs[0].request["task_type"], record.files) for record in client.service.records.values()]
    assert files == [("text2music", ["reference_audio"]), ("cover", ["src_audio", "reference_audio"])]
    more = ask(client, [text, part, part])
    assert more.headers["x-acestep-ignored"] == "input_audio"
    note = "input_audio: text2music takes 1, found 2; the others were ignored"
    assert note in more.json()["choices"][0]["message"]["content"]
    bad = dict(part, input_audio=dict(data="%%%", format="wav"))
    assert "not base64" in ask(client, [text, bad]).json()["detail"]


def test_with_strict_all_audio_parts_must_be_used(http):
    client = http(strict=True, started=False)
    part = dict(type="input_audio", input_audio=dict(data=base64.b64encode(wav()).decode(), format="wav"))
    response = ask(client, [dict(type="text", text="<prompt>strings</prompt>"), part, part])
    assert response.status_code == 400 and response.json()["detail"].startswith("input_audio: not supported")
    assert not list(client.service.store.incoming.iterdir())


def test_errors_are_read_by_both_kinds_of_client(http):
    client = http(started=False)
    for content, body, message in (
        (None, {}, "messages: expected one with the role user"),
        ("x", dict(task_type="cover"), "src_audio: the task cover needs a source"),
        ("x", dict(audio_config=dict(duration=1)), "audio_duration: expected 10 to 600 s"),
    ):
        response = ask(client, content, **body)
        assert response.status_code == 400 and message in response.json()["detail"], response.text
        assert response.json()["error"]["message"] == response.json()["detail"]
    assert ask(client, "x", use_format=True).status_code == 501
    assert client.post("/v1/chat/completions", json=dict(messages=3)).status_code == 400


def test_a_song_that_fails(http):
    pipe = FakePipeline()
    pipe.failing = lambda seeds: 1 / 0
    client = http(pipe=pipe)
    assert ask(client, "<prompt>x</prompt>").status_code == 500
    found = chunks(ask(client, "<prompt>x</prompt>", stream=True).text)
    assert found[-1]["finish_reason"] == "error" and found[-1]["delta"]["content"].startswith("Error: internal error")


def test_a_client_that_goes_cancels_and_one_that_waits_too_long_is_told(http, monkeypatch):
    client = http(pipe=FakePipeline(delay=0.05))
    with client.stream(
        "POST",
        "/v1/chat/completions",
        json=dict(messages=[dict(role="user", content="<prompt>x</prompt>")], stream=True),
    ) as response:
        next(response.iter_lines())
    records = client.service.records
    wait_until(lambda: [record.status for record in records.values()] == ["cancelled"])
    monkeypatch.setattr("acestep_jax.serve.waiting.TIMEOUT", 0.2)
    response = ask(client, "<prompt>x</prompt>")
    assert response.status_code == 504 and list(records.values())[-1].status == "cancelled"
    monkeypatch.setattr("acestep_jax.serve.waiting.TIMEOUT", 60)

    def give_up():
        try:
            client.post("/v1/audio/music/generations", json=dict(prompt="x"), timeout=0.3)
        except Exception:
            pass

    thread = threading.Thread(target=give_up)
    thread.start()
    thread.join()
    wait_until(lambda: list(records.values())[-1].status == "cancelled" and len(records) == 3)


def test_music_generations(http):
    client = http()
    asked = dict(prompt="lofi", duration=10, seed=4)
    answer = client.post("/v1/audio/music/generations", json=asked | dict(n=2)).json()
    assert [one["seed"] for one in answer["data"]] == [4, 5] and answer["data"][0]["duration"] == 10
    assert client.get(answer["data"][1]["url"]).headers["content-type"] == "audio/mpeg"
    coded = client.post("/v1/audio/music/generations", json=asked | dict(response_format="b64_json", format="wav"))
    assert soundfile.info(io.BytesIO(base64.b64decode(coded.json()["data"][0]["b64_json"]))).format == "WAV"
    for body, headers in ((asked, {"accept": "audio/mpeg"}), (asked | dict(response_format="mp3"), {})):
        sound = client.post("/v1/audio/music/generations", json=body, headers=headers)
        assert sound.headers["content-type"] == "audio/mpeg" and soundfile.info(io.BytesIO(sound.content)).frames
    assert client.post("/v1/audio/music/generations", json={}).json()["error"]["code"] == 400


def test_bytes_are_of_the_first_song_that_was_made(http):
    pipe = FakePipeline()

    def failing(seeds):
        if 4 in seeds:
            raise InputError("prompt: not this one")

    pipe.failing = failing
    asked = dict(prompt="lofi", duration=10, seed=4, n=2, response_format="wav")
    sound = http(pipe=pipe).post("/v1/audio/music/generations", json=asked)
    assert sound.status_code == 200, sound.text
    assert soundfile.info(io.BytesIO(sound.content)).format == "WAV"


def test_a_server_that_stops_does_not_cancel(http):
    """The client is told where the song will be; the next start makes it."""
    client = http(started=False)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask(client, "<prompt>lofi piano</prompt>")))
    thread.start()
    wait_until(lambda: client.service.records)
    (record,) = client.service.records.values()
    client.service.closing = True
    client.service.kept.wake()
    thread.join(10)
    assert answers[0].status_code == 503 and f"/v1/songs/{record.id}" in answers[0].text
    assert answers[0].headers["retry-after"] and not record.final


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_under_way_when_a_server_stops_is_waited_for(http, stream):
    client = http(pipe=FakePipeline(delay=0.02))
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask(client, "<prompt>lofi piano</prompt>", stream=stream)))
    thread.start()
    wait_until(lambda: [record.status for record in client.service.records.values()] == ["running"])
    client.service.close(5)
    thread.join(10)
    (answer,), (record,) = answers, client.service.records.values()
    assert answer.status_code == 200 and record.status == "done" and "data:audio/mpeg" in answer.text
