"""Normalises each field of a text to the values that the model was trained on, for songs and for training data.

Source: ACE-Step 1.5's `acestep/constants.py` (VALID_LANGUAGES, VALID_KEYSCALES, BPM_MIN, VALID_TIME_SIGNATURES).
"""

import re

from acestep_jax.errors import InputError, check_text

MIN_BPM, MAX_BPM = 30, 300
TIME_SIGNATURES = ("2", "3", "4", "6")
UNKNOWN_LANGUAGE = "unknown"
# English name of each language by code; names are accepted as well.
LANGUAGES: dict[str, str] = {
    pair.partition(":")[0]: pair.partition(":")[2]
    for pair in (
        "ar:arabic az:azerbaijani bg:bulgarian bn:bengali ca:catalan cs:czech da:danish de:german el:greek en:english "
        "es:spanish fa:persian fi:finnish fr:french he:hebrew hi:hindi hr:croatian ht:haitian hu:hungarian "
        "id:indonesian is:icelandic it:italian ja:japanese ko:korean la:latin lt:lithuanian ms:malay ne:nepali "
        "nl:dutch no:norwegian pa:punjabi pl:polish pt:portuguese ro:romanian ru:russian sa:sanskrit sk:slovak "
        "sr:serbian sv:swedish sw:swahili ta:tamil te:telugu th:thai tl:tagalog tr:turkish uk:ukrainian ur:urdu "
        "vi:vietnamese yue:cantonese zh:chinese unknown:unknown"
    ).split()
}
_CODES = {name: code for code, name in LANGUAGES.items()}
_SAYS_NOTHING = frozenset(("", "n/a", "none", "null", "auto", "?", "-"))
_KEY = re.compile(r"([A-Ga-g])\s*(#|b|♯|♭|sharp|flat)?\s*(?:([mM])|(major|maj|minor|min))?", re.ASCII)
_ACCIDENTALS = {"♯": "#", "sharp": "#", "♭": "b", "flat": "b"}


def says_nothing(value: object) -> bool:
    """Return whether a value means "not known", such as empty text, "N/A" and "auto"."""
    return value is None or str(value).strip().lower() in _SAYS_NOTHING


def bpm(value: str | float | None) -> int | None:
    """Return whole beats per minute from a number or text such as "128 bpm"; None for a value that means "not known".

    Raises:
        InputError: if it is not a number, or not from 30 to 300.
    """
    if says_nothing(value):
        return None
    found = re.fullmatch(r"(\d+(?:[.,]\d+)?)\s*(?:bpm)?", str(value).strip(), re.I)
    number = round(float(found[1].replace(",", "."))) if found else 0
    if not MIN_BPM <= number <= MAX_BPM:
        raise InputError(f"bpm: expected {MIN_BPM} to {MAX_BPM} beats per minute, found {_shown(value)}")
    return number


def keyscale(value: str | None) -> str | None:
    """Return a key as the model knows it, such as "F# minor" for "F#m", "f♯ minor" or "F sharp min".

    A letter without a mode is major, as in chord names. None for a value that means "not known".

    Raises:
        InputError: if it is not a key.
    """
    if value is None:
        return None
    check_text("keyscale", value)
    if says_nothing(value):
        return None
    text = re.sub(r"(?i)major|maj|minor|min|sharp|flat", lambda match: match[0].lower(), value.strip())
    found = _KEY.fullmatch(text)
    if found is None:
        raise InputError(
            "keyscale: expected A to G, with or without # or b, and major or minor, such as 'F# minor', found "
            f"{value!r}"
        )
    note, accidental, letter, word = found.groups()
    minor = letter == "m" or (word or "").startswith("min")
    accidental = _ACCIDENTALS.get(accidental, accidental or "")
    return f"{note.upper()}{accidental} {'minor' if minor else 'major'}"


def timesignature(value: str | float | None) -> str | None:
    """Return the beats in a bar, such as "4" for 4 or "4/4"; None for a value that means "not known".

    Raises:
        InputError: if the model was not trained on it.
    """
    if says_nothing(value):
        return None
    found = re.fullmatch(r"(\d+)(?:\.0)?(?:\s*/\s*(?:2|4|8|16))?", str(value).strip())
    if found is None or found[1] not in TIME_SIGNATURES:
        raise InputError(
            f"timesignature: expected one of {', '.join(TIME_SIGNATURES)}, or a fraction such as 4/4, found "
            f"{_shown(value)}"
        )
    return found[1]


def vocal_language(value: str) -> str:
    """Return the code of a language, such as "en" for "EN", "en-US" or "English"; "unknown" if it is not known.

    Raises:
        InputError: if the model was not trained on the language.
    """
    check_text("vocal_language", value)
    text = value.strip().lower()
    if says_nothing(text):
        return UNKNOWN_LANGUAGE
    code = _CODES.get(text, re.split(r"[-_]", text)[0])
    if code not in LANGUAGES:
        raise InputError(f"vocal_language: expected one of {', '.join(LANGUAGES)}, found {value!r}")
    return code


def lines(value: str) -> str:
    """Return text with uniform line endings."""
    return value.replace("\r\n", "\n").replace("\r", "\n")


def _shown(value: object) -> str:
    """Return a value for messages: text in quotes, numbers without."""
    return repr(value) if isinstance(value, str) else f"{value}"
