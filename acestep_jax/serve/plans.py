"""Plans before songs, and audio codes of songs: `/v1/plans`, `/v1/codes`."""

import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from acestep_jax import request as requests
from acestep_jax.errors import InputError
from acestep_jax.inputs import tasks
from acestep_jax.request import FILES, Sampling
from acestep_jax.serve import schema, uploads
from acestep_jax.serve.engine import Work
from acestep_jax.serve.native import client_of
from acestep_jax.serve.operations import Operation
from acestep_jax.serve.planner_task import PlannerTask
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
from acestep_jax.serve.waiting import BEAT, EventStream, await_end, changes

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
    model = service.model_named(values.pop("model", None))
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
    planner_task = PlannerTask(
        mode=mode,
        planning=planning_of(planning, service.limits),
        codes=flags.get("codes", mode != "format") and mode != "format",
        instrumental=flags.get("instrumental", False),
        required=True,
    )
    work = Work(request, Sampling(), model, planner_task=planner_task, is_song=False)
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
        body.check_known(())
        if not isinstance(body.raw, dict):
            raise InputError('expected a JSON object such as {"wish": "a sad song about the sea"}')
        work, kept = await run_in_threadpool(work_of, service, body.values)
        operation = await run_in_threadpool(service.submit, Operation([work], client_of(request), extra=kept))
        if "text/event-stream" in request.headers.get("accept", ""):
            return EventStream(service, operation, _events(service, operation))
        await finished(service, operation, request)
        return JSONResponse(_plan(operation))

    @routes.post("/v1/codes", summary="The audio codes of a song", openapi_extra=dict(requestBody=schema.codes_body()))
    async def codes(request: Request) -> dict[str, Any]:
        """Return the audio codes of a sound file, 5 per second."""
        service.check_room(client_of(request))
        body = await uploads.read(request, service.store, {"audio": "audio"})
        try:
            body.check_known(("audio", "model"))
            if "audio" not in body.files or (body.uploads is None):
                raise InputError("audio: missing; upload a sound file as multipart/form-data")
            source = str(body.uploads / "audio")
            found = analysis_work(service, body.values.get("model"), "codes", src_audio=source)
        except BaseException:
            body.discard()
            raise
        operation = Operation([found], client_of(request), body.uploads, names={"src_audio": "audio"})
        await run_in_threadpool(service.submit, operation)
        await finished(service, operation, request)
        return dict(audio_codes=_plan(operation)["audio_codes"])

    return routes


def require_planner(service: Service, model: str | None) -> None:
    """Raise HTTPException 501 if a model (None: the first) has no planner."""
    if service.planner_of(model) is None:
        raise HTTPException(501, NO_PLANNER)


def analysis_work(service: Service, model: str | None, mode: str, **source: Any) -> Work:
    """Return the work that analyses an existing song.

    Args:
        model: its name; None: the first.
        mode: a mode of `planner_task.ANALYSIS_MODES`.
        source: `src_audio` or `src_latents`, a file, or `audio_codes` as text.

    Raises:
        InputError: if there is no such model.
        HTTPException: 501 if it lacks the planner for a description, or an audio tokenizer.
    """
    model = service.model_named(model)
    if mode != "codes":
        require_planner(service, model)
    if "audio_codes" not in source and not service.engine.models[model].has_codes:
        raise HTTPException(501, f"{model} has no audio tokenizer")
    request = requests.Request("", seed=0, **source)
    return Work(request, Sampling(), model, planner_task=PlannerTask(mode=mode, required=True), is_song=False)


def _plan(operation: Operation) -> dict[str, Any]:
    plan = operation.plans[0]
    assert plan is not None
    return plan.to_dict() | operation.extra


async def _events(service: Service, operation: Operation) -> AsyncIterator[str]:
    async for changed in changes(service, operation, BEAT):
        stage, step, steps = operation.progress()
        values: dict[str, Any] = dict(status=operation.status, stage=stage, step=step, steps=steps)
        if operation.status == "done":
            values["plan"] = _plan(operation)
        if operation.error is not None:
            values["error"] = operation.error
        text = json.dumps(values, ensure_ascii=False)
        yield f"event: {operation.status}\ndata: {text}\n\n" if changed else ": waiting\n\n"
    if not operation.final:
        yield ": closing\n\n"


async def finished(service: Service, operation: Operation, request: Request) -> None:
    """Wait for an operation; raise HTTPException unless it succeeds. A disconnect cancels."""
    await await_end(service, operation, request, stopping="the server is stopping", late="it was not finished in time")
    if operation.status != "done":
        status = 409 if operation.status != "failed" else 400 if operation.is_refused else 500
        raise HTTPException(status, operation.error or operation.status)
