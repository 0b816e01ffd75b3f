"""A stand-in for the Hugging Face hub: a server on loopback that serves folders as repositories, and can fail.

It speaks what huggingface_hub uses: `/api/models/ID`, `/ID/resolve/REVISION/PATH` with ranges, and commits.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import random
import threading
import urllib.parse
from pathlib import Path

LARGE = 10_000  # bytes from which on a file counts as large, "lfs", and has a SHA-256


class Repository:
    """A folder as one commit of a repository; a file's bytes are read when it is asked for."""

    def __init__(self, folder, *, private=False, gated=False):
        self.folder, self.private, self.gated = Path(folder), private, gated
        names = sorted(p.relative_to(folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
        self.files = {name: self._describe(name) for name in names}
        self.commit = hashlib.sha1(json.dumps(self.files).encode()).hexdigest()
        self.revisions = {"main", self.commit}

    def _describe(self, name):
        data = (self.folder / name).read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        about = {"rfilename": name, "size": len(data), "blobId": git}
        if len(data) >= LARGE:
            about["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
        return about


class HubServer:
    """Serves `repositories` at `endpoint`.

    token: that of whoever may read what is private or gated.
    cuts: how many more downloads of large files are cut off at a random byte.
    change: None, or a function from a path and its bytes to the bytes that are sent instead.
    broken: whether every answer is 503.
    downloads: the paths that were asked for, with the first byte of each request.
    created: the ids of repositories that were created, and whether private.
    commits: of each upload the repository's id, its message and its files.
    """

    token = "hf_right"
    closed = False

    def __init__(self, seed=0):
        self.repositories, self.downloads, self.commits, self.created = {}, [], [], []
        self.cuts, self.change, self.broken, self.random = 0, None, False, random.Random(seed)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def add(self, id, folder, **options):
        """Serve a folder as the repository `id`; see `Repository`."""
        self.repositories[id] = Repository(folder, **options)
        return self.repositories[id]

    def close(self):
        """End the server; connections that are kept open are dropped at the next request."""
        self.closed = True
        self.server.shutdown()
        self.server.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.hub.closed:
            self.close_connection = True
            return None
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if self.hub.broken:
            return self.refuse(503, "")
        if path.startswith("/api/models/"):
            id, tree, revision = path.removeprefix("/api/models/").partition("/tree/")
            if not tree:
                id, _, revision = id.partition("/revision/")
            if tree and (repository := self.find(id, revision)) is not None:
                return self.answer([self.entry(about) for about in repository.files.values()])
            if (repository := self.find(id, revision)) is not None:
                files = list(repository.files.values())
                self.answer({"id": id, "modelId": id, "sha": repository.commit, "siblings": files})
            return None
        id, _, rest = path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        if (repository := self.find(id, revision)) is not None:
            self.send_file(repository, name)
        return None

    @staticmethod
    def entry(about):
        """Return what a listing says of a file."""
        large = {"lfs": {**about["lfs"], "oid": about["lfs"]["sha256"]}} if "lfs" in about else {}
        return {"type": "file", "path": about["rfilename"], "size": about["size"], "oid": about["blobId"], **large}

    def find(self, id, revision):
        """Return the repository, or answer what the hub does if it may not be read and return None."""
        repository = self.hub.repositories.get(id)
        known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repository is None or repository.private and not known:
            self.refuse(404 if known else 401, "RepoNotFound")
        elif revision and revision not in repository.revisions:
            self.refuse(404, "RevisionNotFound")
        else:
            return repository
        return None

    def send_file(self, repository, name):
        if repository.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        if name not in repository.files:
            return self.refuse(404, "EntryNotFound")
        data = (repository.folder / name).read_bytes()
        if self.hub.change is not None:
            data = self.hub.change(name, data)
        total, start = len(data), 0
        if range_ := self.headers.get("Range"):
            start = int(range_.removeprefix("bytes=").rstrip("-"))
        about = repository.files[name]
        self.send_response(206 if range_ else 200)
        self.send_header("Content-Length", str(total - start))
        if range_:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("ETag", f'"{about.get("lfs", {}).get("sha256", about["blobId"])}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self.end_headers()
        if self.command == "HEAD":
            return None
        self.hub.downloads.append((name, start))
        if self.hub.cuts and "lfs" in about and total - start > 1:
            self.hub.cuts -= 1
            self.wfile.write(data[start : self.hub.random.randrange(start + 1, total)])
            self.close_connection = True
            return None
        self.wfile.write(data[start:])
        return None

    def do_POST(self):
        if self.hub.closed:
            self.close_connection = True
            return None
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.refuse(401, "")
        path = urllib.parse.urlsplit(self.path).path
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            values = json.loads(body)
            id = "/".join([values.get("organization") or "me", values["name"]])
            # Earlier versions of huggingface_hub send `private`.
            self.hub.created.append((id, values.get("visibility") == "private" or values.get("private") is True))
            return self.answer({"url": f"{self.hub.endpoint}/{id}", "name": id, "id": id})
        owner, name, what = path.removeprefix("/api/models/").split("/", 2)
        id = f"{owner}/{name}"
        if what.startswith("preupload/"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files, "commitOid": "0" * 40})
        lines = [json.loads(line) for line in body.splitlines()]
        files = {v["value"]["path"]: base64.b64decode(v["value"]["content"]) for v in lines if v["key"] == "file"}
        self.hub.commits.append((id, lines[0]["value"]["summary"], files))
        commit = "1" * 40
        return self.answer(
            {"commitUrl": f"{self.hub.endpoint}/{id}/commit/{commit}", "commitOid": commit, "success": True}
        )

    def answer(self, values):
        data = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status, code):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format, *args):
        pass


@contextlib.contextmanager
def serving(**options):
    """Yield a `HubServer` that is closed at the end."""
    server = HubServer(**options)
    try:
        yield server
    finally:
        server.close()
