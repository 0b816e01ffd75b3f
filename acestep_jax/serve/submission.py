"""Turns client requests into songs to make: the server's limits, seeds, and the fields of `Request` and `Sampling`,
from which the protocols are derived."""

import contextlib
import dataclasses
import math
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from acestep_jax.arguments import arguments, unknown_name
from acestep_jax.errors import InputError
from acestep_jax.planner.metadata import count_codes
from acestep_jax.planner.plan import VERSION, Plan
from acestep_jax.request import Planning, Request, Sampling, split
from acestep_jax.serve.planner_task import PlannerTask

MAX_SEED = 2**32 - 1
# Fields that clients cannot set: the server limits the lengths of texts, in characters.
HIDDEN = ("max_text_length", "max_lyric_length")
FIELDS = {
    name: (field, about)
    for name, (field, about) in (arguments(Request) | arguments(Sampling)).items()
    if about.json and name not in HIDDEN
}
PLANNING = arguments(Planning)
NO_PLANNER = "this server has no planner for the model"


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of the server.

    Attributes:
        queue: waiting songs.
        queue_minutes: estimated minutes of waiting work.
        per_client: waiting songs of one address; addresses of this machine are not limited.
        upload_bytes: size of a request's body.
        duration: seconds of a song, a source or a reference.
        variations: songs per request.
        prompt, lyrics: characters.
        steps: sampling steps; other counts that multiply the work have the same limit.
        keep_bytes, keep_records: size and number of stored records; the oldest are removed first.
    """

    queue: int = 200
    queue_minutes: float = 30.0
    per_client: int = 16
    upload_bytes: int = 256 * 2**20
    duration: float = 600.0
    variations: int = 9
    prompt: int = 4096
    lyrics: int = 16384
    steps: int = 200
    keep_bytes: int = 20 * 10**9
    keep_records: int = 10_000


@dataclasses.dataclass
class Submission:
    """A client's request, independent of the protocol.

    Attributes:
        songs: for each song, the given fields of `Request` and `Sampling`.
        model: name of the model; None: the server's first.
        uploads: a folder from `Store.new_folder` with a file for each field of `files`.
        names: see `uploads.Body`.
        client: address of the client, for limits.
        planner_task: the planner's task for each song that can be planned; None: no planning.
        plan: the plan from the client, whose values are already in `songs`.
        lrc: whether to write a file with timestamps of the lyrics for each song.
    """

    songs: list[dict[str, Any]]
    api: str
    model: str | None = None
    adapters: Mapping[str, float] = dataclasses.field(default_factory=dict)
    format: str = "flac"
    notes: list[str] = dataclasses.field(default_factory=list)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    uploads: Path | None = None
    files: list[str] = dataclasses.field(default_factory=list)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    client: str = "127.0.0.1"
    planner_task: PlannerTask | None = None
    plan: Plan | None = None
    lrc: bool = False


def model_named(models: Mapping[str, Any], name: object, field: str = "model") -> str:
    """Return the name of a model; None or "": the first.

    Args:
        field: the client's name of this value.

    Raises:
        InputError: if there is no such model.
    """
    if name is None or name == "":
        return next(iter(models))
    if not isinstance(name, str) or name not in models:
        raise InputError(f"{field}: expected one of {', '.join(models)}, found {shown(name)}")
    return name


def variations(values: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return the fields of `count` songs with seeds s, s + 1, ...; s is random if it is not given.

    Raises:
        InputError: if a seed is out of range.
    """
    seed = values.get("seed")
    if seed is None:
        seed = secrets.randbelow(MAX_SEED - count)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED - (count - 1):
        raise InputError(f"seed: expected a whole number from 0 to 2^32 - {count}, found {shown(seed)}")
    return [dict(values) | dict(seed=seed + i) for i in range(count)]


def split_planning(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split values into those that are not fields of `Planning`, and those that are, without unset ones."""
    planning = {name: value for name, value in values.items() if name in PLANNING and value is not None}
    return {name: value for name, value in values.items() if name not in PLANNING}, planning


def no_planner(names: Iterable[str], *, strict: bool) -> list[str]:
    """Return a note for each planning field that is ignored because the model has no planner.

    Raises:
        InputError: if `strict` is set and there is one.
    """
    names = list(names)
    if strict and names:
        raise InputError(f"{names[0]}: {NO_PLANNER}, and it was started with --strict")
    return [f"{name}: {NO_PLANNER}; ignored" for name in names]


def planning_of(values: Mapping[str, Any], limits: Limits) -> Planning:
    """Return the planner's sampling settings; raise InputError for an invalid value."""
    for name, value in values.items():
        if isinstance(value, str):
            check_text_length(name, value, limits.prompt)
    try:
        return Planning(**values)
    except (TypeError, OverflowError) as error:
        raise InputError(f"a value has the wrong type for its field ({error})") from None


def plan_of(values: Any) -> Plan:
    """Return the plan from a client, see `Plan.from_dict`; the version is optional."""
    if not isinstance(values, dict):
        raise InputError(f"plan: expected an object as returned by POST /v1/plans, found {shown(values)}")
    try:
        return Plan.from_dict(dict(version=VERSION) | values)
    except InputError:
        raise
    except (TypeError, OverflowError, ValueError) as error:
        raise InputError(f"plan: a value has the wrong type for its field ({error})") from None


def values_of_plan(plan: Plan) -> dict[str, Any]:
    """Return the fields of `Request` in a plan."""
    request = plan.request()
    found = {
        name: getattr(request, name)
        for name, (field, _) in arguments(Request).items()
        if field.default is not getattr(request, name)
    }
    return {name: value for name, value in found.items() if value is not None}


def check_values(values: Mapping[str, Any], limits: Limits) -> None:
    """Raise InputError for an unknown name, or a value beyond the server's limits."""
    for name, value in values.items():
        if name not in FIELDS:
            raise InputError(unknown_name(str(name), FIELDS, "field"))
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str):
                check_text_length(name, text, limits.prompt if "lyrics" not in name else limits.lyrics)
        if isinstance(value, list | tuple) and len(value) > limits.steps:
            raise InputError(f"{name}: expected at most {limits.steps} values, found {len(value)}")
    for name in ("num_inference_steps", "flow_edit_n_avg"):
        value = values.get(name)
        if isinstance(value, int) and value > limits.steps:
            raise InputError(f"{name}: expected at most {limits.steps}, found {shown(value)}")
    duration = values.get("audio_duration")
    if isinstance(duration, int | float) and duration > limits.duration:
        raise InputError(f"audio_duration: expected at most {limits.duration:g} s, found {shown(duration)}")
    codes, most = values.get("audio_codes"), count_codes(limits.duration)
    if isinstance(codes, str) and (count := codes.count("<|audio_code_")) > most:  # the codes determine the duration
        raise InputError(f"audio_codes: expected at most {most}, for {limits.duration:g} s, found {count}")


def check_text_length(name: str, text: str, most: int) -> None:
    """Raise InputError unless `text` is valid and has at most `most` characters. Codes are numbers, and not limited."""
    if name != "audio_codes" and len(text) > most:
        raise InputError(f"{name}: expected at most {most} characters, found {len(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name}: not text that can be written as UTF-8") from None


def request_and_sampling(values: Mapping[str, Any], files: Mapping[str, Path]) -> tuple[Request, Sampling]:
    """Return the request and the sampling settings of a song.

    Args:
        files: uploaded files, by field.

    Raises:
        InputError: if a value cannot be used.
    """
    if "prompt" not in values:
        raise InputError("prompt: missing; describe the music in a few words")
    requested, _, sampled = split(values)
    requested: dict[str, Any] = requested | {name: str(path) for name, path in files.items()}
    try:
        return Request(**requested), Sampling(**sampled)
    except (TypeError, OverflowError) as error:
        raise InputError(f"a value has the wrong type for its field ({error})") from None


def with_fields(message: str, files: Mapping[str, Path]) -> str:
    """Return a message with field names in place of the server's paths, which clients should not see."""
    for name, path in files.items():
        message = message.replace(str(path), name)
    return message


def renamed(message: str, names: Mapping[str, str]) -> str:
    """Return a message with the client's names of its uploads, given by our names of them, in place of ours."""
    if not names:
        return message
    ours = "|".join(map(re.escape, names))
    return re.sub(rf"(?<![\w/])({ours})(?![\w/])", lambda found: names[found[0]], message)


def message_for_client(message: str, files: Mapping[str, Path], names: Mapping[str, str], folder: Path) -> str:
    """Return an error with the client's names of its uploads, and without paths of the server.

    Args:
        files: the uploads, by field.
        names: see `uploads.Body`.
        folder: the server's folder.
    """
    return renamed(with_fields(message, files), names).replace(str(folder), "the server's folder")


@contextlib.contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Have errors of the input name uploads as the client does; see `uploads.Body`."""
    try:
        yield
    except InputError as error:
        if (message := renamed(str(error), names)) == str(error):
            raise
        raise InputError(message) from None


def field_of(message: str) -> str | None:
    """Return the field that a message is about, which it begins with."""
    subject, colon, _ = message.partition(":")
    first = subject.split(",")[0].strip()
    return first if colon and first.isidentifier() else None


def shown(value: Any) -> str:
    """Format a value for messages; truncate long ones."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    if isinstance(value, float) and not math.isfinite(value):
        return "a non-finite number"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
