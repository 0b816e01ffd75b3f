"""Parses the language model's tokens into the fields of a song."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from acestep_jax.errors import InputError
from acestep_jax.inputs import fields
from acestep_jax.planner import cot
from acestep_jax.planner.metadata import Metadata, check_duration
from acestep_jax.planner.tokenizer import Mark, PlannerTokenizer

T = TypeVar("T")

_LYRICS_TITLE = re.compile(r"\A#\s*Lyrics?[ \t]*(\n|\Z)", re.I)
_LANGUAGE_TITLE = re.compile(r"\A# Languages?[ \t]*\n[^\n]*\n+(?=#\s*Lyrics?[ \t]*(\n|\Z))", re.I)


def parse(tokenizer: PlannerTokenizer, ids: Sequence[int]) -> Metadata:
    """Return the fields that the model wrote: metadata, within `<think>` and `</think>` or before the first audio code,
    then lyrics. Fields that are missing, "N/A" or invalid are None or empty.

    Marks are found by their token ids, so a caption that spells one out does not end there.
    """
    ids = [int(i) for i in ids]
    ends = [i for i, token in enumerate(ids) if token >= tokenizer.first_code]
    ids = ids[: ends[0]] if ends else ids
    begin, end = tokenizer.mark(Mark.THINK), tokenizer.mark(Mark.END_OF_THINK)
    thoughts, rest = (ids[: (i := ids.index(end))], ids[i + 1 :]) if end in ids else (ids, [])
    if begin in thoughts:
        thoughts = thoughts[thoughts.index(begin) + 1 :]
    found = parse_fields(tokenizer.decode(thoughts))
    stop = tokenizer.mark(Mark.END_OF_TURN)
    lyrics = tokenizer.decode(i for i in (rest[: rest.index(stop)] if stop in rest else rest) if i < tokenizer.size)
    return Metadata(
        caption=found.get("caption", ""),
        lyrics=parse_lyrics(lyrics),
        bpm=_usable(fields.bpm, found.get("bpm")),
        keyscale=_usable(fields.keyscale, found.get("keyscale")),
        timesignature=_usable(fields.timesignature, found.get("timesignature")),
        duration=_usable(_duration, found.get("duration")),
        language=_usable(fields.vocal_language, found.get("language")),
        genres=found.get("genres", ""),
    )


def parse_fields(text: str) -> dict[str, str]:
    """Return the fields of metadata: a line that does not begin with white space starts a field; other lines and blank
    ones continue it. Empty fields and "N/A" are left out."""
    raw: dict[str, str] = {}
    name = None
    for line in text.split("\n"):
        if line[:1] in (" ", "\t", ""):
            if name is not None:
                raw[name] += f"\n{line}"
        elif ":" in line:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            raw[name] = value
    found = {name: cot.scalar(value.lstrip(" \t")) for name, value in raw.items()}
    return {name: value for name, value in found.items() if value and value.lower() != "n/a"}


def parse_lyrics(text: str) -> str:
    """Return lyrics without leading titles such as "# Lyric" and surrounding white space."""
    text = _LANGUAGE_TITLE.sub("", text.strip())
    return _LYRICS_TITLE.sub("", text).strip()


def _usable(normalise: Callable[[Any], T], value: str | None) -> T | None:
    """Return a value in the form that the model was trained on, or None if it has none."""
    try:
        return None if value is None else normalise(value)
    except InputError:
        return None


def _duration(value: str) -> float | None:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:s|seconds)?", value)
    if found is None:
        return None
    check_duration(float(found[1]))
    return float(found[1])
