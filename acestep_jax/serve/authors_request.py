"""Converts the body of `/release_task` of ACE-Step's own server to a submission. Source: its API documentation."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from acestep_jax.errors import InputError
from acestep_jax.inputs import tasks
from acestep_jax.serve import planner_fields
from acestep_jax.serve.lenient import NO_PROMPT, Fields, for_task, lyrics, put_tracks, seeds, times, tracks
from acestep_jax.serve.models import Model
from acestep_jax.serve.submission import MAX_SEED, Submission, variations

logger = logging.getLogger(__name__)

UPLOADS = {
    "src_audio": "src_audio",
    "ctx_audio": "src_audio",
    "reference_audio": "reference_audio",
    "ref_audio": "reference_audio",
}
PATHS = {
    "src_audio": ("src_audio_path", "ctx_audio_path", "source_audio_path"),
    "reference_audio": ("reference_audio_path", "ref_audio_path"),
}
FORMATS = {"mp3": "mp3", "wav": "wav", "flac": "flac", "opus": "opus", "wav32": "wav32"}
DEFAULT_SECONDS = 60.0
DEFAULT_BATCH, MAX_BATCH = 2, 8
TURBO = dict(num_inference_steps=8, shift=3.0)  # the defaults of this API, which suit only turbo models
EXAMPLES: Sequence[dict[str, Any]] = (
    dict(caption="warm lofi piano with vinyl crackle and a slow swung beat", bpm=80, key_scale="A minor"),
    dict(caption="melodic house with airy pads, a plucked lead and a rolling bass", bpm=124, key_scale="F# minor"),
    dict(caption="acoustic folk with fingerpicked guitar and a soft string section", bpm=96, key_scale="G major"),
    dict(caption="driving synthwave with gated drums and a bright arpeggio", bpm=112, key_scale="E minor"),
)
NO_LANGUAGE_MODEL = "there is no language model here"


class Refused(Exception):
    """The request needs a part that this server does not have."""


def submission(
    values: Mapping[str, Any],
    *,
    models: Mapping[str, Model],
    default_model: str,
    strict: bool,
) -> tuple[Submission, dict[str, tuple[str, str]], list[str]]:
    """Return the submission for a body, the paths that it contains by field, each with the client's name of it, and the
    names of ignored fields.

    Raises:
        InputError: if a value cannot be used, or `strict` is set and a field would be ignored.
        Refused: if it needs the planner.
    """
    fields = Fields(values)
    notes, ignored = [], []
    model = fields.text("model", "model_name", "dit_model") or default_model
    if model not in models:
        logger.info("model %.80r is unknown; %s is used", model, default_model)
        notes.append(f"model: {model[:80]} is unknown here; {default_model} was used")
        model = default_model
    has_planner = models[model].planner is not None
    if fields.flag("use_format", "format") and not has_planner:
        raise Refused("use_format needs the 5 Hz language model, which this server does not have")
    prompt, words = fields.text("prompt", "caption"), fields.text("lyrics")
    query = fields.text("sample_query", "description", "desc")
    wish = bool(query) or fields.flag("sample_mode")
    if not has_planner:
        asked = {"thinking": "the song was made only from the prompt", "sample_query": "it was taken as the prompt"}
        asked["sample_mode"] = "an example was taken as the prompt"
        present = dict(thinking=fields.flag("thinking"), sample_query=bool(query), sample_mode=wish and not query)
        for name in (name for name, is_there in present.items() if is_there):
            ignored.append(name)
            notes.append(f"{name}: {NO_LANGUAGE_MODEL}; {asked[name]}")
    if wish:
        prompt = query if query and has_planner else prompt or query or EXAMPLES[0]["caption"]
    song = _song(fields, prompt, words, turbo=models[model].turbo)
    if models[model].takes_stems and (whole := fields.text("global_caption")):
        song["global_caption"] = whole
    song = for_task(song)
    is_open = song["task_type"] == tasks.DEFAULT and not song.get("audio_codes")
    planner_task = None
    if has_planner and is_open:
        planner_task = planner_fields.planner_task(fields, wish=wish, words=lyrics(words) if words.strip() else "")
    if planner_task is not None:
        song = planner_fields.prepared(song, planner_task, fields, words)
    elif is_open:
        seconds = fields.number("audio_duration", "duration", "target_duration")
        if seconds is None or seconds <= 0:
            notes.append(f"audio_duration: not given; {DEFAULT_SECONDS:g} s was used")
            song["audio_duration"] = DEFAULT_SECONDS
    for name, neutral in (("repaint_wav_crossfade_sec", 0.0), ("global_caption", "")):
        if fields.get(name) not in (None, "", neutral, str(neutral)) and name not in song:
            ignored.append(name)
            notes.append(f"{name}: not supported; ignored")
    if strict and ignored:
        raise InputError(f"{ignored[0]}: not supported, and the server was started with --strict")
    form = fields.text("audio_format", default="mp3").strip().lower()
    if form not in FORMATS:
        notes.append(f"audio_format: {form[:20]} is not supported; mp3 was used")
    count = fields.whole("batch_size")
    count = DEFAULT_BATCH if count is None else min(MAX_BATCH, max(1, count))
    found = Submission(
        songs=songs(song, count, [] if fields.flag("use_random_seed", default=True) else seeds(fields.get("seed"))),
        api="authors",
        model=model,
        format=FORMATS.get(form, "mp3"),
        notes=notes,
        extra=dict(asked=_asked(fields, prompt, words)),
        planner_task=planner_task,
    )
    paths = {}
    for field, aliases in PATHS.items():
        if given := [(name, fields.text(name)) for name in aliases if fields.text(name)]:
            paths[field] = given[0]
    return found, paths, ignored


def songs(song: Mapping[str, Any], count: int, given: Sequence[int]) -> list[dict[str, Any]]:
    """Return `count` songs with the given seeds; the remaining songs continue from the first seed.

    Raises:
        InputError: if a seed is out of range.
    """
    if bad := [seed for seed in given if seed > MAX_SEED]:
        raise InputError(f"seed: expected 0 to 2^32 - 1, found {bad[0]}")
    if len(given) > 1:
        first = variations(dict(song) | dict(seed=given[0]), count)
        return [dict(one) | (dict(seed=given[i]) if i < len(given) else {}) for i, one in enumerate(first)]
    return variations(dict(song) | (dict(seed=given[0]) if given else {}), count)


def metadata(fields: Fields) -> dict[str, Any]:
    """Return the fields of `Request` that describe the music; None or nothing where the client gives none."""
    found: dict[str, Any] = dict(
        keyscale=fields.text("key_scale", "keyscale", "key") or None,
        timesignature=fields.text("time_signature", "timesignature") or None,
    )
    if (bpm := fields.whole("bpm")) is not None and bpm > 0:
        found["bpm"] = bpm
    if (seconds := fields.number("audio_duration", "duration", "target_duration")) is not None and seconds > 0:
        found["audio_duration"] = seconds
    return found


def _song(fields: Fields, prompt: str, words: str, *, turbo: bool) -> dict[str, Any]:
    """Return the fields of `Request` and `Sampling`."""
    task = fields.text("task_type", default=tasks.DEFAULT).strip() or tasks.DEFAULT
    instruction = fields.text("instruction").strip()
    song: dict[str, Any] = dict(
        prompt=prompt.strip() or NO_PROMPT,
        lyrics=lyrics(words),
        vocal_language=fields.text("vocal_language", "language", default="en") or "en",
        task_type=task,
        **metadata(fields),
    )
    if instruction and instruction != tasks.TASKS[tasks.DEFAULT].instruction:
        song["instruction"] = instruction
    if turbo:
        song |= TURBO
    steps = fields.whole("inference_steps")
    if steps is not None and steps > 0:
        song["num_inference_steps"] = steps
    for name, aliases in (
        ("guidance_scale", ("guidance_scale",)),
        ("shift", ("shift",)),
        ("cfg_interval_start", ("cfg_interval_start",)),
        ("cfg_interval_end", ("cfg_interval_end",)),
        ("audio_cover_strength", ("audio_cover_strength", "cover_strength")),
        ("cover_noise_strength", ("cover_noise_strength",)),
        ("velocity_norm_threshold", ("velocity_norm_threshold",)),
        ("velocity_ema_factor", ("velocity_ema_factor",)),
        ("latent_shift", ("latent_shift",)),
        ("latent_rescale", ("latent_rescale",)),
    ):
        if (value := fields.number(*aliases)) is not None and not (turbo and name == "guidance_scale"):
            song[name] = value
    if (codes := fields.text("audio_code_string", "audio_codes")).strip():
        song["audio_codes"] = codes
    if schedule := times(fields.text("timesteps")):
        song["timesteps"] = schedule
    task_of = tasks.TASKS.get(task)
    if task_of is not None and task_of.has_regions:
        end = fields.number("repainting_end")
        song["repainting_start"] = fields.number("repainting_start") or 0.0
        song["repainting_end"] = -1.0 if not end else end
        for name in ("repaint_mode", "chunk_mask_mode"):
            if text := fields.text(name):
                song[name] = text
        if (strength := fields.number("repaint_strength")) is not None:
            song["repaint_strength"] = strength
        if (frames := fields.whole("repaint_latent_crossfade_frames")) is not None:
            song["repaint_latent_crossfade_frames"] = frames
    if task_of is not None and task_of.max_tracks:
        put_tracks(song, tracks(fields.get("track_name")) or tracks(fields.get("track_classes", "instruments")))
    method, mode = fields.text("infer_method", default="ode"), fields.text("sampler_mode", default="euler")
    song["solver"] = "sde" if method == "sde" else "heun" if mode == "heun" else "euler"
    variant = fields.text("guidance_variant")
    song["guidance"] = "adg" if fields.flag("use_adg") or variant == "adg" else "apg"
    return song


def _asked(fields: Fields, prompt: str, words: str) -> dict[str, str]:
    """Return the `metas` of the response: the requested values, and N/A for the rest."""
    return dict(
        bpm=fields.text("bpm") or "N/A",
        duration=fields.text("audio_duration", "duration", "target_duration") or "N/A",
        genres="N/A",
        keyscale=fields.text("key_scale", "keyscale", "key") or "N/A",
        timesignature=fields.text("time_signature", "timesignature") or "N/A",
        prompt=prompt,
        lyrics=words,
    )


def check_path(path: str) -> None:
    """Raise InputError for a path on the server, with the authors' message; no path is opened."""
    if ".." in re.split(r"[/\\]", path):
        raise InputError("path traversal in audio file paths is not allowed")
    if path.startswith(("/", "\\", "~")) or re.match(r"[A-Za-z]:", path):
        raise InputError("absolute audio file paths are not allowed")
    raise InputError("audio file paths are not opened; upload the file as multipart/form-data")
