"""The REST API of ACE-Step's own application: submit, poll, fetch. Its clients work unchanged."""

import json
import random
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, quote, unquote

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from acestep_jax.errors import InputError
from acestep_jax.inputs.tasks import DEFAULT, TASKS
from acestep_jax.planner.plan import Plan
from acestep_jax.serve import authors_analysis as analysis
from acestep_jax.serve import authors_lora, authors_request, planner_fields, sounds, uploads
from acestep_jax.serve.authors_analysis import CODES
from acestep_jax.serve.envelope import envelope
from acestep_jax.serve.files import StoredFile
from acestep_jax.serve.lenient import Fields
from acestep_jax.serve.native import ID, SONG, client_of, link_song
from acestep_jax.serve.operations import Operation
from acestep_jax.serve.planner_task import ANALYSIS_MODES
from acestep_jax.serve.plans import finished
from acestep_jax.serve.security import Keys
from acestep_jax.serve.service import Service
from acestep_jax.serve.store import Record
from acestep_jax.serve.submission import Submission, naming

LATE_KEYS = (
    "/release_task",
    "/query_result",
    "/create_random_sample",
    "/format_input",
    "/cancel_task",
    "/v1/transcribe",
)
FILE = re.compile(r"(?P<id>[0-9a-f-]{36})/(?P<index>\d{1,4})(?P<suffix>\.[a-z0-9.]{2,8})")
SUFFIXES = {form.suffix: name for name, form in sounds.FORMATS.items()}
MOST_IDS = 1000  # in one poll
MISSING = "Audio file not found"


class Authors:
    """The state that all clients of this API share, as in the authors' server: the model and the adapters in use."""

    def __init__(self, service: Service, keys: Keys):
        self.service, self.keys = service, keys
        self.model = next(iter(service.engine.models))
        self.scales: dict[str, float] = {}
        self.use_lora = True

    def result(self, record: Record) -> list[dict[str, Any]]:
        """Return the `result` of a task."""
        part, stage, _, _ = self.service.progress(record)
        common: dict[str, Any] = dict(wave="", create_time=int(record.created), env="development")
        if record.status != "done":
            one = dict(file="", status=CODES[record.status], progress=round(part, 4), stage=stage) | common
            if record.status in ("queued", "running"):
                one["stage"] = record.status if stage == "queued" else stage
            else:
                one |= dict(progress=0.0, stage=record.status, error=record.error or "cancelled")
            return [one]
        seeds = ",".join(str(song.seed) for song in record.songs)
        return [self._song(record, i, seeds) | common for i, song in enumerate(record.songs) if song.status == "done"]

    def task(self, record: Record) -> dict[str, Any]:
        """Return the response of a poll for a task."""
        _, stage, step, steps = self.service.progress(record)
        text = f"{stage} {step}/{steps}" if stage == "denoising" else stage
        result = json.dumps(self.result(record), ensure_ascii=False)
        return dict(task_id=record.id, status=CODES[record.status], result=result, progress_text=text)

    def _song(self, record: Record, index: int, seeds: str) -> dict[str, Any]:
        song, form = record.songs[index], sounds.FORMATS[record.format]
        path = self.service.store.song_path(record, index, form.suffix)
        took = (record.finished or record.created) - (record.started or record.created)
        about = [f"{song.seconds:g} s of audio, {took:.1f} s for the request", *record.notes]
        plan, metas = None if song.plan is None else Plan.from_dict(song.plan), record.extra.get("asked", {})
        return dict(
            file=self.keys.link(f"/v1/audio?path={quote(str(path), safe='')}"),
            status=1,
            prompt=song.request.get("prompt", "") if plan is None else plan.caption,
            lyrics=song.request.get("lyrics", "") if plan is None else plan.lyrics,
            metas=metas if plan is None else planner_fields.in_metas(metas, plan),
            generation_info="\n".join(about),
            seed_value=seeds,
            lm_model="" if plan is None else self.service.planner_of(record.model) or "",
            dit_model=record.model,
            progress=1.0,
            stage="succeeded",
        )

    def planners(self) -> list[dict[str, Any]]:
        """Return the available planners."""
        names = dict.fromkeys(model.planner for model in self.service.engine.models.values() if model.planner)
        return [dict(name=name, is_loaded=name == self.service.planner_of(self.model)) for name in names]

    def find_file(self, path: str) -> tuple[Record, int, str] | None:
        """Return the record, song and format for a path of `/v1/audio`; None if it is not a song. The path is only
        compared as text, and never opened."""
        root = str(self.service.store.songs)
        for prefix in (f"{root}/", "songs/", ""):
            found = FILE.fullmatch(path.removeprefix(prefix)) if path.startswith(prefix) else None
            if found and ID.fullmatch(found["id"]) and found["suffix"] in SUFFIXES:
                record = self.service.records.get(found["id"])
                if record is None:
                    raise HTTPException(404, MISSING)
                return record, int(found["index"]), SUFFIXES[found["suffix"]]
        return None

    def link_path(self, body: uploads.Body, field: str, name: str, path: str) -> None:
        """Use a song of this server for a field if the server has returned this path; else raise InputError.

        Args:
            name: what the client calls the field.
        """
        if field in body.files:
            return
        body.names[field] = name
        query = parse_qs(path.partition("?")[2]).get("path", [""])[0] if "/v1/audio?" in path else ""
        found = self.find_file(query or unquote(path))
        if found is not None:
            path = f"/v1/songs/{found[0].id}/{found[1]}.flac"
        elif not SONG.fullmatch(path) and self.service.inputs is None:
            authors_request.check_path(path)
        with naming(body.names):
            link_song(self.service, body, field, path)

    def submission(self, body: uploads.Body, client: str) -> tuple[Submission, list[str]]:
        """Return the submission for a request for songs, and the names of ignored fields.

        Raises:
            InputError: see `authors_request.submission`.
            HTTPException: 501 if it needs the planner.
        """
        models, strict = self.service.engine.models, self.service.strict
        try:
            found, paths, ignored = authors_request.submission(
                body.values, models=models, default_model=self.model, strict=strict
            )
        except authors_request.Refused as error:
            raise HTTPException(501, str(error)) from None
        found.notes += body.ignored(strict=strict)
        for field, (name, path) in paths.items():
            self.link_path(body, field, name, path)
        found.uploads, found.files, found.names, found.client = body.uploads, body.files, body.names, client
        found.adapters = dict(self.scales) if self.use_lora else {}
        _leave_out_uploads(found, body)
        return found, ignored

    def submit_analysis(self, mode: str, body: uploads.Body, client: str) -> Operation:
        """Start an analysis, see `authors_analysis`."""
        try:
            fields = Fields(body.values)
            for field, aliases in authors_request.PATHS.items():
                names = ("audio_path", *aliases) if mode == "transcribe" else aliases
                if mode in ANALYSIS_MODES and field == "src_audio" and (path := fields.text(*names)):
                    self.link_path(body, field, next(name for name in names if fields.text(name)), path)
            work = analysis.work(self.service, self.model, mode, fields, body)
        except BaseException:
            body.discard()
            raise
        return self.service.submit(Operation([work], client, body.uploads, body.names, dict(mode=mode)))

    def check_token(self, request: Request, values: dict[str, Any]) -> None:
        """Raise HTTPException 401 unless the key is in the header, or in the body as in early versions."""
        if getattr(request.state, "authorised", False):  # by its headers, see `Guard`
            return
        token = values.get("ai_token")
        if token is None:
            raise HTTPException(401, "Missing ai_token or Authorization header")
        if not self.keys.accepts(str(token)):
            raise HTTPException(401, "Invalid ai_token")

    async def body(self, request: Request, files: Mapping[str, str] | None = None) -> uploads.Body:
        """Read a body; check its key and, with --strict, that it has no other files.

        Args:
            files: the sound files that it may contain, by the names of their parts.
        """
        body = await uploads.read(request, self.service.store, files or {})
        try:
            if not isinstance(body.raw, dict):
                raise HTTPException(400, "Request body must be a JSON object")
            self.check_token(request, body.values)
            body.ignored(strict=self.service.strict)
        except BaseException:
            body.discard()
            raise
        return body


def router(service: Service, keys: Keys) -> APIRouter:
    """Return the routes."""
    routes, api = APIRouter(tags=["ACE-Step's API"]), Authors(service, keys)

    @routes.post("/release_task", summary="Submit")
    async def release_task(request: Request) -> Response:
        service.check_room(client_of(request))
        body = await api.body(request, authors_request.UPLOADS)
        try:
            if mode := analysis.mode_of(Fields(body.values)):
                operation = await run_in_threadpool(api.submit_analysis, mode, body, client_of(request))
                place = max(1, service.position(operation))
                return JSONResponse(envelope(dict(task_id=operation.id, status="queued", queue_position=place)))
            found, ignored = await run_in_threadpool(api.submission, body, client_of(request))
        except HTTPException as error:
            body.discard()
            detail = str(error.detail)
            return JSONResponse(envelope(None, error.status_code, detail) | dict(detail=detail), error.status_code)
        except BaseException:
            body.discard()
            raise
        record = await run_in_threadpool(service.accept, found)
        data = dict(task_id=record.id, status="queued", queue_position=max(1, service.position(record)))
        headers = {"x-acestep-ignored": ", ".join(ignored)} if ignored else {}
        return JSONResponse(envelope(data), headers=headers)

    @routes.post("/query_result", summary="Poll")
    async def query_result(request: Request) -> Response:
        values = (await api.body(request)).values
        ids = values.get("task_id_list", [])
        if isinstance(ids, str):
            ids = uploads.parse_json(ids) if ids.strip().startswith("[") else [ids]
        if not isinstance(ids, list) or len(ids) > MOST_IDS:
            raise InputError(f"task_id_list: expected an array of at most {MOST_IDS} ids")
        return JSONResponse(envelope([_task(api, str(task_id)) for task_id in ids]))

    @routes.post("/cancel_task", summary="Cancel")
    async def cancel_task(request: Request) -> dict[str, Any]:
        task_id = str((await api.body(request)).values.get("task_id", ""))
        record = service.records.get(task_id)
        if record is None and (operation := service.operations.all.get(task_id)) is not None:
            await run_in_threadpool(service.operations.cancel, operation)
            return envelope(dict(task_id=task_id, status=operation.status))
        if record is None:
            raise HTTPException(404, "there is no task of that id")
        await run_in_threadpool(service.cancel, record)
        return envelope(dict(task_id=task_id, status="cancelled" if record.status == "cancelled" else record.status))

    @routes.get("/v1/audio", summary="Fetch")
    @routes.head("/v1/audio", include_in_schema=False)
    async def audio(path: str) -> Response:
        found = api.find_file(path)
        if found is None:
            raise HTTPException(403, "Access denied: path outside allowed directory")
        record, index, name = found
        file = await run_in_threadpool(service.sound, record, index, name)
        if file is None:
            raise HTTPException(404, MISSING)
        return StoredFile(file, missing=MISSING, media_type=sounds.FORMATS[name].media_type)

    @routes.get("/v1/stats", summary="Counts")
    async def stats() -> dict[str, Any]:
        found = service.counts()
        ended = [r.finished - r.started for r in list(service.records.values())[-50:] if r.finished and r.started]
        jobs = dict(
            total=sum(found.values()),
            queued=found["queued"],
            running=found["running"],
            succeeded=found["done"],
            failed=found["failed"] + found["cancelled"],
        )
        mean = sum(ended) / len(ended) if ended else 5.0
        return envelope(
            dict(jobs=jobs, queue_size=service.waiting(), queue_maxsize=service.limits.queue, avg_job_seconds=mean)
        )

    @routes.get("/v1/model_inventory", summary="Models")
    async def inventory() -> dict[str, Any]:
        models = [
            dict(name=name, is_default=name == api.model, is_loaded=name == api.model, supported_task_types=model.tasks)
            for name, model in service.engine.models.items()
        ]
        return envelope(
            dict(
                models=models,
                default_model=api.model,
                lm_models=api.planners(),
                loaded_lm_model=service.planner_of(api.model),
                llm_initialized=service.planner_of(api.model) is not None,
            )
        )

    @routes.post("/v1/init", summary="Choose the model")
    async def init(request: Request) -> dict[str, Any]:
        """Make one of the server's models the default of this API; it is loaded when a song needs it."""
        values = (await api.body(request)).values
        name = values.get("model") or api.model
        if name not in service.engine.models:
            return envelope(None, 400, f"unknown model; expected one of {', '.join(service.engine.models)}")
        if Fields(values).flag("init_llm") and service.planner_of(name) is None:
            return envelope(None, 501, authors_request.NO_LANGUAGE_MODEL)
        api.model = name
        models = [dict(name=one, is_default=one == name) for one in service.engine.models]
        return envelope(
            dict(
                message=f"{name} is the default",
                slot=1,
                loaded_model=name,
                loaded_lm_model=service.planner_of(name),
                models=models,
                lm_models=api.planners(),
                llm_initialized=service.planner_of(name) is not None,
            )
        )

    @routes.post("/create_random_sample", summary="An example request")
    async def random_sample(request: Request) -> dict[str, Any]:
        await api.body(request)
        example = random.choice(authors_request.EXAMPLES)
        rest = dict(lyrics="[Instrumental]", time_signature="4", duration=60, vocal_language="en")
        return envelope(dict(example) | rest)

    @routes.post("/format_input", summary="Caption and lyrics, rewritten")
    async def format_input(request: Request) -> dict[str, Any]:
        values = (await api.body(request)).values
        if service.planner_of(api.model) is None:
            return envelope(None, 501, "format_input needs the 5 Hz language model, which this server does not have")
        work = await run_in_threadpool(analysis.rewriting, service, api.model, Fields(values))
        operation = await run_in_threadpool(service.submit, Operation([work], client_of(request)))
        try:
            await finished(service, operation, request)
        except HTTPException as error:
            return envelope(None, error.status_code, str(error.detail))
        plan = operation.plans[0]
        assert plan is not None
        return envelope(planner_fields.metadata(plan))

    @routes.post("/v1/transcribe", summary="The lyrics of a song, and when they are sung")
    async def transcribe(request: Request) -> dict[str, Any]:
        """Transcribe a song of this server, given in `audio_path`, or an upload. This needs a model with a planner,
        which detects the language itself: `language` is ignored."""
        service.check_room(client_of(request))
        body = await api.body(request, dict(audio="src_audio", src_audio="src_audio"))
        operation = await run_in_threadpool(api.submit_analysis, "transcribe", body, client_of(request))
        await finished(service, operation, request)
        return envelope(analysis.transcription(operation))

    authors_lora.add(routes, api)
    return routes


def _task(api: Authors, task_id: str) -> dict[str, Any]:
    """Return the response to a poll. An unknown id is reported as waiting, as in the authors' server."""
    record = api.service.records.get(task_id)
    if record is None:
        if (operation := api.service.operations.all.get(task_id)) is not None:
            return analysis.task(api.service, operation)
        if task_id in api.service.store.removed:
            gone = [dict(file="", wave="", status=2, progress=0.0, stage="failed", error="expired")]
            return dict(task_id=task_id, status=2, result=json.dumps(gone), progress_text="expired")
        return dict(task_id=task_id, status=0, result="[]", progress_text="")
    return api.task(record)


def _leave_out_uploads(found: Submission, body: uploads.Body) -> None:
    """Drop a source that the task does not take, because clients of this API always send it."""
    name = found.songs[0].get("task_type", DEFAULT)
    task = TASKS.get(name)
    if task is not None and "src_audio" not in task.accepts and "src_audio" in body.files:
        body.files.remove("src_audio")
        assert body.uploads is not None
        (body.uploads / "src_audio").unlink()
        found.notes.append(f"src_audio: {name} takes none; ignored")
