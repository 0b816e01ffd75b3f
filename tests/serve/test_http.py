"""Polls that are answered as soon as they are read: on connections of sockets, as clients keep them."""

import gc
import json
import socket
import time

import pytest

from acestep_jax.serve.polls import Polls
from acestep_jax.serve.security import Guard
from tests.serve.conftest import KEY
from tests.serve.fake import FakePipeline, wait_until
from tests.serve.test_http_native import SONG

pytest.importorskip("httptools")


class Connection:
    """One connection; answers are read one by one."""

    def __init__(self, client):
        self.host = f"127.0.0.1:{client.base_url.port}"
        self.socket = socket.create_connection(("127.0.0.1", client.base_url.port), timeout=10)
        self.left = b""

    def request(self, target, method="GET", body=None, **headers):
        own = {"Host": self.host, **{name.replace("_", "-"): value for name, value in headers.items()}}
        if body is not None:
            own |= {"Content-Type": "application/json", "Content-Length": len(body)}
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in own.items())]
        return "\r\n".join([*lines, "", ""]).encode() + (body or b"")

    def send(self, data):
        self.socket.sendall(data)
        return self

    def answer(self):
        """Return the status, the headers and the JSON of the next answer."""
        while b"\r\n\r\n" not in self.left:
            self._more()
        head, _, self.left = self.left.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        length = int(headers.get("content-length", 0))
        while len(self.left) < length:
            self._more()
        body, self.left = self.left[:length], self.left[length:]
        return int(first.split()[1]), headers, json.loads(body) if body else None

    def _more(self):
        found = self.socket.recv(65536)
        assert found, "the server has closed the connection"
        self.left += found


@pytest.fixture
def server(http, monkeypatch):
    """A function that makes a server with one finished song: (connection, id, which polls were answered at once)."""

    def make(**options):
        client = http(**options)
        record_id = client.post("/v1/songs", json=SONG).json()["id"]
        wait_until(lambda: client.service.records[record_id].final)
        quick, counted = Polls._respond_song, []
        monkeypatch.setattr(
            Polls, "_respond_song", lambda self, record, etag: counted.append(record) or quick(self, record, etag)
        )
        connection = Connection(client)
        connection.client = client
        return connection, record_id, counted

    return make


def test_the_same_bytes_again_and_again(server):
    connection, record_id, counted = server()
    ask = connection.request(f"/v1/songs/{record_id}")
    for _ in range(3):
        status, headers, found = connection.send(ask).answer()
        assert status == 200 and found["id"] == record_id and found["status"] == "done"
        assert headers["x-content-type-options"] == "nosniff" and "default-src" in headers["content-security-policy"]
        assert headers["etag"] and headers["cache-control"] == "private, no-cache" and headers["date"]
    assert len(counted) == 3
    same = connection.request(f"/v1/songs/{record_id}", If_None_Match=headers["etag"])
    for _ in range(2):
        status, headers, found = connection.send(same).answer()
        assert status == 304 and found is None and headers["etag"]
    assert connection.client.delete(f"/v1/songs/{record_id}").status_code == 200
    for _ in range(2):
        status, _, found = connection.send(ask).answer()
        assert status == 404 and found["detail"] == "there is no song of that id"


def test_several_requests_at_once_are_answered_in_order(server):
    connection, record_id, _ = server()
    ask, other = connection.request(f"/v1/songs/{record_id}"), connection.request("/ready")
    for together, expected in (
        (ask + ask, ["id", "id"]),
        (ask + other + ask, ["id", "ready", "id"]),
        (other + ask, ["ready", "id"]),
        (ask, ["id"]),
    ):
        connection.send(together)
        assert [name in connection.answer()[2] for name in expected] == [True] * len(expected)


def test_requests_in_pieces(server):
    connection, record_id, counted = server()
    ask = connection.request(f"/v1/songs/{record_id}")
    for place in (3, 40, len(ask) - 1):
        connection.send(ask[:place])
        wait_until(lambda: connection.socket.send(b"") == 0)
        assert connection.send(ask[place:]).answer()[0] == 200
    body = json.dumps(dict(task_id_list=[record_id])).encode()
    for _ in range(2):
        whole = connection.request("/query_result", "POST", body)
        assert connection.send(whole).answer()[2]["data"][0]["status"] == 1
    for place in (len(whole) - len(body), len(whole) - 5):
        connection.send(whole[:place])
        assert connection.send(whole[place:]).answer()[2]["data"][0]["status"] == 1
    job = record_id.replace("-", "")[:16]
    assert connection.send(connection.request(f"/job?id={job}")).answer()[2] == dict(status="done")


def test_a_body_that_looks_like_a_poll_is_none(server):
    """The parser waits for a body, which happens to be what this connection was polled with."""
    connection, record_id, counted = server()
    ask = connection.request(f"/v1/songs/{record_id}")
    assert connection.send(ask).answer()[0] == 200
    head = connection.request("/v1/songs", "POST", ask)[: -len(ask)]
    connection.send(head)
    status, _, found = connection.send(ask).answer()
    assert status == 400 and "not JSON" in found["detail"] and len(counted) == 1
    assert connection.send(ask).answer()[2]["id"] == record_id


def test_who_may_not_ask_is_told_so_on_the_same_connection(server, monkeypatch):
    connection, record_id, counted = server(key=KEY)
    path = f"/v1/songs/{record_id}"
    good = connection.request(path, Authorization=f"Bearer {KEY}")
    for asked, expected in (
        (good, 200),
        (connection.request(path), 401),
        (good, 200),
        (connection.request(path, Authorization="Bearer no"), 401),
        (good.replace(connection.host.encode(), b"evil.example"), 421),
        (connection.request(path, Authorization=f"Bearer {KEY}", Origin="http://evil.example"), 200),
        (good, 200),
    ):
        status, headers, _ = connection.send(asked).answer()
        assert status == expected and "access-control-allow-origin" not in headers
    assert len(counted) == 3  # what has an origin, or is refused, goes to the application


def test_a_cookie_ends_though_the_bytes_are_the_same(server, monkeypatch):
    connection, record_id, _ = server(key=KEY)
    cookie = connection.client.post("/v1/session", content=KEY).headers["set-cookie"].partition(";")[0]
    ask = connection.request(f"/v1/songs/{record_id}", Cookie=cookie)
    assert [connection.send(ask).answer()[0] for _ in range(2)] == [200, 200]
    later = time.time() + 2 * 24 * 3600
    monkeypatch.setattr("acestep_jax.serve.security.time.time", lambda: later)
    assert connection.send(ask).answer()[0] == 401


def test_what_fails_is_answered_by_the_application(server, monkeypatch, caplog):
    connection, record_id, _ = server()
    monkeypatch.setattr(Guard, "_problem", lambda *_: 1 / 0)
    connection.send(connection.request("/ready"))
    assert connection.socket.recv(100).startswith(b"HTTP/1.1 500")  # which fails, too
    assert "could not be answered at once" in caplog.text


def test_what_changes_is_told_at_once(server):
    connection, record_id, _ = server()
    ask = connection.request(f"/v1/songs/{record_id}")
    assert not connection.send(ask).answer()[2]["songs"][0]["favourite"]
    connection.client.put(f"/v1/songs/{record_id}/0/favourite")
    assert connection.send(ask).answer()[2]["songs"][0]["favourite"]


def protocol_of(ask):
    """Return what reads the connection on which this was asked last."""
    kinds = [one for one in gc.get_objects() if type(one).__name__ == "Protocol"]
    (found,) = (one for one in kinds if hasattr(one, "_cache") and one._cache.data == ask)
    return found


@pytest.mark.parametrize("more", [{}, dict(Connection="close")], ids=["held", "passed on"])
def test_what_comes_with_a_poll_is_waited_for(server, more):
    """The time of silence does not begin with the answer to the poll."""
    pipe = FakePipeline()
    connection, record_id, _ = server(pipe=pipe, planner="acestep-5Hz-lm-tiny")
    ask = connection.request(f"/v1/songs/{record_id}")
    connection.send(ask).answer()
    protocol_of(ask).timeout_keep_alive, pipe.planner.delay = 0.2, 0.03
    slow = connection.request("/v1/plans", "POST", b'{"prompt": "x", "audio_duration": 10}', **more)
    began = time.monotonic()
    connection.send(ask + slow)
    assert connection.answer()[2]["id"] == record_id
    status, _, found = connection.answer()
    assert status == 200 and found["caption"] and time.monotonic() - began > 0.5


@pytest.mark.parametrize("target", ["http://x:99999/", "http://localhost"])
def test_an_address_of_no_meaning_before_its_body(server, target):
    connection, _, _ = server()
    ask = connection.request(target, "POST", b"{}")
    connection.send(ask[:-2])
    assert connection.socket.recv(100).startswith(b"HTTP/1.1 400")


def test_a_connection_that_is_silent_is_closed(server):
    """Its timer is of the first answer, and begins anew while the same bytes come."""
    connection, record_id, _ = server()
    ask = connection.request(f"/v1/songs/{record_id}")
    connection.send(ask).answer()
    protocol = protocol_of(ask)
    protocol.timeout_keep_alive = 0.3
    connection.send(ask).answer()
    protocol.loop.call_soon_threadsafe(protocol.timeout_keep_alive_handler)
    assert connection.send(ask).answer()[0] == 200
    began = time.monotonic()
    assert connection.socket.recv(10) == b"" and 0.2 < time.monotonic() - began < 5
