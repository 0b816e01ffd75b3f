"""Planner settings from the requests of the authors' protocols and related ones. As in `serve.lenient`, values that
cannot be parsed become the default."""

from typing import Any

from acestep_jax.planner.plan import Plan
from acestep_jax.planner.prompts import NOTHING
from acestep_jax.request import Planning
from acestep_jax.serve.lenient import INSTRUMENTAL, Fields
from acestep_jax.serve.planner_task import PlannerTask

RANGES = dict(
    lm_temperature=(0.0, 10.0), lm_cfg_scale=(1.0, 100.0), lm_top_p=(1e-3, 1.0), lm_repetition_penalty=(1.0, 10.0)
)
CFG_SCALE = 2.5  # default of the authors' protocol
CAPTION = ("use_cot_caption", "cot_caption", "cot-caption")
LANGUAGE = ("use_cot_language", "cot_language", "cot-language")
NEEDS = ("thinking", "sample_query", "sample_mode", "use_format")


def planning(fields: Fields, **defaults: float) -> Planning:
    """Return the planner's sampling settings.

    Args:
        defaults: defaults of the protocol.
    """
    values: dict[str, Any] = dict(defaults)
    for name, (least, most) in RANGES.items():
        if (value := fields.number(name)) is not None:
            values[name] = min(most, max(least, value))
    if (count := fields.whole("lm_top_k")) is not None:
        values["lm_top_k"] = min(10**6, max(0, count))
    if (seed := fields.whole("lm_seed")) is not None and 0 <= seed < 2**32:
        values["lm_seed"] = seed
    if (text := fields.text("lm_negative_prompt")).strip() and text.strip() != NOTHING:
        values["lm_negative_prompt"] = text[:4096]
    return Planning(**values, use_cot_caption=fields.flag(*CAPTION, default=True))


def planner_task(fields: Fields, *, wish: bool, words: str) -> PlannerTask | None:
    """Return the planner's task for a song: text and codes with `thinking`; otherwise only text, or nothing if
    use_cot_caption and use_cot_language are off.

    Args:
        wish: whether the prompt is a wish, for which the planner writes everything.
        words: the given lyrics.
    """
    thinking, rewrite = fields.flag("thinking"), fields.flag("use_format", "format")
    writes = fields.flag(*CAPTION, default=True) or fields.flag(*LANGUAGE, default=True)
    required = thinking or rewrite or wish
    if not required and not writes:
        return None
    return PlannerTask(
        mode="inspire" if wish else "format" if rewrite else "generate",
        planning=planning(fields, lm_cfg_scale=CFG_SCALE),
        codes=thinking,
        instrumental=wish and words == INSTRUMENTAL,
        required=required,
    )


def prepared(song: dict[str, Any], requested: PlannerTask, fields: Fields, words: str) -> dict[str, Any]:
    """Return a song to plan without the protocol's defaults for fields that the client left out, which the planner may
    choose.

    Args:
        fields: fields of the request, for the client's own language.
    """
    left = dict(song)
    if fields.flag(*LANGUAGE, default=True) and not fields.text("vocal_language", "language"):
        left.pop("vocal_language", None)
    if requested.mode == "inspire" and (requested.instrumental or not words.strip()):
        left["lyrics"] = INSTRUMENTAL if requested.instrumental else ""
    return left


def metadata(plan: Plan) -> dict[str, Any]:
    """Return the values of a plan by the names of the authors' protocol."""
    return dict(
        caption=plan.caption,
        lyrics=plan.lyrics,
        bpm=plan.bpm,
        key_scale=plan.keyscale or "",
        time_signature=plan.timesignature or "",
        duration=plan.audio_duration,
        vocal_language=plan.vocal_language or "unknown",
    )


def in_metas(requested: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the `metas` of a response, with the planner's values in place of "N/A"."""
    written = dict(bpm=plan.bpm, duration=plan.audio_duration, keyscale=plan.keyscale, timesignature=plan.timesignature)
    known = {name: value for name, value in written.items() if value is not None}
    return {name: known.get(name, value) if value == "N/A" else value for name, value in requested.items()}
