"""What one song is asked for, and what that means in frames, texts and arrays."""

import dataclasses
import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.errors import InputError, check_number, check_text
from acestep_jax.inputs import tasks
from acestep_jax.inputs.prompt import lyric_text, prompt_text
from acestep_jax.io import audio

MIN_DURATION, MAX_DURATION = 10.0, 600.0  # seconds
DEFAULT_DURATION = 60.0
MIN_SOURCE = 1.0  # seconds
REFERENCE_SECONDS = 30

Audio = str | Path | np.ndarray


@dataclasses.dataclass(frozen=True)
class Request:
    """One song. The fields are the arguments of `AceStepPipeline.__call__` that may differ within a batch.

    prompt: what the music is like.
    lyrics: "[Instrumental]" asks for no voice; vocal_language: of the lyrics.
    audio_duration: seconds, 10 to 600; None: 60. With a source or codes, the song is as long as those, and this is
        only what the model is told; None: the truth.
    bpm: beats per minute, 30 to 300; keyscale: such as "F# minor"; timesignature: 2, 3, 4 or 6. None: the model
        decides.
    instruction: None: that of the task.
    task_type: text2music, repaint, cover, extract, lego or complete, see `acestep_jax.inputs.tasks`.
    track_name: of extract and lego; complete_track_classes: of complete. See `acestep_jax.inputs.tasks.TRACKS`.
    src_audio: the song to work on, a file or an array [channels, samples] at the pipeline's sample rate.
    reference_audio: what it should sound like, likewise; None: the model decides.
    audio_codes: "<|audio_code_123|>...", 5 in a second, to make a cover of instead of a song.
    repainting_start, repainting_end: seconds of the source, of what repaint makes anew and lego fills; None, or -1 for
        the end: from the beginning, to the end; one of each, or as many starts as ends for several regions. What begins
        before 0 or ends after the source makes the song longer.
    audio_cover_strength: 0 to 1, how long or how much the source of a cover counts.
    seed: from 0 to 2^32 - 1, or a JAX key. None: a new one.
    latents: the noise to start from, [frames, 64], instead of a seed's.
    """

    prompt: str
    lyrics: str = ""
    audio_duration: float | None = None
    vocal_language: str = "en"
    bpm: int | None = None
    keyscale: str | None = None
    timesignature: str | int | None = None
    instruction: str | None = None
    task_type: str = "text2music"
    track_name: str | None = None
    complete_track_classes: Sequence[str] = ()
    src_audio: Audio | None = None
    reference_audio: Audio | None = None
    audio_codes: str | None = None
    repainting_start: float | Sequence[float] | None = None
    repainting_end: float | Sequence[float] | None = None
    audio_cover_strength: float = 1.0
    seed: int | jax.Array | None = None
    latents: np.ndarray | None = None

    def __post_init__(self):
        """Raises InputError if a value is of the wrong kind."""
        for name in ("prompt", "lyrics", "vocal_language", "task_type"):
            check_text(name, getattr(self, name))
        for name in ("keyscale", "instruction", "track_name", "audio_codes"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))
        for name in ("audio_duration", "audio_cover_strength"):
            if name != "audio_duration" or self.audio_duration is not None:
                check_number(name, getattr(self, name))
        if self.bpm is not None:
            check_number("bpm", self.bpm, whole=True)
        if self.seed is not None and not is_key(self.seed):
            check_number("seed", self.seed, whole=True)
        if isinstance(self.complete_track_classes, str):
            raise InputError(
                f"complete_track_classes: expected a list of tracks, found {self.complete_track_classes!r}"
            )
        for name in ("repainting_start", "repainting_end"):
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                object.__setattr__(self, name, value := value.tolist())
            for item in value if isinstance(value, list | tuple) else [value]:
                if item is not None:
                    check_number(name, item)


def collect(prompt: str | Request | Sequence[str | Request], each: dict, shared: dict, seed, latents) -> list[Request]:
    """A request for each prompt; one that is a `Request` already stays.

    Args:
        each: fields with one value for all, or a list of them.
        shared: fields with one value.
        seed: a number, from which the songs count on, a key, or one for each.
        latents: [B, frames, 64] or None.

    Raises:
        InputError: if there is no prompt, a list is of another length, a seed is none, or a `Request` comes with
            further values of its own fields.
    """
    prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    if not prompts:
        raise InputError("prompt: the list is empty; give at least one")
    count = len(prompts)
    lists = {name: list(v) if isinstance(v, list | tuple) else [v] * count for name, v in each.items()}
    lists["latents"] = [None] * count if latents is None else list(np.asarray(latents, np.float32))
    lists["seed"] = _seed_of_each(seed, count)
    for name, values in lists.items():
        if len(values) != count:
            raise InputError(f"{name}: expected one or {count}, one for each prompt, found {len(values)}")
    defaults = {field.name: field.default for field in dataclasses.fields(Request)}
    requests = []
    for i, item in enumerate(prompts):
        values = shared | {name: list_[i] for name, list_ in lists.items()}
        if not isinstance(item, Request):
            item = Request(item, **values)
        elif given := [k for k, v in values.items() if v is not None and not np.array_equal(v, defaults[k])]:
            raise InputError(f"{given[0]}: prompt {i} is a Request, which has its own; set it there")
        requests.append(item)
    return requests


def _seed_of_each(seed, count: int) -> list:
    """A number or key for each song, or None."""
    if seed is None:
        return [None] * count
    if is_key(seed):
        keys = jax.random.wrap_key_data(np.asarray(jax.random.key_data(seed)), impl=jax.random.key_impl(seed))
        return list(jax.vmap(jax.random.fold_in, (None, 0))(keys, np.arange(count)) if keys.ndim == 0 else keys)
    try:
        seeds = [operator.index(s) for s in np.atleast_1d(np.asarray(seed)).tolist()]
    except TypeError:
        raise InputError(f"seed: expected whole numbers or a key of jax.random.key, found {seed!r}") from None
    return seeds if np.ndim(seed) else [seeds[0] + i for i in range(count)]


def is_key(seed) -> bool:
    """Whether it is a key of jax.random.key, or several."""
    return isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)


class Model(NamedTuple):
    """What a plan depends on of the model."""

    sample_rate: int  # Hz
    hop: int  # samples in a latent frame
    channels: int  # of the audio
    codebook_size: int | None  # None: there is no audio tokenizer
    window: int  # latent frames in a code

    @property
    def rate(self) -> float:
        """Latent frames in a second."""
        return self.sample_rate / self.hop


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request that has been checked. Frames are latent ones, of the song that is made.

    task_type: of the request, or cover where it has codes.
    text, lyrics: what the encoders read; plain_text: as if it were text to music, for weak covers.
    frames, samples: of the song.
    source: [channels, frames * hop], silent where there is no source; None: no source.
    source_samples: first and one past the last of `source` that are the source's.
    codes: [n] int32 to make the source latents of; tokenized: those are the source's own.
    silent: [frames] bool, where the source latents are replaced by silence; mask: [frames] bool, the chunk mask.
    reference: [channels, 30 s], None: silence.
    kept: whether the audio outside of the mask is the source's.
    cover_strength: below 1 only for covers.
    """

    task_type: str
    text: str
    lyrics: str
    plain_text: str
    frames: int
    samples: int
    source: np.ndarray | None
    source_samples: tuple[int, int]
    codes: np.ndarray | None
    tokenized: bool
    silent: np.ndarray
    mask: np.ndarray
    reference: np.ndarray | None
    kept: bool
    cover_strength: float


def plan(request: Request, model: Model) -> Plan:
    """Reads the files of a request, checks all of it, and decides what is to be done.

    Raises:
        InputError: if an argument is out of range, of the wrong shape, or does not go with the task; if a file is no
            audio that can be read.
        OSError: if there is no such file.
    """
    task_type = request.task_type
    if request.audio_codes is not None and task_type == "text2music":
        task_type = "cover"
    task = tasks.find(task_type)
    _check_arguments(request, task_type, task, model)
    source, codes = None, None
    source_samples = (0, 0)
    if request.src_audio is not None:
        source = load_audio(request.src_audio, "src_audio", model)
        source, source_samples, mask = _lay_out(source, request, task, model)
        frames = len(mask)
        # As long as the source to the sample, but for what regions add behind it.
        samples = source_samples[1] if source_samples[1] > (frames - 1) * model.hop else frames * model.hop
    elif request.audio_codes is not None:
        codes = tasks.codes_from_text(request.audio_codes, model.codebook_size)
        frames = len(codes) * model.window
        check_length(frames / model.rate, "audio_codes")
        mask, samples = np.ones(frames, bool), frames * model.hop
    else:
        frames = math.ceil(_duration(request.audio_duration) * model.rate)
        mask, samples = np.ones(frames, bool), frames * model.hop
    silent = mask & task.silent_regions if task.needs_audio else np.ones(frames, bool)

    seconds = _duration(request.audio_duration) if request.audio_duration is not None else frames / model.rate
    names = request.complete_track_classes or ([request.track_name] if request.track_name else ())
    usual = tasks.instruction(task_type, names)
    told = dict(audio_duration=seconds, bpm=request.bpm, keyscale=request.keyscale, timesignature=request.timesignature)
    return Plan(
        task_type=task_type,
        text=prompt_text(request.prompt, instruction=request.instruction or usual, **told),
        lyrics=lyric_text(request.lyrics, request.vocal_language),
        plain_text=prompt_text(request.prompt, instruction=tasks.instruction("text2music"), **told),
        frames=frames,
        samples=samples,
        source=source,
        source_samples=source_samples,
        codes=codes,
        tokenized=task.tokenized and source is not None,
        silent=silent,
        mask=mask,
        reference=None if request.reference_audio is None else _reference(request.reference_audio, model),
        kept=task.silent_regions,
        cover_strength=request.audio_cover_strength,
    )


def _check_arguments(request: Request, task_type: str, task: tasks.Task, model: Model) -> None:
    """Raises InputError where arguments do not go together."""
    has_audio = request.src_audio is not None
    if has_audio and not task.needs_audio:
        others = ", ".join(name for name, other in tasks.TASKS.items() if other.needs_audio)
        raise InputError(f"src_audio: the task {task_type} takes none; set task_type to one of {others}")
    if request.audio_codes is not None:
        if has_audio:
            raise InputError("audio_codes, src_audio: expected one of them, found both")
        if task_type != "cover":
            raise InputError(f"audio_codes: the task {task_type} takes none; set task_type to cover")
    elif task.needs_audio and not has_audio:
        raise InputError(f"src_audio: the task {task_type} needs a song to work on; give a file or an array")
    if task.tokenized and model.codebook_size is None:
        raise InputError(
            f"task_type: {task_type} needs the audio tokenizer, which this checkpoint lacks; convert one that has it"
        )
    if not task.has_regions and not (request.repainting_start is None and request.repainting_end is None):
        raise InputError(f"repainting_start, repainting_end: the task {task_type} takes none; set task_type to repaint")
    if not 0 <= request.audio_cover_strength <= 1:
        raise InputError(f"audio_cover_strength: expected 0 to 1, found {request.audio_cover_strength}")
    if request.audio_cover_strength < 1 and task_type != "cover":
        raise InputError(f"audio_cover_strength: the task {task_type} takes none; leave it at 1")
    if request.track_name is not None and task_type == "complete":
        raise InputError("track_name: the task complete takes complete_track_classes instead")
    if request.complete_track_classes and task_type != "complete":
        raise InputError(f"complete_track_classes: the task {task_type} takes none; leave it out")


def _lay_out(
    source: np.ndarray, request: Request, task: tasks.Task, model: Model
) -> tuple[np.ndarray, tuple[int, int], np.ndarray]:
    """The source within the song that is made: its audio, where it begins and ends, and the chunk mask."""
    frames = math.ceil(source.shape[1] / model.hop)
    left, mask = 0, np.ones(frames, bool)
    if task.has_regions:
        starts, ends = (
            x if isinstance(x, list | tuple) else [x] for x in (request.repainting_start, request.repainting_end)
        )
        if len(starts) != len(ends) or not starts:
            raise InputError(
                f"repainting_start, repainting_end: expected as many of both, found {len(starts)} and {len(ends)}"
            )
        extent = tasks.extent(starts, ends, frames, model.rate, MAX_DURATION)
        left, mask = extent.left, extent.mask()
    begin = left * model.hop
    end = begin + source.shape[1]
    return np.pad(source, ((0, 0), (begin, len(mask) * model.hop - end))), (begin, end), mask


def load_audio(source: Audio, name: str, model: Model) -> np.ndarray:
    """[channels, samples] float32 at the model's rate, from a file or an array; a mono one is given to all channels.

    Raises:
        InputError: if it is none, holds NaN, or is shorter than 1 s or longer than 600 s.
    """
    if isinstance(source, str | Path):
        name = str(source)
        samples = audio.read(source, model.sample_rate, model.channels)
    else:
        samples = np.atleast_2d(np.asarray(source))
        if not np.issubdtype(samples.dtype, np.floating):
            raise InputError(f"{name}: expected a file or an array of floating-point samples, found {samples.dtype}")
        samples = samples.astype(np.float32)
        if samples.ndim != 2 or samples.shape[0] not in (1, model.channels):
            raise InputError(
                f"{name}: expected an array [1 or {model.channels} channels, samples] at {model.sample_rate} Hz, or a "
                f"file, found shape {list(np.shape(source))}"
            )
        if not np.isfinite(samples).all():
            raise InputError(f"{name}: holds NaN or infinities; expected samples within [-1, 1]")
        samples = np.broadcast_to(samples, (model.channels, samples.shape[1]))
    check_length(samples.shape[1] / model.sample_rate, name)
    return samples


def check_length(seconds: float, name: str) -> None:
    if not MIN_SOURCE <= seconds <= MAX_DURATION:
        raise InputError(f"{name}: expected {MIN_SOURCE:g} to {MAX_DURATION:g} s of music, found {seconds:.3g} s")


def _reference(source: Audio, model: Model) -> np.ndarray | None:
    """Ten seconds each from the front, from one third on and from the back, of what is repeated to 30 s at least.

    None if it is silent: silence is encoded once and for all.
    """
    samples = load_audio(source, "reference_audio", model)
    if not samples.any():
        return None
    whole, part = REFERENCE_SECONDS * model.sample_rate, REFERENCE_SECONDS * model.sample_rate // 3
    samples = np.tile(samples, (1, math.ceil(whole / samples.shape[1])))
    third = samples.shape[1] // 3
    parts = [samples[:, :part], samples[:, third : third + part], samples[:, samples.shape[1] - part :]]
    return np.concatenate(parts, axis=1)


def _duration(duration: float | None) -> float:
    duration = DEFAULT_DURATION if duration is None else float(duration)
    if not MIN_DURATION <= duration <= MAX_DURATION:
        raise InputError(f"audio_duration: expected {MIN_DURATION:g} to {MAX_DURATION:g} seconds, found {duration:g}")
    return duration
