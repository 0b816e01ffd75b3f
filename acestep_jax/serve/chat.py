"""The OpenRouter-style chat API of ACE-Step's application, and an OpenAI-style music endpoint."""

import base64
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from acestep_jax.errors import InputError
from acestep_jax.planner.plan import Plan
from acestep_jax.serve import chat_request, sounds, uploads
from acestep_jax.serve.authors_request import Refused
from acestep_jax.serve.files import found_or_404
from acestep_jax.serve.lenient import INSTRUMENTAL, Fields
from acestep_jax.serve.native import client_of
from acestep_jax.serve.security import Keys
from acestep_jax.serve.service import Service
from acestep_jax.serve.store import Record, SongRecord
from acestep_jax.serve.submission import Submission, values_of_plan, variations
from acestep_jax.serve.waiting import BEAT, EventStream, await_end, changes

PIECE = 64 * 2**10 // 4 * 3  # bytes of audio that are 64 kB in base64
MAX_JSON = 64 * 2**20  # bytes of a body with base64 audio
MISSING = "the song has been deleted"


def router(service: Service, keys: Keys) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["chat and music"])

    @routes.get("/v1/models", summary="Models")
    async def models() -> dict[str, Any]:
        return _models(service)

    @routes.get("/api/v1/models", include_in_schema=False)
    async def openrouter_models() -> dict[str, Any]:
        return _models(service)

    @routes.post("/v1/chat/completions", summary="Songs as a chat response")
    async def completions(request: Request) -> Response:
        service.check_room(client_of(request))
        body = await uploads.read(request, service.store, {}, max_json=MAX_JSON)
        if not isinstance(body.raw, dict):
            raise InputError("expected a JSON object with messages")
        try:
            found, ignored = await run_in_threadpool(
                chat_request.submission, service.store, body, models=service.engine.models, strict=service.strict
            )
        except Refused as error:
            body.discard()
            raise HTTPException(501, str(error)) from None
        except BaseException:
            body.discard()
            raise
        found.client = client_of(request)
        record = await run_in_threadpool(service.accept, found)
        headers = {"x-acestep-ignored": ", ".join(ignored)} if ignored else {}
        shape = ChatResponse(service, record, openai=_wants_openai(body.values))
        if Fields(body.values).flag("stream"):
            return EventStream(service, record, shape.stream(), headers)
        await _finish(service, record, request)
        return JSONResponse(await run_in_threadpool(shape.completion), headers=headers)

    @routes.post("/v1/audio/music/generations", summary="Songs, in the style of OpenAI's images API")
    async def generations(request: Request) -> Response:
        service.check_room(client_of(request))
        body = await uploads.read(request, service.store, {})
        if not isinstance(body.raw, dict):
            raise InputError("expected a JSON object with a prompt")
        found, response = await run_in_threadpool(_music, service, body, client_of(request))
        record = await run_in_threadpool(service.accept, found)
        await _finish(service, record, request)
        if response == "bytes" or request.headers.get("accept", "").startswith("audio/"):
            data = await run_in_threadpool(_first, service, record)
            return Response(data, media_type=sounds.FORMATS[record.format].media_type)
        data = []
        for i, song in enumerate(record.songs):
            path = await run_in_threadpool(service.sound, record, i, record.format)
            if path is None:
                continue
            one: dict[str, Any] = dict(seed=song.seed, duration=song.seconds)
            if response == "b64_json":
                one["b64_json"] = await run_in_threadpool(_base64, path)
            else:
                one["url"] = str(request.base_url).rstrip("/") + keys.link(f"/v1/songs/{record.id}/{i}.{record.format}")
            data.append(one)
        return JSONResponse(dict(created=int(record.created), data=data))

    return routes


class ChatResponse:
    """The response to a chat completion: whole, or as a stream.

    Args:
        openai: whether audio has OpenAI's format, `message.audio.data`, instead of the authors'.
    """

    def __init__(self, service: Service, record: Record, *, openai: bool):
        self.service, self.record, self.openai = service, record, openai
        self.common = dict(id=f"chatcmpl-{record.id}", created=int(record.created), model=f"acestep/{record.model}")

    def completion(self) -> dict[str, Any]:
        """Return the whole response."""
        message: dict[str, Any] = dict(role="assistant", content=self.content())
        if self.openai:
            message["audio"] = dict(
                id=f"audio-{self.record.id}",
                data=base64.b64encode(_first(self.service, self.record)).decode(),
                expires_at=int(time.time()) + 3600,
                transcript=_made_of(self.record.songs[0]).get("lyrics", ""),
            )
        else:
            message["audio"] = self._audio()
        choice = dict(index=0, message=message, finish_reason="stop")
        usage = dict(prompt_tokens=0, completion_tokens=0, total_tokens=0)
        return dict(object="chat.completion", choices=[choice], usage=usage) | self.common

    async def stream(self) -> AsyncIterator[str]:
        """Yield it as server-sent events, with a heartbeat every two seconds."""
        yield self._chunk(dict(role="assistant", content="Generating music"))
        told = time.monotonic()
        async for _ in changes(self.service, self.record, BEAT):
            if not self.record.final and time.monotonic() - told >= BEAT:
                yield self._chunk(dict(content="."))
                told = time.monotonic()
        if self.record.status != "done":
            stopping = None if self.record.final else _stopping(self.record)
            reason = stopping or self.record.error or self.record.status
            yield self._chunk(dict(content=f"Error: {reason}"), "error")
        else:
            yield self._chunk(dict(content=self.content()))
            if self.openai:
                data = await run_in_threadpool(_first, self.service, self.record)
                for start in range(0, len(data), PIECE):
                    piece = base64.b64encode(data[start : start + PIECE]).decode()
                    yield self._chunk(dict(audio=dict(id=f"audio-{self.record.id}", data=piece)))
            else:
                yield self._chunk(dict(audio=await run_in_threadpool(self._audio)))
            yield self._chunk({}, "stop")
        yield "data: [DONE]\n\n"

    def content(self) -> str:
        """Return the text, which describes the song."""
        request, song = _made_of(self.record.songs[0]), self.record.songs[0]
        lines = ["## Metadata"]
        for title, value in (
            ("Caption", request.get("prompt")),
            ("BPM", request.get("bpm")),
            ("Duration", f"{song.seconds:g}s" if song.seconds else None),
            ("Key", request.get("keyscale")),
            ("Time Signature", request.get("timesignature")),
        ):
            if value:
                lines.append(f"**{title}:** {value}")
        if (words := request.get("lyrics")) and words != INSTRUMENTAL:
            lines += ["", "## Lyrics", words]
        return "\n".join([*lines, *(f"\n{note}" for note in self.record.notes)])

    def _audio(self) -> list[dict[str, Any]]:
        media = sounds.FORMATS[self.record.format].media_type
        urls = (f"data:{media};base64,{_base64(path)}" for path in _paths(self.service, self.record))
        return [dict(type="audio_url", audio_url=dict(url=url)) for url in urls]

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = dict(index=0, delta=delta, finish_reason=reason)
        values = dict(object="chat.completion.chunk", choices=[choice]) | self.common
        return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


def _paths(service: Service, record: Record) -> Iterator[Path]:
    """Yield the sound file of each song that was made."""
    for i in range(len(record.songs)):
        if (path := service.sound(record, i, record.format)) is not None:
            yield path


def _first(service: Service, record: Record) -> bytes:
    """Return the sound file of the first song that was made; raise HTTPException 404 if it has been deleted."""
    for path in _paths(service, record):
        with found_or_404(MISSING):
            return path.read_bytes()
    raise HTTPException(404, MISSING)


def _made_of(song: SongRecord) -> dict[str, Any]:
    """Return the fields of `Request` that a song was made from; the plan's replace the requested ones."""
    if song.plan is None:
        return song.request
    return song.request | values_of_plan(Plan.from_dict(song.plan))


def _stopping(record: Record) -> str:
    return f"the server is stopping; the song will be at /v1/songs/{record.id}"


async def _finish(service: Service, record: Record, request: Request) -> None:
    """Wait for a record; raise HTTPException if it fails or takes too long. A disconnect cancels."""
    late = "the song was not finished in time; stream, or submit it with POST /v1/songs"
    await await_end(service, record, request, stopping=_stopping(record), late=late)
    if record.status != "done":
        raise HTTPException(500, record.error or record.status)


def _music(service: Service, body: uploads.Body, client: str) -> tuple[Submission, str]:
    """Return the submission for a request to the music endpoint, and the kind of its response: url, b64_json or bytes.

    Raises:
        InputError: if a value cannot be used.
    """
    fields = Fields(body.values)
    form, response = fields.text("format", default="mp3"), fields.text("response_format", default="url")
    if response in chat_request.FORMATS:  # as in OpenAI's speech API
        form, response = response, "bytes"
    if response not in ("url", "b64_json", "bytes"):
        raise InputError(f"response_format: expected url, b64_json or a sound format, found {response!r:.80}")
    prompt = fields.text("prompt", "input")
    if not prompt:
        raise InputError("prompt: missing; describe the music in a few words")
    model = fields.text("model").rpartition("/")[2]
    notes = []
    if model not in service.engine.models:
        if model:
            notes.append(f"model: {model[:80]} is unknown here; the default was used")
        model = next(iter(service.engine.models))
    seconds = fields.number("duration", "audio_length")
    values: dict[str, Any] = dict(
        prompt=prompt,
        lyrics=fields.text("lyrics") or INSTRUMENTAL,
        audio_duration=seconds or chat_request.DEFAULT_SECONDS,
        seed=fields.whole("seed"),
        num_inference_steps=fields.whole("num_inference_steps"),
        guidance_scale=fields.number("guidance_scale"),
    )
    count = min(chat_request.MAX_SONGS, max(1, fields.whole("n") or 1))
    values = {name: value for name, value in values.items() if value is not None}
    found = Submission(
        songs=variations(values, count),
        api="music",
        model=model,
        format=sounds.check_format(form),
        notes=notes + body.ignored(strict=service.strict),
        client=client,
    )
    return found, response


def _wants_openai(values: dict[str, Any]) -> bool:
    modalities = values.get("modalities")
    return isinstance(values.get("audio"), dict) and isinstance(modalities, list) and "audio" in modalities


def _models(service: Service) -> dict[str, Any]:
    free = dict.fromkeys(("prompt", "completion", "request", "image"), "0")
    data = [
        dict(
            id=f"acestep/{name}",
            name=name,
            created=0,
            input_modalities=["text", "audio"],
            output_modalities=["audio", "text"],
            context_length=4096,
            max_output_length=300,
            pricing=free,
            description=f"ACE-Step 1.5, {', '.join(model.tasks)}",
        )
        for name, model in service.engine.models.items()
    ]
    return dict(object="list", data=data)


def _base64(path: Path) -> str:
    with found_or_404(MISSING):
        return base64.b64encode(path.read_bytes()).decode()
