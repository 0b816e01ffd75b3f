"""Who may ask, and what cannot be reached: attacks over real HTTP, with raw sockets where a client would mend them."""

import json
import os
import resource
import socket
import time

import pytest

from acestep_jax.serve.inputs import InputFolder
from acestep_jax.serve.submission import Limits
from tests.serve.conftest import KEY
from tests.serve.test_http_native import SONG, wav


def raw(client, text):
    """Return the answer to a request as it is written."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=5) as connection:
        connection.sendall(text if isinstance(text, bytes) else text.encode())
        answer = b""
        while block := connection.recv(65536):
            answer += block
        return answer.decode("utf-8", "replace")


START = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"POST /v1/songs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"


@pytest.mark.parametrize(
    ("start", "block"),
    [
        (b"GET /", b"x" * 2**16),
        (START + b"x: ", b"x" * 2**16),
        (START, b"x: y\r\n" * 2**13),
        (START, b"x" * 2**16),
        (CHUNKED + b"0\r\n", b"x: y\r\n" * 2**13),
        (CHUNKED + b"1;", b"x" * 2**16),
    ],
    ids=["path", "one header", "many headers", "name", "trailers", "extension of a chunk"],
)
def test_a_head_of_50_mb_is_cut_off(http, start, block):
    """So that who has no key cannot fill memory."""
    client = http(key=KEY)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sent, answer = 0, b""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=5) as connection:
        try:
            connection.sendall(start)
            while sent < 50e6:
                connection.sendall(block)
                sent += len(block)
        except OSError:  # closed
            pass
        assert sent < 30e6  # what the kernel holds
        try:
            answer = connection.recv(64)
        except OSError:  # closed before all of it was read, so that the answer may be lost
            pass
    assert not answer or answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 401"))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 30  # MB
    assert client.get("/v1/songs").status_code == 200


def test_heads_and_bodies_up_to_the_limits_pass(http):
    client = http(started=False)
    for _ in range(3):  # by one connection
        assert client.get("/health", headers={"x": "y" * 40_000}).status_code == 200
    pieces = [json.dumps(SONG).encode(), *[b" " * 1000] * 300]
    assert client.post("/v1/songs", content=iter(pieces)).status_code == 202
    assert client.post("/v1/songs", content=b"".join(pieces)).status_code == 202


def get(client, path, host=None):
    """Return the answer to a path as it is written."""
    return raw(
        client, f"GET {path} HTTP/1.1\r\nHost: {host or client.base_url.netloc.decode()}\r\nConnection: close\r\n\r\n"
    )


def status(answer):
    return int(answer.split()[1])


def test_a_key_is_needed_but_for_what_is_open(http):
    client = http(key=KEY)
    del client.headers["authorization"]
    for path in (
        "/v1/songs",
        "/metrics",
        "/v1/server",
        "/v1/stats",
        "/v1/models",
        "/props",
        "/v1/audio?path=x",
        "/job?id=x",
    ):
        assert client.get(path).status_code == 401, path
    for path in ("/v1/songs", "/v1/chat/completions", "/v1/audio/music/generations", "/synth", "/lm", "/release_task"):
        assert client.post(path, json={}).status_code == 401, path
    for path in ("/health", "/ready", "/docs", "/openapi.json"):
        assert client.get(path).status_code in (200, 503), path
    for value in (KEY, f"Bearer {KEY}", f"bearer {KEY}"):
        assert client.get("/v1/songs", headers={"authorization": value}).status_code == 200
    for value in ("", "Bearer", "Bearer x", KEY[:-1], KEY + "x", "Basic eA==", "Bearer \xff"):
        response = client.get("/v1/songs", headers={"authorization": value.encode("latin-1")})
        assert response.status_code == 401 and KEY not in response.text


def test_the_key_may_come_in_the_body_of_early_clients(http):
    client = http(key=KEY)
    del client.headers["authorization"]
    body = dict(prompt="x", audio_duration=10)
    assert client.post("/release_task", json=body).json()["detail"] == "Missing ai_token or Authorization header"
    assert client.post("/release_task", json=body | dict(ai_token="no")).json()["detail"] == "Invalid ai_token"
    assert client.post("/release_task", json=body | dict(ai_token=KEY)).json()["data"]["status"] == "queued"
    wrong = client.post("/release_task", json=body | dict(ai_token=KEY), headers={"authorization": "Bearer no"})
    assert wrong.status_code == 401 and wrong.json()["detail"] == "Invalid API key"


def test_a_page_trades_the_key_for_a_cookie(http):
    client = http(key=KEY)
    del client.headers["authorization"]
    assert client.post("/v1/session", content="wrong").status_code == 401
    response = client.post("/v1/session", content=KEY)
    cookie = response.headers["set-cookie"]
    assert response.status_code == 204 and "HttpOnly" in cookie and "SameSite=strict" in cookie and KEY not in cookie
    assert client.get("/v1/songs").status_code == 200
    client.cookies.clear()
    name, _, value = cookie.partition(";")[0].partition("=")
    until, _, signature = value.partition(".")
    for forged in (
        f"{int(until) + 9}.{signature}",
        f"{int(time.time()) - 9}.{signature}",
        "x",
        f"{until}.",
        f"²{value}",
    ):
        assert client.get("/v1/songs", headers={"cookie": f"{name}={forged}".encode()}).status_code == 401


def test_no_header_opens_a_path(http):
    """Neither a Host that holds a path, nor what cannot be parsed, which is no error of the server."""
    client = http(key=KEY)
    del client.headers["authorization"]
    for host in ("localhost/health?", "localhost/health", "[", "localhost:x", "a b"):
        assert status(get(client, "/v1/songs", host)) in (400, 421), host
    assert client.post("/v1/songs", json={}, headers={"origin": "http://["}).status_code in (401, 403)


def test_uploads_need_the_key_first(http):
    """Also in the forms and on the paths that may carry the key in the body."""
    client = http(key=KEY)
    del client.headers["authorization"]
    kind = {"content-type": "Multipart/form-data; boundary=x"}
    assert client.post("/release_task", content=b"--x--", headers=kind).status_code == 401
    assert client.post("/v1/session", content=(b"x" * 1000 for _ in range(100))).status_code == 413


def test_the_cookie_is_good_for_the_authors_api(http):
    client = http(key=KEY)
    del client.headers["authorization"]
    assert client.post("/v1/session", content=KEY).status_code == 204
    assert client.post("/query_result", json={"task_id_list": []}).status_code == 200


def test_links_are_the_same_for_an_hour_and_valid_for_a_day(monkeypatch):
    pytest.importorskip("fastapi")
    from acestep_jax.serve.security import Keys

    keys, now = Keys(KEY, b"secret"), [1_800_000_000.0]  # the beginning of an hour
    monkeypatch.setattr("time.time", lambda: now[0])
    links = []
    for seconds in (1, 3600, 3601):
        now[0] = 1_800_000_000.0 + seconds
        links.append(keys.link("/v1/songs/x/0.flac"))
    assert links[0] == links[1] != links[2]
    path, _, query = links[1].partition("?")
    now[0] += 24 * 3600 - 1
    assert keys.knows_link(path, query)
    now[0] += 3600
    assert not keys.knows_link(path, query)


def test_links_are_signed(http, finished, monkeypatch):
    client = http(key=KEY)
    record = finished(client, client.post("/v1/songs", json=SONG).json()["id"])
    link = record["songs"][0]["audio"]
    path, _, query = link.partition("?")
    task = json.loads(client.post("/query_result", json=dict(task_id_list=[record["id"]])).json()["data"][0]["result"])
    del client.headers["authorization"]
    assert client.get(link).status_code == 200 and client.get(task[0]["file"]).status_code == 200
    for wrong in (
        path,
        f"{path}?{query[:-1]}",
        link.replace("0.flac", "0.wav"),
        link.replace("exp=1", "exp=2"),
        f"{link}x",
    ):
        assert client.get(wrong).status_code == 401, wrong
    assert client.get(f"/v1/songs?{query}").status_code == 401
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 25 * 3600)
    assert client.get(link).status_code == 401


def test_a_host_that_is_not_ours(http):
    """As by DNS rebinding: the browser of a user asks for evil.example, which has become 127.0.0.1."""
    client = http(hosts=["music.example"])
    for host in (
        "evil.example",
        "evil.example:8001",
        "",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "a@localhost",
    ):
        assert status(get(client, "/v1/songs", host or " ")) == 421, host
    port = client.base_url.port
    for host in ("localhost", f"LOCALHOST:{port}", "127.0.0.1", "[::1]:8001", "music.example", "10.1.2.3"):
        assert status(get(client, "/v1/songs", host)) == 200, host
    assert status(raw(client, "GET /v1/songs HTTP/1.0\r\n\r\n")) == 421


def test_an_origin_that_is_not_ours(http):
    client = http(origins=["http://studio.example"])
    for origin in (
        "http://evil.example",
        "null",
        "http://localhost:1",
        f"https://127.0.0.1.evil:{client.base_url.port}",
    ):
        for send in (client.post, client.delete):
            response = send("/v1/songs/x", headers={"origin": origin})
            assert response.status_code == 403 and "access-control-allow-origin" not in response.headers
        assert "access-control-allow-origin" not in client.get("/health", headers={"origin": origin}).headers
    own = f"http://{client.base_url.netloc.decode()}"
    assert client.post("/v1/songs", json=SONG, headers={"origin": own}).status_code == 202
    other = client.post("/v1/songs", json=SONG, headers={"origin": "http://studio.example"})
    assert other.status_code == 202 and other.headers["access-control-allow-origin"] == "http://studio.example"
    asked = {"origin": "http://studio.example", "access-control-request-method": "POST"}
    flight = client.options("/v1/songs", headers=asked)
    assert flight.status_code == 204 and "authorization" in flight.headers["access-control-allow-headers"]
    assert "if-none-match" in flight.headers["access-control-allow-headers"]
    assert "etag" in flight.headers["access-control-expose-headers"]
    assert client.options("/v1/songs", headers=asked | {"origin": "http://evil.example"}).status_code == 403


@pytest.mark.parametrize(
    "path",
    [
        *("../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "%2Fetc%2Fpasswd"),
        *(
            "..\\..\\etc\\passwd",
            "x%00.flac",
            "%00",
            "....//....//etc/passwd",
            "%252e%252e%252fetc%252fpasswd",
            "~root",
        ),
        *("file:///etc/passwd", "secret", "songs/../secret", "removed", "C:\\windows", "{data}/secret"),
        *("{data}/songs/../secret", "{data}/songs/{id}/../../secret", "{data}/songs/{id}/request.json", "{id}/0.flac/"),
        *("{ID}/0.flac", "{id}/00.flac%0a", "{id}/link.flac", "{id}/-1.flac"),
    ],
)
def test_no_path_of_a_client_is_opened(http, finished, path):
    client = http()
    record = finished(client, client.post("/v1/songs", json=SONG).json()["id"])
    folder = client.service.store.folder
    os.symlink("/etc/passwd", folder / "songs" / record["id"] / "link.flac")
    path = path.format(data=folder, id=record["id"], ID=record["id"].upper())
    for place in (f"/v1/audio?path={path}", f"/v1/songs/{record['id']}/{path}", f"/v1/songs/{path}", f"/static/{path}"):
        answer = get(client, place.replace(" ", "%20"))
        assert status(answer) in (400, 403, 404, 405, 422), (place, answer[:200])
        assert "root:" not in answer and client.service.store.secret().hex() not in answer
    for name in ("src_audio", "reference_audio"):
        asked = SONG | {"task_type": "cover", name: path}
        assert client.post("/v1/songs", json=asked).status_code == 400
    asked = dict(prompt="x", task_type="cover", src_audio_path=path)
    assert client.post("/release_task", json=asked).status_code == 400
    assert set(client.service.records) == {record["id"]}


def test_the_song_itself_is_reached_by_its_path(http, finished):
    client = http()
    record = finished(client, client.post("/v1/songs", json=SONG).json()["id"])
    for path in (f"{client.service.store.songs}/{record['id']}/0.flac", f"{record['id']}/0.mp3"):
        assert client.get("/v1/audio", params=dict(path=path)).status_code == 200
    link = client.service.store.songs / record["id"] / "0.wav"
    os.symlink("/etc/passwd", link)
    assert client.get(f"/v1/songs/{record['id']}/0.wav").status_code == 404


def test_bodies_that_are_too_large(http):
    client = http(limits=Limits(upload_bytes=3 * 2**20), started=False)
    host = client.base_url.netloc.decode()
    head = f"POST /v1/songs HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    head += "Content-Type: multipart/form-data; boundary=b\r\n"
    told = raw(client, head + "Content-Length: 300000000\r\n\r\n")  # refused before a byte of it is sent
    assert status(told) == 413
    assert status(raw(client, head + "Content-Length: 9999999999999999999999\r\n\r\n")) in (400, 413)

    def pieces():
        yield b'--b\r\nContent-Disposition: form-data; name="src_audio"; filename="a.wav"\r\n\r\n'
        for _ in range(40):
            yield bytes(2**18)

    kind = {"content-type": "multipart/form-data; boundary=b"}
    assert client.post("/v1/songs", content=pieces(), headers=kind).status_code == 413
    assert client.post("/v1/songs", data=dict(request="x" * (2**20 + 2**17)), files={"a": b""}).status_code == 413
    many = {f"f{i}": "x" for i in range(200)}
    assert client.post("/v1/songs", data=many, files={"a": b""}).status_code == 413
    files = [("src_audio", ("a.wav", b"x")) for _ in range(9)]
    assert client.post("/v1/songs", data=dict(request="{}"), files=files).status_code == 413
    assert client.post("/release_task", data=many).status_code == 413
    assert not list(client.service.store.incoming.iterdir())


def test_bodies_that_are_no_bodies(http):
    client = http(started=False)
    json_kind, form = {"content-type": "application/json"}, {"content-type": "multipart/form-data; boundary=b"}
    for path in ("/v1/songs", "/release_task", "/query_result", "/synth", "/lm", "/v1/chat/completions"):
        for content in (b"", b"{", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"null", b"1e999", b"NaN"):
            assert client.post(path, content=content, headers=json_kind).status_code == 400, (path, content[:9])
        for content in (
            b"",
            b"--b",
            b"--b\r\n\r\n\r\n--b--",
            b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
        ):
            found = client.post(path, content=content, headers=form).status_code
            assert found == 400 or (found, path) == (200, "/query_result"), (path, content)  # polls for no task
        assert client.post(path, content=b"<x/>", headers={"content-type": "text/xml"}).status_code == 415


def test_a_body_that_does_not_come(http, monkeypatch):
    monkeypatch.setattr("acestep_jax.serve.security.BODY_SECONDS", 0.2)
    client = http(started=False)
    host = client.base_url.netloc.decode()
    head = f"POST /v1/songs HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
    assert status(raw(client, head + 'Connection: close\r\n\r\n{"prompt":')) == 408


def test_files_of_a_folder_may_be_named_and_no_others(http, finished, tmp_path):
    folder = tmp_path / "inputs"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.wav").write_bytes(wav(4.0))
    (tmp_path / "secret.wav").write_bytes(wav(4.0))
    (folder / "link.wav").symlink_to(tmp_path / "secret.wav")
    (folder / "out").symlink_to(tmp_path)
    (folder / "inside.wav").symlink_to(folder / "sub" / "a.wav")
    os.mkfifo(folder / "pipe")
    client = http(inputs=InputFolder(folder))
    asked = dict(prompt="x", task_type="repaint", repainting_start=1.0, repainting_end=2.0, num_inference_steps=1)
    bad = [
        "../secret.wav",
        str(tmp_path / "secret.wav"),
        "link.wav",
        "out/secret.wav",
        "sub",
        "pipe",
        "a\0b",
        "",
        "/etc/passwd",
    ]
    for path in [*bad, "sub/../../secret.wav", "~/x", "nothing.wav", "x" * 5000, "%2e%2e/secret.wav", "..\\secret.wav"]:
        answers = [client.post("/v1/songs", json=asked | dict(src_audio=path))]
        if path:  # an empty path is none in the authors' protocol
            repaint = dict(prompt="x", task_type="repaint", src_audio_path=path)
            answers.append(client.post("/release_task", json=repaint))
        for response in answers:
            told = str(tmp_path) in response.text and str(tmp_path) not in path
            assert response.status_code == 400 and not told, response.text
    assert not list(client.service.store.incoming.iterdir())
    for path in ("sub/a.wav", str(folder / "sub" / "a.wav"), "inside.wav"):
        record = finished(client, client.post("/v1/songs", json=asked | dict(src_audio=path)).json()["id"])
        assert record["status"] == "done" and record["uploads"] == ["src_audio"]
    released = client.post("/release_task", json=dict(prompt="x", task_type="repaint", src_audio_path="sub/a.wav"))
    assert released.status_code == 200


def test_a_body_that_comes_drop_by_drop(http, monkeypatch):
    """Each piece comes in time, but all of them together do not."""
    monkeypatch.setattr("acestep_jax.serve.security.BODY_SECONDS", 0.4)
    client = http(started=False)

    def pieces():
        for _ in range(30):
            yield b" "
            time.sleep(0.05)

    began = time.monotonic()
    response = client.post("/v1/songs", content=pieces(), headers={"content-type": "application/json"})
    assert response.status_code == 408 and time.monotonic() - began < 5


def test_large_bodies_wait_for_each_other(http, monkeypatch):
    monkeypatch.setattr("acestep_jax.serve.security.LARGE_BODIES", 1)
    monkeypatch.setattr("acestep_jax.serve.security.LARGE_BODY", 1000)
    client = http(started=False)
    monkeypatch.setattr("acestep_jax.serve.security.BODY_SECONDS", 1.0)
    host, text = client.base_url.netloc.decode(), json.dumps(SONG) + " " * 200_000
    kind = {"content-type": "application/json"}
    with socket.create_connection(host.split(":")) as other:
        head = (
            f"POST /v1/songs HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 9000\r\n\r\n"
        )
        other.sendall(head.encode() + bytes(5000))
        time.sleep(0.2)
        busy = client.post("/v1/songs", content=text, headers=kind)
        small = client.post("/v1/songs", json=SONG)
    assert busy.status_code in (202, 429) and small.status_code == 202
    assert client.post("/v1/songs", content=text, headers=kind).status_code == 202


def test_nobody_without_the_key_takes_a_place_of_large_bodies(http, monkeypatch):
    monkeypatch.setattr("acestep_jax.serve.security.LARGE_BODIES", 1)
    monkeypatch.setattr("acestep_jax.serve.security.LARGE_BODY", 1000)
    client = http(key=KEY, started=False)
    monkeypatch.setattr("acestep_jax.serve.security.BODY_SECONDS", 1.0)
    host, kind = client.base_url.netloc.decode(), {"content-type": "application/json"}
    with socket.create_connection(host.split(":"), timeout=5) as other:
        other.sendall(
            f"POST /release_task HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            "Content-Length: 9000\r\n\r\n".encode()
            + bytes(5000)
        )
        answer = other.recv(4096).decode()  # at once, and not when the body has not come in time
        assert status(answer) == 413
        text = json.dumps(SONG) + " " * 200_000
        assert client.post("/v1/songs", content=text, headers=kind).status_code == 202
    small = json.dumps(SONG | dict(ai_token=KEY))
    del client.headers["authorization"]
    assert client.post("/release_task", content=small, headers=kind).status_code == 200


def test_pages_may_load_nothing_from_elsewhere(http):
    client = http(started=False)
    assert "default-src 'self'" in client.get("/v1/server").headers["content-security-policy"]
    assert "content-security-policy" not in client.get("/docs").headers  # which loads its scripts from the network


def test_a_file_that_cannot_be_read_is_told_without_its_name(http, finished, monkeypatch):
    client = http()
    record = client.post("/v1/songs", json=SONG).json()
    finished(client, record["id"])

    def broken(*_):
        raise PermissionError(13, "Permission denied", str(client.service.store.folder))

    monkeypatch.setattr("acestep_jax.serve.sounds.convert", broken)
    response = client.get(f"/v1/songs/{record['id']}/0.ogg")
    assert response.status_code == 503 and response.headers["retry-after"]
    assert str(client.service.store.folder) not in response.text


@pytest.mark.parametrize(
    "name", ["bpm", "seed", "audio_duration", "guidance_scale", "timesteps", "variations", "prompt"]
)
def test_odd_values_are_never_an_error_of_the_server(http, name):
    client = http(started=False)
    odd = [None, True, -1, 0, 1.5, 1e308, 10**400, "", "x", "\ud800", "\0", [], [[]], {}, [None], ["x"], [1e3], "٣"]
    for value in odd:
        content = json.dumps(SONG | {name: value})
        response = client.post("/v1/songs", content=content, headers={"content-type": "application/json"})
        assert response.status_code in (202, 400), (value, response.text)
        field = {"audio_duration": "duration", "num_inference_steps": "inference_steps"}.get(name, name)
        for path, body in (
            ("/release_task", dict(prompt="x", duration=10, use_random_seed=False) | {field: value}),
            ("/synth", dict(caption="x", duration=10) | {field: value}),
        ):
            content = json.dumps(body)
            response = client.post(path, content=content, headers={"content-type": "application/json"})
            assert response.status_code in (200, 400), (path, value, response.text)
        for record in list(client.service.records.values()):
            client.service.delete(record)
