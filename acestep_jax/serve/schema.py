"""The OpenAPI description of a request, derived from the fields of `Request`, `Planning` and
`Sampling`."""

import dataclasses
from typing import Any

from acestep_jax.arguments import Argument, describe, repeatable, value_types
from acestep_jax.request import FILES, Arguments
from acestep_jax.serve.sounds import NAMES
from acestep_jax.serve.submission import FIELDS, PLANNING

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
EXTRA: dict[str, Any] = {
    "variations": dict(type="integer", minimum=1, default=1, description="Number of songs, with consecutive seeds."),
    "format": dict(type="string", enum=list(NAMES), default="flac", description="Format of the linked sound files."),
    "lrc": dict(
        type="boolean", default=False, description="Whether to write timestamps of each song's lyrics as an LRC file."
    ),
    "model": dict(type="string", description="One of the server's models. Default: the first."),
    "adapters": dict(
        type="object",
        additionalProperties=dict(type="number"),
        description="Scale of each adapter to use, by its name on the server.",
    ),
}
PLAN = dict(type="object", description="A plan as returned by POST /v1/plans, possibly edited, instead of a prompt.")
SHARED = ("lyrics", "audio_duration", "vocal_language", "bpm", "keyscale", "timesignature")  # in requests and plans
PLAN_FIELDS = (
    ("wish", "string", "A few words for which the planner writes caption and lyrics; same as prompt without lyrics."),
    ("instrumental", "boolean", "With wish: whether the song has no vocals."),
    ("codes", "boolean", "Whether the planner writes audio codes, too. Default: true; false with rewrite."),
    ("rewrite", "boolean", "With prompt: whether to rewrite caption and lyrics, without audio codes."),
)
SONG_LINK = "a finished song of this server, such as /v1/songs/ID/0.flac"  # also where its latents are meant


def properties() -> dict[str, Any]:
    """Return the JSON schema of each field of a submission."""
    found = {name: _property(name, field, about) for name, (field, about) in FIELDS.items()}
    for name in FILES:
        found[name] = dict(
            type="string", description=f"{describe(name, Arguments)} In JSON {SONG_LINK}; in a form an upload."
        )
    return found | EXTRA | planning() | dict(plan=PLAN)


def planning() -> dict[str, Any]:
    """Return the JSON schema of each field of `Planning`."""
    return {name: _property(name, field, about) for name, (field, about) in PLANNING.items()}


def plan_body() -> dict[str, Any]:
    """Return the `requestBody` of a plan request."""
    fields = {name: _property(name, *FIELDS[name]) for name in ("prompt", *SHARED, "seed")}
    words = {name: dict(type=kind, description=text) for name, kind, text in PLAN_FIELDS}
    return _json(fields | words | planning() | dict(plan=PLAN, model=EXTRA["model"]))


def codes_body() -> dict[str, Any]:
    """Return the `requestBody` of an audio-code request."""
    properties = dict(audio=dict(type="string", format="binary", description="A sound file."), model=EXTRA["model"])
    form = dict(type="object", properties=properties, required=["audio"])
    return dict(required=True, content={"multipart/form-data": dict(schema=form)})


def _json(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    schema = dict(type="object", properties=properties) | more
    return dict(required=True, content={"application/json": dict(schema=schema)})


def request_body() -> dict[str, Any]:
    """Return the `requestBody` of a submission: JSON, or a form with uploads."""
    fields = properties()
    uploads = {name: dict(type="string", format="binary", description=fields[name]["description"]) for name in FILES}
    form = dict(
        type="object",
        properties=dict(request=dict(type="string", description="The JSON of the request.")) | uploads,
        required=["request"],
    )
    return dict(
        required=True,
        content={
            "application/json": dict(schema=dict(type="object", properties=fields)),
            "multipart/form-data": dict(schema=form),
        },
    )


def _property(name: str, field: dataclasses.Field, about: Argument) -> dict[str, Any]:
    types = [word for kind, word in _TYPES.items() if kind in value_types(field.type)]
    one: dict[str, Any] = dict(type=types[0] if len(types) == 1 else types)
    if about.choices:
        one["enum"] = list(about.choices)
    if about.minimum is not None:
        one["minimum"] = about.minimum
    if about.maximum is not None:
        one["maximum"] = about.maximum
    many = dict(type="array", items=one)
    shape = dict(anyOf=[one, many]) if repeatable(field.type) else one
    return shape | dict(description=describe(name, Arguments))
