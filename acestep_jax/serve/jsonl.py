"""Many songs from a file of requests: packed into batches, a sound file and its settings for each, resumable."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from acestep_jax.errors import InputError
from acestep_jax.inputs.codec import bucket
from acestep_jax.io import audio
from acestep_jax.io.files import publish_file
from acestep_jax.pipeline import AceStepPipeline, AudioPipelineOutput
from acestep_jax.request import Request
from acestep_jax.request import plan as make_plan
from acestep_jax.sampling import Sampling

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
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not at what else Unicode takes for an end of line
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    songs, errors, names = [], [], {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            song = _song(line, place, path.parent, out_dir, defaults, number)
            if (earlier := names.setdefault(song.settings_path, place)) != place:
                raise InputError(f"name: {song.path.stem} is that of {earlier} already; give another")
            if song.settings_path.resolve() == path.resolve():
                raise InputError(f"name: {song.settings_path} is the file of requests itself; give another")
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
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name:
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
    request = Request(**{"prompt": None} | {key: value for key, value in values.items() if key in _REQUEST})
    sampling = Sampling(**{key: value for key, value in values.items() if key in _SAMPLING})
    suffix = "" if Path(name).suffix.lower() in audio.FORMATS else ".wav"
    path = out_dir / f"{name}{suffix}"
    for source in (request.src_audio, request.reference_audio):
        if source is not None and Path(source).resolve() == path.resolve():
            raise InputError(f"name: {path} is a source or reference of the song itself; give another")
    return Song(place, path, values, request, sampling)


def generate(
    pipe: AceStepPipeline, songs: Sequence[Song], batch_size: int, about: dict[str, Any], *, overwrite: bool = False
) -> Iterator[tuple[Song, str | None]]:
    """Makes the songs that are not there yet; yields each with None, or with what went wrong.

    Songs of one sampling and one bucket of duration make a batch. The sound is written after the settings, so a song
    that has both is finished. Of several processes, the first decides what is to be made, and writes.

    Args:
        about: what else the songs depend on, such as the checkpoint; kept with the settings.
        overwrite: whether to make finished songs again.
    """
    groups: dict[tuple, list[Song]] = {}
    for song, error in zip(songs, _agree([_unfinished(song, about, overwrite) for song in songs]), strict=True):
        if error is not None:
            yield song, error or None
            continue
        try:
            frames = make_plan(song.request, pipe.codec.model).frames
        except (InputError, OSError) as error:
            yield song, str(error)
            continue
        groups.setdefault((song.sampling, bucket(frames)), []).append(song)
    for _, members in sorted(groups.items(), key=lambda item: item[0][1]):
        for start in range(0, len(members), batch_size):
            yield from _make(pipe, members[start : start + batch_size], about, overwrite)


def _unfinished(song: Song, about: dict, overwrite: bool) -> str | None:
    """None for a song that is to be made, nothing for one that is finished, or why it cannot be written."""
    try:
        if not overwrite and _is_finished(song, about):
            return ""
        audio.check_output(song.path, overwrite=overwrite)
    except InputError as error:
        return str(error)
    return None


def _agree(decisions: list[str | None]) -> list[str | None]:
    """Those of process 0, whose disk has the songs; the others make what it makes."""
    if jax.process_count() == 1:
        return decisions
    codes = np.array([{None: 0, "": 1}.get(decision, 2) for decision in decisions], np.int32)
    words = [None, "", "not made, see the first process"]
    return [words[code] for code in multihost_utils.broadcast_one_to_all(codes)]


def _make(pipe: AceStepPipeline, songs: list[Song], about: dict, overwrite: bool) -> Iterator[tuple[Song, str | None]]:
    """One batch; if it fails, each of its songs alone, so that one does not stop the others."""
    # Of a mesh that shares songs out, each device must have as many: the last one fills a batch up.
    multiple = 1 if pipe.mesh is None or len(songs) == 1 else pipe.mesh.shape["data"]
    requests = [song.request for song in songs]
    requests += requests[-1:] * (-len(requests) % multiple)
    try:
        made = pipe(requests, **dataclasses.asdict(songs[0].sampling))
    except (InputError, OSError, ValueError, jax.errors.JaxRuntimeError) as error:
        if len(songs) > 1:
            for song in songs:
                yield from _make(pipe, [song], about, overwrite)
        else:
            yield songs[0], str(error)
        return
    for i, song in enumerate(songs):
        try:
            if jax.process_index() == 0:
                _write(song, made, i, about, overwrite)
        except (InputError, OSError) as error:
            yield song, str(error)
        else:
            yield song, None


def _write(song: Song, made: AudioPipelineOutput, i: int, about: dict, overwrite: bool) -> None:
    """The settings first: a song whose sound is there too is finished, whatever stopped the run. Where they take the
    place of others, the sound first: what is there stays until there is something better."""
    settings = dict(
        request=song.values,
        seed=made.seeds[i],
        seconds=made.samples[i] / made.sample_rate,
        sample_rate=made.sample_rate,
    )

    def write_settings() -> None:
        with publish_file(song.settings_path) as temporary:
            temporary.write_text(json.dumps(settings | about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def write_sound() -> None:
        wave = made.audios[i, :, : made.samples[i]]
        audio.write(song.path, wave, made.sample_rate, overwrite=overwrite)

    for write in (write_sound, write_settings) if overwrite else (write_settings, write_sound):
        write()


def _is_finished(song: Song, about: dict) -> bool:
    """Whether the song is there. Raises InputError if it, or another file of that name, was made otherwise."""
    found = {}
    if song.settings_path.exists():
        try:
            found = json.loads(song.settings_path.read_text(encoding="utf-8"))
            if found["request"] == song.values and all(found[key] == about[key] for key in about if key != "version"):
                return song.path.exists()
        except (ValueError, KeyError, TypeError):
            found = {}
        if not song.path.exists() and "request" in found:  # of a song that was never finished
            return False
        raise InputError(
            f"{song.settings_path}: already exists, made with other settings; remove it and the song, give another "
            "name, or ask for it to be overwritten"
        )
    return False
