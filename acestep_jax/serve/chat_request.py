"""Converts a chat message to a submission, as the authors' OpenRouter-style API does."""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

from acestep_jax.errors import InputError
from acestep_jax.inputs import tasks
from acestep_jax.serve import planner_fields, uploads
from acestep_jax.serve.authors_request import NO_LANGUAGE_MODEL, TURBO, Refused, songs
from acestep_jax.serve.lenient import INSTRUMENTAL, NO_PROMPT, Fields, for_task, lyrics, seeds
from acestep_jax.serve.models import Model
from acestep_jax.serve.store import Store
from acestep_jax.serve.submission import Submission

FORMATS = {"mp3": "mp3", "wav": "wav", "flac": "flac", "opus": "opus", "ogg": "ogg"}
MAX_SONGS = 8
DEFAULT_SECONDS = 60.0
MARKS = ("[verse", "[chorus", "[bridge", "[intro", "[outro", "[hook", "[pre-chorus", "[refrain", "[inst")
_TAG = re.compile(r"<(prompt|lyrics)>(.*?)</\1>", re.IGNORECASE | re.DOTALL)


def last_message(messages: Any) -> tuple[str, list[Mapping[str, Any]]]:
    """Return the text and the audio parts of the user's last message.

    Raises:
        InputError: if there is no such message.
    """
    if not isinstance(messages, list):
        raise InputError("messages: expected an array")
    content = next(
        (m.get("content") for m in reversed(messages) if isinstance(m, dict) and m.get("role") == "user"), None
    )
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise InputError("messages: expected one with the role user and text")
    parts = [part for part in content if isinstance(part, dict)]
    text = "\n".join(str(part.get("text", "")) for part in parts if part.get("type") == "text")
    sounds = [part["input_audio"] for part in parts if isinstance(part.get("input_audio"), dict)]
    return text, sounds


def prompt_and_lyrics(text: str, given: str) -> tuple[str, str, bool]:
    """Return the prompt, the lyrics, and whether the text is a wish for the language model."""
    found = {match[1].lower(): match[2].strip() for match in _TAG.finditer(text)}
    if found:
        rest = _TAG.sub("", text).strip()
        prompt = "\n".join(part for part in (found.get("prompt", ""), rest) if part)
        return prompt, found.get("lyrics", "") or given, False
    if given:
        return text.strip(), given, False
    if looks_like_lyrics(text):
        return "", text.strip(), False
    return text.strip(), "", True


def looks_like_lyrics(text: str) -> bool:
    """Return whether a text has lyric tags, or four or more short lines."""
    lines = [line for line in text.splitlines() if line.strip()]
    short = len(lines) >= 4 and sum(map(len, lines)) / len(lines) < 60
    return short or any(mark in text.lower() for mark in MARKS)


def put_audio(store: Store, body: uploads.Body, sounds: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> None:
    """Store the audio parts of a message as uploads of the fields, in order; leave out those that have no field.

    Raises:
        InputError: if a part is not base64.
    """
    for sound, field in zip(sounds, fields, strict=False):
        data = sound.get("data")
        if not isinstance(data, str):
            raise InputError("input_audio: expected base64 in data")
        data = data.partition(",")[2] if data.startswith("data:") else data
        try:
            decoded = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise InputError("input_audio: data is not base64") from None
        body.uploads = body.uploads or store.new_folder()
        (body.uploads / field).write_bytes(decoded)
        body.files.append(field)


def submission(
    store: Store,
    body: uploads.Body,
    *,
    models: Mapping[str, Model],
    strict: bool,
) -> tuple[Submission, list[str]]:
    """Return the submission for a chat completion, and the names of ignored fields.

    Raises:
        InputError: if a value cannot be used.
        Refused: if it needs the planner.
    """
    values = body.values
    fields, audio_config = Fields(values), values.get("audio_config")
    config = Fields(audio_config if isinstance(audio_config, dict) else {})
    text, sounds = last_message(values.get("messages"))
    prompt, words, wish = prompt_and_lyrics(text, fields.text("lyrics"))
    notes: list[str] = []
    ignored: list[str] = []
    name = fields.text("model")
    model = name.rpartition("/")[2]
    if model not in models:
        if model:
            notes.append(f"model: {name[:80]} is unknown here; the default was used")
        model = next(iter(models))
    has_planner = models[model].planner is not None
    if fields.flag("use_format") and not has_planner:
        raise Refused("use_format needs the 5 Hz language model, which this server does not have")
    instrumental = config.flag("instrumental")
    if fields.flag("thinking") and not has_planner:
        ignored.append("thinking")
        notes.append(f"thinking: {NO_LANGUAGE_MODEL}; the song was made only from the prompt")
    wish = fields.flag("sample_mode") or wish and (has_planner or not instrumental)
    if wish and not has_planner:
        ignored.append("sample_query")
        notes.append("There is no language model here: the text was taken as the prompt of a song without lyrics.")
    task = fields.text("task_type") or tasks.DEFAULT
    found = tasks.find(task)
    order = ("reference_audio",) if task == tasks.DEFAULT else ("src_audio", "reference_audio")
    if len(sounds) > len(order):
        ignored.append("input_audio")
        notes.append(f"input_audio: {task} takes {len(order)}, found {len(sounds)}; the others were ignored")
    if strict and ignored:
        raise InputError(f"{ignored[0]}: not supported, and the server was started with --strict")
    put_audio(store, body, sounds, order)
    song: dict[str, Any] = dict(
        prompt=prompt.strip() or NO_PROMPT,
        lyrics=lyrics(words),
        task_type=task,
        vocal_language=config.text("vocal_language") or "en",
        keyscale=config.text("key_scale") or None,
        timesignature=config.text("time_signature") or None,
        audio_cover_strength=fields.number("audio_cover_strength"),
    )
    if (bpm := config.whole("bpm")) is not None and bpm > 0:
        song["bpm"] = bpm
    seconds = config.number("duration")
    planner_task = None
    if has_planner and task == tasks.DEFAULT:
        said = INSTRUMENTAL if instrumental and not words.strip() else words
        planner_task = planner_fields.planner_task(Fields(_named(values)), wish=wish, words=said)
    if planner_task is not None:
        song = planner_fields.prepared(song, planner_task, Fields(dict(config.values) | dict(values)), words)
    if seconds is not None and seconds > 0:
        song["audio_duration"] = seconds
    elif task == tasks.DEFAULT and planner_task is None:
        song["audio_duration"] = DEFAULT_SECONDS
    if models[model].turbo:
        song |= TURBO
    elif (scale := fields.number("guidance_scale")) is not None:
        song["guidance_scale"] = scale
    if found.has_regions:
        end = fields.number("repainting_end")
        song["repainting_start"] = fields.number("repainting_start") or 0.0
        song["repainting_end"] = -1.0 if not end else end
    song = for_task({key: value for key, value in song.items() if value is not None})
    count = min(MAX_SONGS, max(1, fields.whole("batch_size") or 1))
    form = config.text("format", default="mp3").lower()
    if form not in FORMATS:
        notes.append(f"format: {form[:20]} is not supported; mp3 was used")
    made = Submission(
        songs=songs(song, count, seeds(values.get("seed"))),
        api="chat",
        model=model,
        format=FORMATS.get(form, "mp3"),
        notes=notes,
        uploads=body.uploads,
        files=body.files,
        planner_task=planner_task,
    )
    return made, ignored


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with the chat's own fields under the planner's names."""
    names = dict(temperature="lm_temperature", top_p="lm_top_p", top_k="lm_top_k")
    return {names.get(name, name): value for name, value in values.items()}
