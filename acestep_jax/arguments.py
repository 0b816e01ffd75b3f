"""The metadata of an argument, and the checks, help texts and messages derived from it.

An argument is a field of `request.Request`, `request.Planning` or `request.Sampling`; its `Argument` is the field's
metadata.
"""

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.errors import InputError, check_number, check_text, nearest


@dataclass(frozen=True)
class Argument:
    """The metadata of a field besides its name, type and default.

    Attributes:
        help: full sentences that stand on their own, for help texts and tables.
        unit: unit of a number, such as "s".
        minimum, maximum: the range of a number, both inclusive; None: unbounded.
        choices: the allowed texts; empty: any.
        flag: the name on the command line without its dashes; None: the field's name; "": not on the command line.
        metavar: the placeholder of its value in help texts.
        default: what the default None means, for help texts.
        from_file: whether `@FILE` on the command line stands for the text in that file.
        json: whether the value can be written in JSON.
        reader: function that checks and normalises a given value, instead of the check of its type and range.
    """

    help: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    flag: str | None = None
    metavar: str | None = None
    default: str | None = None
    from_file: bool = False
    json: bool = True
    reader: Callable[[Any], Any] | None = None


def argument(default: Any = dataclasses.MISSING, *, help: str, meaning: str | None = None, **about: Any) -> Any:
    """Return a dataclass field with an `Argument` as its metadata.

    Args:
        default: of the field; without it the field is required.
        meaning: what the default means, see `Argument.default`.
    """
    metadata = {"argument": Argument(help=help, default=meaning, **about)}
    return dataclasses.field(default=default, metadata=metadata)


def arguments(kind: type) -> dict[str, tuple[dataclasses.Field, Argument]]:
    """Return the fields of a dataclass by name, each with its `Argument`."""
    return {field.name: (field, field.metadata["argument"]) for field in dataclasses.fields(kind)}


# Our names for arguments of diffusers' pipelines.
ELSEWHERE = {
    "generator": "use seed=N",
    "audio_end_in_s": "use audio_duration=SECONDS",
    "negative_prompt": "guidance contrasts with the model's own null condition; leave it out",
    "num_waveforms_per_prompt": "give a list of prompts; song i of seed s gets seed s + i",
    "callback_on_step_end_tensor_inputs": "leave it out: callback_on_step_end gets (step, t, latents)",
    "callback": "use callback_on_step_end=FUNCTION",
    "return_dict": "leave it out",
    "attention_kwargs": "leave it out; adapters are set with pipe.set_adapters({name: scale})",
    "callback_steps": "leave it out; callback_on_step_end is called after each step",
    "cross_attention_kwargs": "leave it out; adapters are set with pipe.set_adapters({name: scale})",
    "torch_dtype": 'use dtype="bfloat16", "float16" or "float32" of from_pretrained',
    "device_map": "use mesh=make_mesh(...) of from_pretrained",
    "device": "use mesh=make_mesh(...) of from_pretrained",
    "duration": "use audio_duration=SECONDS",
    "steps": "use num_inference_steps=N",
    "infer_step": "use num_inference_steps=N",
    "language": "use vocal_language=CODE",
    "task": "use task_type=TASK",
}


def unknown_name(name: str, known: Iterable[str], what: str = "argument") -> str:
    """Return the message for a name that is not among `known`: what to use instead, or the nearest known name."""
    if name in ELSEWHERE:
        return f"{name}: unknown {what}; {ELSEWHERE[name]}"
    return f"{name}: unknown {what}; {nearest(name, sorted(known))}"


def is_key(seed: Any) -> bool:
    """Return whether it is a key of `jax.random.key`, or an array of several."""
    return isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)


def check_fields(values: Any) -> None:
    """Bring every field into form, and check it against its type, range and choices; sequences of numbers or texts
    become tuples.

    Raises:
        InputError: naming the field, what was expected and what was found.
    """
    for name, (field, about) in arguments(type(values)).items():
        value = getattr(values, name)
        if value is None and types.NoneType in typing.get_args(field.type):
            continue
        if about.reader is not None:
            object.__setattr__(values, name, about.reader(value))
            continue
        kinds = value_types(field.type)
        if isinstance(value, np.ndarray) and repeatable(field.type):
            value = value.tolist()
        if isinstance(value, list | tuple) and repeatable(field.type):
            object.__setattr__(values, name, tuple(value))
            items: Collection[Any] = [item for item in value if item is not None]
        elif np.ndarray in kinds or jax.Array in kinds and is_key(value):
            continue  # arrays are checked where they are read
        elif repeatable(field.type) and not kinds & {str, float} & _accepted(field.type):
            raise InputError(f"{name}: expected a list of {'numbers' if float in kinds else 'texts'}, found {value!r}")
        else:
            items = [value]
        for item in items:
            _check_value(name, item, kinds, about)


def _accepted(kind: Any) -> set[Any]:
    """The types that a single value, outside of a sequence, may have."""
    return {part for part in alternatives(kind) if typing.get_origin(part) is None}


def _check_value(name: str, value: Any, kinds: set[Any], about: Argument) -> None:
    if kinds == {bool}:
        if not isinstance(value, bool | np.bool_):
            raise InputError(f"{name}: expected true or false, found {value!r}")
        return
    if str in kinds and not (int in kinds and isinstance(value, numbers.Integral)):
        check_text(name, value)
        if about.choices and value not in about.choices:
            raise InputError(f"{name}: expected one of {', '.join(about.choices)}, found {value!r}")
        return
    check_number(name, value, integer=float not in kinds)
    number: Any = value
    low, high = about.minimum, about.maximum
    if not (-math.inf if low is None else low) <= number <= (math.inf if high is None else high) or (
        about.unit == "" and not math.isfinite(number)
    ):
        raise InputError(f"{name}: expected {describe_range(about)}, found {number:g}")


def describe_range(about: Argument) -> str:
    """Return the range of a number in words, such as "10 to 600 s"."""
    unit = f" {about.unit}" if about.unit else ""
    low, high = about.minimum, about.maximum
    if low is not None and high is not None:
        return f"{low:g} to {high:g}{unit}" if high < 2**31 else f"{low:g} to 2^32 - 1{unit}"
    return f"at least {low:g}{unit}" if low is not None else f"a finite number{unit and f' ({about.unit})'}"


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the types that a union joins, or the one type."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def value_types(kind: Any) -> set[Any]:
    """Return the types of one value of a field: without None, and of the items of a sequence."""
    found: set[Any] = set()
    for part in alternatives(kind):
        found |= set(typing.get_args(part)) if typing.get_origin(part) is Sequence else {part}
    return found - {types.NoneType}


def repeatable(kind: Any) -> bool:
    """Return whether a field takes a sequence of values."""
    return any(typing.get_origin(part) is Sequence for part in alternatives(kind))


def describe(name: str, kind: type) -> str:
    """Return the help of a field with its range, choices and default, for help texts and tables."""
    field, about = arguments(kind)[name]
    parts = []
    if value_types(field.type) & {int, float} and about.minimum is not None:
        parts.append(describe_range(about).capitalize() + ".")
    elif about.unit:
        parts.append(f"Unit: {about.unit}.")
    if about.choices:
        parts.append(f"One of {', '.join(about.choices)}.")
    if about.default is not None:
        parts.append(f"Default: {about.default}.")
    elif isinstance(field.default, str | int | float) and field.default is not False and field.default != "":
        parts.append(
            f"Default: {field.default:g}." if isinstance(field.default, float) else f"Default: {field.default}."
        )
    return " ".join([about.help, *parts])


def table(kind: type) -> str:
    """Return the documentation's table of the fields, in Markdown."""
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", np.ndarray: "array"}
    rows = ["| argument | option | type | default | |", "|---|---|---|---|---|"]
    for name, (field, about) in arguments(kind).items():
        kinds = [word for k, word in names.items() if k in value_types(field.type)]
        default = about.default
        if default is None:
            default = "required" if field.default is dataclasses.MISSING else _written(field.default)
        help, _, _ = describe(name, kind).partition(" Default: ")
        option = flag(name, about)
        if option and value_types(field.type) == {bool} and field.type is not bool:
            option = f"{option}`, `--no-{option[2:]}"
        cells = [f"`{name}`", f"`{option}`" if option else "", " or ".join(kinds), default, help.replace("|", "\\|")]
        rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(rows) + "\n"


def flag(name: str, about: Argument) -> str:
    """Return the option of a field on the command line, such as --cover-strength; "" if it has none."""
    if name == "prompt":
        return "PROMPT"
    short = name.replace("_", "-") if about.flag is None else about.flag
    return f"--{short}" if short else ""


def _written(default: Any) -> str:
    """Return a default as documentation shows it."""
    if default in (None, "", ()):
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)
