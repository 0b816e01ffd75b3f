"""The checkpoint that the transformer's training starts from: a trained autoencoder and text encoder, random weights
in all other networks, and the latents of silence.

The condition encoder and the networks of the audio codes stay random: a random layer preserves the differences in its
input, and the transformer learns to use it. Lyrics and references are zeroed there, because the music is instrumental.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from acestep_jax.inputs.prompt import PAD
from acestep_jax.io import checkpoint, checkpoint_writer
from acestep_jax.models.autoencoder import AutoencoderOobleck
from acestep_jax.models.condition_encoder import SILENCE_FRAMES
from acestep_jax.models.config import (
    AudioTokenDetokenizerConfig,
    AudioTokenizerConfig,
    ConditionEncoderConfig,
    NetworkConfig,
    TextEncoderConfig,
    TransformerConfig,
)
from acestep_jax.models.qwen3 import Qwen3Model
from acestep_jax.models.registry import FAMILY

_NARROW: dict[str, Any] = dict(
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    sliding_window=64,
    rope_theta=10000.0,
)
TEXT_ENCODER = TextEncoderConfig(
    vocab_size=1536,
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_hidden_layers=2,
    rope_theta=10000.0,
)
CONFIGS: dict[str, NetworkConfig] = {
    "transformer": TransformerConfig(
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=32,
        rope_theta=10000.0,
        encoder_hidden_size=_NARROW["hidden_size"],
        model_version="small",
    ),
    "condition_encoder": ConditionEncoderConfig(
        **_NARROW,
        text_hidden_dim=TEXT_ENCODER.hidden_size,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
    ),
    "audio_tokenizer": AudioTokenizerConfig(
        **_NARROW, fsq_dim=_NARROW["hidden_size"], num_attention_pooler_hidden_layers=1
    ),
    "audio_token_detokenizer": AudioTokenDetokenizerConfig(**_NARROW, num_attention_pooler_hidden_layers=1),
}


# Guidance of 7, as of the published models, is too much for this one.
SAMPLING = {"num_inference_steps": 50, "guidance_scale": 3.0, "shift": 1.0}


def write_start(
    destination: Path, vae: AutoencoderOobleck, text_encoder: Qwen3Model, tokenizer: Tokenizer, seed: int
) -> None:
    """Write the checkpoint, in float32. Raises InputError if `destination` exists."""
    networks = {"text_encoder": text_encoder, "vae": vae}
    networks |= {
        name: FAMILY.networks[name][0](config, rngs=nnx.Rngs(seed + i))
        for i, (name, config) in enumerate(CONFIGS.items())
    }
    _set_up(networks["transformer"], seed + len(CONFIGS))
    encoder = networks["condition_encoder"]
    for part in (encoder.lyric_encoder, encoder.timbre_encoder):
        part.norm.scale.set_value(jnp.zeros_like(part.norm.scale[...]))
    encoder.silence_latent.set_value(silence(vae))
    save_networks(destination, {name: networks[name] for name in FAMILY.networks}, tokenizer)


def save_networks(destination: Path, networks: dict[str, nnx.Module], tokenizer: Tokenizer) -> None:
    """Write networks by name as a checkpoint. Raises InputError if `destination` exists."""
    arrays = [
        (f"{name}.{leaf}", np.asarray(variable.get_value()))
        for name, network in networks.items()
        for leaf, variable in checkpoint.leaves(network).items()
    ]
    configs = {name: network.config for name, network in networks.items()}
    checkpoint_writer.save(destination, configs, arrays, tokenizer.to_str(), {"pad_token": PAD}, sampling=SAMPLING)


def silence(vae: AutoencoderOobleck) -> jax.Array:
    """Encode silence to latents [1, SILENCE_FRAMES, C]. All frames are equal except those near the ends."""
    frames = 64
    ends = jax.jit(lambda vae, sound: vae.encode(sound).mean)(vae, jnp.zeros((1, 2, frames * vae.hop_length)))
    half = frames // 2
    middle = jnp.repeat(ends[:, half : half + 1], SILENCE_FRAMES - frames, axis=1)
    return jnp.concatenate([ends[:, :half], middle, ends[:, half:]], axis=1)


def _set_up(transformer: nnx.Module, seed: int) -> None:
    """Initialise every layer as a small change of its input, with open gates and a large cross-attention output.

    The shift before self-attention is random and the same for all tokens. A query that depends on the prompt then meets
    keys with a common component, and attends to certain distances from the first step on. Without it, the model did
    not learn to attend a beat back in 7000 steps.
    """
    depth = transformer.config.num_hidden_layers
    for name, variable in checkpoint.leaves(transformer).items():
        value = variable.get_value()
        if name == "layers.scale_shift_table":
            shift = 0.7 * jax.random.normal(jax.random.key(seed), value[..., 0, :].shape)
            variable.set_value(jnp.zeros_like(value).at[..., 0, :].set(shift).at[..., (2, 5), :].set(1.0))
        elif name == "scale_shift_table":
            variable.set_value(jnp.zeros_like(value))
        elif name.endswith(("time_proj.kernel", "proj_out_conv.kernel")):
            variable.set_value(0.1 * value)
        elif name.endswith("cross_attn.to_out.kernel"):
            variable.set_value(2 * value)
        elif name.endswith(("to_out.kernel", "down_proj.kernel")):
            variable.set_value(value / (3 * depth) ** 0.5)
