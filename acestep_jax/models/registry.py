"""Model families: the networks of a checkpoint, their prompt templates, and the sampling defaults of each variant.

A new ACE-Step is one more `Family` here.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

from flax import nnx

from acestep_jax.models.audio_tokenizer import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer
from acestep_jax.models.autoencoder import AutoencoderOobleck
from acestep_jax.models.condition_encoder import AceStepConditionEncoder
from acestep_jax.models.config import (
    AudioTokenDetokenizerConfig,
    AudioTokenizerConfig,
    AutoencoderConfig,
    ConditionEncoderConfig,
    NetworkConfig,
    PlannerConfig,
    TextEncoderConfig,
    TransformerConfig,
)
from acestep_jax.models.qwen3 import Qwen3ForCausalLM, Qwen3Model
from acestep_jax.models.transformer import AceStepTransformer1DModel

PLANNER = "planner"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """The sampling defaults of a variant.

    num_inference_steps: steps of the solver.
    guidance_scale: scale of classifier-free guidance; 1.0: none.
    shift: s of t <- s t / (1 + (s - 1) t), which spends more of the steps at high noise.
    audio_duration: duration of a song without a source, in seconds.
    vocal_language: language of the lyrics.
    """

    num_inference_steps: int
    guidance_scale: float
    shift: float
    audio_duration: float = 60.0
    vocal_language: str = "en"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compat:
    """The meaning of `Sampling.compat`: every switch and default in which implementations differ. Fields of `Request`
    and `Sampling` that are None take their values from here; a given value overrides them.

    defaults: by variant, the `model_version` of the transformer's config. Models with other names have the defaults of
        base or, if guidance is distilled into them, of turbo, except for duration and language: these are 60 s and en,
        which training here also uses for songs without a language.
    dcw_enabled: whether turbo models are corrected in the wavelet domain, see `diffusion.dcw`; others never are.
    chunk_mask_mode: "explicit": 1 for frames to generate, 0 for the rest; "auto": 2 everywhere.
    stems_chunk_mask_mode: the same for models fine-tuned on stems (`is_lego_sft`).
    repaint_mode: how a repainted song is held to its source, see `inputs.settings.repaint_settings`.
    lego_keeps_source: whether lego with regions keeps the source outside of them, as repaint does.
    cover_mode, cfg_interval_in, attend_to_padding: see `Sampling`.
    turbo_ends_with_euler: whether Heun's last step on turbo models skips the evaluation at t = 0.
    snap_timesteps: whether turbo models snap `timesteps` to the nearest ones that they were trained at.
    tells_source_duration: whether the text gives the duration of the source where a region makes the song longer.
    keeps_metadata: whether a long caption is truncated, so that the text after it is kept; else the end of the text is.
    regions_reach_outwards: whether latent frames that a region only touches belong to it, and the audio changes at the
        exact sample; else both ends are rounded down to the start of a frame.
    thinking: whether the planner, if the model has one, plans text2music requests, see `Planning`.
    """

    defaults: Mapping[str, SamplingDefaults]
    dcw_enabled: bool
    chunk_mask_mode: str
    stems_chunk_mask_mode: str
    repaint_mode: str
    lego_keeps_source: bool
    cover_mode: str
    cfg_interval_in: str
    attend_to_padding: bool
    turbo_ends_with_euler: bool
    snap_timesteps: bool
    tells_source_duration: bool
    keeps_metadata: bool
    regions_reach_outwards: bool
    thinking: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The properties that all checkpoints of a family share.

    networks: the module and the config of every network, by diffusers' folder names.
    optional: networks that a checkpoint may lack.
    planner: the module and the config of the language model that plans songs. It has its own checkpoint, in which it is
        called `PLANNER`.
    prompt: input of the text encoder, a `str.format` template with instruction, caption, bpm, timesignature, keyscale
        and duration.
    lyrics: input of the lyric encoder, a template with language and lyrics.
    compat: a `Compat` for each value of `Sampling.compat`.
    turbo_times: the timesteps that turbo models were trained at.
    shifts: shift of the turbo checkpoints that were distilled at a single one, by a part of their folders' names.
    """

    networks: Mapping[str, tuple[Callable[..., nnx.Module], type[NetworkConfig]]]
    optional: tuple[str, ...]
    planner: tuple[Callable[..., nnx.Module], type[NetworkConfig]]
    prompt: str
    lyrics: str
    compat: Mapping[str, Compat]
    turbo_times: tuple[float, ...]
    shifts: Mapping[str, float]

    @property
    def every(self) -> Mapping[str, tuple[Callable[..., nnx.Module], type[NetworkConfig]]]:
        """Return `networks` and `planner`: every network that a checkpoint may contain."""
        return MappingProxyType({**self.networks, PLANNER: self.planner})


def _defaults(
    *, audio_duration: float, vocal_language: str, **steps_guidance_shift: tuple[int, float, float]
) -> Mapping[str, SamplingDefaults]:
    return MappingProxyType(
        {
            variant: SamplingDefaults(
                num_inference_steps=steps,
                guidance_scale=scale,
                shift=shift,
                audio_duration=audio_duration,
                vocal_language=vocal_language,
            )
            for variant, (steps, scale, shift) in steps_guidance_shift.items()
        }
    )


# The authors' application, ace-step/ACE-Step-1.5, on its main branch in August 2026. docs/compat.md names the file that
# each value comes from, and the other values that upstream has for it; upstream contradicts itself in places.
_ACE_STEP = Compat(
    defaults=_defaults(
        audio_duration=120.0,
        vocal_language="unknown",
        turbo=(8, 1.0, 3.0),
        base=(32, 7.0, 3.0),
        sft=(50, 7.0, 3.0),
    ),
    dcw_enabled=True,
    # Because of a bug, upstream's default "auto" gave 1 until August 2026, and 2 since then (its issue 1289). Its
    # trainers feed 0 and 1, and its page requests "explicit" with regions: 2 is for models fine-tuned on stems.
    chunk_mask_mode="explicit",
    stems_chunk_mask_mode="auto",
    repaint_mode="balanced",
    lego_keeps_source=True,
    cover_mode="switch",
    cfg_interval_in="t",
    # Upstream's networks ignore these masks, but its batches are variations of one request: nothing is padded.
    attend_to_padding=False,
    turbo_ends_with_euler=True,
    snap_timesteps=True,
    tells_source_duration=True,
    # Upstream truncates the end of the text and the ends of regions, and thereby loses what the user requested.
    keeps_metadata=True,
    regions_reach_outwards=True,
    thinking=True,
)

# `AceStepPipeline` of diffusers 0.42, pipelines/ace_step/pipeline_ace_step.py.
_DIFFUSERS = Compat(
    defaults=_defaults(
        audio_duration=60.0, vocal_language="en", turbo=(8, 1.0, 3.0), base=(8, 7.0, 3.0), sft=(8, 7.0, 3.0)
    ),
    dcw_enabled=False,
    chunk_mask_mode="explicit",
    stems_chunk_mask_mode="explicit",
    repaint_mode="aggressive",
    lego_keeps_source=False,
    cover_mode="blend",
    cfg_interval_in="progress",
    attend_to_padding=True,
    turbo_ends_with_euler=False,
    snap_timesteps=False,
    tells_source_duration=False,
    keeps_metadata=False,
    regions_reach_outwards=False,
    thinking=False,
)

# Templates and defaults are from ACE-Step 1.5's own code, as in diffusers' `AceStepPipeline`.
ACE_STEP_1_5 = Family(
    networks=MappingProxyType(
        {
            "transformer": (AceStepTransformer1DModel, TransformerConfig),
            "condition_encoder": (AceStepConditionEncoder, ConditionEncoderConfig),
            "text_encoder": (Qwen3Model, TextEncoderConfig),
            "vae": (AutoencoderOobleck, AutoencoderConfig),
            "audio_tokenizer": (AceStepAudioTokenizer, AudioTokenizerConfig),
            "audio_token_detokenizer": (AceStepAudioTokenDetokenizer, AudioTokenDetokenizerConfig),
        }
    ),
    optional=("audio_tokenizer", "audio_token_detokenizer"),
    planner=(Qwen3ForCausalLM, PlannerConfig),
    prompt=(
        "# Instruction\n{instruction}\n\n"
        "# Caption\n{caption}\n\n"
        "# Metas\n"
        "- bpm: {bpm}\n"
        "- timesignature: {timesignature}\n"
        "- keyscale: {keyscale}\n"
        "- duration: {duration} seconds\n"
        "<|endoftext|>\n"
    ),
    lyrics="# Languages\n{language}\n\n# Lyric\n{lyrics}<|endoftext|>",
    compat=MappingProxyType({"ace-step": _ACE_STEP, "diffusers": _DIFFUSERS}),
    # Eight steps at the shifts 1, 2 and 3. Source: `VALID_TIMESTEPS` of modeling_acestep_v15_turbo.py.
    turbo_times=tuple(
        sorted({shift * u / (8 + (shift - 1) * u) for shift in (1.0, 2.0, 3.0) for u in range(1, 9)}, reverse=True)
    ),
    shifts=MappingProxyType({"-turbo-shift1": 1.0, "-turbo-shift3": 3.0, "-turbo-fix-inst-shift3": 3.0}),
)

# The family whose checkpoints the library reads and writes.
FAMILY = ACE_STEP_1_5
