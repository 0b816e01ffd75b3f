"""Many songs from a file of requests: packed into batches, a sound file and its settings for each, resumable."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from acestep_jax import audio
from acestep_jax.codec import bucket
from acestep_jax.errors import InputError
from acestep_jax.files import publish_file
from acestep_jax.pipeline import AceStepPipeline
from acestep_jax.request import Request
from acestep_jax.request import plan as make_plan
from acestep_jax.sampling import Sampling

logger = logging.getLogger(__name__)

_REQUEST = {field.name for field in dataclasses.fields(Request)} - {"latents"}
_SAMPLING = {field.name for field in dataclasses.fields(Sampling)}
_FILES = ("src_audio", "reference_audio")


@dataclasses.dataclass(frozen=True)
class Song:
    """One line of the file.

    place: for messages, such as "requests.jsonl:3".
    path: of the sound file; its settings go beside it, with the suffix .json.
    values: all that was asked for, as it is kept beside the song.
    """

    place: str
    path: Path
    values: dict[str, Any]
    request: Request
    sampling: Sampling

    @property
    def settings_path(self) -> Path:
        return self.path.with_suffix(".json")


def read(path: str | Path, out_dir: str | Path, defaults: dict[str, Any]) -> tuple[list[Song], list[str]]:
    """The songs of a file with one JSON object on each line, and what is wrong with other lines.

    Keys are the arguments of `AceStepPipeline.__call__` that a song or its sampling has, and `name`, of the sound file
    in `out_dir`: the number of the line by default, .wav without a suffix. Sound files are looked for from the folder
    of `path`.

    Args:
        defaults: values for all lines that do not have their own.

    Raises:
        InputError: if the file is not UTF-8, or has no request.
        OSError: if it cannot be read.
    """
    path, out_dir = Path(path), Path(out_dir)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    songs, errors, names = [], [], {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            song = _song(line, place, path.parent, out_dir, defaults, number)
            if (earlier := names.setdefault(song.path, place)) != place:
                raise InputError(f"name: {song.path.name} is that of {earlier} already; give another")
            songs.append(song)
        except InputError as error:
            errors.append(f"{place}: {error}")
    if not songs and not errors:
        raise InputError(f"{path}: holds no request; expected a JSON object on each line")
    return songs, errors


def _song(line: str, place: str, folder: Path, out_dir: Path, defaults: dict, number: int) -> Song:
    try:
        own = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f'not JSON ({error}); expected an object such as {{"prompt": "lofi piano"}}') from None
    if not isinstance(own, dict):
        raise InputError(f"expected a JSON object, found {line.strip()[:40]}")
    name = own.pop("name", f"{number:05}")
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise InputError(f"name: expected the name of a file, without folders, found {name!r}")
    if unknown := sorted(own.keys() - _REQUEST - _SAMPLING):
        known = ", ".join(sorted(_REQUEST | _SAMPLING))
        raise InputError(f"unknown key(s) {', '.join(unknown)}; expected some of name, {known}")
    values = defaults | own
    for key in _FILES:
        if key in own and own[key] is not None:
            if not isinstance(own[key], str):
                raise InputError(f"{key}: expected the name of a sound file, found {own[key]!r}")
            values[key] = str(folder / own[key])
    if not isinstance(values.get("prompt"), str):
        raise InputError(f"prompt: expected a text, found {values.get('prompt')!r}")
    try:
        request = Request(**{key: _frozen(value) for key, value in values.items() if key in _REQUEST})
        sampling = Sampling(**{key: _frozen(value) for key, value in values.items() if key in _SAMPLING})
    except TypeError as error:
        raise InputError(f"a value of the wrong kind ({error})") from None
    target = out_dir / name
    return Song(place, target if target.suffix else target.with_suffix(".wav"), values, request, sampling)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def generate(
    pipe: AceStepPipeline, songs: Sequence[Song], batch_size: int, about: dict[str, Any], *, overwrite: bool = False
) -> Iterator[tuple[Song, str | None]]:
    """Makes the songs that are not there yet; yields each with None, or with what went wrong.

    Songs of one sampling and one bucket of duration make a batch. The settings are written after the sound, so a song
    that has both is finished.

    Args:
        about: what else the songs depend on, such as the checkpoint; kept with the settings.
        overwrite: whether to make finished songs again.
    """
    groups: dict[tuple, list[Song]] = {}
    for song in songs:
        try:
            if not overwrite and _is_finished(song, about):
                yield song, None
                continue
            audio.check_output(song.path, overwrite=overwrite)
            frames = make_plan(song.request, pipe.codec.model).frames
        except (InputError, OSError, TypeError, ValueError) as error:
            yield song, str(error)
            continue
        groups.setdefault((song.sampling, bucket(frames)), []).append(song)
    for _, members in sorted(groups.items(), key=lambda item: item[0][1]):
        for start in range(0, len(members), batch_size):
            yield from _make(pipe, members[start : start + batch_size], about, overwrite)


def _make(pipe: AceStepPipeline, songs: list[Song], about: dict, overwrite: bool) -> Iterator[tuple[Song, str | None]]:
    """One batch; if it fails, each of its songs alone, so that one does not stop the others."""
    # Of a mesh that shares songs out, each device must have as many: the last one fills a batch up.
    multiple = 1 if pipe.mesh is None or len(songs) == 1 else pipe.mesh.shape["data"]
    requests = [song.request for song in songs]
    requests += requests[-1:] * (-len(requests) % multiple)
    try:
        made = pipe(requests, **dataclasses.asdict(songs[0].sampling))
    except (InputError, OSError, TypeError, ValueError, jax.errors.JaxRuntimeError) as error:
        if len(songs) > 1:
            for song in songs:
                yield from _make(pipe, [song], about, overwrite)
        else:
            yield songs[0], str(error)
        return
    for i, song in enumerate(songs):
        try:
            if jax.process_index() == 0:
                audio.write(song.path, made.audios[i, :, : made.samples[i]], made.sample_rate, overwrite=overwrite)
                settings = dict(
                    request=song.values,
                    seed=made.seeds[i],
                    seconds=made.samples[i] / made.sample_rate,
                    sample_rate=made.sample_rate,
                )
                text = json.dumps(settings | about, indent=2, ensure_ascii=False) + "\n"
                with publish_file(song.settings_path) as temporary:
                    temporary.write_text(text, encoding="utf-8")
        except (InputError, OSError) as error:
            yield song, str(error)
        else:
            yield song, None


def _is_finished(song: Song, about: dict) -> bool:
    """Whether the song is there. Raises InputError if it was made otherwise."""
    if not song.path.exists() or not song.settings_path.exists():
        return False
    try:
        found = json.loads(song.settings_path.read_text(encoding="utf-8"))
        same = found["request"] == song.values and all(found[key] == value for key, value in about.items())
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise InputError(
            f"{song.path}: already exists, made with other settings; remove it, give another name, or ask for it to be "
            "overwritten"
        )
    return True
