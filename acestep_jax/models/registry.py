"""Families of models: the networks of a checkpoint, the texts that they were trained on, and how each variant samples.

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
    TextEncoderConfig,
    TransformerConfig,
)
from acestep_jax.models.qwen3 import Qwen3Model
from acestep_jax.models.transformer import AceStepTransformer1DModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """How a variant is sampled unless the user says otherwise.

    num_inference_steps: steps of the solver.
    guidance_scale: of classifier-free guidance; 1.0: none.
    shift: s of t <- s t / (1 + (s - 1) t), which spends more of the steps where noise is high.
    """

    num_inference_steps: int
    guidance_scale: float
    shift: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What all checkpoints of a family have in common.

    networks: the module and the config of every network, under the names of diffusers' folders.
    optional: networks that a checkpoint may lack.
    prompt: what the text encoder reads, a template for `str.format`: instruction, caption, bpm, timesignature, keyscale
        and duration.
    lyrics: what the lyric encoder reads, a template of language and lyrics.
    defaults: by variant, the `model_version` of the transformer's config.
    """

    networks: Mapping[str, tuple[Callable[..., nnx.Module], type[NetworkConfig]]]
    optional: tuple[str, ...]
    prompt: str
    lyrics: str
    defaults: Mapping[str, SamplingDefaults]


_GUIDED = SamplingDefaults(num_inference_steps=50, guidance_scale=7.0, shift=1.0)

# Templates and defaults are those of ACE-Step 1.5's own code, as in diffusers' `AceStepPipeline`.
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
    defaults=MappingProxyType(
        {
            "turbo": SamplingDefaults(num_inference_steps=8, guidance_scale=1.0, shift=3.0),
            "base": _GUIDED,
            "sft": _GUIDED,
        }
    ),
)

# The family whose checkpoints the library reads and writes.
FAMILY = ACE_STEP_1_5
