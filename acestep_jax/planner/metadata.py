"""The known values of a song, before and after the language model writes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from acestep_jax.errors import InputError, check_number, check_text
from acestep_jax.inputs import fields
from acestep_jax.request import MAX_DURATION, MIN_DURATION

CODES_PER_SECOND = 5
CODEBOOK_SIZE = 64000
INSTRUMENTAL = "[Instrumental]"


@dataclass(frozen=True)
class Known:
    """The values that the user gave; the language model writes those that are None or empty.

    Attributes:
        caption: the caption; for `inspire`, a query in any words.
        bpm: beats per minute, 30 to 300.
        keyscale: such as "F# minor".
        timesignature: beats in a bar: 2, 3, 4 or 6.
        duration: seconds, 10 to 600.
        language: code of the vocal language, such as "en"; "unknown" is the same as None.
        instrumental: whether there are no vocals. Empty lyrics become "[Instrumental]".
        codes: audio codes, 0 to 63999, for `understand`.

    Raises:
        InputError: if a value is of the wrong type, unknown or out of range.
    """

    caption: str = ""
    lyrics: str = ""
    bpm: str | float | None = None
    keyscale: str | None = None
    timesignature: str | float | None = None
    duration: float | None = None
    language: str | None = None
    instrumental: bool = False
    codes: Sequence[int] = ()

    def __post_init__(self):
        for name in ("caption", "lyrics"):
            check_text(name, getattr(self, name))
            try:
                getattr(self, name).encode()
            except UnicodeEncodeError as error:
                raise InputError(f"{name}: not valid text ({error.reason}); is it in UTF-8?") from None
            object.__setattr__(self, name, fields.lines(getattr(self, name)))
        if self.language is not None:
            language = fields.vocal_language(self.language)
            object.__setattr__(self, "language", None if language == fields.UNKNOWN_LANGUAGE else language)
        object.__setattr__(self, "bpm", fields.bpm(self.bpm))
        object.__setattr__(self, "keyscale", fields.keyscale(self.keyscale))
        object.__setattr__(self, "timesignature", fields.timesignature(self.timesignature))
        if self.duration is not None:
            check_duration(self.duration)
        object.__setattr__(self, "codes", check_codes(self.codes))
        if self.instrumental and not self.lyrics.strip():
            object.__setattr__(self, "lyrics", INSTRUMENTAL)


@dataclass(frozen=True)
class Metadata:
    """The metadata of a song. Attributes as in `Known`; values from the user are kept.

    Attributes:
        bpm, keyscale, timesignature, duration: None only if the language model answered "N/A" in `understand`.
        language: "unknown" if the language model wrote that; None if there is no value.
        genres: written only by `inspire`, `format` and `understand`, and by few models.
    """

    caption: str
    lyrics: str = ""
    bpm: int | None = None
    keyscale: str | None = None
    timesignature: str | None = None
    duration: float | None = None
    language: str | None = None
    genres: str = ""


def check_duration(duration: float) -> None:
    """Raise InputError unless a duration, in seconds, is in the range that the model was trained on."""
    check_number("duration", duration)
    if not MIN_DURATION <= duration <= MAX_DURATION:
        raise InputError(
            f"duration: expected {MIN_DURATION:g} to {MAX_DURATION:g} s, found {duration:g}; give a duration in that "
            "range, or none"
        )


def check_codes(codes: Sequence[int], name: str = "codes") -> tuple[int, ...]:
    """Return audio codes as a tuple; raise InputError, naming `name`, unless they are integers in the codebook."""
    for code in codes:
        check_number(name, code, integer=True)
        if not 0 <= code < CODEBOOK_SIZE:
            raise InputError(
                f"{name}: expected whole numbers from 0 to {CODEBOOK_SIZE - 1}, the size of the codebook, found {code}"
            )
    return tuple(int(code) for code in codes)


def count_codes(duration: float) -> int:
    """Return the number of audio codes that cover a song of this duration in seconds."""
    return math.ceil(round(CODES_PER_SECOND * duration, 6))
