"""The channel between the processes of a slice: messages over TCP, each a line of JSON and some bytes.

It does not use device collectives, which block the devices and time out, nor JAX's key-value store, which detects the
end of another process late. TCP detects it at once, and the loss of a machine within a minute.
"""

import hmac
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from acestep_jax.errors import InputError

_LENGTH = struct.Struct(">Q")
MAX_ABOUT = 2**26  # bytes of JSON
MAX_HELLO = 2**12  # bytes of the first message
HELLO_SECONDS = 10.0  # timeout for the whole first message of a new connection
GONE_SECONDS = 60  # without a reply, after which the other machine is considered lost
JOIN_SECONDS = 300.0  # timeout for all processes to connect, the same as JAX's


class Message(NamedTuple):
    """A message: a kind, values that JSON can hold, and bytes."""

    kind: str
    about: dict[str, Any]
    blobs: list[bytes]


class Channel:
    """A connection to another process. Any thread may send, one receives. An OSError means that the other process is
    gone."""

    def __init__(self, sock: socket.socket):
        self._socket = sock
        self._sending = threading.Lock()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Keep-alive works only while no data are in flight; otherwise TCP_USER_TIMEOUT, in milliseconds, applies.
        times = dict(TCP_KEEPIDLE=GONE_SECONDS // 2, TCP_KEEPINTVL=GONE_SECONDS // 6, TCP_KEEPCNT=3)
        for name, value in dict(times, TCP_USER_TIMEOUT=1000 * GONE_SECONDS).items():
            if hasattr(socket, name):  # Linux; the first three on current macOS
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, kind: str, about: dict[str, Any] | None = None, blobs: Sequence[bytes] = ()) -> None:
        """Send a message."""
        head = json.dumps([kind, about or {}, [len(blob) for blob in blobs]]).encode()
        with self._sending:
            self._socket.sendall(_LENGTH.pack(len(head)) + head)
            for blob in blobs:
                self._socket.sendall(blob)

    def receive(self) -> Message:
        """Return the next message.

        Raises:
            OSError: if the other process is gone.
        """
        self._socket.settimeout(None)
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > MAX_ABOUT:
            raise ConnectionError("no message of this program")
        kind, about, lengths = json.loads(self._read(length))
        return Message(kind, about, [bytes(self._read(n)) for n in lengths])

    def hello(self, seconds: float) -> dict[str, Any]:
        """Return the contents of the first message. Its sender is not authenticated yet.

        Raises:
            OSError, ValueError, RecursionError: if it is not a hello, or does not arrive in time.
        """
        end = time.monotonic() + seconds
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, end))
        if length > MAX_HELLO:
            raise ConnectionError("no message of this program")
        found = json.loads(self._read(length, end))
        if not isinstance(found, list) or found[::2] != ["hello", []] or not isinstance(found[1], dict):
            raise ConnectionError("no hello")
        self._socket.settimeout(None)
        return found[1]

    def close(self) -> None:
        """Close the connection; a receiver gets an error."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # closed already
            pass
        self._socket.close()

    def _read(self, count: int, end: float | None = None) -> bytearray:
        data = bytearray(count)
        view, read = memoryview(data), 0
        while read < count:
            if end is not None:  # for all of it, even if single bytes keep arriving
                if (left := end - time.monotonic()) <= 0:
                    raise TimeoutError("nothing whole has come in time")
                self._socket.settimeout(left)
            got = self._socket.recv_into(view[read:])
            if not got:
                raise ConnectionResetError("the other process is gone")
            read += got
        return data


class LeaderSocket:
    """The leader's listening socket. Followers authenticate with a key that only the processes of this run know.

    Args:
        host: address at which the others reach this process; if it is a loopback address, other machines cannot.
    """

    def __init__(self, host: str):
        self.key = secrets.token_hex(32)
        if host in ("localhost", "127.0.0.1", "::1"):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, 0), family=family)
        elif socket.has_dualstack_ipv6():
            self._socket = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            self._socket = socket.create_server(("", 0))

    @property
    def port(self) -> int:
        """The port."""
        return self._socket.getsockname()[1]

    def accept(self, count: int, seconds: float = JOIN_SECONDS) -> dict[int, Channel]:
        """Return the connections to processes 1 to `count`, and stop listening.

        Raises:
            InputError: if they have not all connected in time.
        """
        found: dict[int, Channel] = {}
        end = time.monotonic() + seconds
        with self._socket:
            while len(found) < count:
                self._socket.settimeout(max(0.01, end - time.monotonic()))
                try:
                    sock, _ = self._socket.accept()
                except TimeoutError:
                    missing = ", ".join(str(i) for i in range(1, count + 1) if i not in found)
                    raise InputError(f"distributed: process {missing} has not connected within {seconds:g} s") from None
                channel = Channel(sock)
                try:
                    hello = channel.hello(min(HELLO_SECONDS, max(0.0, end - time.monotonic())))
                    known = hmac.compare_digest(str(hello.get("key")).encode(), self.key.encode())
                except (OSError, ValueError, RecursionError):  # not one of our processes
                    channel.close()
                    continue
                index = hello.get("index")
                if not known or not isinstance(index, int) or not 1 <= index <= count or index in found:
                    channel.close()
                    continue
                found[index] = channel
        return found


def connect(host: str, port: int, key: str, index: int, seconds: float = JOIN_SECONDS) -> Channel:
    """Return the connection to the leader.

    Raises:
        InputError: if it cannot be reached.
    """
    try:
        channel = Channel(socket.create_connection((host, port), timeout=seconds))
        channel.send("hello", dict(key=key, index=index))
    except OSError as error:
        raise InputError(f"distributed: process 0 cannot be reached at {host}:{port} ({error})") from None
    return channel
