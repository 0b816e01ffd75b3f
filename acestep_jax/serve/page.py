"""The page at `/`: its files, the list of options that it is built from, and its routes besides `/v1/songs`.

The page is plain HTML, CSS and JavaScript modules in `page/`. It has no list of options of its own: `options` derives
them from the fields of `Request`, `Planning` and `Sampling`, so a new argument appears on the page automatically.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from acestep_jax.arguments import Argument, arguments, describe, repeatable, value_types
from acestep_jax.errors import InputError
from acestep_jax.inputs import fields, tasks
from acestep_jax.inputs.prompt import lyric_text
from acestep_jax.request import FILES, LATENTS, MAX_LYRIC_TOKENS, MAX_PROMPT_TOKENS, Arguments, Planning, Sampling
from acestep_jax.serve import native, schema, sounds, uploads
from acestep_jax.serve.files import StoredFile, found_or_404
from acestep_jax.serve.service import Service
from acestep_jax.serve.submission import FIELDS, PLANNING, check_text_length

FOLDER = Path(__file__).parent / "page"
MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "worker-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-cache",  # page and server must have the same version
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}
# A browser may only play an upload that it gets back.
UPLOAD_HEADERS = {"content-security-policy": "default-src 'none'; sandbox", "cache-control": "private"}
UPLOAD_TYPES = {"WAV": "audio/wav", "FLAC": "audio/flac", "MP3": "audio/mpeg", "OGG": "audio/ogg"}
PEAKS = 800  # default number of columns of a waveform
PEAK = 127  # value of full scale
BLOCK = 2**18  # audio frames read at once
ABBREVIATIONS = ("bpm", "cfg", "dcw", "ema", "lm", "lora")
MINOR_AND_MAJOR = ("major", "minor")
NOTES = ("C", "C#", "Db", "D", "D#", "Eb", "E", "F", "F#", "Gb", "G", "G#", "Ab", "A", "A#", "Bb", "B")


def options() -> dict[str, Any]:
    """Return all options, ready for JSON: each field with its type, range and help, and the tasks."""
    known = {name: _option(name, field, about) for name, (field, about) in (FIELDS | PLANNING).items()}
    known["timesignature"]["values"] = list(fields.TIME_SIGNATURES)
    known["vocal_language"]["values"] = list(fields.LANGUAGES)
    known["vocal_language"]["names"] = {code: name.capitalize() for code, name in fields.LANGUAGES.items()}
    known["keyscale"]["values"] = [f"{note} {mode}" for mode in MINOR_AND_MAJOR for note in NOTES]
    known["track_name"]["values"] = list(tasks.TRACKS)
    return dict(
        fields=known,
        files={name: describe(name, Arguments) for name in FILES},
        tasks={name: _task(name, task) for name, task in tasks.TASKS.items()},
        formats=list(sounds.NAMES),
        tokens=dict(prompt=MAX_PROMPT_TOKENS, lyrics=MAX_LYRIC_TOKENS),
    )


def _option(name: str, field: dataclasses.Field, about: Argument) -> dict[str, Any]:
    kinds = {str: "text", int: "whole", float: "number", bool: "boolean"}
    words = [kinds[kind] for kind in kinds if kind in value_types(field.type)]
    default = None if field.default is dataclasses.MISSING else field.default
    group = "planning" if name in arguments(Planning) else "sampling" if name in arguments(Sampling) else "request"
    words_of_name = (about.flag or name).replace("-", " ").replace("_", " ").split()
    label = " ".join(word.upper() if word in ABBREVIATIONS else word for word in words_of_name)
    return dict(
        label=label[:1].upper() + label[1:],
        group=group,
        hidden=about.flag == "",  # an alias of another field
        types=words,
        many=repeatable(field.type),
        long=about.from_file,
        required=field.default is dataclasses.MISSING,
        default=list(default) if isinstance(default, tuple) else default,
        meaning=about.default,
        minimum=about.minimum,
        maximum=about.maximum,
        unit=about.unit,
        values=list(about.choices),
        help=describe(name, Arguments),
        tasks=tasks.accepting(name),
    )


def _task(name: str, task: tasks.Task) -> dict[str, Any]:
    return dict(
        accepts=list(task.accepts),
        needs_source=task.needs_source,
        regions=task.has_regions,
        max_tracks=task.max_tracks,
        turbo=task.turbo,
        tokenized=task.tokenized,
    )


def peaks(path: Path, count: int) -> dict[str, Any]:
    """Return the waveform of a sound file: the minimum and maximum sample over all channels in each of `count` equal
    parts, as integers from -127 to 127, and the duration in seconds. The file is read in blocks."""
    with path.open("rb") as file, soundfile.SoundFile(file) as sound:
        hop = max(1, -(-sound.frames // count))
        found: list[np.ndarray] = []
        block = hop * max(1, BLOCK // hop)
        while hop > BLOCK and len(part := _extremes(sound, hop)):
            found.append(part)
        while hop <= BLOCK and len(read := sound.read(block, dtype="float32", always_2d=True)):
            whole = np.pad(read, ((0, -len(read) % hop), (0, 0)), mode="edge").reshape(-1, hop * read.shape[1])
            found.append(np.stack([whole.min(1), whole.max(1)], 1))
        seconds = sound.frames / sound.samplerate
    values = np.clip(np.rint(np.concatenate(found or [np.zeros((0, 2))]) * PEAK), -PEAK, PEAK)
    return dict(seconds=seconds, peaks=values.astype(int).ravel().tolist())


def _extremes(sound: soundfile.SoundFile, frames: int) -> np.ndarray:
    """Return the minimum and maximum sample of the next frames, [1, 2], or [0, 2] at the end of the file."""
    blocks = sound.blocks(BLOCK, frames=frames, dtype="float32")
    ends = [(block.min(), block.max()) for block in blocks if len(block)]
    return np.array([(min(low for low, _ in ends), max(high for _, high in ends))] if ends else np.zeros((0, 2)))


def count_tokens(service: Service, values: Any) -> dict[str, int]:
    """Return the number of tokens of a request's prompt and lyrics for a model, including those of its templates.

    Raises:
        InputError: naming the field that cannot be used.
    """
    if not isinstance(values, dict):
        raise InputError('expected a JSON object such as {"prompt": "lofi piano", "lyrics": ""}')
    name = service.model_named(values.get("model"))
    texts = {}
    for field in ("prompt", "lyrics"):
        text = values.get(field) or ""
        if not isinstance(text, str):
            raise InputError(f"{field}: expected text")
        check_text_length(field, text, getattr(service.limits, field))
        texts[field] = text
    language = values.get("vocal_language") or "en"
    if not isinstance(language, str):
        raise InputError("vocal_language: expected text")
    return service.engine.models[name].count_tokens(texts["prompt"], lyric_text(texts["lyrics"], language))


def _tokens_body() -> dict[str, Any]:
    described = schema.properties()
    counted = {name: described[name] for name in ("prompt", "lyrics", "vocal_language", "model")}
    return dict(content={"application/json": dict(schema=dict(type="object", properties=counted))})


def router(service: Service, folder: Path | None = FOLDER) -> APIRouter:
    """Return the routes.

    Args:
        folder: folder of the page's files; None: no page is served.
    """
    routes = APIRouter(tags=["songs"])

    @routes.post(
        "/v1/tokens", summary="Tokens of a prompt and of lyrics", openapi_extra=dict(requestBody=_tokens_body())
    )
    async def tokens(request: Request) -> dict[str, Any]:
        """Take prompt, lyrics, vocal_language and model; return the token counts of both, and the model's limits."""
        body = await uploads.read_bytes(request, uploads.MAX_TEXT)
        counted = await run_in_threadpool(count_tokens, service, uploads.parse_json(body))
        limits = dict(prompt=MAX_PROMPT_TOKENS, lyrics=MAX_LYRIC_TOKENS)
        return {name: dict(tokens=count, limit=limits[name]) for name, count in counted.items()}

    @routes.get("/v1/songs/{record_id}/{index}/peaks", summary="The waveform of a song")
    def waveform(
        record_id: str,
        index: int,
        response: Response,
        count: int = Query(PEAKS, ge=1, le=4000, description="Columns."),
    ) -> dict[str, Any]:
        """Return the minimum and maximum sample of each of `count` parts, interleaved, from -127 to 127."""
        path = service.sound(native.find(service, record_id), index, "flac")
        if path is None:
            raise HTTPException(404, "this song is not finished")
        response.headers["cache-control"] = "private, max-age=86400"  # a song never changes
        with found_or_404(native.MISSING):
            return peaks(path, count)

    @routes.get("/v1/songs/{record_id}/uploads/{field}", summary="The source or reference of a song")
    def upload(record_id: str, field: str) -> Response:
        """Return the source or the reference of a record as it was uploaded: sound or latents."""
        record = native.find(service, record_id)
        if field not in FILES or field not in record.files:
            raise HTTPException(404, "there is no such file")
        path = service.store.upload_path(record, field)
        if field in LATENTS:
            kind = "application/octet-stream"
            return StoredFile(path, missing=native.MISSING, media_type=kind, headers=UPLOAD_HEADERS)
        with found_or_404(native.MISSING), path.open("rb") as file, soundfile.SoundFile(file) as sound:
            kind = UPLOAD_TYPES.get(sound.format, "application/octet-stream")
        return StoredFile(path, missing=native.MISSING, media_type=kind, headers=UPLOAD_HEADERS)

    if folder is not None:
        _add_files(routes, folder)
    return routes


def _add_files(routes: APIRouter, folder: Path) -> None:
    """Serve the page. Its files are looked up by name, so no path is built from a client's input."""
    files = {path.name: path for path in folder.iterdir() if path.suffix in MEDIA_TYPES}

    def send(name: str) -> Response:
        path = files[name]
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], headers=HEADERS)

    @routes.get("/", include_in_schema=False)
    @routes.head("/", include_in_schema=False)
    def index() -> Response:
        return send("index.html")

    @routes.get("/static/options.json", include_in_schema=False)
    def list_options() -> dict[str, Any]:
        return options()

    @routes.get("/static/{name}", include_in_schema=False)
    @routes.head("/static/{name}", include_in_schema=False)
    def file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "there is no such file")
        return send(name)
