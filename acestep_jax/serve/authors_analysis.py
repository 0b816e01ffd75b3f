"""The authors' protocol without generating a song: audio codes, descriptions, and rewritten requests."""

import json
import secrets
from typing import Any

from acestep_jax.errors import InputError
from acestep_jax.request import Request, Sampling
from acestep_jax.serve import planner_fields, uploads
from acestep_jax.serve.authors_request import metadata
from acestep_jax.serve.engine import Work
from acestep_jax.serve.lenient import NO_PROMPT, Fields
from acestep_jax.serve.operations import Operation
from acestep_jax.serve.planner_task import ANALYSIS_MODES, PlannerTask
from acestep_jax.serve.plans import analysis_work, require_planner
from acestep_jax.serve.service import Service
from acestep_jax.serve.submission import MAX_SEED, check_text_length

MODES = {"extract_codes_only": "codes", "full_analysis_only": "describe", "analysis_only": "generate"}
CODES = {"queued": 0, "running": 0, "done": 1, "failed": 2, "cancelled": 2}


def mode_of(fields: Fields) -> str | None:
    """Return the requested analysis, a mode of `planner_task.PlannerTask`; None: a song is requested."""
    return next((mode for name, mode in MODES.items() if fields.flag(name)), None)


def work(service: Service, default_model: str, mode: str, fields: Fields, body: uploads.Body) -> Work:
    """Return the work for the engine.

    Raises:
        InputError: if the source is missing, or a value cannot be used.
        HTTPException: 501 if there is no planner, or no audio tokenizer.
    """
    model = fields.text("model", "model_name", "dit_model")
    model = model if model in service.engine.models else default_model
    if mode != "codes":
        require_planner(service, model)
    if mode in ANALYSIS_MODES:
        codes = fields.text("audio_code_string", "audio_codes").strip()
        if body.uploads is not None and "src_audio" in body.files:
            return analysis_work(service, model, mode, src_audio=str(body.uploads / "src_audio"))
        if not codes:
            raise InputError("src_audio: missing; upload the song as multipart/form-data")
        return analysis_work(service, model, mode, audio_codes=codes)
    found = rewriting(service, model, fields)
    found.planner_task = PlannerTask(planning=planner_fields.planning(fields), codes=False, required=True)
    return found


def transcription(operation: Operation) -> dict[str, Any]:
    """Return the response of /v1/transcribe: the transcribed lyrics and their timestamps, which are empty if the
    model's alignment heads are not known."""
    plan, found = operation.plans[0], operation.analyses[0]
    assert plan is not None and found is not None
    times = found.timestamps
    words = [] if times is None else [dict(word=word.text, start=word.start, end=word.end) for word in times.words]
    return dict(words=words, lrc_text="" if times is None else times.lrc(), lyrics_text=plan.lyrics)


def rewriting(service: Service, model: str, fields: Fields) -> Work:
    """Return a work in which the planner rewrites caption and lyrics.

    Raises:
        InputError: if a value cannot be used.
        HTTPException: 501 if there is no planner.
    """
    require_planner(service, model)
    values: dict[str, Any] = dict(
        prompt=fields.text("prompt", "caption").strip() or NO_PROMPT,
        lyrics=fields.text("lyrics"),
        vocal_language=fields.text("vocal_language", "language") or None,
        seed=secrets.randbelow(MAX_SEED),
        **metadata(fields),
    )
    for name, most in (("prompt", service.limits.prompt), ("lyrics", service.limits.lyrics)):
        check_text_length(name, values[name], most)
    planning = planner_fields.planning(fields)
    if (temperature := fields.number("temperature")) is not None:
        planning = planner_fields.planning(Fields(dict(fields.values) | dict(lm_temperature=temperature)))
    planner_task = PlannerTask("format", planning, codes=False, required=True)
    return Work(Request(**values), Sampling(), model, planner_task=planner_task, is_song=False)


def task(service: Service, operation: Operation) -> dict[str, Any]:
    """Return the response to a poll."""
    stage, step, steps = operation.progress()
    common: dict[str, Any] = dict(file="", wave="", create_time=int(operation.created), env="development")
    common |= dict(status=CODES[operation.status], progress=round(step / max(1, steps), 4), stage=stage)
    plan = operation.plans[0]
    if operation.final and (operation.status != "done" or plan is None):
        common |= dict(progress=0.0, error=operation.error or operation.status)
    elif plan is not None:
        said = planner_fields.metadata(plan)
        codes = "".join(f"<|audio_code_{code}|>" for code in plan.audio_codes)
        about = dict(bpm="N/A", duration="N/A", genres="N/A", keyscale="N/A", timesignature="N/A")
        common |= dict(
            progress=1.0,
            stage="succeeded",
            prompt=plan.caption,
            lyrics=plan.lyrics,
            metas=planner_fields.in_metas(about, plan) | dict(prompt=plan.caption, lyrics=plan.lyrics),
            generation_info=codes if operation.extra.get("mode") == "codes" else json.dumps(said, ensure_ascii=False),
            audio_codes=codes,
            seed_value="",
            lm_model="" if operation.extra.get("mode") == "codes" else service.planner_of(operation.model) or "",
            dit_model=operation.model,
        )
    result = json.dumps([common], ensure_ascii=False)
    return dict(task_id=operation.id, status=CODES[operation.status], result=result, progress_text=stage)
