"""From a `Request` to a `Job`: files are read once, everything is checked, and texts are tokenised."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from acestep_jax.errors import InputError
from acestep_jax.inputs import tasks
from acestep_jax.inputs.buckets import BUCKETS
from acestep_jax.inputs.ineffective import warn_of_request
from acestep_jax.inputs.latents import excerpt, load_latents
from acestep_jax.inputs.prompt import lyric_text, prompt_text, stems_caption, tokenize
from acestep_jax.inputs.settings import compat_of, defaults_of, settled
from acestep_jax.io import audio
from acestep_jax.request import MAX_DURATION, Audio, Request, Sampling

logger = logging.getLogger(__name__)

MIN_SOURCE = 1.0  # seconds
REFERENCE_SECONDS = 30


class ProgramKey(NamedTuple):
    """The static shapes of a job: jobs with the same key, in batches of one size, share all compiled programs."""

    frames: int  # latent frames, a bucket
    prompt_tokens: int  # a bucket
    lyric_tokens: int  # a bucket
    source: bool
    codes: bool
    reference: bool
    latents: tuple[bool, bool]  # whether source and reference are latents
    partial_cover: bool
    edited: bool


@dataclass(frozen=True)
class Job:
    """A request that has been checked, with its files read. Arrays are on the host; frames are latent frames.

    Attributes:
        request: the request that the job was prepared from.
        task_type, task: see `tasks.TASKS`; cover, if a text2music request has audio codes.
        prompt_ids, lyric_ids: tokens of the prompt and the lyrics, [n] int32.
        plain_ids: tokens of the prompt for text2music, which partial covers use in part, [n] int32.
        frames, samples: length of the song.
        source: [channels, frames * hop] float32, padded with silence if the song is longer than its source; None: no
            source.
        source_latents: [frames, C] float32 instead of `source`, zero where the song is longer than its source; None:
            no latents.
        source_samples: (first, one past the last) sample of the source within the song.
        codes: [n] int32, audio codes instead of a source.
        silent: [frames] bool, true where the source latents are silence.
        mask: [frames] bool, true where the song is generated.
        keeps_source: whether the source's audio is kept outside of the mask.
        regions: (first, one past the last) sample of each region in which the audio is new; empty: everywhere.
        reference: [channels, 30 s] float32; None: silence, or latents.
        reference_latents: [750, C] float32 in place of `reference`; None: none.
        edited_ids, edited_lyric_ids: tokens of the texts that describe the source, for FlowEdit, [n] int32; None: no
            editing.
        compat: setting of the sampling that the job was prepared for.
    """

    request: Request
    task_type: str
    task: tasks.Task
    prompt_ids: np.ndarray
    plain_ids: np.ndarray
    lyric_ids: np.ndarray
    frames: int
    samples: int
    source: np.ndarray | None
    source_samples: tuple[int, int]
    codes: np.ndarray | None
    silent: np.ndarray
    mask: np.ndarray
    keeps_source: bool
    reference: np.ndarray | None
    source_latents: np.ndarray | None = None
    reference_latents: np.ndarray | None = None
    edited_ids: np.ndarray | None = None
    edited_lyric_ids: np.ndarray | None = None
    regions: tuple[tuple[int, int], ...] = ()
    compat: str = "ace-step"

    @property
    def program_key(self) -> ProgramKey:
        """The programs that the job needs, see `ProgramKey`."""
        return ProgramKey(
            frames=BUCKETS.frames_of(self.frames),
            prompt_tokens=BUCKETS.prompt_of(len(self.prompt_ids)),
            lyric_tokens=BUCKETS.lyrics_of(len(self.lyric_ids)),
            source=self.source is not None,
            codes=self.codes is not None,
            reference=self.reference is not None,
            latents=(self.source_latents is not None, self.reference_latents is not None),
            partial_cover=self.partial_cover,
            edited=self.edited,
        )

    @property
    def partial_cover(self) -> bool:
        """Whether the song follows its source only in some steps, or with a weight below 1."""
        return self.request.audio_cover_strength < 1

    @property
    def edited(self) -> bool:
        """Whether the source is edited with FlowEdit."""
        return self.edited_ids is not None


def prepare(
    request: Request,
    configs: Mapping[str, Any],
    tokenizer: Tokenizer,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    defaults: Mapping[str, Any] | None = None,
) -> Job:
    """Read the files of a request, check all fields, and return the job.

    Args:
        configs: architectures of the model's networks by name.
        tokenizer: the text encoder's tokenizer.
        sampling: how the job will be sampled; its `compat` determines defaults and the format of the prompt.
        defaults: defaults of the checkpoint, which override those of its variant, see `SamplingDefaults`.

    Raises:
        InputError: if an argument is out of range, of the wrong shape, or not accepted by the task, or a file is not
            readable audio.
        OSError: if there is no such file.
    """
    vae, task_type = configs["vae"], request.task_type
    task = tasks.find(task_type)
    compat, own = compat_of(sampling), defaults_of(sampling, configs.get("transformer"), defaults)
    sampling = settled(sampling, configs.get("transformer"))
    if request.audio_codes is not None and task.with_codes:
        task_type, task = task.with_codes, tasks.find(task.with_codes)
    if request.flow_edit_morph:
        task = replace(task, needs_source=True, accepts=(*task.accepts, "src_audio", "src_latents"))
    check_accepted(request, task_type, task)
    _check_edit(request, configs)
    _check_source(request, task_type, task, configs)
    warn_of_request(request)

    hop, rate = vae.hop_length, vae.sampling_rate / vae.hop_length
    source, latents, codes, source_samples, regions = None, None, None, (0, 0), ()
    if request.src_audio is not None or request.src_latents is not None:
        if request.src_audio is not None:
            source = load_audio(request.src_audio, "src_audio", vae)
            size = source.shape[1]
        else:
            assert request.src_latents is not None
            latents = load_latents(request.src_latents, "src_latents", vae)
            size = len(latents) * hop
        left, mask, seconds = _lay_out(
            math.ceil(size / hop), request, task, rate, outward=compat.regions_reach_outwards
        )
        regions = tuple((round(start * rate * hop), round(end * rate * hop)) for start, end in seconds)
        frames, source_samples = len(mask), (left * hop, left * hop + size)
        if source is not None:
            source = np.pad(source, ((0, 0), (left * hop, frames * hop - source_samples[1])))
        if latents is not None:
            latents = np.pad(latents, ((left, frames - left - len(latents)), (0, 0)))
        # The song has exactly the length of its source, unless a region extends it at the end.
        length = source_samples[1] if source_samples[1] > (frames - 1) * hop else frames * hop
    else:
        if request.audio_codes is not None:
            size = codebook_size(configs)
            assert size is not None  # see `_check_source`
            codes = tasks.codes_from_text(request.audio_codes, size)
            window = configs["audio_tokenizer"].pool_window_size
            frames = len(codes) * window
            check_length(frames / rate, "audio_codes")
            if request.audio_duration is not None:
                wanted = math.ceil(request.audio_duration * rate)
                if 0 < frames - wanted < window:
                    frames = wanted  # the last code lasts longer than the song
                elif abs(frames - wanted) >= window:
                    logger.warning(
                        "audio_duration: %g s, but the audio codes are of %g s, and so is the song; pipe.plan(plan) "
                        "writes codes for another duration",
                        request.audio_duration,
                        frames / rate,
                    )
        else:
            seconds = request.audio_duration or own.audio_duration
            frames = math.ceil(seconds * rate)
        mask, length = np.ones(frames, bool), frames * hop
    keeps_source = task.silent_regions or task.has_regions and compat.lego_keeps_source and not mask.all()

    seconds = frames / rate
    if source_samples[1] and compat.tells_source_duration:
        seconds = (source_samples[1] - source_samples[0]) / vae.sampling_rate
    told: dict[str, Any] = dict(
        audio_duration=request.audio_duration or seconds,
        bpm=request.bpm,
        keyscale=request.keyscale,
        timesignature=request.timesignature,
    )
    tracks = request.track_name or request.complete_track_classes
    instruction = tasks.instruction(task_type, [tracks] if isinstance(tracks, str) else tracks)
    instruction, caption = request.instruction or instruction, request.prompt
    if is_for_stems(configs):
        caption = stems_caption(
            caption, request.global_caption, instruction, explicit=sampling.chunk_mask_mode == "explicit"
        )
    language = request.vocal_language or own.vocal_language
    texts = [
        prompt_text(caption, instruction=instruction, **told),
        prompt_text(request.prompt, instruction=tasks.instruction(tasks.DEFAULT), **told),
    ]
    words = [lyric_text(request.lyrics, language)]
    if request.flow_edit_morph:
        texts.append(prompt_text(request.flow_edit_source_caption, instruction=instruction, **told))
        words.append(lyric_text(request.flow_edit_source_lyrics, language))
    prompt_ids, plain_ids, *edited_ids = tokenize(
        tokenizer,
        texts,
        max_length=request.max_text_length,
        what="prompt",
        keep_metadata=compat.keeps_metadata,
    )
    lyric_ids, *edited_lyric_ids = tokenize(tokenizer, words, max_length=request.max_lyric_length, what="lyrics")
    transformer = configs.get("transformer")
    if transformer is not None and transformer.turbo and not task.turbo:
        logger.warning("task_type %s: turbo models were not trained for it; use a base model", task_type)
    return Job(
        request=request,
        task_type=task_type,
        task=task,
        prompt_ids=prompt_ids,
        plain_ids=plain_ids,
        lyric_ids=lyric_ids,
        frames=frames,
        samples=length,
        source=source,
        source_latents=latents,
        source_samples=source_samples,
        codes=codes,
        silent=np.ones(frames, bool) if task.silent_source else mask & task.silent_regions,
        mask=mask,
        keeps_source=keeps_source,
        compat=sampling.compat,
        edited_ids=edited_ids[0] if edited_ids else None,
        edited_lyric_ids=edited_lyric_ids[0] if edited_lyric_ids else None,
        reference=None if request.reference_audio is None else _reference(request.reference_audio, vae),
        reference_latents=None if request.reference_latents is None else _reference_latents(request, vae),
        regions=regions,
    )


def check_accepted(values: Request | Sampling, task_type: str, task: tasks.Task) -> None:
    """Raise InputError if a given field is not accepted by the task."""
    for field in fields(values):
        accepting = tasks.accepting(field.name)
        given = getattr(values, field.name)
        if task_type in accepting or field.name in task.accepts:
            continue
        if not isinstance(given, np.ndarray) and given == field.default:
            continue
        edit = field.name in ("src_audio", "src_latents") and "flow_edit_morph" in task.accepts
        raise InputError(
            f"{field.name}: the task {task_type} does not take it; leave it out, or set task_type to "
            f"{' or '.join(accepting)}{', or edit it with flow_edit_morph=True' if edit else ''}"
        )


def codebook_size(configs: Mapping[str, Any]) -> int | None:
    """Return the size of the codebook; None if the model has no audio tokenizer and detokenizer."""
    if not configs.keys() >= {"audio_tokenizer", "audio_token_detokenizer"}:
        return None
    return math.prod(configs["audio_tokenizer"].fsq_input_levels)


def _check_edit(request: Request, configs: Mapping[str, Any]) -> None:
    if request.flow_edit_morph and not request.flow_edit_source_caption.strip():
        raise InputError("flow_edit_source_caption: missing; describe the source, so that there is something to change")
    if not request.flow_edit_morph and (request.flow_edit_source_caption or request.flow_edit_source_lyrics):
        name = "flow_edit_source_caption" if request.flow_edit_source_caption else "flow_edit_source_lyrics"
        raise InputError(f"{name}: has an effect only with flow_edit_morph=True; set that, or leave it out")
    if request.flow_edit_morph and (request.latents is not None or request.retake_variance):
        name = "latents" if request.latents is not None else "retake_variance"
        raise InputError(f"{name}: with flow_edit_morph the noise is drawn from the seed; leave it out")
    if request.flow_edit_morph and request.audio_cover_strength < 1:
        raise InputError(
            "audio_cover_strength: expected 1 with flow_edit_morph, which has no text2music part; leave it out"
        )
    if request.global_caption and not is_for_stems(configs):
        raise InputError("global_caption: only for models fine-tuned on stems; leave it out, or say it in the prompt")


def is_for_stems(configs: Mapping[str, Any]) -> bool:
    """Return whether the model was fine-tuned on stems."""
    return "transformer" in configs and configs["transformer"].is_lego_sft


def _check_source(request: Request, task_type: str, task: tasks.Task, configs: Mapping[str, Any]) -> None:
    for names in (("audio_codes", "src_audio", "src_latents"), ("reference_audio", "reference_latents")):
        given = [name for name in names if getattr(request, name) is not None]
        if len(given) > 1:
            raise InputError(f"{', '.join(given)}: expected one of them, found {'both' if len(given) == 2 else 'all'}")
    if task.needs_source and request.audio_codes is None and request.src_audio is None and request.src_latents is None:
        raise InputError(f"src_audio: the task {task_type} needs a source; give a file or an array")
    if task.tokenized and codebook_size(configs) is None:
        raise InputError(
            f"task_type: {task_type} needs the audio tokenizer, which this checkpoint lacks; convert one that has it"
        )


def _lay_out(
    frames: int, request: Request, task: tasks.Task, rate: float, *, outward: bool = True
) -> tuple[int, np.ndarray, tuple[tuple[float, float], ...]]:
    """Return the frame at which a source of `frames` frames begins in the song, the chunk mask, and the regions in
    seconds.
    `outward`: see `tasks.extent`."""
    if not task.has_regions:
        return 0, np.ones(frames, bool), ()
    starts, ends = _several(request.repainting_start), _several(request.repainting_end)
    if len(starts) != len(ends) or not starts:
        raise InputError(
            f"repainting_start, repainting_end: expected as many of both, found {len(starts)} and {len(ends)}"
        )
    extent = tasks.extent(starts, ends, frames, rate, MAX_DURATION, outward=outward)
    return extent.left, extent.mask(), tuple(extent.seconds)


def _several(value: float | Sequence[float] | None) -> Sequence[float | None]:
    return value if isinstance(value, Sequence) else (value,)


def load_audio(source: Audio, name: str, vae: Any) -> np.ndarray:
    """Read a source or a reference from a file or an array; mono is copied to all channels.

    Args:
        name: name of the argument, for error messages.
        vae: the autoencoder's config; the result has its sample rate and its channels.

    Returns:
        [channels, samples] float32.

    Raises:
        InputError: if it is neither, has non-finite samples, or is shorter than 1 s or longer than 600 s.
        OSError: if there is no such file.
    """
    channels = vae.audio_channels
    if isinstance(source, str | Path):
        name = str(source)
        samples = audio.read(source, vae.sampling_rate, channels)
    else:
        samples = np.atleast_2d(np.asarray(source))
        if not np.issubdtype(samples.dtype, np.floating):
            raise InputError(f"{name}: expected a file or an array of floating-point samples, found {samples.dtype}")
        samples = samples.astype(np.float32)
        if samples.ndim != 2 or samples.shape[0] not in (1, channels):
            raise InputError(
                f"{name}: expected an array [1 or {channels} channels, samples] at {vae.sampling_rate} Hz, or a file, "
                f"found shape {list(np.shape(source))}"
            )
        if not np.isfinite(samples).all():
            raise InputError(f"{name}: holds NaN or infinities; expected samples within [-1, 1]")
        samples = np.broadcast_to(samples, (channels, samples.shape[1]))
    check_length(samples.shape[1] / vae.sampling_rate, name)
    return samples


def check_length(seconds: float, name: str) -> None:
    """Raise InputError unless the audio called `name` is 1 to 600 s long."""
    if not MIN_SOURCE <= seconds <= MAX_DURATION:
        raise InputError(f"{name}: expected {MIN_SOURCE:g} to {MAX_DURATION:g} s of music, found {seconds:.3g} s")


def _reference(source: Audio, vae: Any) -> np.ndarray | None:
    """Return 30 s of the reference: ten seconds each from the start, from one third on, and from the end. A reference
    below 30 s is first repeated.

    None if it is silent, because silence is encoded only once.
    """
    samples = load_audio(source, "reference_audio", vae)
    if not samples.any():
        return None
    return excerpt(samples, REFERENCE_SECONDS * vae.sampling_rate)


def _reference_latents(request: Request, vae: Any) -> np.ndarray:
    """Return 30 s of the reference's latents, see `_reference`, [frames, C]."""
    assert request.reference_latents is not None
    latents = load_latents(request.reference_latents, "reference_latents", vae)
    return excerpt(latents.T, REFERENCE_SECONDS * vae.sampling_rate // vae.hop_length).T
