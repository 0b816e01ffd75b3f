"""The protocol of acestep.cpp's server: `/lm`, `/synth`, `/understand`, `/job`, `/props`. Without a planner, `/lm`
completes a request with its defaults, so that `/lm` and then `/synth` works."""

import re
import secrets
import threading
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from acestep_jax.errors import InputError
from acestep_jax.inputs import tasks
from acestep_jax.serve import cpp_latents, cpp_planner, sounds, uploads
from acestep_jax.serve.authors_request import songs
from acestep_jax.serve.cpp_planner import BOUNDARY, STATES
from acestep_jax.serve.engine import Work
from acestep_jax.serve.lenient import INSTRUMENTAL, NO_PROMPT, Fields, for_task, lyrics, put_tracks, times, tracks
from acestep_jax.serve.native import client_of
from acestep_jax.serve.operations import Operation
from acestep_jax.serve.records import short_id
from acestep_jax.serve.service import Service
from acestep_jax.serve.store import Record
from acestep_jax.serve.submission import Submission, renamed

BLOCK = 2**20
MAX_BATCH = 9
KEPT = 32  # results of /lm that are kept
SOLVERS = {"euler": "euler", "sde": "sde"}
DEFAULT: dict[str, Any] = dict(
    caption="",
    lyrics="",
    bpm=0,
    duration=0,
    keyscale="",
    timesignature="",
    vocal_language="",
    seed=-1,
    lm_batch_size=1,
    synth_batch_size=1,
    lm_temperature=0.85,
    lm_cfg_scale=2.0,
    lm_top_p=0.9,
    lm_top_k=0,
    lm_negative_prompt="",
    lm_mode="generate",
    use_cot_caption=True,
    audio_codes="",
    inference_steps=0,
    guidance_scale=0,
    shift=0,
    dcw_scaler=0,
    dcw_high_scaler=0,
    dcw_mode="low",
    audio_cover_strength=1,
    cover_noise_strength=0,
    repainting_start=0,
    repainting_end=-1,
    task_type=tasks.DEFAULT,
    track="",
    solver="euler",
    custom_timesteps="",
    output_format="mp3",
    adapter="",
    adapter_scale=1,
    latent_shift=0,
    latent_rescale=1,
    synth_model="",
)
SHARED = ("adapter", "adapter_scale", "output_format", "synth_model")  # the same for all songs of an array


class Cpp:
    """The jobs of this protocol: songs are records of the service, results of /lm are stored here."""

    def __init__(self, service: Service):
        self.service = service
        self._completed: dict[str, list[dict[str, Any]]] = {}
        self._lock = threading.Lock()  # of the above

    def completed(self, job_id: str) -> list[dict[str, Any]] | None:
        """Return the requests that a job has completed with defaults; None if it is no such job."""
        with self._lock:
            return self._completed.get(job_id)

    def record(self, job_id: str) -> Record | None:
        """Return the record of a job, whose id is a prefix of the record's id."""
        return self.service.kept.find_short(job_id)

    def complete(self, body: uploads.Body, client: str) -> str:
        """Complete requests, with the planner or, without one, with defaults; return the id of the job.

        Raises:
            InputError: if a value cannot be used.
        """
        body.ignored(strict=self.service.strict)
        model = next(iter(self.service.engine.models))
        has_planner = self.service.planner_of(model) is not None
        found: list[dict[str, Any]] = []
        works: list[Work] = []
        for one in _requests(body):
            fields, full = Fields(one), DEFAULT | one
            count = min(MAX_BATCH, max(1, fields.whole("lm_batch_size") or 1))
            planner_task = cpp_planner.planner_task(fields) if has_planner else None
            found += [full if planner_task else full | dict(lyrics=one.get("lyrics") or INSTRUMENTAL)] * count
            if planner_task is not None:
                works += cpp_planner.works(self.service, model, fields, planner_task, count)
        if len(found) > MAX_BATCH:
            raise InputError(f"lm_batch_size: expected at most {MAX_BATCH} songs in all, found {len(found)}")
        if works and len(works) == len(found):
            return short_id(self.service.submit(Operation(works, client, extra=dict(requests=found))).id)
        if works:
            raise InputError("request: expected codes, or a task without the planner, in all of an array or in none")
        job_id = secrets.token_hex(8)
        with self._lock:
            self._completed[job_id] = found
            while len(self._completed) > KEPT:
                del self._completed[next(iter(self._completed))]
        return job_id

    def understand(self, body: uploads.Body, client: str) -> str:
        """Start describing a song; return the id of the job.

        Raises:
            InputError: if there is no song.
            HTTPException: 501 if there is no planner.
        """
        cpp_latents.prefer_latents(self.service, body)
        fields = Fields(_own_request(body))
        cpp_latents.check_unused(self.service, body)
        work = cpp_planner.description_work(self.service, fields, body)
        operation = Operation([work], client, body.uploads, body.names, dict(requests=None))
        return short_id(self.service.submit(operation).id)

    def convert(self, body: uploads.Body, client: str) -> str:
        """Have sound encoded or latents decoded; return the id of the job.

        Raises:
            InputError: unless there is one of them.
        """
        cpp_latents.check_unused(self.service, body)
        work, extra = cpp_latents.conversion(self.service, Fields(_own_request(body)), body)
        return short_id(self.service.submit(Operation([work], client, body.uploads, body.names, extra)).id)

    def submission(self, body: uploads.Body, client: str) -> Submission:
        """Return the submission for a request to /synth.

        Raises:
            InputError: if a value cannot be used.
        """
        cpp_latents.prefer_latents(self.service, body)
        found = _requests(body)
        first = Fields(found[0])
        notes: list[str] = []
        for one in found[1:]:
            for name in SHARED:
                if (own := one.get(name, DEFAULT[name])) != (its := found[0].get(name, DEFAULT[name])):
                    raise InputError(
                        f"{name}: expected one for all songs of an array, found {its!r:.80} and {own!r:.80}"
                    )
        for name in ("vae", "lm_model"):
            if (text := first.text(name)) and text not in (*self.service.engine.models, self.service.planner_of()):
                notes.append(f"{name}: {text[:80]} is unknown here; ignored")
        model = self.service.model_named(first.text("synth_model"), "synth_model")
        made: list[dict[str, Any]] = []
        for one in found:
            fields = Fields(one)
            count = min(MAX_BATCH, max(1, fields.whole("synth_batch_size") or 1))
            seed = fields.whole("seed")
            song = _song(fields, body, turbo=self.service.engine.models[model].turbo)
            made += songs(song, count, [seed] if seed is not None and seed >= 0 else [])
        notes += body.ignored(strict=self.service.strict)
        if self.service.strict and notes:
            raise InputError(notes[0])
        form = cpp_latents.check_format(first)
        scale = first.number("adapter_scale")
        adapter = first.text("adapter")
        return Submission(
            songs=made,
            api="cpp",
            model=model,
            adapters={adapter: 1.0 if scale is None else scale} if adapter else {},
            format=form,
            notes=notes,
            uploads=body.uploads,
            files=body.files,
            names=body.names,
            client=client,
        )

    def parts(self, record: Record) -> Iterator[bytes]:
        """Yield the result of /synth as parts of one body: the audio of each song, then its latents."""
        form = sounds.FORMATS[record.format]
        for i, song in enumerate(record.songs):
            if song.status != "done":
                continue
            sound = self.service.sound(record, i, record.format)
            if sound is None:
                continue
            latents = self.service.store.song_path(record, i, ".latents")
            heads = (
                f"Content-Type: {form.media_type}",
                'Content-Type: application/octet-stream\r\nContent-Disposition: form-data; name="latent"',
            )
            for head, path in zip(heads, (sound, latents), strict=True):
                yield f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode()
                with path.open("rb") as file:
                    while block := file.read(BLOCK):
                        yield block
                yield b"\r\n"
        yield f"--{BOUNDARY}--\r\n".encode()


def router(service: Service, version: str) -> APIRouter:
    """Return the routes."""
    routes, api = APIRouter(tags=["acestep.cpp's API"]), Cpp(service)

    @routes.post("/synth", summary="Submit")
    async def synth(request: Request) -> dict[str, str]:
        service.check_room(client_of(request))
        body = await uploads.read(request, service.store, cpp_latents.UPLOADS)
        try:
            found = await run_in_threadpool(api.submission, body, client_of(request))
        except BaseException:
            body.discard()
            raise
        record = await run_in_threadpool(service.accept, found)
        return dict(id=short_id(record.id))

    @routes.post("/lm", summary="Complete requests, with their defaults")
    async def complete(request: Request) -> dict[str, str]:
        body = await uploads.read(request, service.store, {})
        return dict(id=await run_in_threadpool(api.complete, body, client_of(request)))

    @routes.post("/understand", summary="Describe a song")
    async def understand(request: Request) -> dict[str, str]:
        body = await uploads.read(request, service.store, cpp_latents.UPLOADS)
        try:
            return dict(id=await run_in_threadpool(api.understand, body, client_of(request)))
        except BaseException:
            body.discard()
            raise

    @routes.post("/vae", summary="Sound to latents, or latents to sound")
    async def vae(request: Request) -> dict[str, str]:
        service.check_room(client_of(request))
        body = await uploads.read(request, service.store, cpp_latents.UPLOADS)
        try:
            return dict(id=await run_in_threadpool(api.convert, body, client_of(request)))
        except BaseException:
            body.discard()
            raise

    @routes.get("/job", summary="Poll, or fetch with result=1")
    async def job(id: str = "", result: str = "0") -> Response:
        wants_result = _flag("result", result)
        if (completed := api.completed(id)) is not None:
            return JSONResponse(completed if wants_result else dict(status="done"))
        record = api.record(_job_id(id))
        if record is None and (operation := service.operations.find_short(id)) is not None:
            return await run_in_threadpool(cpp_planner.answer, service.operations, operation, wants_result)
        if record is None:
            raise HTTPException(404, cpp_latents.MISSING)
        if not wants_result:
            return JSONResponse(state(record))
        if record.status == "failed":
            raise HTTPException(500, renamed(record.error or "failed", cpp_latents.NAMES))
        if record.status != "done":
            raise HTTPException(404, "Result not ready")
        return StreamingResponse(api.parts(record), media_type=f"multipart/mixed; boundary={BOUNDARY}")

    @routes.post("/job", summary="Cancel with cancel=1")
    async def cancel(id: str = "", cancel: str = "0") -> dict[str, str]:
        if api.completed(id) is not None:
            return dict(status="done")
        wanted, record = _flag("cancel", cancel), api.record(_job_id(id))
        if record is None and (operation := service.operations.find_short(id)) is not None:
            if wanted:
                await run_in_threadpool(service.operations.cancel, operation)
            return dict(status=STATES[operation.status])
        if record is None:
            raise HTTPException(404, cpp_latents.MISSING)
        if wanted:
            await run_in_threadpool(service.cancel, record)
        return state(record)

    @routes.get("/props", summary="Models and defaults")
    async def props() -> dict[str, Any]:
        names, planner = list(service.engine.models), service.planner_of()
        lm = [] if planner is None else [planner]
        return dict(
            version=version,
            models=dict(lm=lm, embedding=names, dit=names, vae=names),
            adapters=list(service.engine.adapters),
            cli=dict(max_batch=MAX_BATCH),
            default=DEFAULT,
            presets=dict(
                turbo=dict(inference_steps=8, guidance_scale=1, shift=3),
                sft=dict(inference_steps=50, guidance_scale=1, shift=1),
            ),
        )

    return routes


def state(record: Record) -> dict[str, str]:
    """Return the state of a job, as a poll reports it."""
    return dict(status=STATES[record.status])


def _job_id(text: str) -> str:
    """Return the id of a job; raise InputError if it is not valid."""
    if not re.fullmatch("[0-9a-f]{16}", text):
        raise InputError("id: expected 16 hexadecimal digits, as returned by /synth and /lm")
    return text


def _flag(name: str, text: str) -> bool:
    if text not in ("0", "1"):
        raise InputError(f"{name}: expected 0 or 1, found {text!r:.40}")
    return text == "1"


def _own_request(body: uploads.Body) -> dict[str, Any]:
    """Return the request beside an upload, which may be missing."""
    return _requests(body)[0] if body.values.get("request") or body.kind == "json" else {}


def _requests(body: uploads.Body) -> list[dict[str, Any]]:
    """Return the requests of a body: an object, an array of them, or either in the field `request`."""
    found = body.raw
    if body.kind == "form":
        found = uploads.parse_json(body.values.get("request", "null"))
    found = found if isinstance(found, list) else [found]
    if not found or len(found) > MAX_BATCH or not all(isinstance(one, dict) for one in found):
        raise InputError(f'request: expected an object such as {{"caption": "lofi piano"}}, or up to {MAX_BATCH}')
    return found


def _correction(fields: Fields) -> dict[str, Any]:
    """Return the fields of `Sampling` for DCW, which is off here unless a scaler is above 0."""
    mode = fields.text("dcw_mode") or DEFAULT["dcw_mode"]
    low, high = fields.number("dcw_scaler") or 0.0, fields.number("dcw_high_scaler") or 0.0
    if low <= 0 and (mode != "double" or high <= 0):
        return dict(dcw_enabled=False)
    found: dict[str, Any] = dict(dcw_enabled=True, dcw_mode=mode, dcw_scaler=low)
    return found | dict(dcw_high_scaler=high) if mode == "double" else found


def _song(fields: Fields, body: uploads.Body, *, turbo: bool) -> dict[str, Any]:
    """Return the fields of `Request` and `Sampling`; 0 and "" stand for the model's defaults."""
    task = fields.text("task_type") or tasks.DEFAULT
    song: dict[str, Any] = dict(
        prompt=fields.text("caption").strip() or NO_PROMPT,
        lyrics=lyrics(fields.text("lyrics")),
        task_type=task,
        num_inference_steps=fields.whole("inference_steps") or None,
        shift=fields.number("shift") or None,
        audio_cover_strength=fields.number("audio_cover_strength"),
        cover_noise_strength=fields.number("cover_noise_strength"),
        timesteps=times(fields.text("custom_timesteps")),
        latent_shift=fields.number("latent_shift"),
        latent_rescale=fields.number("latent_rescale"),
        **cpp_planner.metadata(fields),
    )
    if not turbo:
        song["guidance_scale"] = fields.number("guidance_scale") or None
    solver = fields.text("solver", default="euler")
    if solver not in SOLVERS:
        raise InputError(f"solver: expected one of {', '.join(SOLVERS)}, found {solver!r:.80}")
    song["solver"] = SOLVERS[solver]
    song |= _correction(fields) if solver != "sde" else dict(dcw_enabled=False)
    found = tasks.find(task)
    if found.has_regions:
        song["repainting_start"] = fields.number("repainting_start") or 0.0
        end = fields.number("repainting_end")
        song["repainting_end"] = -1.0 if end is None else end
    if found.max_tracks:
        put_tracks(song, tracks(fields.get("track")))
    if codes := fields.text("audio_codes").strip():
        song["audio_codes"] = cpp_planner.codes_of(codes)
    return for_task({name: value for name, value in song.items() if value is not None})
