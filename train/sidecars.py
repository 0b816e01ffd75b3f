"""Caption, lyrics and metadata of a song, from the files beside it.

For a song `name.mp3`, each value is taken from the first of these that contains it:

1. `name.caption.txt` and `name.lyrics.txt`;
2. `name.txt`: lines `key: value`, with `lyrics:` last and up to the end of the file; or only lyrics, if the first line
   is no such pair;
3. `name.json`: an object of such keys;
4. one JSON file in the top folder, {"metadata": {...}, "samples": [...]}, as saved by ACE-Step's dataset builder;
5. tables `*.csv` in the top folder with a column `file`.

Values are normalised to what the model was trained on where that is unambiguous ("Am", "4/4", "128 bpm"), and ignored
with a warning otherwise.
"""

import csv
import dataclasses
import hashlib
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from acestep_jax.errors import InputError
from acestep_jax.inputs.prompt import TIME_SIGNATURES

INSTRUMENTAL = "[Instrumental]"
LANGUAGE = "en"
# ACE-Step's `VALID_LANGUAGES`, "unknown" included.
LANGUAGES = frozenset(
    "ar az bg bn ca cs da de el en es fa fi fr he hi hr ht hu id is it ja ko la lt ms ne nl no pa pl pt ro ru sa sk sr "
    "sv sw ta te th tl tr uk ur vi yue zh unknown".split()
)

# The keys of each value.
_ALIASES = {
    "caption": ("caption", "prompt"),
    "lyrics": ("lyrics", "lyric"),
    "genre": ("genre", "genres"),
    "bpm": ("bpm", "tempo"),
    "keyscale": ("keyscale", "key", "scale"),
    "timesignature": ("timesignature", "time_signature", "signature"),
    "language": ("language", "lang", "vocal_language"),
    "is_instrumental": ("is_instrumental", "instrumental"),
    "custom_tag": ("custom_tag", "tag", "tags", "trigger"),
    "tag_position": ("tag_position",),
    "prompt_override": ("prompt_override",),
    "repeat": ("repeat", "repeats"),
}
_FIELDS = {alias: field for field, aliases in _ALIASES.items() for alias in aliases}
_UNKNOWN = frozenset(("", "n/a", "none", "null", "auto", "?", "-"))
_PAIR = re.compile(r"\s*([A-Za-z][A-Za-z_ ]*?)\s*:\s*(.*?)\s*$")
_KEY = re.compile(r"([A-Ga-g])\s*(#|b|♯|♭|sharp|flat)?\s*(?:([mM])|(major|maj|minor|min))?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Contents of the prompt and the lyrics of a song. `fallback`: the caption is the name of the file."""

    caption: str
    lyrics: str
    language: str
    bpm: int | None
    keyscale: str | None
    timesignature: str | None
    repeat: int
    fallback: bool


class Sidecars:
    """Reads the texts of the songs of a folder.

    warnings: values that were found and ignored so far, by file.
    """

    def __init__(self, folder: str | Path, sources: Iterable[str]):
        """Read the files that describe several songs.

        Args:
            folder: of the songs.
            sources: relative paths of the songs, with "/" between parts.

        Raises:
            InputError: if such a file is damaged, or there are several datasets.
        """
        self.folder = Path(folder)
        self.warnings: list[str] = []
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for source in sources:
            self._by_name[PurePosixPath(source).name].append(source)
        self._defaults: dict[str, Any] = {}
        # By source, in order of precedence: (file, values).
        self._shared: dict[str, list[tuple[Path, dict[str, Any]]]] = defaultdict(list)
        self._read_dataset()
        self._read_tables()

    def read(self, source: str) -> Texts:
        """Return the texts of a song. Raise InputError if one of its files is not UTF-8 or cannot be parsed."""
        path = self.folder / source
        found = [*self._own(path), *self._shared.get(source, ())]
        values: dict[str, tuple[Path, Any]] = {}
        for file, entry in found:
            for field, value in entry.items():
                values.setdefault(field, (file, value))

        def get(field: str, check) -> Any:
            if field not in values:
                return None
            file, value = values[field]
            result = check(value)
            if result is None:
                self.warnings.append(f"{file}: {field} {value!r} is unknown to the model; ignored for {source}")
            return result

        caption, fallback = self._caption(path, {field: str(value) for field, (_, value) in values.items()})
        language = get("language", _language)
        return Texts(
            caption=caption,
            lyrics=self._lyrics(found),
            language=language or ("unknown" if "language" in values else LANGUAGE),
            bpm=get("bpm", _bpm),
            keyscale=get("keyscale", _keyscale),
            timesignature=get("timesignature", _time_signature),
            repeat=get("repeat", _repeat) or 1,
            fallback=fallback,
        )

    def _own(self, path: Path) -> list[tuple[Path, dict[str, Any]]]:
        """Return the values of the song's own files, in order of precedence."""
        found = []
        for field in ("caption", "lyrics"):
            if (file := path.with_suffix(f".{field}.txt")).is_file():
                text = _read_text(file).strip()
                found.append((file, {field: text if field == "lyrics" else " ".join(text.split())}))
        if (file := path.with_suffix(".txt")).is_file():
            found.append((file, self._clean(file, _parse_text(file, _read_text(file)))))
        if (file := path.with_suffix(".json")).is_file():
            values = _read_json(file)
            if not isinstance(values, dict):
                raise InputError(f"{file}: expected a JSON object with keys such as caption and lyrics")
            if "samples" not in values:  # else it is a dataset, see `_read_dataset`
                found.append((file, self._clean(file, values, quiet=True)))
        return [(file, {k: v for k, v in entry.items() if v != ""}) for file, entry in found]

    def _clean(self, file: Path, values: Mapping[str, Any], *, quiet: bool = False) -> dict[str, Any]:
        """Return the known values under our names, without empty ones."""
        result = {}
        for key, value in values.items():
            field = _FIELDS.get(str(key).strip().lower().replace(" ", "_"))
            if field is None:
                if not quiet:
                    self.warnings.append(f"{file}: unknown key {key!r}, ignored; known are {', '.join(_ALIASES)}")
            elif isinstance(value, list):
                result.setdefault(field, ", ".join(map(str, value)))
            elif value is not None and str(value).strip().lower() not in _UNKNOWN:
                result.setdefault(field, str(value).strip())
        return result

    def _caption(self, path: Path, values: dict[str, str]) -> tuple[str, bool]:
        """Return the caption with its tag, and whether it is the name of the file."""
        genre, caption = values.get("genre"), values.get("caption")
        override = values.get("prompt_override", "").lower()
        if genre and override != "caption" and (override == "genre" or not caption or self._by_genre(path)):
            caption = genre
        tag = values.get("custom_tag") or self._defaults.get("custom_tag", "")
        position = values.get("tag_position") or self._defaults.get("tag_position", "prepend")
        if tag and (not caption or position == "replace"):
            return tag, False
        fallback = not caption
        if fallback:
            words = [word for word in re.split(r"[\W_]+", path.stem) if any(c.isalpha() for c in word)]
            caption = " ".join(words) or path.stem
        if tag:
            caption = f"{caption}, {tag}" if position == "append" else f"{tag}, {caption}"
        return caption, fallback

    def _by_genre(self, path: Path) -> bool:
        """Return whether the song is of the percentage that the dataset trains on the genre; the same in every run."""
        ratio = self._defaults.get("genre_ratio", 0)
        return int(hashlib.sha256(path.name.encode()).hexdigest(), 16) % 100 < ratio

    def _lyrics(self, found: list[tuple[Path, dict[str, Any]]]) -> str:
        """Return the lyrics of the first source that has some or says that the song is instrumental."""
        for file, entry in found:
            lyrics = entry.get("lyrics")
            instrumental = _is_true(entry["is_instrumental"]) if "is_instrumental" in entry else False
            is_tag = lyrics is not None and re.fullmatch(r"\[?\s*(instrumental|inst)\s*\]?", lyrics.strip(), re.I)
            if instrumental and lyrics and not is_tag:
                self.warnings.append(f"{file}: is_instrumental is true, so its lyrics are ignored")
            if instrumental or is_tag:
                return INSTRUMENTAL
            if lyrics:
                return lyrics.replace("\r\n", "\n").strip()
        return INSTRUMENTAL

    def _read_dataset(self) -> None:
        datasets = []
        for file in sorted(self.folder.glob("*.json")):
            if '"samples"' in (text := _read_text(file)) and isinstance(values := _read_json(file, text), dict):
                if isinstance(values.get("samples"), list):
                    datasets.append((file, values))
        if len(datasets) > 1:
            names = ", ".join(file.name for file, _ in datasets)
            raise InputError(f"{self.folder}: {names} are all datasets of samples; keep one")
        for file, values in datasets:
            metadata = values.get("metadata") or {}
            if not isinstance(metadata, dict) or not all(isinstance(entry, dict) for entry in values["samples"]):
                raise InputError(f"{file}: expected JSON objects as metadata and in samples")
            self._defaults = self._clean(file, metadata, quiet=True)
            try:
                self._defaults["genre_ratio"] = float(metadata.get("genre_ratio") or 0)
            except (TypeError, ValueError):
                raise InputError(
                    f"{file}: genre_ratio: expected a percentage, found {metadata['genre_ratio']!r}"
                ) from None
            for entry in values["samples"]:
                cleaned = self._clean(file, entry, quiet=True)
                if "is_instrumental" not in cleaned and "all_instrumental" in metadata:
                    cleaned["is_instrumental"] = str(metadata["all_instrumental"])
                names = [str(entry[key]) for key in ("audio_path", "filename") if entry.get(key)]
                self._share(file, names, cleaned)

    def _read_tables(self) -> None:
        for file in sorted(self.folder.glob("*.csv")):
            text = _read_text(file)
            header = text.partition("\n")[0].lower().replace('"', "")
            delimiter = next((d for d in ",;\t" if "file" in map(str.strip, header.split(d))), None)
            if delimiter is None:
                self.warnings.append(f"{file}: its first line names no column `file`; it is ignored")
                continue
            for row in csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter):
                values = {str(key).strip().lower(): value for key, value in row.items() if isinstance(value, str)}
                if name := values.pop("file", "").strip():
                    self._share(file, [name], self._clean(file, values, quiet=True))

    def _share(self, file: Path, names: list[str], values: dict[str, Any]) -> None:
        """Add values for the only song that fits one of the names, paths on this or another machine."""
        for name in names:
            parts = PurePosixPath(name.replace("\\", "/")).parts
            fits = []
            for source in self._by_name.get(parts[-1] if parts else "", ()):
                own = PurePosixPath(source).parts
                if (shorter := min(len(own), len(parts))) and own[-shorter:] == parts[-shorter:]:
                    # The more parts of the path agree, the better the match; the whole path is best.
                    fits.append(((shorter, own == parts), source))
            fits.sort()
            if len(fits) > 1 and fits[-1][0] == fits[-2][0]:
                self.warnings.append(f"{file}: {name} may be any of {len(fits)} files; add the folder")
                return
            if fits:
                self._shared[fits[-1][1]].append((file, values))
                return
        self.warnings.append(f"{file}: no audio file {' or '.join(names) or 'is named in an entry'}; it is ignored")


def _parse_text(file: Path, text: str) -> dict[str, str]:
    """Parse `key: value` lines, or the whole text as lyrics if the first line has no known key."""
    lines = text.strip().splitlines()
    first = _PAIR.match(lines[0]) if lines else None
    if first is None or first[1].lower().replace(" ", "_") not in _FIELDS:
        return {"lyrics": text.strip()}
    values = {}
    for number, line in enumerate(lines):
        pair = _PAIR.match(line)
        if pair is None:
            if line.strip():
                raise InputError(
                    f"{file}: begins with lines of `key: value`, but {line.strip()!r} is not one; put lyrics last, "
                    "after a line `lyrics:`"
                )
            continue
        if _FIELDS.get(pair[1].lower()) == "lyrics":
            return values | {"lyrics": "\n".join([pair[2], *lines[number + 1 :]]).strip()}
        values[pair[1]] = pair[2]
    return values


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _read_json(file: Path, text: str | None = None) -> Any:
    try:
        return json.loads(_read_text(file) if text is None else text)
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error}); correct or remove it") from None


def _is_true(value: str) -> bool:
    return value.strip().lower() in ("true", "yes", "1", "1.0", "on")


def _bpm(value: str) -> int | None:
    found = re.fullmatch(r"(\d+(?:[.,]\d+)?)\s*(?:bpm)?", value, re.I)
    bpm = round(float(found[1].replace(",", "."))) if found else 0
    return bpm if 30 <= bpm <= 300 else None


def _keyscale(value: str) -> str | None:
    """Normalise "F#m" or "f♯ minor" to "F# minor"; a bare letter is major, as in the names of chords."""
    found = _KEY.fullmatch(re.sub(r"(?i)major|maj|minor|min|sharp|flat", lambda m: m[0].lower(), value))
    if found is None:
        return None
    note, accidental, letter, word = found.groups()
    accidental = {None: "", "♯": "#", "sharp": "#", "♭": "b", "flat": "b"}.get(accidental, accidental)
    minor = letter == "m" or (word or "").startswith("min")
    return f"{note.upper()}{accidental} {'minor' if minor else 'major'}"


def _time_signature(value: str) -> str | None:
    found = re.fullmatch(r"(\d+)(?:\.0)?(?:\s*/\s*(?:2|4|8|16))?", value)
    return found[1] if found and found[1] in TIME_SIGNATURES else None


def _language(value: str) -> str | None:
    code = re.split(r"[-_]", value.lower())[0]
    return code if code in LANGUAGES else None


def _repeat(value: str) -> int | None:
    return int(value) if value.isdecimal() and 1 <= int(value) <= 1000 else None
