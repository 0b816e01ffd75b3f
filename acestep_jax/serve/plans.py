"""Plans before songs, and audio codes of songs: `/v1/plans`, `/v1/codes`."""

import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from acestep_jax import request as requests
from acestep_jax.errors import InputError
from acestep_jax.inputs import tasks
from acestep_jax.request import FILES, Sampling
from acestep_jax.serve import schema, uploads
from acestep_jax.serve.engine import Work
from acestep_jax.serve.errands import Errand
from acestep_jax.serve.native import client_of
from acestep_jax.serve.service import Service
from acestep_jax.serve.submission import (
    MAX_SEED,
    NO_PLANNER,
    check_values,
    plan_of,
    planning_of,
    shown,
    split_planning,
    values_of_plan,
)
from acestep_jax.serve.thinking import Thought
from acestep_jax.serve.waiting import RETRY_SECONDS, TIMEOUT, changes, ended

BEAT = 2.0  # seconds between heartbeats of a stream
OTHERS = (*FILES, "variations", "format", "adapters")  # fields of a song request that do not affect a plan
FLAGS = ("instrumental", "codes", "rewrite")


def work_of(service: Service, values: dict[str, Any]) -> tuple[Work, dict[str, Any]]:
    """Return the work for a plan request, and the values of the client's plan that are kept.

    Raises:
        InputError: naming the field that cannot be used.
        HTTPException: 501 if there is no planner.
    """
    values, planning = split_planning(values)
    planning.pop("thinking", None)
    model = values.pop("model", None)
    if model is not None and not (isinstance(model, str) and model in service.engine.models):
        raise InputError(f"model: expected one of {', '.join(service.engine.models)}, found {shown(model)}")
    require_planner(service, model)
    flags = {name: values.pop(name) for name in FLAGS if values.get(name) is not None}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise InputError(f"{name}: expected true or false, found {shown(value)}")
    subjects = [name for name in ("wish", "prompt", "plan") if values.get(name) is not None]
    if len(subjects) != 1:
        raise InputError(f"wish, prompt, plan: expected one of them, found {' and '.join(subjects) or 'none'}")
    mode, kept = "generate", None
    if subjects == ["wish"]:
        mode, values["prompt"] = "inspire", values.pop("wish")
        if flags.get("instrumental") and values.get("lyrics"):
            raise InputError("instrumental, lyrics: expected one of them, found both")
    elif subjects == ["plan"]:  # its text is kept, and it gets new codes
        kept = plan_of(values.pop("plan"))
        values = {n: v for n, v in values_of_plan(kept).items() if n != "audio_codes"} | values
        planning["use_cot_caption"] = False
    elif flags.get("rewrite"):
        mode = "format"
    elif not values.get("lyrics"):
        mode = "inspire"
    values = {name: value for name, value in values.items() if name not in OTHERS}
    if values.get("task_type") not in (None, tasks.DEFAULT):
        raise InputError(f"task_type: the planner supports {tasks.DEFAULT}, found {shown(values['task_type'])}")
    check_values(values, service.limits)
    values = {name: values[name] for name in ("prompt", "seed", *schema.SHARED) if name in values}
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    given.setdefault("seed", secrets.randbelow(MAX_SEED))
    try:
        request = requests.Request(**given)
    except (TypeError, OverflowError) as error:
        raise InputError(f"a value has the wrong type for its field ({error})") from None
    thought = Thought(
        mode=mode,
        planning=planning_of(planning, service.limits),
        codes=flags.get("codes", mode != "format") and mode != "format",
        instrumental=flags.get("instrumental", False),
        required=True,
    )
    work = Work(request, Sampling(), model or next(iter(service.engine.models)), thought=thought, is_song=False)
    return work, {} if kept is None else dict(prompt=kept.prompt)


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["plans"])

    @routes.post("/v1/plans", summary="A plan", openapi_extra=dict(requestBody=schema.plan_body()))
    async def plan(request: Request) -> Response:
        """Return a plan for a wish, a prompt or an edited plan, in the format of `plan` in `POST /v1/songs`. The body
        may be a whole song request; fields that do not affect a plan are ignored. With `Accept: text/event-stream`,
        stream events queued, running, done, failed and cancelled. Closing the connection cancels."""
        service.check_room(client_of(request))
        body = await uploads.read(request, service.store)
        if not isinstance(body.raw, dict):
            raise InputError('expected a JSON object such as {"wish": "a sad song about the sea"}')
        work, kept = work_of(service, body.values)
        errand = await run_in_threadpool(service.ask, [work], client_of(request), extra=kept)
        if "text/event-stream" in request.headers.get("accept", ""):
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            return StreamingResponse(_events(service, errand), media_type="text/event-stream", headers=headers)
        await finished(service, errand, request)
        return JSONResponse(_plan(errand))

    @routes.post("/v1/codes", summary="The audio codes of a song", openapi_extra=dict(requestBody=schema.codes_body()))
    async def codes(request: Request) -> dict[str, Any]:
        """Return the audio codes of a sound file, 5 per second."""
        service.check_room(client_of(request))
        body = await uploads.read(request, service.store, {"audio": "audio"})
        try:
            if "audio" not in body.files or (body.uploads is None):
                raise InputError("audio: missing; upload a sound file as multipart/form-data")
            model = body.values.get("model") or next(iter(service.engine.models))
            found = listening(service, model, "codes", src_audio=str(body.uploads / "audio"))
        except BaseException:
            body.discard()
            raise
        names = {"src_audio": "audio"}
        errand = await run_in_threadpool(service.ask, [found], client_of(request), body.uploads, None, names)
        await finished(service, errand, request)
        return dict(audio_codes=_plan(errand)["audio_codes"])

    return routes


def require_planner(service: Service, model: str | None) -> None:
    """Raise HTTPException 501 if a model (None: the first) has no planner."""
    if service.planner_of(model) is None:
        raise HTTPException(501, NO_PLANNER)


def listening(service: Service, model: str, mode: str, **source: Any) -> Work:
    """Return the work that analyses an existing song.

    Args:
        mode: a mode of `thinking.LISTENING`.
        source: `src_audio` or `src_latents`, a file, or `audio_codes` as text.

    Raises:
        InputError: if there is no such model.
        HTTPException: 501 if it lacks the planner for a description, or an audio tokenizer.
    """
    if model not in service.engine.models:
        raise InputError(f"model: expected one of {', '.join(service.engine.models)}, found {shown(model)}")
    if mode != "codes":
        require_planner(service, model)
    if "audio_codes" not in source and not service.engine.models[model].has_codes:
        raise HTTPException(501, f"{model} has no audio tokenizer")
    request = requests.Request("", seed=0, **source)
    return Work(request, Sampling(), model, thought=Thought(mode=mode, required=True), is_song=False)


def _plan(errand: Errand) -> dict[str, Any]:
    plan = errand.plans[0]
    assert plan is not None
    return plan.to_dict() | errand.extra


async def _events(service: Service, errand: Errand) -> AsyncIterator[str]:
    try:
        async for changed in changes(service, errand, BEAT):
            stage, step, steps = errand.progress()
            values: dict[str, Any] = dict(status=errand.status, stage=stage, step=step, steps=steps)
            if errand.status == "done":
                values["plan"] = _plan(errand)
            if errand.error is not None:
                values["error"] = errand.error
            text = json.dumps(values, ensure_ascii=False)
            yield f"event: {errand.status}\ndata: {text}\n\n" if changed else ": waiting\n\n"
        if not errand.final:
            yield ": closing\n\n"
    finally:
        service.errands.cancel(errand)


async def finished(service: Service, errand: Errand, request: Request) -> None:
    """Wait for an errand; raise HTTPException unless it succeeds. A disconnect cancels."""

    async def connected() -> bool:
        return not await request.is_disconnected()

    try:
        await ended(service, errand, TIMEOUT, connected)
    finally:
        over, is_waiting = service.is_over(errand), not errand.final
        service.errands.cancel(errand)
    if is_waiting and over:
        raise HTTPException(503, "the server is stopping", {"retry-after": str(RETRY_SECONDS)})
    if is_waiting:
        raise HTTPException(504, "it was not finished in time")
    if errand.status != "done":
        status = 409 if errand.status != "failed" else 400 if errand.is_refused else 500
        raise HTTPException(status, errand.error or errand.status)
