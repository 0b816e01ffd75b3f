"""The server's own protocol: `/v1/songs`."""

import dataclasses
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from acestep_jax.errors import InputError
from acestep_jax.request import FILES
from acestep_jax.serve import schema, sounds, uploads
from acestep_jax.serve.files import StoredFile
from acestep_jax.serve.planner_task import PlannerTask
from acestep_jax.serve.security import Keys
from acestep_jax.serve.service import Service
from acestep_jax.serve.store import LRC, Record
from acestep_jax.serve.submission import (
    FIELDS,
    Submission,
    no_planner,
    plan_of,
    planning_of,
    shown,
    split_planning,
    values_of_plan,
    variations,
)
from acestep_jax.serve.waiting import changes

ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
SONG = re.compile(r"(?:https?://[^/]+)?/v1/songs/(?P<id>[0-9a-f-]{36})/(?P<index>\d{1,4})(?:\.\w+)?(?:\?.*)?")
FILE = re.compile(r"(?P<index>\d{1,4})\.(?P<suffix>[a-z0-9]{2,8})")
COMMENT_SECONDS = 15.0  # between heartbeats of a stream
REFRESH_SECONDS = 2.0  # between updates of a place in the queue
UPLOADS = {name: name for name in FILES}
MISSING = "there is no song of that id"
PROCESS = f"{time.time_ns() // 10**6:x}"  # part of event ids, which are valid only within one process


def find(service: Service, record_id: str) -> Record:
    """Return a record; raise HTTPException 404 if there is none. The id is only looked up, and never used in a path."""
    record = service.records.get(record_id) if ID.fullmatch(record_id) else None
    if record is None:
        raise HTTPException(404, MISSING)
    return record


def client_of(request: Request) -> str:
    """Return the address of a client."""
    return request.client.host if request.client else "127.0.0.1"


def link_song(service: Service, body: uploads.Body, field: str, value: str) -> None:
    """Use a finished song of this server, given by its link, or a file of `service.inputs`, given by its path.

    Raises:
        InputError: for any other text.
    """
    found = SONG.fullmatch(value)
    record = service.records.get(found["id"]) if found else None
    if record is None and service.inputs is None:
        raise InputError(
            f"{field}: paths are not opened; upload the file as multipart/form-data, or give {schema.SONG_LINK}"
        )
    body.uploads = body.uploads or service.store.new_folder()
    if record is not None and found is not None:
        service.kept.use_song(body.uploads, field, record, int(found["index"]))
    elif service.inputs is not None:
        service.inputs.take(field, value, body.uploads / field, service.limits.upload_bytes)
    body.files.append(field)


def submission_of(service: Service, body: uploads.Body, client: str) -> Submission:
    """Return the submission for a body of this protocol.

    Raises:
        InputError: naming the field that cannot be used.
    """
    body.check_known(("request", *FILES))
    values = body.raw
    if body.kind == "form":
        others = body.values.keys() - {"request"}
        if "request" not in body.values or others:
            name = min(others, default="request")
            raise InputError(f"{name}: expected a field request with JSON, and uploads {' and '.join(FILES)}")
        values = uploads.parse_json(body.values["request"])
    if not isinstance(values, dict):
        raise InputError('expected a JSON object such as {"prompt": "lofi piano"}')
    values, planning = split_planning(values)
    count, form, with_lrc = values.pop("variations", 1), values.pop("format", "flac"), values.pop("lrc", False)
    if not isinstance(with_lrc, bool):
        raise InputError(f"lrc: expected true or false, found {shown(with_lrc)}")
    model, adapters = service.model_named(values.pop("model", None)), values.pop("adapters", None) or {}
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= service.limits.variations:
        raise InputError(f"variations: expected 1 to {service.limits.variations}, found {shown(count)}")
    if not isinstance(adapters, dict):
        raise InputError(f"adapters: expected an object of scales by name, found {shown(adapters)}")
    for field in FILES:
        value = values.pop(field, None)
        if value is None:
            continue
        if field in body.files or not isinstance(value, str):
            raise InputError(f"{field}: expected an upload or the link of a song, found {shown(value)}")
        link_song(service, body, field, value)
    plan, replaced = values.pop("plan", None), []
    if plan is not None:
        plan = plan_of(plan)
        said = values_of_plan(plan)
        replaced = [
            n for n, v in said.items() if values.get(n) not in (None, "", v, plan.prompt if n == "prompt" else v)
        ]
        values |= said
    planner_task, notes = planner_task_of(service, model, planning, is_planned=plan is not None)
    notes += [f"{name}: the plan's value was used" for name in replaced]
    return Submission(
        songs=variations(values, count),
        api="native",
        planner_task=planner_task,
        plan=plan,
        lrc=with_lrc,
        model=model,
        adapters=adapters,
        format=sounds.check_format(form),
        notes=notes,
        uploads=body.uploads,
        files=body.files,
        client=client,
    )


def planner_task_of(
    service: Service, model: str | None, planning: dict[str, Any], *, is_planned: bool
) -> tuple[PlannerTask | None, list[str]]:
    """Return the planner's task, and notes about ignored planning fields. As in the library, a song is planned if there
    is a planner, unless the song comes from a plan.

    Raises:
        InputError: if a value cannot be used, or see `no_planner`.
    """
    thinking = planning.get("thinking")
    checked = planning_of(planning, service.limits)
    if service.planner_of(model) is None:
        return None, no_planner([name for name, value in planning.items() if value is not False], strict=service.strict)
    if thinking is False or is_planned:
        return None, []
    return PlannerTask(planning=dataclasses.replace(checked, thinking=None), required=bool(thinking)), []


def view(service: Service, keys: Keys, record: Record) -> dict[str, Any]:
    """Return the representation of a record for clients."""
    part, stage, step, steps = service.progress(record)
    eta = service.eta(record)
    songs = []
    for i, song in enumerate(record.songs):
        values: dict[str, Any] = dict(index=i, status=song.status, seed=song.seed, seconds=song.seconds)
        values["favourite"] = song.favourite
        if song.status == "done":
            base = f"/v1/songs/{record.id}/{i}"
            values["audio"] = keys.link(f"{base}.{record.format}")
            values["latents"] = keys.link(f"{base}.latents")
        if song.lrc:
            values["lrc"] = keys.link(f"/v1/songs/{record.id}/{i}.lrc")
        if song.plan is not None:
            values["plan"] = {name: value for name, value in song.plan.items() if name != "audio_codes"}
            values["plan_file"] = keys.link(f"/v1/songs/{record.id}/{i}.plan")
        if song.error:
            values["error"] = song.error
        songs.append(values)
    first = record.songs[0]
    return dict(
        id=record.id,
        status=record.status,
        position=service.position(record),
        eta_seconds=None if eta is None else round(eta, 1),
        progress=round(part, 4),
        stage=stage,
        step=step,
        steps=steps,
        created=record.created,
        started=record.started,
        finished=record.finished,
        model=record.model,
        adapters=record.adapters,
        format=record.format,
        lrc=record.lrc,
        notes=record.notes,
        error=record.error,
        request=first.request | first.sampling,
        uploads=record.files,
        songs=songs,
    )


def router(service: Service, keys: Keys) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["songs"])

    @routes.post(
        "/v1/songs", status_code=202, openapi_extra=dict(requestBody=schema.request_body()), summary="Request songs"
    )
    async def submit(request: Request, response: Response) -> dict[str, Any]:
        """Submit songs. Fields are those of `Request`, `Planning` and `Sampling`; an unknown field is an error."""
        service.check_room(client_of(request))
        body = await uploads.read(request, service.store, UPLOADS)
        try:
            submission = await run_in_threadpool(submission_of, service, body, client_of(request))
        except BaseException:
            body.discard()
            raise
        record = await run_in_threadpool(service.accept, submission)
        response.headers["location"] = f"/v1/songs/{record.id}"
        return view(service, keys, record)

    @routes.get("/v1/songs", summary="History, newest first")
    def history(
        limit: int = Query(20, ge=1, le=200, description="Maximum number of records."),
        before: str | None = Query(None, max_length=64, description="Only records older than the one with this id."),
    ) -> dict[str, Any]:
        records = service.history(limit, before)
        more = records[-1].id if len(records) == limit else None
        return dict(songs=[view(service, keys, record) for record in records], before=more)

    @routes.get("/v1/songs/{record_id}", summary="One record")
    async def get(record_id: str) -> Response:
        """Return the record. Polls of known ids never get here: `serve.polls` answers them, with an ETag."""
        return JSONResponse(view(service, keys, find(service, record_id)))

    @routes.post("/v1/songs/{record_id}/cancel", summary="Stop the unfinished songs of a record")
    async def cancel(record_id: str) -> dict[str, Any]:
        record = find(service, record_id)
        await run_in_threadpool(service.cancel, record)
        return view(service, keys, record)

    @routes.delete("/v1/songs/{record_id}", summary="Cancel a record, or remove a finished one")
    async def delete(record_id: str) -> dict[str, Any]:
        record = find(service, record_id)
        was_final = record.final
        await run_in_threadpool(service.delete if was_final else service.cancel, record)
        return dict(id=record.id, status="removed" if was_final else record.status)

    @routes.put("/v1/songs/{record_id}/{index}/favourite", summary="Mark a song as a favourite", status_code=204)
    @routes.delete("/v1/songs/{record_id}/{index}/favourite", summary="Unmark it", status_code=204)
    async def favourite(record_id: str, index: int, request: Request) -> Response:
        """Mark a song as a favourite, or unmark it. Favourites do not count toward `--keep-gb`."""
        record = find(service, record_id)
        if not 0 <= index < len(record.songs) or record.songs[index].status != "done":
            raise HTTPException(404, "this song is not finished")
        await run_in_threadpool(service.kept.set_favourite, record, index, request.method == "PUT")
        return Response(status_code=204)

    @routes.get("/v1/songs/{record_id}/events", summary="Progress as server-sent events")
    async def events(record_id: str, request: Request) -> StreamingResponse:
        """Stream events queued, running, done, failed and cancelled, each with the record. Supports Last-Event-ID."""
        record = find(service, record_id)
        last = request.headers.get("last-event-id", "")
        stream = _events(service, keys, record, last)
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    @routes.get("/v1/songs/{record_id}/{name}", summary="The audio, latents or settings of a song")
    @routes.head("/v1/songs/{record_id}/{name}", include_in_schema=False)
    async def file(record_id: str, name: str, download: bool = False) -> Response:
        """Return song I as I.flac, .wav, .mp3, .ogg, .opus, .wav24 or .wav32, with range requests; its latents as
        I.latents, float32 [frames, channels]; its settings as I.json; its plan as I.plan; or the timestamps of its
        lyrics as I.lrc."""
        record = find(service, record_id)
        found = FILE.fullmatch(name)
        index = int(found["index"]) if found else -1
        if found is None or index >= len(record.songs):
            raise HTTPException(404, "there is no such file")
        suffix = found["suffix"]
        if suffix == "json":
            song = record.songs[index]
            about = dict(model=record.model, adapters=record.adapters, seconds=song.seconds)
            text = json.dumps(song.request | song.sampling | about, ensure_ascii=False, indent=2)
            return Response(text, media_type="application/json")
        if suffix == "plan":
            if record.songs[index].plan is None:
                raise HTTPException(404, "this song has no plan")
            return JSONResponse(record.songs[index].plan)
        if suffix == "lrc":
            path = service.store.song_path(record, index, LRC)
            found_path = path if record.songs[index].lrc and path.exists() else None
            if found_path is None:
                raise HTTPException(404, "this song has no timestamps of its lyrics; request it with lrc")
            media = "text/plain; charset=utf-8"
        elif suffix == "latents":
            path = service.store.song_path(record, index, ".latents")
            found_path = path if record.songs[index].status == "done" and path.exists() else None
            media = "application/octet-stream"
        elif suffix in sounds.FORMATS:
            found_path = await run_in_threadpool(service.sound, record, index, suffix)
            media = sounds.FORMATS[suffix].media_type
        else:
            raise HTTPException(
                404, f"unknown kind of file; expected one of {', '.join(sounds.FORMATS)}, latents, json, plan, lrc"
            )
        if found_path is None:
            raise HTTPException(404, "this song is not finished")
        options: dict[str, Any] = dict(filename=f"{record.id}-{found_path.name}") if download else {}
        return StoredFile(found_path, missing=MISSING, media_type=media, **options)

    @routes.get("/v1/server", summary="Models, adapters and limits")
    async def about() -> dict[str, Any]:
        limits = service.limits
        return dict(
            models=[
                dict(
                    name=name,
                    turbo=model.turbo,
                    tasks=model.tasks,
                    sample_rate=model.sample_rate,
                    frame_rate=model.frame_rate,
                    planner=model.planner,
                    lrc=model.has_alignment,
                )
                for name, model in service.engine.models.items()
            ],
            adapters=list(service.engine.adapters),
            planner=any(model.planner for model in service.engine.models.values()),
            formats=list(sounds.NAMES),
            fields=list(FIELDS),
            limits=dict(
                duration=limits.duration,
                variations=limits.variations,
                prompt=limits.prompt,
                lyrics=limits.lyrics,
                upload_bytes=limits.upload_bytes,
                queue=limits.queue,
            ),
        )

    return routes


async def _events(service: Service, keys: Keys, record: Record, last: str) -> AsyncIterator[str]:
    sent, told, place = last, time.monotonic(), None
    async for _ in changes(service, record, REFRESH_SECONDS):
        event_id, status = f"{PROCESS}-{record.version}", record.status  # before the view: changes in between are
        now, values = time.monotonic(), view(service, keys, record)  # sent again, even if they are the last ones
        if event_id != sent or values["position"] != place and place is not None:
            text = json.dumps(values, ensure_ascii=False)
            yield f"id: {event_id}\nevent: {status}\ndata: {text}\n\n"
            sent, told = event_id, now
        elif now - told >= COMMENT_SECONDS:
            yield ": waiting\n\n"
            told = now
        place = values["position"]
    if not record.final:
        yield ": closing\n\n"
