"""The bodies of requests: JSON, forms and uploads, read with limits. Names from clients are never used for files."""

import dataclasses
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from acestep_jax.arguments import unknown_name
from acestep_jax.errors import InputError
from acestep_jax.serve.store import Store

MAX_FILES, MAX_FIELDS, MAX_TEXT = 4, 100, 2**20
MAX_JSON = 4 * 2**20  # bytes; a JSON body contains only texts and audio codes
MAX_NAME = 80  # characters of a name in messages
# Commas and opening brackets in JSON, at most: `json.loads` keeps Python's lock to its end, even in a thread, so the
# event loop waits for it. As many values take up to 0.1 s; a megabyte of text takes 3 to 5 ms.
MARKS = b",[{"
MAX_MARKS = 2**17
BLOCK = 2**20


@dataclasses.dataclass
class Body:
    """The contents of a body.

    Attributes:
        values: the fields of an object or a form.
        raw: the parsed JSON, which may not be an object.
        uploads: a folder of the store with a file for each of `files`; None if there are none.
        files: the fields of the form that have a file.
        names: what the client calls its files, by our names of them.
        unknown: the fields of the form that have a file that is neither expected nor text.
        kind: "json" or "form".
    """

    values: dict[str, Any]
    raw: Any = None
    uploads: Path | None = None
    files: list[str] = dataclasses.field(default_factory=list)
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    unknown: list[str] = dataclasses.field(default_factory=list)
    kind: str = "json"

    def discard(self) -> None:
        """Remove the uploads."""
        if self.uploads is not None:
            shutil.rmtree(self.uploads, ignore_errors=True)

    def check_known(self, names: Collection[str]) -> None:
        """Raise InputError if the form has a file under another name than `names`."""
        for name in self.unknown:
            raise InputError(unknown_name(name[:MAX_NAME], names, "file"))

    def ignored(self, *, strict: bool) -> list[str]:
        """Return a note for each file of the form that no field takes.

        Raises:
            InputError: if `strict` is set and there is one.
        """
        if strict and self.unknown:
            raise InputError(f"{self.unknown[0][:MAX_NAME]}: unknown file, and the server was started with --strict")
        return [f"{name[:MAX_NAME]}: unknown file; ignored" for name in self.unknown]


async def read(
    request: Request, store: Store, file_names: Mapping[str, str] | None = None, *, max_json: int = MAX_JSON
) -> Body:
    """Read a body as JSON or as a form, by its Content-Type, or by its first bytes if that is missing.

    Args:
        file_names: the fields of a form that may have a file, with our name for each.

    Raises:
        InputError: if it is not JSON, or its form is damaged.
        HTTPException: 413 for too many or too large fields, or see `parse_json`; 415 for another kind.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _multipart(request, store, file_names or {})
    data = await read_bytes(request, max_json)
    start = data.lstrip()[:1]
    if kind == "application/json" or kind.endswith("+json"):
        return _json(data)
    if kind == "application/x-www-form-urlencoded":
        if start == b"{":  # JSON, as sent by curl -d
            return _json(data)
        return _form(data)
    if start in (b"{", b"["):
        return _json(data)
    if kind in ("", "text/plain", "application/octet-stream") and b"=" in data:
        return _form(data)
    raise HTTPException(415, "Unsupported Content-Type; use application/json or multipart/form-data")


def parse_json(text: str | bytes) -> Any:
    """Return parsed JSON.

    Raises:
        InputError: if it is invalid, or has lone surrogates, which UTF-8 cannot encode.
        HTTPException: 413 for more than `MAX_MARKS`.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(data) > MAX_MARKS and len(data) - len(data.translate(None, MARKS)) > MAX_MARKS:
        raise HTTPException(413, f"JSON with more than {MAX_MARKS} commas and opening brackets")
    try:
        found = json.loads(data)
        if b"\\ud" in data.lower():
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise InputError(f"not JSON ({reason})") from None


async def read_bytes(request: Request, most: int) -> bytes:
    """Return the body of a request; raise HTTPException 413 as soon as it exceeds `most` bytes."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise HTTPException(413, f"the body is larger than {most} bytes; upload audio as multipart/form-data")
        parts.append(part)
    return b"".join(parts)


def _json(data: bytes) -> Body:
    raw = parse_json(data)
    return Body(raw if isinstance(raw, dict) else {}, raw)


def _form(data: bytes) -> Body:
    try:
        pairs = parse_qsl(data.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError:
        raise HTTPException(413, f"more than {MAX_FIELDS} fields") from None
    values = dict(pairs)
    return Body(values, values, kind="form")


async def _multipart(request: Request, store: Store, file_names: Mapping[str, str]) -> Body:
    try:
        form = await request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_TEXT)
    except HTTPException as error:
        too_large = "Too many" in str(error.detail) or "maximum size" in str(error.detail)
        raise HTTPException(413 if too_large else error.status_code, error.detail) from None
    if not form.multi_items():
        raise HTTPException(400, "the multipart body has no parts")
    body = Body({}, kind="form")
    try:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                body.values[name] = value
            elif name in file_names:
                body.uploads = body.uploads or store.new_folder()
                await run_in_threadpool(_copy, value, body.uploads / file_names[name])
                if file_names[name] in body.files:
                    raise InputError(f"{name}: given twice")
                body.files.append(file_names[name])
                body.names[file_names[name]] = name
            elif (value.size or 0) > MAX_TEXT:
                body.unknown.append(name)
            elif value.size or value.filename:  # not an empty file input of a browser
                try:  # text may be sent as a file
                    body.values[name] = (await value.read()).decode()
                except UnicodeDecodeError:
                    body.unknown.append(name)
    except BaseException:
        body.discard()
        raise
    finally:
        await form.close()
    body.raw = body.values
    return body


def _copy(upload: UploadFile, path: Path) -> None:
    with path.open("wb") as target:
        shutil.copyfileobj(upload.file, target, BLOCK)
