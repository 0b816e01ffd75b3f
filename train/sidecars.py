"""Caption, lyrics and metadata of a song, from the files next to it.

For a song `name.mp3`, each value is taken from the first of these files that contains it:

1. `name.caption.txt` and `name.lyrics.txt`;
2. `name.txt`: lines `key: value`, where `lyrics:` comes last and extends to the end of the file; or only lyrics, if the
   first line is not such a pair;
3. `name.json`: an object with these keys;
4. one JSON file in the top folder, {"metadata": {...}, "samples": [...]}, as saved by ACE-Step's dataset builder;
5. tables `*.csv` in the top folder with a column `file`.

Names may be in upper or lower case, and the first files may also be called `name_prompt.txt` or `name_caption.txt` and
`name_lyrics.txt`, as for ACE-Step 1. Values are normalised as in requests, see `inputs.fields` ("Am", "4/4",
"128 bpm"); a song with a value that the model does not know is skipped with an error.
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
from acestep_jax.inputs import fields
from acestep_jax.io.files import as_path, read_text
from acestep_jax.planner.metadata import INSTRUMENTAL

LANGUAGE = "en"

# The accepted keys for each value.
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
# Further keys that ACE-Step's dataset builder writes for a song or the dataset; they are not needed here.
_OF_DATASETS = frozenset(
    "all_instrumental audio_path created_at duration filename formatted_lyrics genre_ratio id labeled name num_samples "
    "raw_lyrics".split()
)
_PAIR = re.compile(r"\s*([A-Za-z][A-Za-z_ ]*?)\s*:\s*(.*?)\s*$")


# Suffixes of files that hold a single text: ours and those of ACE-Step 1.
_OWN_TEXTS = {
    "caption": (".caption.txt", "_prompt.txt", "_caption.txt"),
    "lyrics": (".lyrics.txt", "_lyrics.txt"),
}


@dataclasses.dataclass(frozen=True)
class Texts:
    """The contents of a song's prompt and lyrics. `fallback`: the caption is the file name."""

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

    warnings: messages about values ignored so far.
    used: files read so far.
    """

    def __init__(self, folder: str | Path, sources: Iterable[str], language: str = LANGUAGE):
        """Read the files that describe several songs.

        Args:
            folder: folder of the songs.
            sources: relative paths of the songs, with "/" as separator.
            language: language of songs that do not give one.

        Raises:
            InputError: if one of these files is damaged, or there are several datasets.
        """
        self.folder, self.language = as_path(folder), language
        self.warnings: list[str] = []
        self.used: set[Path] = set()
        self._listed: dict[Path, dict[str, list[str]]] = {}
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
            try:
                return check(value)
            except InputError as error:
                raise InputError(f"{file}: {error}; correct or remove it") from None

        caption, fallback = self._caption(path, {field: str(value) for field, (_, value) in values.items()})
        return Texts(
            caption=caption,
            lyrics=self._lyrics(found),
            language=get("language", fields.vocal_language) or self.language,
            bpm=get("bpm", fields.bpm),
            keyscale=get("keyscale", fields.keyscale),
            timesignature=get("timesignature", fields.timesignature),
            repeat=get("repeat", _repeat) or 1,
            fallback=fallback,
        )

    def _own(self, path: Path) -> list[tuple[Path, dict[str, Any]]]:
        """Return the values in the song's own files, in order of precedence."""
        found = []
        for field, endings in _OWN_TEXTS.items():
            if file := self._sidecar(path, *endings):
                text = _read_text(file).strip()
                found.append((file, {field: text if field == "lyrics" else " ".join(text.split())}))
        if file := self._sidecar(path, ".txt"):
            found.append((file, self._clean(file, _parse_text(file, _read_text(file)))))
        if file := self._sidecar(path, ".json"):
            values = _read_json(file)
            if not isinstance(values, dict):
                raise InputError(f"{file}: expected a JSON object with keys such as caption and lyrics")
            if "samples" not in values:  # else it is a dataset, see `_read_dataset`
                found.append((file, self._clean(file, values, quiet=True)))
        return [(file, {k: v for k, v in entry.items() if v != ""}) for file, entry in found]

    def _sidecar(self, path: Path, *endings: str) -> Path | None:
        """Return the file next to a song with the song's name and the first of these endings that exists, ignoring case
        unless that is ambiguous."""
        names = self._names_in(path.parent)
        for wanted in (f"{path.stem}{ending}" for ending in endings):
            same = names.get(wanted.casefold(), ())
            if same:
                file = path.parent / (wanted if wanted in same else same[0])
                self.used.add(file)
                return file
        return None

    def _names_in(self, folder: Path) -> dict[str, list[str]]:
        """Return the file names in a folder by their case-folded names."""
        if folder not in self._listed:
            names: dict[str, list[str]] = defaultdict(list)
            for file in sorted(folder.iterdir()) if folder.is_dir() else ():
                if file.is_file():
                    names[file.name.casefold()].append(file.name)
            self._listed[folder] = names
        return self._listed[folder]

    def _clean(self, file: Path, values: Mapping[str, Any], *, quiet: bool = False) -> dict[str, Any]:
        """Return the known values under our names, without empty values."""
        result = {}
        for key, value in values.items():
            field = _FIELDS.get(str(key).strip().lower().replace(" ", "_"))
            if field is None:
                message = f"{file}: unknown key {key!r}, ignored; known are {', '.join(_ALIASES)}"
                if not (quiet and str(key).strip().lower() in _OF_DATASETS) and message not in self.warnings:
                    self.warnings.append(message)
            elif isinstance(value, list):
                result.setdefault(field, ", ".join(map(str, value)))
            elif not fields.says_nothing(value) or field == "language" and value:  # "auto" is a language, "" is not
                result.setdefault(field, str(value).strip())
        return result

    def _caption(self, path: Path, values: dict[str, str]) -> tuple[str, bool]:
        """Return the caption with its tag, and whether it is the file name."""
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
        """Return whether the song trains on its genre, as a percentage of the dataset does; the same in every run."""
        ratio = self._defaults.get("genre_ratio", 0)
        return int(hashlib.sha256(path.name.encode()).hexdigest(), 16) % 100 < ratio

    def _lyrics(self, found: list[tuple[Path, dict[str, Any]]]) -> str:
        """Return the lyrics of the first file that has lyrics or says that the song is instrumental."""
        for file, entry in found:
            lyrics = entry.get("lyrics")
            instrumental = _is_true(entry["is_instrumental"]) if "is_instrumental" in entry else False
            is_tag = lyrics is not None and re.fullmatch(r"\[?\s*(instrumental|inst)\s*\]?", lyrics.strip(), re.I)
            if instrumental and lyrics and not is_tag:
                self.warnings.append(f"{file}: is_instrumental is true, so its lyrics are ignored")
            if instrumental or is_tag:
                return INSTRUMENTAL
            if lyrics:
                return fields.lines(lyrics).strip()
        return INSTRUMENTAL

    def _read_dataset(self) -> None:
        datasets = []
        for file in self._in_top_folder(".json"):
            if '"samples"' in (text := _read_text(file)) and isinstance(values := _read_json(file, text), dict):
                if isinstance(values.get("samples"), list):
                    datasets.append((file, values))
                    self.used.add(file)
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
                self._attach(file, names, cleaned)

    def _read_tables(self) -> None:
        for file in self._in_top_folder(".csv"):
            text = _read_text(file)
            header = text.partition("\n")[0].lower().replace('"', "")
            delimiter = next((d for d in ",;\t" if "file" in map(str.strip, header.split(d))), None)
            if delimiter is None:
                self.warnings.append(f"{file}: its first line names no column `file`; it is ignored")
                continue
            self.used.add(file)
            for row in csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter):
                values = {str(key).strip().lower(): value for key, value in row.items() if isinstance(value, str)}
                if name := values.pop("file", "").strip():
                    self._attach(file, [name], self._clean(file, values, quiet=True))
                elif any(value.strip() for value in values.values()):
                    self.warnings.append(f"{file}: a row without a name in the column `file`; it is ignored")

    def _in_top_folder(self, suffix: str) -> list[Path]:
        """Return the files with a suffix, in upper or lower case, in the top folder."""
        return sorted(file for file in self.folder.iterdir() if file.suffix.lower() == suffix and file.is_file())

    def _attach(self, file: Path, names: list[str], values: dict[str, Any]) -> None:
        """Add values for the one song that matches one of the names, which are paths on this or another machine."""
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
        return read_text(file)
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _read_json(file: Path, text: str | None = None) -> Any:
    try:
        return json.loads(_read_text(file) if text is None else text)
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error}); correct or remove it") from None


def _is_true(value: str) -> bool:
    return value.strip().lower() in ("true", "yes", "1", "1.0", "on")


def _repeat(value: str) -> int:
    if not value.isdecimal() or not 1 <= int(value) <= 1000:
        raise InputError(f"repeat: expected a whole number from 1 to 1000, found {value!r}")
    return int(value)
