"""Everything that can be requested: `Request` describes one song, `Planning` says how the planner completes it, and
`Sampling` says how a batch of songs is sampled.

Each argument is defined here and nowhere else: its name, type, default, help, unit and range. The keywords of
`AceStepPipeline.__call__`, the options of the command line, the keys of a JSONL line and the tables in the
documentation are derived from the fields of these dataclasses, see `acestep_jax.arguments`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from acestep_jax.arguments import argument, arguments, check_fields, unknown_name
from acestep_jax.diffusion import dcw
from acestep_jax.diffusion.guidance import GUIDANCE
from acestep_jax.diffusion.noise import gpu_threads
from acestep_jax.diffusion.solvers import SOLVERS
from acestep_jax.errors import InputError
from acestep_jax.inputs import fields
from acestep_jax.models.registry import FAMILY

MIN_DURATION, MAX_DURATION = 10.0, 600.0  # seconds
CHUNK_MASKS = ("explicit", "auto")
REPAINT_MODES = ("conservative", "balanced", "aggressive")
MAX_PROMPT_TOKENS, MAX_LYRIC_TOKENS = 256, 2048  # what the model was trained on

Audio = str | Path | np.ndarray
SOUNDS, LATENTS = ("src_audio", "reference_audio"), ("src_latents", "reference_latents")  # fields that name files
FILES = (*SOUNDS, *LATENTS)


def _by_compat(field: str) -> str:
    """Return the default of a field under each setting of `Sampling.compat`, as text for help messages."""
    values = {}
    for name, compat in FAMILY.compat.items():
        value = getattr(compat.defaults["turbo"] if field not in compat.__dataclass_fields__ else compat, field)
        values[name] = f"{value:g}" if isinstance(value, float) else str(value).lower()
    first, *others = values.items()
    other = [f"{value} with compat={name}" for name, value in others if value != first[1]]
    return "; ".join([first[1], *other])


@dataclass(frozen=True)
class Request:
    """One song. Fields hold what the user gave; `inputs.prepare` checks that they are consistent.

    Raises:
        InputError: if a value is of the wrong type or out of range.
    """

    prompt: str = argument(help="Description of the music.", metavar="PROMPT")
    lyrics: str = argument(
        "",
        help='Lyrics to sing; "[Instrumental]" requests no vocals. @FILE reads them from a file.',
        metavar="TEXT",
        from_file=True,
    )
    audio_duration: float | None = argument(
        None,
        help="Duration of the song. A song made from a source or from audio codes has the length of these; the "
        "duration is then only part of the prompt.",
        unit="s",
        minimum=MIN_DURATION,
        maximum=MAX_DURATION,
        flag="duration",
        meaning=f"the length of the source, or {_by_compat('audio_duration')}",
    )
    vocal_language: str | None = argument(
        None,
        help="Language code of the lyrics, such as en, zh or ja; unknown lets the model decide.",
        flag="language",
        metavar="CODE",
        meaning=_by_compat("vocal_language"),
        reader=fields.vocal_language,
    )
    _: KW_ONLY
    bpm: str | float | None = argument(
        None,
        help="Tempo, such as 128; rounded to a whole number.",
        unit="beats per minute",
        minimum=fields.MIN_BPM,
        maximum=fields.MAX_BPM,
        metavar="N",
        meaning="chosen by the model",
        reader=fields.bpm,
    )
    keyscale: str | None = argument(
        None,
        help='Key and mode, such as "F# minor".',
        flag="key",
        metavar="KEY",
        meaning="chosen by the model",
        reader=fields.keyscale,
    )
    timesignature: str | float | None = argument(
        None,
        help="Beats per bar: 2, 3, 4 or 6, or a fraction such as 6/8.",
        flag="time-signature",
        metavar="N",
        meaning="chosen by the model",
        reader=fields.timesignature,
    )
    instruction: str | None = argument(
        None, help="Instruction to the model, instead of the task's own.", metavar="TEXT", meaning="the task's own"
    )
    task_type: str = argument(
        "text2music",
        help="Task: text2music, repaint, cover, cover-nofsq, extract, lego or complete. cover-nofsq is a cover that "
        "follows the source's latents directly, without the audio tokenizer.",
        flag="task",
        metavar="TASK",
    )
    track_name: str | Sequence[str] | None = argument(
        None,
        help="Track to extract, to add (lego) or to complete the song with (complete), such as vocals or drums; "
        "repeatable for complete.",
        flag="track",
        metavar="NAME",
        meaning="none",
    )
    complete_track_classes: Sequence[str] = argument(
        (), help="Tracks to complete the song with: diffusers' name for track_name.", flag=""
    )
    src_audio: Audio | None = argument(
        None,
        help="Source: the song that every task except text2music works on, and that FlowEdit edits, as a sound file or "
        "an array [channels, samples] at the pipeline's sample rate.",
        flag="source",
        metavar="FILE",
        meaning="none",
    )
    reference_audio: Audio | None = argument(
        None,
        help="Reference for the timbre, as a sound file or an array [channels, samples] at the pipeline's sample rate.",
        flag="reference",
        metavar="FILE",
        meaning="none",
    )
    src_latents: Audio | None = argument(
        None,
        help="Latents to use as the source instead of encoding src_audio: an array [frames, channels] such as "
        "Song.latents, or a file of it in float32, little-endian, without a header.",
        flag="source-latents",
        metavar="FILE",
        meaning="none",
    )
    reference_latents: Audio | None = argument(
        None,
        help="Reference for the timbre as latents, in place of reference_audio; see src_latents.",
        flag="reference-latents",
        metavar="FILE",
        meaning="none",
    )
    audio_codes: str | None = argument(
        None,
        help='Audio codes to make a cover from, instead of a source: text such as "<|audio_code_123|>...", 5 codes per '
        "second. @FILE reads them from a file.",
        flag="codes",
        metavar="TEXT",
        from_file=True,
        meaning="none",
    )
    repainting_start: float | Sequence[float] | None = argument(
        None,
        help="Start of a region to repaint, or to fill (lego). Repeatable; a negative start extends the song at the "
        "front.",
        unit="s",
        flag="start",
        meaning="the beginning",
    )
    repainting_end: float | Sequence[float] | None = argument(
        None,
        help="End of the region to repaint; -1 is the end of the source. Repeatable; an end beyond that of the source "
        "extends the song.",
        unit="s",
        flag="end",
        meaning="the end of the source",
    )
    audio_cover_strength: float = argument(
        1.0,
        help="How closely a cover follows its source: the fraction of the sampling steps that follow it, or the weight "
        "of its velocity; cover_mode says which.",
        minimum=0,
        maximum=1,
        flag="cover-strength",
    )
    seed: int | jax.Array | None = argument(
        None,
        help="Seed of the noise, or a JAX key. The same seed gives the same song.",
        minimum=0,
        maximum=2**32 - 1,
        meaning="a new one, which is reported",
    )
    retake_seed: int | None = argument(
        None,
        help="Seed of a second noise, which retake_variance mixes into the first, for variations of a song.",
        minimum=0,
        maximum=2**32 - 1,
        meaning="a new one, which is reported",
    )
    retake_variance: float = argument(
        0.0,
        help="How much of the second noise to mix in: the noise is cos(v pi/2) times the first plus sin(v pi/2) times "
        "the second. 0 gives the original song, 1 a different one.",
        minimum=0,
        maximum=1,
    )
    global_caption: str = argument(
        "",
        help="Description of the whole song, for models fine-tuned on stems, whose prompt describes one track.",
        metavar="TEXT",
    )
    flow_edit_morph: bool = argument(
        False,
        help="Edit the source with FlowEdit: follow the difference between the velocity for prompt and lyrics and the "
        "velocity for flow_edit_source_caption and flow_edit_source_lyrics. For text2music, cover and cover-nofsq.",
    )
    flow_edit_source_caption: str = argument(
        "", help="FlowEdit: description of the source.", metavar="TEXT", flag="source-caption"
    )
    flow_edit_source_lyrics: str = argument(
        "",
        help="FlowEdit: lyrics of the source. @FILE reads them from a file.",
        metavar="TEXT",
        flag="source-lyrics",
        from_file=True,
    )
    latents: np.ndarray | None = argument(
        None,
        help="Initial noise, an array [frames, channels], instead of noise drawn from the seed.",
        flag="",
        json=False,
    )
    max_text_length: int = argument(
        MAX_PROMPT_TOKENS,
        help="Maximum number of prompt tokens; longer prompts are truncated with a warning.",
        minimum=1,
        flag="",
    )
    max_lyric_length: int = argument(
        MAX_LYRIC_TOKENS,
        help="Maximum number of lyric tokens; longer lyrics are truncated with a warning.",
        minimum=1,
        flag="",
    )

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class Sampling:
    """How a batch of songs is sampled. A field that is None takes the value that `compat` has for the model's variant,
    see `models.registry.Compat`.

    Raises:
        InputError: if a value is of the wrong type, out of range or unknown.
    """

    num_inference_steps: int | None = argument(
        None, help="Number of sampling steps.", minimum=1, flag="steps", metavar="N", meaning="the variant's"
    )
    guidance_scale: float | None = argument(
        None, help="Guidance scale; 1 turns guidance off.", minimum=0, flag="guidance", meaning="the variant's"
    )
    shift: float | None = argument(
        None, help="Shift of the timesteps towards the noise, above 0.", meaning="the variant's"
    )
    _: KW_ONLY
    compat: str = argument(
        "ace-step",
        help="Which implementation's behaviour and defaults to use where they differ: the authors' application "
        "(ace-step) or diffusers. Other options override individual ones.",
        choices=tuple(FAMILY.compat),
    )
    timesteps: Sequence[float] | None = argument(
        None,
        help="Strictly decreasing timesteps within (0, 1], instead of num_inference_steps and shift; repeatable.",
        flag="timestep",
        metavar="T",
        meaning="computed from num_inference_steps and shift",
    )
    snap_timesteps: bool | None = argument(
        None,
        help="Whether to round the timesteps, given or computed, to the nearest of the 20 that turbo models were "
        "trained at; for turbo models only.",
        meaning=_by_compat("snap_timesteps"),
    )
    solver: str = argument("euler", help="Solver of the sampling ODE or SDE.", choices=tuple(SOLVERS))
    guidance: str = argument("apg", help="Guidance rule.", choices=tuple(GUIDANCE), flag="guidance-rule")
    cfg_interval_start: float = argument(
        0.0, help="Start of the interval in which guidance is applied.", minimum=0, maximum=1
    )
    cfg_interval_end: float = argument(
        1.0, help="End of the interval in which guidance is applied.", minimum=0, maximum=1
    )
    cfg_interval_in: str | None = argument(
        None,
        help="How the interval of guidance is measured: in the time t, as in ACE-Step, or in the progress 1 - t, as in "
        "diffusers.",
        choices=("t", "progress"),
        meaning=_by_compat("cfg_interval_in"),
    )
    cover_mode: str | None = argument(
        None,
        help="What an audio_cover_strength below 1 means: switch changes to text2music after that fraction of the "
        "steps, as in ACE-Step; blend mixes the velocities of cover and text2music with that weight, as in diffusers.",
        choices=("switch", "blend"),
        meaning=_by_compat("cover_mode"),
    )
    cover_noise_strength: float = argument(
        0.0,
        help="How close to its source a cover starts: 0 starts from pure noise, s from the timestep nearest to 1 - s.",
        minimum=0,
        maximum=1,
        flag="cover-noise",
    )
    chunk_mask_mode: str | None = argument(
        None,
        help="Mask that tells the model about the regions: explicit is 1 inside and 0 outside; auto is 2 everywhere, "
        "which lets the model decide.",
        choices=CHUNK_MASKS,
        meaning=f"{_by_compat('chunk_mask_mode')}; auto for models fine-tuned on stems",
    )
    repaint_mode: str | None = argument(
        None,
        help="Steps after which everything outside of the regions is reset to the source. conservative: all; balanced: "
        "some, see repaint_strength; aggressive: none.",
        choices=REPAINT_MODES,
        meaning=_by_compat("repaint_mode"),
    )
    repaint_strength: float = argument(
        0.5,
        help="With repaint_mode=balanced and strength s: restore the source after each step in the first fraction "
        "1 - s of the steps, and blend the latents over 25 (1 - s) frames outside of the regions.",
        minimum=0,
        maximum=1,
    )
    repaint_injection_ratio: float | None = argument(
        None,
        help="The source is restored outside of the regions after each step in this first fraction of the sampling "
        "steps.",
        minimum=0,
        maximum=1,
        meaning="set by repaint_mode",
    )
    repaint_latent_crossfade_frames: int | None = argument(
        None,
        help="Number of latent frames outside of the regions over which the result fades into the source.",
        minimum=0,
        meaning="set by repaint_mode",
    )
    dcw_enabled: bool | None = argument(
        None,
        help="Whether to correct each step in the wavelet domain (DCW).",
        meaning="true for turbo models; false for others, and with compat=diffusers",
    )
    dcw_mode: str = argument(
        "double",
        help="What DCW corrects: the low band, the high band, both (double), or the latents without a transform (pix).",
        choices=dcw.MODES,
    )
    dcw_scaler: float = argument(
        0.05, help="Scale of DCW for the low band, or for the only band that is corrected.", minimum=0
    )
    dcw_high_scaler: float = argument(0.02, help="Scale of DCW for the high band, with dcw_mode=double.", minimum=0)
    dcw_wavelet: str = argument("haar", help="Wavelet of DCW.", choices=tuple(dcw.WAVELETS))
    velocity_norm_threshold: float = argument(
        0.0,
        help="Upper bound of the velocity's norm, relative to the norm of the latents at that step; 0: unbounded.",
        minimum=0,
    )
    velocity_ema_factor: float = argument(
        0.0, help="Fraction of the previous step's velocity in each velocity.", minimum=0, maximum=1
    )
    flow_edit_n_min: float = argument(
        0.0, help="FlowEdit: fraction of the steps after which editing begins.", minimum=0, maximum=1
    )
    flow_edit_n_max: float = argument(
        1.0, help="FlowEdit: fraction of the steps after which editing ends and denoising begins.", minimum=0, maximum=1
    )
    flow_edit_n_avg: int = argument(1, help="FlowEdit: number of noises to average over in each step.", minimum=1)
    latent_shift: float = argument(0.0, help="Offset to add to the latents before they are decoded.")
    latent_rescale: float = argument(
        1.0, help="Factor to multiply the latents by, before latent_shift is added.", minimum=0
    )
    posterior: str = argument(
        "mean",
        help="Latents of a source or a reference: the mean of the autoencoder's posterior, or a sample from it, as in "
        "ACE-Step and diffusers.",
        choices=("mean", "sample"),
    )
    noise: str = argument(
        "jax",
        help="Generator of the initial noise: jax, or torch for the noise that PyTorch draws on a GPU from the same "
        "seed. torch:A100 names the GPU, which songs longer than 25.6 s require.",
        metavar="KIND",
    )
    attend_to_padding: bool | None = argument(
        None,
        help="Whether to attend to the padding of shorter texts in a batch, as diffusers does.",
        meaning=_by_compat("attend_to_padding"),
    )

    def __post_init__(self):
        check_fields(self)
        if self.shift is not None and not 0 < self.shift:
            raise InputError(f"shift: expected a number above 0, found {self.shift:g}")
        if self.noise != "jax":
            gpu_threads(self.noise)
        start, end = self.cfg_interval_start, self.cfg_interval_end
        if start > end:
            raise InputError(f"cfg_interval_start, cfg_interval_end: expected start <= end, found {start} and {end}")
        if (first := self.flow_edit_n_min) > (last := self.flow_edit_n_max):
            raise InputError(f"flow_edit_n_min, flow_edit_n_max: expected min <= max, found {first:g} and {last:g}")


@dataclass(frozen=True, kw_only=True)
class Planning:
    """Whether the planner, a language model, completes a request, and how the planner is sampled.

    Names are those of ACE-Step's own application.

    Raises:
        InputError: if a value is of the wrong type or out of range.
    """

    thinking: bool | None = argument(
        None,
        help="Whether the planner first writes caption, metadata and audio codes; for text2music only.",
        flag="think",
        meaning="true where the model has a planner; false with compat=diffusers",
    )
    use_cot_caption: bool | None = argument(
        None,
        help="Whether the planner's caption replaces the prompt; false suits adapters and exact prompts.",
        flag="cot-caption",
        meaning="true",
    )
    lm_seed: int | None = argument(
        None,
        help="Seed of the plan; song i of a batch uses lm_seed + i. The same seed gives the same plan.",
        minimum=0,
        maximum=2**32 - 1,
        meaning="the song's seed",
    )
    lm_temperature: float = argument(
        0.85, help="Temperature of the planner; 0 always takes the likeliest token.", minimum=0, maximum=10
    )
    lm_cfg_scale: float = argument(
        2.0, help="Guidance scale of the planner's audio codes; 1 turns guidance off.", minimum=1
    )
    lm_top_k: int = argument(0, help="Number of likeliest tokens that the planner samples from; 0: all.", minimum=0)
    lm_top_p: float | None = argument(
        None,
        help="Total probability of the likeliest tokens that the planner samples from; 1: all.",
        minimum=0,
        maximum=1,
        meaning="0.9; 1 for plans from a few words, rewrites and descriptions",
    )
    lm_repetition_penalty: float = argument(
        1.0,
        help="Repetition penalty of the planner, for tokens that were sampled before; 1: none.",
        minimum=1,
        maximum=10,
    )
    lm_negative_prompt: str = argument(
        "", help="Text that guidance steers the audio codes away from.", metavar="TEXT", meaning="none"
    )
    lm_attempts: int = argument(
        1,
        help="Maximum number of attempts at sampling the codes; they are sampled again only if they get stuck in a "
        "loop.",
        minimum=1,
        maximum=10,
    )
    best_of: int = argument(
        1,
        help="Number of plans to write for each song, each with its own seed; the one that fits its text best is used.",
        minimum=1,
        maximum=16,
    )

    def __post_init__(self):
        check_fields(self)
        if self.lm_top_p == 0:
            raise InputError("lm_top_p: expected a number above 0, found 0; lm_temperature=0 takes the likeliest token")


KINDS = (Request, Planning, Sampling)


@dataclass(frozen=True)
class Arguments(Sampling, Planning, Request):
    """The keywords of `AceStepPipeline.__call__`: the fields of all `KINDS`; positional ones first."""


def split(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the values that belong to `Request`, to `Planning` and to `Sampling`.

    Raises:
        InputError: if a name is a field of none of them; the message suggests what to use.
    """
    known = [arguments(kind) for kind in KINDS]
    for name in values:
        if not any(name in names for names in known):
            raise InputError(unknown_name(name, [name for names in known for name in names]))
    requested, planned, sampled = ({name: values[name] for name in values if name in names} for names in known)
    return requested, planned, sampled
