"""The metadata of a song in the format that the language model was trained on: YAML, sorted, folded at 80 columns."""

import re

import yaml


def dump(
    *,
    bpm: int | None = None,
    caption: str | None = None,
    duration: float | None = None,
    genres: str | None = None,
    keyscale: str | None = None,
    language: str | None = None,
    timesignature: str | None = None,
) -> str:
    """Return the given values as YAML, without a trailing newline.

    Args:
        duration: seconds, rounded to whole ones as for the transformer.
    """
    values: dict[str, str | int] = {}
    for name, text in dict(
        caption=caption, genres=genres, keyscale=keyscale, language=language, timesignature=timesignature
    ).items():
        if text:
            values[name] = int(text) if text.isascii() and text.isdecimal() else text
    if bpm is not None:
        values["bpm"] = int(bpm)
    if duration is not None:
        values["duration"] = int(duration)
    return yaml.dump(values, allow_unicode=True, sort_keys=True).strip()


def scalar(text: str) -> str:
    """Return the value of a YAML scalar on one or several lines, without quotes and with its lines joined. Text that is
    not valid YAML is returned unchanged."""
    if text[:1] in ("'", '"'):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = None
        if isinstance(value, str):
            return value.strip()
    lines = [line.strip(" \t") for line in text.split("\n")]
    if len(lines) > 1 and re.fullmatch(r"[|>][+-]?[1-9]?", lines[0]):  # a block scalar
        lines = lines[1:]
    return " ".join(line for line in lines if line)
