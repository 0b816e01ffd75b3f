"""Lenient parsing, as in the authors' server and related ones: several names per value, anything as text, and the
default for values that do not parse. `inputs.fields` parses the values for the model."""

import re
from collections.abc import Mapping
from typing import Any

from acestep_jax.errors import InputError
from acestep_jax.inputs import tasks
from acestep_jax.inputs.tasks import TRACKS
from acestep_jax.planner.metadata import INSTRUMENTAL
from acestep_jax.serve.uploads import parse_json

TRUE = ("1", "true", "yes", "y", "on")
NESTED = ("metas", "meta", "metadata", "user_metadata", "userMetadata")
NO_PROMPT = "music"  # used if a client gives only lyrics, because the library requires a description
MAX_INT = 2**63


class Fields:
    """The values of a request, by any of their names, at the top level or in the objects that clients nest them in.

    Raises:
        HTTPException: 413, see `uploads.parse_json`.
    """

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        self._places = [values, _object(values.get("param_obj"))]
        self._places.append(next((_object(values[name]) for name in NESTED if values.get(name) is not None), {}))

    def get(self, *names: str) -> Any:
        """Return the first value under one of the names or their camelCase forms; None if there is none."""
        for place in self._places:
            for name in (*names, *map(_camel, names)):
                if place.get(name) is not None:
                    return place[name]
        return None

    def text(self, *names: str, default: str = "") -> str:
        """Return a value as text."""
        value = self.get(*names)
        if value is None or isinstance(value, list | dict):
            return default
        return str(value)

    def whole(self, *names: str) -> int | None:
        """Return an integer; None if there is no valid one."""
        number = self.number(*names)
        return None if number is None else int(number)

    def number(self, *names: str) -> float | None:
        """Return a finite number; None if there is no valid one."""
        return number(self.get(*names))

    def flag(self, *names: str, default: bool = False) -> bool:
        """Return a boolean."""
        value = self.get(*names)
        if value is None:
            return default
        return value if isinstance(value, bool) else str(value).strip().lower() in TRUE


def number(value: Any) -> float | None:
    """Parse a finite number from a number or text; return None if it is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if abs(found) < MAX_INT else None


def lyrics(text: str) -> str:
    """Return lyrics; empty lyrics become those of an instrumental song."""
    return INSTRUMENTAL if text.strip().lower() in ("", "[inst]", "[instrumental]") else text


def seeds(value: Any) -> list[int]:
    """Return the seeds in a number or a text such as "42,123", without negative and invalid ones."""
    found = [number(part) for part in (value.split(",") if isinstance(value, str) else [value])]
    return [int(seed) for seed in found if seed is not None and seed >= 0]


def times(text: str) -> list[float] | None:
    """Return the timesteps in "0.97,0.76,...,0" without the 0; None if there are none."""
    found = [number(part) for part in text.replace(" ", "").split(",") if part]
    numbers = [value for value in found if value]
    return numbers or None


def tracks(value: Any) -> list[str]:
    """Return the track names in "VOCALS | DRUMS", "vocals,drums" or a list."""
    parts = value if isinstance(value, list) else re.split(r"[|,]", str(value or ""))
    names = [str(part).strip().lower().replace(" ", "_") for part in parts]
    return [name for name in names if name]


def for_task(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the task takes, because clients of these protocols send all fields for every task.

    Raises:
        InputError: if there is no such task.
    """
    name = values.get("task_type") or tasks.DEFAULT
    task = tasks.find(name)
    if values.get("audio_codes") and task.with_codes:
        name, task = task.with_codes, tasks.find(task.with_codes)
    return {field: value for field, value in values.items() if name in tasks.accepting(field)}


def put_tracks(values: dict[str, Any], found: list[str]) -> None:
    """Set the tracks of a task.

    Raises:
        InputError: if one is unknown.
    """
    for name in found:
        if name not in TRACKS:
            raise InputError(f"track_name: unknown track {name[:40]!r}; expected one of {', '.join(TRACKS)}")
    if found:
        values["track_name"] = found if len(found) > 1 else found[0]


def _object(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except InputError:
            return {}
    return value if isinstance(value, dict) else {}


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.title() for part in rest)
