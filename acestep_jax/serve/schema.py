"""The OpenAPI description of a request, derived from the fields of `Request` and `Sampling`."""

import dataclasses
from typing import Any

from acestep_jax.arguments import Argument, describe, repeatable, value_types
from acestep_jax.request import Arguments
from acestep_jax.serve.sounds import NAMES
from acestep_jax.serve.store import FILE_FIELDS
from acestep_jax.serve.submission import FIELDS, PLANNING

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
EXTRA: dict[str, Any] = {
    "variations": dict(type="integer", minimum=1, default=1, description="Songs to make, of consecutive seeds."),
    "format": dict(type="string", enum=list(NAMES), default="flac", description="Sound file of the links."),
    "lrc": dict(
        type="boolean", default=False, description="Whether each song gets an LRC file, which says when lines are sung."
    ),
    "model": dict(type="string", description="One of the server's models. Default: the first."),
    "adapters": dict(
        type="object",
        additionalProperties=dict(type="number"),
        description="Scale of each adapter that is used, by the name that the server gives it.",
    ),
}
PLAN = dict(type="object", description="A plan as POST /v1/plans answers it, in place of prompt; it may be changed.")
SHARED = ("lyrics", "audio_duration", "vocal_language", "bpm", "keyscale", "timesignature")  # by requests and plans
PLAN_FIELDS = (
    ("wish", "string", "A few words, of which the planner makes caption and lyrics; as a prompt without lyrics."),
    ("instrumental", "boolean", "With wish: whether nothing is to be sung."),
    ("codes", "boolean", "Whether the planner writes audio codes, too. Default: true; false with rewrite."),
    ("rewrite", "boolean", "With prompt: whether caption and lyrics are written anew, without audio codes."),
)
SONG_LINK = "a finished song of this server, such as /v1/songs/ID/0.flac"


def properties() -> dict[str, Any]:
    """Return the JSON schema of each field of a submission."""
    found = {name: _property(name, field, about) for name, (field, about) in FIELDS.items()}
    for name in FILE_FIELDS:
        found[name] = dict(
            type="string", description=f"{describe(name, Arguments)} In JSON {SONG_LINK}; in a form an upload."
        )
    return found | EXTRA | planning() | dict(plan=PLAN)


def planning() -> dict[str, Any]:
    """Return the JSON schema of each field of `Planning`."""
    return {name: _property(name, field, about) for name, (field, about) in PLANNING.items()}


def plan_body() -> dict[str, Any]:
    """Return the `requestBody` of a request for a plan."""
    fields = {name: _property(name, *FIELDS[name]) for name in ("prompt", *SHARED, "seed")}
    words = {name: dict(type=kind, description=text) for name, kind, text in PLAN_FIELDS}
    return _json(fields | words | planning() | dict(plan=PLAN, model=EXTRA["model"]))


def codes_body() -> dict[str, Any]:
    """Return the `requestBody` of a request for audio codes."""
    properties = dict(audio=dict(type="string", format="binary", description="A sound file."), model=EXTRA["model"])
    form = dict(type="object", properties=properties, required=["audio"])
    return dict(required=True, content={"multipart/form-data": dict(schema=form)})


def _json(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    schema = dict(type="object", properties=properties) | more
    return dict(required=True, content={"application/json": dict(schema=schema)})


def request_body() -> dict[str, Any]:
    """Return the `requestBody` of a submission: JSON, or a form with uploads."""
    fields = properties()
    uploads = {
        name: dict(type="string", format="binary", description=fields[name]["description"]) for name in FILE_FIELDS
    }
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
