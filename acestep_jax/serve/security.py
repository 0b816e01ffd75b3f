"""Access control: the key, hosts and origins, signed links, and limits for large or slow bodies.

Every page open in the browser can reach a server on the same machine. So requests must name this host (against DNS
rebinding), and requests that change something must not come from another origin.
"""

import asyncio
import functools
import hashlib
import hmac
import ipaddress
import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from acestep_jax.serve.errors import error_body
from acestep_jax.serve.http import RawRequest, RawResponse

COOKIE = "acestep-session"
LINK_SECONDS, LINK_STEP = 24 * 3600, 3600
BODY_SECONDS = 60.0  # for a body, plus the time it takes at `BODY_RATE`
BODY_RATE = 2**18  # minimum bytes per second of a large body
LARGE_BODY, LARGE_BODIES = 2**20, 4  # bytes, and how many larger bodies are read at once
OPEN = ("/health", "/ready", "/docs", "/openapi.json", "/v1/session")  # accessible without a key
OPEN_FOLDERS = ("/static/",)
FOREIGN_SCRIPTS = ("/docs",)  # loads scripts from the network
CSP = b"default-src 'self'; media-src 'self' blob:; img-src 'self' blob: data:; base-uri 'none'; frame-ancestors 'none'"
SAFE = b"x-content-type-options: nosniff\r\ncontent-security-policy: " + CSP + b"\r\n"
READING = ("GET", "HEAD", "OPTIONS")
LATE_KINDS = ("", "application/json", "application/x-www-form-urlencoded")  # uploads need the key first
HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([\w.-]+))(?::\d{1,5})?", re.ASCII)
ALLOWED = "authorization, content-type, range, last-event-id, if-none-match, x-api-key"
EXPOSED = "content-range, content-length, retry-after, etag, x-acestep-ignored"


class Keys:
    """The server's key, session cookies for the page, and signed links to audio that work without a key.

    Args:
        key: the key; None: access is open.
        secret: key for signing links and cookies.
    """

    def __init__(self, key: str | None, secret: bytes):
        self.key = key
        self._secret = secret + (key or "").encode()

    def accepts(self, given: str | None) -> bool:
        """Return whether this is the key, comparing in constant time."""
        if self.key is None:
            return True
        return given is not None and hmac.compare_digest(given.encode(), self.key.encode())

    def session(self) -> str:
        """Return the value of a cookie that replaces the key for a day."""
        until = int(time.time()) + LINK_SECONDS
        return f"{until}.{self._signature('session', until)}"

    def knows_session(self, value: str | None) -> bool:
        """Return whether a cookie comes from `session` and has not expired."""
        until, _, signature = (value or "").partition(".")
        return self._is_signed("session", until, signature)

    def link(self, path: str) -> str:
        """Return a path with a signature that is valid for at least a day, or the path itself if there is no key.

        Signatures expire on the hour, so responses within the same hour have the same links, and so the same ETag.
        """
        if self.key is None:
            return path
        until = -(-(int(time.time()) + LINK_SECONDS) // LINK_STEP) * LINK_STEP
        return f"{path}{'&' if '?' in path else '?'}exp={until}&sig={self._signature(path, until)}"

    def knows_link(self, path: str, query: str) -> bool:
        """Return whether a path comes from `link` and has not expired."""
        rest, _, last = query.partition("exp=")
        values = parse_qs("exp=" + last)
        signed = path + (f"?{rest.rstrip('&')}" if rest.rstrip("&") else "")
        return self._is_signed(signed, *(values.get(name, [""])[0] for name in ("exp", "sig")))

    def _signature(self, subject: str, until: int) -> str:
        return hmac.new(self._secret, f"{subject}\n{until}".encode(), hashlib.sha256).hexdigest()

    def _is_signed(self, subject: str, until: str, signature: str) -> bool:
        if not (until.isascii() and until.isdigit() and len(until) < 12) or int(until) < time.time():
            return False
        return hmac.compare_digest(self._signature(subject, int(until)).encode(), signature.encode())


def given_key(given: Mapping[bytes, str]) -> str | None:
    """Return the key in a request's headers: a bearer token, the bare key, or X-API-Key."""
    value = given.get(b"authorization") or given.get(b"x-api-key")
    if value is None:
        return None
    scheme, _, rest = value.partition(" ")
    return rest.strip() if scheme.lower() == "bearer" and rest else value.strip()


class Guard:
    """The middleware that handles all requests first.

    Args:
        hosts: host names of the server, besides its addresses and localhost.
        origins: origins of pages on other hosts that are allowed.
        max_bytes: maximum size of a body.
        late_keys: paths that accept the key in the body and check it themselves.
        polls: answers requests that need no route, see `polls.Polls.quick`; None: nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        hosts: Collection[str] = (),
        origins: Collection[str] = (),
        max_bytes: int,
        late_keys: Collection[str] = (),
        polls: Callable[[Scope, Mapping[bytes, str], bytes], RawResponse | None] | None = None,
    ):
        self.app, self.keys, self.max_bytes = app, keys, max_bytes
        self._polls = polls
        self.hosts = {"localhost", *(host.lower() for host in hosts)}
        self.origins = {origin.rstrip("/").lower() for origin in origins}
        self.late_keys = frozenset(late_keys)
        self._large = asyncio.Semaphore(LARGE_BODIES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Polls pass here a thousand times per second, so build one dictionary, in which the first of equal names wins.
        given = {name: value.decode("latin-1") for name, value in reversed(scope["headers"])}
        origin = given.get(b"origin")
        allowed = origin is not None and origin.lower() in self.origins
        headers = _cors(origin) if allowed and origin is not None else []
        if problem := self._problem(scope, given, allowed):
            status, text = problem
            await _answer(send, status, error_body(scope["path"], status, text), headers)
            return
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in given:
            status = 204 if allowed else 403
            await _answer(send, status, None if allowed else {"detail": "origin not allowed"}, headers)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(b"x-content-type-options", b"nosniff")]
                named = {name for name, _ in message["headers"]}
                if scope["path"] not in FOREIGN_SCRIPTS and b"content-security-policy" not in named:
                    own.append((b"content-security-policy", CSP))
                message["headers"] = [*message["headers"], *headers, *own]
            await send(message)

        # Unauthorised clients get no place among large bodies, since they could keep others from uploading.
        authorised = scope.get("state", {}).get("authorised", False)
        most = self.max_bytes if authorised else min(self.max_bytes, LARGE_BODY)
        body = _Body(receive, most, self._large, authorised)
        try:
            await self.app(scope, body.receive, send_with_headers)
        finally:
            body.release()

    def quick(self, request: RawRequest) -> RawResponse | None:
        """Return the answer to a poll that passes here and needs no route, see `serve.http`; None: the application
        answers.

        Pages of other origins get more headers, so theirs is not answered here.
        """
        given = {name: value.decode("latin-1") for name, value in reversed(request.headers)}
        path, _, query = request.target.partition(b"?")
        if self._polls is None or b"origin" in given or b"%" in path or not path.isascii():
            return None
        scope: Scope = dict(type="http", method=request.method, path=path.decode(), raw_path=path, query_string=query)
        scope["headers"], scope["state"] = request.headers, {}
        if self._problem(scope, given, False) or not scope["state"].get("authorised", False):
            return None
        found = self._polls(scope, given, request.body)
        # A cookie or a signed link ends some day, a key does not.
        lasts = found is None or self.keys.key is None or self.keys.accepts(given_key(given))
        return found if found is None or lasts else found._replace(repeat=None)

    def _problem(self, scope: Scope, given: Mapping[bytes, str], allowed: bool) -> tuple[int, str] | None:
        """Return the status and message if a request is rejected; None if it is allowed."""
        host, origin = given.get(b"host", ""), given.get(b"origin")
        if not self._is_own(host):
            return 421, "Host: this is not a name of this server; start it with --public-host NAME"
        if origin is not None and not allowed and scope["method"] not in READING:
            if origin.lower().partition("://")[2] != host.lower():
                return 403, "Origin: pages of other hosts may not do this; start the server with --cors ORIGIN"
        length = given.get(b"content-length", "")
        if length and not (length.isascii() and length.isdigit()):
            return 400, "Content-Length: expected a number"
        if length and (len(length) > 15 or int(length) > self.max_bytes):
            return 413, f"the body is larger than {self.max_bytes // 2**20} MB"
        if self.keys.key is None or self._is_open(scope, given):
            scope.setdefault("state", {})["authorised"] = True
            return None
        key = given_key(given)
        if key is None:
            kind = given.get(b"content-type", "").partition(";")[0].strip().lower()
            if scope["path"] in self.late_keys and kind in LATE_KINDS:
                return None
            return 401, "Missing Authorization header"
        if not self.keys.accepts(key):
            return 401, "Invalid API key"
        scope.setdefault("state", {})["authorised"] = True
        return None

    def _is_open(self, scope: Scope, given: Mapping[bytes, str]) -> bool:
        path = scope["path"]  # not the URL's path, which some versions of Starlette derive from the Host header
        if path == "/" or path in OPEN or path.startswith(OPEN_FOLDERS) or scope["method"] == "OPTIONS":
            return True
        query = scope["query_string"].decode("latin-1")
        if scope["method"] in ("GET", "HEAD") and "sig=" in query and self.keys.knows_link(_raw_path(scope), query):
            return True
        return b"cookie" in given and self.keys.knows_session(Request(scope).cookies.get(COOKIE))

    def _is_own(self, host: str) -> bool:
        """Return whether a Host header names this server: any address, since DNS rebinding needs a name, or a known
        name."""
        name = name_of(host)
        return name is not None and (not name or name in self.hosts)


@functools.lru_cache(256)
def name_of(host: str) -> str | None:
    """Return the name in a Host header, in lower case; "" for an address, None if it is neither."""
    found = HOST.fullmatch(host)
    if found is None:
        return None
    name = found[1] or found[2]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.lower()
    return ""


class _Body:
    """The body of a request as it is read: 413 if it is too large, 408 if it arrives too slowly; large bodies wait for
    each other."""

    def __init__(self, receive: Receive, max_bytes: int, large: asyncio.Semaphore, authorised: bool):
        self._authorised = authorised
        self._receive, self._max_bytes, self._large = receive, max_bytes, large
        self._end = time.monotonic() + BODY_SECONDS
        self._count, self._is_whole, self._holds = 0, False, False

    async def receive(self) -> Message:
        if self._is_whole:
            return await self._receive()
        left = self._end + self._count / BODY_RATE - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, min(BODY_SECONDS, left))):  # unlike wait_for, it creates no task
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the body did not arrive in time") from None
        if message["type"] == "http.request":
            self._count += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
            if self._count > self._max_bytes:
                without = "" if self._authorised else ", and the key is not in a header"
                raise HTTPException(413, f"the body is larger than {self._max_bytes // 2**20} MB{without}")
            if self._count > LARGE_BODY and not self._is_whole and not self._holds:
                await self._wait()
        if self._is_whole:
            self.release()
        return message

    def release(self) -> None:
        """Release the place of a large body."""
        if self._holds:
            self._holds = False
            self._large.release()

    async def _wait(self) -> None:
        began = time.monotonic()
        try:
            await asyncio.wait_for(self._large.acquire(), BODY_SECONDS)
        except TimeoutError:
            raise HTTPException(429, "other uploads are in progress", {"retry-after": str(int(BODY_SECONDS))}) from None
        self._holds = True
        self._end += time.monotonic() - began


def _raw_path(scope: Scope) -> str:
    return scope.get("raw_path", scope["path"].encode()).decode("latin-1").partition("?")[0]


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    values = {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": "GET, POST, PUT, DELETE, OPTIONS",
        "access-control-allow-headers": ALLOWED,
        "access-control-expose-headers": EXPOSED,
        "vary": "Origin",
    }
    return [(name.encode(), value.encode("latin-1", "replace")) for name, value in values.items()]


async def _answer(send: Send, status: int, body: object, headers: Iterable[tuple[bytes, bytes]]) -> None:
    encoded = b"" if body is None else json.dumps(body).encode()
    own = [(b"content-length", str(len(encoded)).encode())]
    if body is not None:
        own.append((b"content-type", b"application/json"))
    if status == 401:
        own.append((b"www-authenticate", b"Bearer"))
    if status == 413:
        own.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": encoded})
