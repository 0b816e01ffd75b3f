"""What can be requested: `Request` for one song, `Planning` for what the planner writes of it before, `Sampling` for
how a batch of songs is sampled.

This is the only place where an argument is written down: its name, type, default, help, unit and range. The keywords of
`AceStepPipeline.__call__`, the options of the command line, the keys of a JSONL line and the documentation's tables are
derived from the fields of these dataclasses, see `acestep_jax.arguments`.
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


def _by_compat(field: str) -> str:
    """Return the values that the settings of `Sampling.compat` give a field, or their defaults of a variant."""
    values = {}
    for name, compat in FAMILY.compat.items():
        value = getattr(compat.defaults["turbo"] if field not in compat.__dataclass_fields__ else compat, field)
        values[name] = f"{value:g}" if isinstance(value, float) else str(value).lower()
    first, *others = values.items()
    other = [f"{value} with compat={name}" for name, value in others if value != first[1]]
    return "; ".join([first[1], *other])


@dataclass(frozen=True)
class Request:
    """One song. Fields hold what the user gave; `inputs.prepare` checks how they go together.

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
        help="Duration of the song. With a source or audio codes the song is as long as those, and this is only what "
        "the model is told.",
        unit="s",
        minimum=MIN_DURATION,
        maximum=MAX_DURATION,
        flag="duration",
        meaning=f"the length of the source, or {_by_compat('audio_duration')}",
    )
    vocal_language: str | None = argument(
        None,
        help="Language code of the lyrics, such as en, zh or ja; unknown leaves it to the model.",
        flag="language",
        metavar="CODE",
        meaning=_by_compat("vocal_language"),
        reader=fields.vocal_language,
    )
    _: KW_ONLY
    bpm: str | float | None = argument(
        None,
        help="Tempo, such as 128; it is rounded.",
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
        help="Beats in a bar: 2, 3, 4 or 6, also as a fraction such as 6/8.",
        flag="time-signature",
        metavar="N",
        meaning="chosen by the model",
        reader=fields.timesignature,
    )
    instruction: str | None = argument(
        None, help="Instruction to the model in place of the task's own.", metavar="TEXT", meaning="that of the task"
    )
    task_type: str = argument(
        "text2music",
        help="Task: text2music, repaint, cover, cover-nofsq, extract, lego or complete. cover-nofsq covers the "
        "source's own latents, without the audio tokenizer.",
        flag="task",
        metavar="TASK",
    )
    track_name: str | Sequence[str] | None = argument(
        None,
        help="Track to extract, to add (lego) or to complete the song with, such as vocals or drums; repeatable for "
        "complete.",
        flag="track",
        metavar="NAME",
        meaning="none",
    )
    complete_track_classes: Sequence[str] = argument(
        (), help="Tracks to complete the song with; the name that diffusers has for track_name there.", flag=""
    )
    src_audio: Audio | None = argument(
        None,
        help="Source: the song that every task but text2music works on, a sound file or an array [channels, samples] "
        "at the pipeline's sample rate.",
        flag="source",
        metavar="FILE",
        meaning="none",
    )
    reference_audio: Audio | None = argument(
        None,
        help="Reference for the timbre, a sound file or an array [channels, samples] at the pipeline's sample rate.",
        flag="reference",
        metavar="FILE",
        meaning="chosen by the model",
    )
    audio_codes: str | None = argument(
        None,
        help='Audio codes as text, "<|audio_code_123|>...", 5 for each second, to make a cover of in place of a '
        "source. @FILE reads them from a file.",
        flag="codes",
        metavar="TEXT",
        from_file=True,
        meaning="none",
    )
    repainting_start: float | Sequence[float] | None = argument(
        None,
        help="Start of a region to repaint or to fill (lego); repeatable; negative extends the song at the front.",
        unit="s",
        flag="start",
        meaning="the beginning",
    )
    repainting_end: float | Sequence[float] | None = argument(
        None,
        help="End of that region, -1 for the end of the source; repeatable; past the end of the source extends the "
        "song.",
        unit="s",
        flag="end",
        meaning="the end of the source",
    )
    audio_cover_strength: float = argument(
        1.0,
        help="Fraction of the sampling steps for which a cover follows its source, or the weight with which it does, "
        "see cover_mode.",
        minimum=0,
        maximum=1,
        flag="cover-strength",
    )
    seed: int | jax.Array | None = argument(
        None,
        help="Seed of the noise, or a JAX key; the same seed gives the same song.",
        minimum=0,
        maximum=2**32 - 1,
        meaning="a new one, which is reported",
    )
    retake_seed: int | None = argument(
        None,
        help="Seed of a second noise that retake_variance mixes into the first one, for variations of a song.",
        minimum=0,
        maximum=2**32 - 1,
        meaning="a new one, which is reported",
    )
    retake_variance: float = argument(
        0.0,
        help="Share of that noise: cos(v pi/2) of the first and sin(v pi/2) of the second; 0 is the song itself, 1 "
        "another one.",
        minimum=0,
        maximum=1,
    )
    global_caption: str = argument(
        "",
        help="Description of the whole song, where the prompt describes one track; for models fine-tuned on stems.",
        metavar="TEXT",
    )
    flow_edit_morph: bool = argument(
        False,
        help="Edit the source by flow: follow the difference between what the model makes of prompt and lyrics, and of "
        "flow_edit_source_caption and flow_edit_source_lyrics. For text2music, cover and cover-nofsq.",
    )
    flow_edit_source_caption: str = argument(
        "", help="Description of the source that is edited by flow.", metavar="TEXT", flag="source-caption"
    )
    flow_edit_source_lyrics: str = argument(
        "",
        help="Lyrics of the source that is edited by flow. @FILE reads them from a file.",
        metavar="TEXT",
        flag="source-lyrics",
        from_file=True,
    )
    latents: np.ndarray | None = argument(
        None,
        help="Initial noise, an array [frames, channels], in place of the seed's.",
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
    """How a batch of songs is sampled. None stands for what `compat` gives for the model's variant, see
    `models.registry.Compat`.

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
        None, help="Shift of the timesteps towards the noise, above 0.", minimum=0, meaning="the variant's"
    )
    _: KW_ONLY
    compat: str = argument(
        "ace-step",
        help="Whose behaviour and defaults are taken where implementations differ: those of the authors' application, "
        "or of diffusers. Other options override single ones.",
        choices=tuple(FAMILY.compat),
    )
    timesteps: Sequence[float] | None = argument(
        None,
        help="Strictly decreasing timesteps within (0, 1] in place of num_inference_steps and shift; repeatable.",
        flag="timestep",
        metavar="T",
        meaning="computed from num_inference_steps and shift",
    )
    snap_timesteps: bool | None = argument(
        None,
        help="Whether those times become the nearest of the 20 that turbo models were trained at; only for these.",
        meaning=_by_compat("snap_timesteps"),
    )
    solver: str = argument("euler", help="Solver of the sampling ODE or SDE.", choices=tuple(SOLVERS))
    guidance: str = argument("apg", help="Guidance rule.", choices=tuple(GUIDANCE), flag="guidance-rule")
    cfg_interval_start: float = argument(
        0.0, help="Start of the interval in which guidance acts.", minimum=0, maximum=1
    )
    cfg_interval_end: float = argument(1.0, help="End of the interval in which guidance acts.", minimum=0, maximum=1)
    cfg_interval_in: str | None = argument(
        None,
        help="What that interval is measured in: the time t, as in ACE-Step, or the progress 1 - t, as in diffusers.",
        choices=("t", "progress"),
        meaning=_by_compat("cfg_interval_in"),
    )
    cover_mode: str | None = argument(
        None,
        help="What an audio_cover_strength below 1 does: switch changes to text2music after that fraction of the "
        "steps, as in ACE-Step; blend mixes the velocities with that weight, as in diffusers.",
        choices=("switch", "blend"),
        meaning=_by_compat("cover_mode"),
    )
    cover_noise_strength: float = argument(
        0.0,
        help="How close to its source a cover starts: 0 is pure noise, and s starts at the timestep nearest to 1 - s.",
        minimum=0,
        maximum=1,
        flag="cover-noise",
    )
    chunk_mask_mode: str | None = argument(
        None,
        help="What the model is told of the regions: explicit is 1 in them and 0 outside, auto 2 everywhere, which "
        "leaves them to the model.",
        choices=CHUNK_MASKS,
        meaning=f"{_by_compat('chunk_mask_mode')}; auto for models fine-tuned on stems",
    )
    repaint_mode: str | None = argument(
        None,
        help="How a song with regions is held to its source outside of them while it is made: conservative in all "
        "steps, balanced in a part of them, see repaint_strength, aggressive in none.",
        choices=REPAINT_MODES,
        meaning=_by_compat("repaint_mode"),
    )
    repaint_strength: float = argument(
        0.5,
        help="With repaint_mode=balanced: the source is put back after each of the first 1 - s of the steps, and the "
        "latents are blended over 25 (1 - s) frames outside of the regions.",
        minimum=0,
        maximum=1,
    )
    repaint_injection_ratio: float | None = argument(
        None,
        help="Fraction of the sampling steps, from the first on, after each of which the source is put back outside of "
        "the regions.",
        minimum=0,
        maximum=1,
        meaning="that of repaint_mode",
    )
    repaint_latent_crossfade_frames: int | None = argument(
        None,
        help="Latent frames outside of the regions over which what was made fades into the source, at the end.",
        minimum=0,
        meaning="those of repaint_mode",
    )
    dcw_enabled: bool | None = argument(
        None,
        help="Whether each step is corrected in the wavelet domain (DCW).",
        meaning="true for turbo models; false for others, and with compat=diffusers",
    )
    dcw_mode: str = argument(
        "double",
        help="What DCW corrects: the low band, the high band, both (double), or all alike (pix).",
        choices=dcw.MODES,
    )
    dcw_scaler: float = argument(0.05, help="Scale of DCW for the low band, or for the only one.", minimum=0)
    dcw_high_scaler: float = argument(0.02, help="Scale of DCW for the high band, with dcw_mode=double.", minimum=0)
    dcw_wavelet: str = argument("haar", help="Wavelet of DCW.", choices=tuple(dcw.WAVELETS))
    velocity_norm_threshold: float = argument(
        0.0,
        help="Greatest norm of the velocity, in norms of the latents at that step; 0: unbounded.",
        minimum=0,
    )
    velocity_ema_factor: float = argument(
        0.0, help="Share of the velocity of the step before in each velocity.", minimum=0, maximum=1
    )
    flow_edit_n_min: float = argument(
        0.0, help="Fraction of the steps after which editing by flow begins.", minimum=0, maximum=1
    )
    flow_edit_n_max: float = argument(
        1.0, help="Fraction of the steps after which it ends, and the song is denoised.", minimum=0, maximum=1
    )
    flow_edit_n_avg: int = argument(1, help="Noises that each step of editing by flow is averaged over.", minimum=1)
    latent_shift: float = argument(0.0, help="What is added to the latents before they are decoded.")
    latent_rescale: float = argument(1.0, help="What the latents are multiplied by before that.", minimum=0)
    posterior: str = argument(
        "mean",
        help="What the autoencoder makes of a source or a reference: the mean of the posterior, or a sample of it, as "
        "ACE-Step and diffusers draw.",
        choices=("mean", "sample"),
    )
    noise: str = argument(
        "jax",
        help="Generator of the initial noise: jax, or torch for what PyTorch draws on a GPU from the same seed "
        "(torch:A100 names the GPU, needed for songs longer than 25.6 s).",
        metavar="KIND",
    )
    attend_to_padding: bool | None = argument(
        None,
        help="Whether the padding of shorter texts in a batch is attended to, as in diffusers.",
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
    """Whether the planner, a language model, writes what a request leaves open, and how it is sampled.

    Names are those of ACE-Step's own application.

    Raises:
        InputError: if a value is of the wrong type or out of range.
    """

    thinking: bool | None = argument(
        None,
        help="Whether the planner writes caption, metadata and audio codes for text2music before the song is made.",
        flag="think",
        meaning="true where the model has a planner; false with compat=diffusers",
    )
    use_cot_caption: bool | None = argument(
        None,
        help="Whether the planner's caption takes the place of the prompt; false suits adapters and exact prompts.",
        flag="cot-caption",
        meaning="true",
    )
    lm_seed: int | None = argument(
        None,
        help="Seed of the plan; song i of a batch gets this one + i. The same seed gives the same plan.",
        minimum=0,
        maximum=2**32 - 1,
        meaning="that of the song",
    )
    lm_temperature: float = argument(
        0.85, help="Temperature of the planner; 0 takes the likeliest token.", minimum=0, maximum=10
    )
    lm_cfg_scale: float = argument(2.0, help="Guidance scale of the audio codes; 1 turns it off.", minimum=1)
    lm_top_k: int = argument(0, help="Number of likeliest tokens to sample from; 0: all.", minimum=0)
    lm_top_p: float | None = argument(
        None,
        help="Probability of the likeliest tokens to sample from; 1: all.",
        minimum=0,
        maximum=1,
        meaning="0.9; 1 for what is written of a wish, rewritten or described",
    )
    lm_repetition_penalty: float = argument(
        1.0, help="What makes tokens that were sampled before less likely; 1: nothing.", minimum=1, maximum=10
    )
    lm_negative_prompt: str = argument(
        "", help="Text that guidance leads the audio codes away from.", metavar="TEXT", meaning="none"
    )
    lm_attempts: int = argument(
        1, help="How often codes are sampled at most, while they get stuck in a loop.", minimum=1, maximum=10
    )
    best_of: int = argument(
        1,
        help="Number of plans to write for each song, each with its own seed; the one that fits its text best is kept.",
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
    """Return the values of fields of `Request`, of `Planning` and of `Sampling`.

    Raises:
        InputError: if a name is a field of none; the message suggests what to use.
    """
    known = [arguments(kind) for kind in KINDS]
    for name in values:
        if not any(name in names for names in known):
            raise InputError(unknown_name(name, [name for names in known for name in names]))
    requested, planned, sampled = ({name: values[name] for name in values if name in names} for names in known)
    return requested, planned, sampled
