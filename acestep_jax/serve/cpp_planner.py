"""The planner in acestep.cpp's protocol: completes requests, and describes songs."""

import dataclasses
import json
import secrets
from typing import Any

from fastapi import HTTPException, Response
from fastapi.responses import JSONResponse

from acestep_jax.errors import InputError
from acestep_jax.inputs import tasks
from acestep_jax.inputs.tasks import codes_to_text
from acestep_jax.planner.plan import Plan
from acestep_jax.request import Request, Sampling
from acestep_jax.serve import cpp_latents, planner_fields, uploads
from acestep_jax.serve.engine import Work
from acestep_jax.serve.lenient import NO_PROMPT, Fields
from acestep_jax.serve.operations import Operation, Operations
from acestep_jax.serve.planner_task import PlannerTask
from acestep_jax.serve.plans import analysis_work, require_planner
from acestep_jax.serve.service import Service
from acestep_jax.serve.submission import MAX_SEED, check_text_length

BOUNDARY = "ace-batch-boundary"
STATES = {"queued": "running", "running": "running", "done": "done", "failed": "failed", "cancelled": "cancelled"}
MODES = ("generate", "inspire", "format")
UNDERSTAND_DEFAULTS = dict(lm_temperature=0.3, lm_top_p=1.0)  # the defaults of /understand


def planner_task(fields: Fields) -> PlannerTask | None:
    """Return the planner's task for a request; None: the request has audio codes, or a task that is not planned.

    Raises:
        InputError: if its mode is unknown.
    """
    mode = fields.text("lm_mode") or "generate"
    if mode not in MODES:
        raise InputError(f"lm_mode: expected one of {', '.join(MODES)}, found {mode!r:.80}")
    task = fields.text("task_type") or tasks.DEFAULT
    if fields.text("audio_codes").strip() or tasks.find(task).with_codes is None:
        return None
    codes = mode == "generate"
    if codes and not fields.text("lyrics").strip():
        mode = "inspire"
    return PlannerTask(mode, planner_fields.planning(fields), codes=codes, required=True)


def metadata(fields: Fields) -> dict[str, Any]:
    """Return the fields of `Request` that describe the music; 0 and "" stand for None."""
    return dict(
        bpm=fields.whole("bpm") or None,
        audio_duration=fields.number("duration") or None,
        keyscale=fields.text("keyscale") or None,
        timesignature=fields.text("timesignature") or None,
        vocal_language=fields.text("vocal_language") or None,
    )


def works(service: Service, model: str, fields: Fields, planner_task: PlannerTask, count: int) -> list[Work]:
    """Return `count` works for a request, each with its own seed.

    Raises:
        InputError: if a value cannot be used.
    """
    values: dict[str, Any] = dict(
        prompt=fields.text("caption").strip() or NO_PROMPT,
        lyrics=fields.text("lyrics"),
        **metadata(fields),
    )
    for name, most in (("prompt", service.limits.prompt), ("lyrics", service.limits.lyrics)):
        check_text_length(name, values[name], most)
    seed = secrets.randbelow(MAX_SEED - count)
    return [
        Work(Request(**values, seed=seed + i), Sampling(), model, planner_task=planner_task.for_song(i), is_song=False)
        for i in range(count)
    ]


def description_work(service: Service, fields: Fields, body: uploads.Body) -> Work:
    """Return the work that describes a song.

    Raises:
        InputError: if there is no song.
        HTTPException: 501 if there is no planner.
    """
    model = next(iter(service.engine.models))
    codes = fields.text("audio_codes").strip()
    if source := cpp_latents.source_of(body):
        work = analysis_work(service, model, "understand", **source)
    elif codes:
        work = analysis_work(service, model, "understand", audio_codes=codes_of(codes))
    else:
        require_planner(service, model)
        raise InputError("audio: missing; upload the song as multipart/form-data")
    assert work.planner_task is not None
    work.planner_task = dataclasses.replace(
        work.planner_task, planning=planner_fields.planning(fields, **UNDERSTAND_DEFAULTS)
    )
    return work


def codes_of(text: str) -> str:
    """Convert comma-separated numbers to the library's format of audio codes."""
    try:
        return text if "<|" in text else codes_to_text([int(part) for part in text.split(",")])
    except ValueError:
        raise InputError("audio_codes: expected numbers separated by commas") from None


def answer(operations: Operations, operation: Operation, wants_result: bool) -> Response:
    """Return the response of /job: the state, or the completed requests; for a described song a multipart body, with
    its latents; or the result of /vae."""
    if not wants_result:
        return JSONResponse(dict(status=STATES[operation.status]))
    if operation.status == "failed":
        raise HTTPException(400 if operation.is_refused else 500, operation.error or "failed")
    plans = [plan for plan in operation.plans if plan is not None]
    if operation.status != "done":
        raise HTTPException(404, "Result not ready")
    if "form" in operation.extra:
        return cpp_latents.converted(operations, operation)
    requests = operation.extra["requests"]
    if requests is not None:
        return JSONResponse([_completed(one, plan) for one, plan in zip(requests, plans, strict=True)])
    text = json.dumps([_completed({}, plans[0])], ensure_ascii=False)
    described = f"--{BOUNDARY}\r\nContent-Type: application/json\r\n\r\n{text}\r\n".encode()
    body = described + cpp_latents.part(operation, BOUNDARY) + f"--{BOUNDARY}--\r\n".encode()
    return Response(body, media_type=f"multipart/mixed; boundary={BOUNDARY}")


def _completed(request: dict[str, Any], plan: Plan) -> dict[str, Any]:
    return request | dict(
        caption=plan.caption,
        lyrics=plan.lyrics,
        bpm=plan.bpm or 0,
        duration=plan.audio_duration or 0,
        keyscale=plan.keyscale or "",
        timesignature=plan.timesignature or "",
        vocal_language=plan.vocal_language or "",
        audio_codes=",".join(map(str, plan.audio_codes)),
        lm_batch_size=1,
    )
