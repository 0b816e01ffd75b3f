"""A plan: the planner's answer to a wish, as data that can be read, edited, saved and turned into songs."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from acestep_jax.arguments import unknown_name
from acestep_jax.errors import InputError
from acestep_jax.inputs.tasks import codes_to_text
from acestep_jax.io.files import as_path, check_output, publish_file
from acestep_jax.planner.metadata import check_codes
from acestep_jax.request import Planning, Request

VERSION = 1
# The fields that a plan shares with the request that it becomes.
_SHARED = ("lyrics", "audio_duration", "vocal_language", "bpm", "keyscale", "timesignature")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A planned song: the planner's text and codes, and all values that the user gave, which are kept.

    Attributes:
        caption: description of the music, used instead of the prompt.
        lyrics, audio_duration, vocal_language, bpm, keyscale, timesignature: see `Request`; None: left to the model.
        audio_codes: 5 per second, each from 0 to 63999; empty: the transformer gets only text.
        prompt: the user's own words.
        lm_seed: the seed that reproduces the plan; None if no seed does.
        score: how well the codes match the text, from 0 to 1, see `planner.scores`; None: not computed.

    Raises:
        InputError: if a value is of the wrong type or out of range.
    """

    caption: str
    lyrics: str = ""
    audio_duration: float | None = None
    vocal_language: str | None = None
    bpm: int | None = None
    keyscale: str | None = None
    timesignature: str | None = None
    audio_codes: Sequence[int] = ()
    prompt: str = ""
    lm_seed: int | None = None
    score: float | None = None

    def __post_init__(self):
        codes = self.audio_codes
        if not isinstance(codes, Sequence | np.ndarray) or isinstance(codes, str):
            raise InputError(f"audio_codes: expected a list of whole numbers, found {codes!r}")
        object.__setattr__(self, "audio_codes", check_codes(codes, "audio_codes"))
        Planning(lm_seed=self.lm_seed)  # checks it
        checked = Request(self.prompt, **{name: getattr(self, name) for name in _SHARED})
        for name in _SHARED:
            object.__setattr__(self, name, getattr(checked, name))
        Request(self.caption)  # checks that it is text
        if self.score is not None and not (isinstance(self.score, int | float) and math.isfinite(self.score)):
            raise InputError(f"score: expected a number, found {self.score!r}")

    def request(self, base: Request | None = None) -> Request:
        """Return the request of the song.

        Args:
            base: a request with further fields, such as the seed; the plan's fields replace its own.
        """
        values: dict[str, Any] = {name: getattr(self, name) for name in _SHARED}
        values |= dict(prompt=self.caption, audio_codes=codes_to_text(self.audio_codes) if self.audio_codes else None)
        return Request(**values) if base is None else dataclasses.replace(base, **values)

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary for `from_dict` that is ready for JSON."""
        values = dataclasses.asdict(self)
        return {"version": VERSION, **values, "audio_codes": list(self.audio_codes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "plan") -> Self:
        """Return the plan in a dictionary.

        Args:
            source: name for messages, such as that of its file.

        Raises:
            InputError: if it is of another version, a key is unknown, or a value is out of range.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"{source}: expected a JSON object, found {str(values)[:40]}")
        values = dict(values)
        if (version := values.pop("version", None)) != VERSION:
            raise InputError(f"{source}: version: expected a plan of version {VERSION}, found {version!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise InputError(f"{source}: {unknown_name(name, known, 'key')}")
        if "caption" not in values:
            raise InputError(f"{source}: caption: missing; describe the music in a few words")
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the plan as JSON, atomically.

        Raises:
            InputError: see `check_output`.
            OSError: if it cannot be written.
        """
        path = check_output(path, overwrite=overwrite)
        with publish_file(path) as temporary:
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan written by `save` or by hand.

        Raises:
            InputError: if the file is not a plan, see `from_dict`.
            OSError: if it cannot be read.
        """
        path = as_path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:  # also raised for bytes that are not UTF-8
            raise InputError(f"{path}: not a plan in JSON ({error}); `acestep-jax plan` writes one") from None
        return cls.from_dict(values, str(path))

    def to_json(self) -> str:
        """Return the plan as JSON with one line per field, including the codes."""
        values = self.to_dict()
        codes = values.pop("audio_codes")
        lines = [f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
        return "{\n" + ",\n".join([*lines, f'  "audio_codes": {json.dumps(codes)}']) + "\n}"

    def describe(self) -> str:
        """Return the plan as readable text: one line per field, then the lyrics."""
        seconds = "" if self.audio_duration is None else f"{self.audio_duration:g} s"
        fields = dict(
            caption=self.caption,
            bpm=self.bpm,
            key=self.keyscale,
            time_signature=self.timesignature,
            duration=seconds,
            language=self.vocal_language,
            codes=len(self.audio_codes) or None,
            score=None if self.score is None else f"{self.score:.3f}",
        )
        lines = [f"{name.replace('_', ' ')}: {value}" for name, value in fields.items() if value not in (None, "")]
        return "\n".join([*lines, *([] if not self.lyrics else ["", self.lyrics])])
