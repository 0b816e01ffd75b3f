"""The compiled programs around the denoising loop, from texts and audio to arrays and back. Weights are arguments."""

import functools

import jax
import jax.numpy as jnp

from acestep_jax.diffusion.denoise import Condition
from acestep_jax.inputs.collate import Tokens
from acestep_jax.models.audio_tokenizer import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer
from acestep_jax.models.autoencoder import AutoencoderOobleck
from acestep_jax.models.condition_encoder import AceStepConditionEncoder
from acestep_jax.models.kernels.compiler import COMPILER_OPTIONS
from acestep_jax.models.qwen3 import Qwen3Model

REFERENCE_FRAMES = 750  # latent frames of the timbre reference (30 s), silence where there is none
PEAK = 10.0 ** (-1.0 / 20.0)  # -1 dBFS, the loudest sample of every song


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def encode_audio(
    vae: AutoencoderOobleck, audio: jax.Array, lengths: jax.Array, keys: jax.Array | None = None
) -> jax.Array:
    """Encode audio [B, channels, samples] to latents [B, samples // hop, C] float32.

    Args:
        lengths: [B] int32, samples.
        keys: [B], for a sample of the posterior of each song; None: the mean.
    """
    posterior = vae.encode(audio, lengths)
    mean = posterior.mean.astype(jnp.float32)
    if keys is None:
        return mean
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], jnp.float32))(keys)
    return mean + posterior.std.astype(jnp.float32) * noise


@jax.jit
def tokenize(
    audio_tokenizer: AceStepAudioTokenizer,
    condition_encoder: AceStepConditionEncoder,
    latents: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """Encode latents [B, T, C] to codes [B, ceil(T / 5)] int32; silence fills up an item's last window."""
    size = audio_tokenizer.config.pool_window_size
    silence = condition_encoder.silence(size)[0].astype(latents.dtype)  # [5, 64]
    past = jnp.arange(latents.shape[1]) - lengths[:, None]  # [B, T], frames from the end on
    latents = jnp.where((past >= 0)[:, :, None], silence[jnp.clip(past, 0, size - 1)], latents)
    return audio_tokenizer.tokenize(latents, silence[None])[1][:, :, 0]


@jax.jit
def detokenize(
    audio_tokenizer: AceStepAudioTokenizer, audio_token_detokenizer: AceStepAudioTokenDetokenizer, codes: jax.Array
) -> jax.Array:
    """Decode codes [B, n] int32 to latents [B, 5 n, C] float32."""
    vectors = audio_tokenizer.quantizer.get_output_from_indices(codes[:, :, None])
    return audio_token_detokenizer(vectors).astype(jnp.float32)


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def encode_timbres(condition_encoder: AceStepConditionEncoder, references: jax.Array | None = None) -> jax.Array:
    """Encode reference clips to tokens [N + 1, D], of which the last is that of silence.

    Args:
        references: [N, 750, C], their latents; None: there are none.
    """
    clips = condition_encoder.silence(REFERENCE_FRAMES).astype(jnp.float32)
    if references is not None:
        clips = jnp.concatenate([references, clips])
    return condition_encoder.timbre_encoder(clips.astype(condition_encoder.runtime.dtype))


@functools.partial(jax.jit, static_argnames="attend_to_padding", compiler_options=COMPILER_OPTIONS)
def encode(
    text_encoder: Qwen3Model,
    condition_encoder: AceStepConditionEncoder,
    tokens: Tokens[jax.Array],
    lyrics: Tokens[jax.Array],
    timbres: jax.Array,
    owners: jax.Array,
    *,
    attend_to_padding: bool = False,
) -> Condition:
    """Return the condition of B songs.

    Args:
        tokens: of the prompts.
        timbres: [N, D], see `encode_timbres`.
        owners: [B] int32, which of them is a song's.
        attend_to_padding: whether padding is valid as well, as in diffusers.
    """
    condition, mask = condition_encoder.combine(
        text_encoder(tokens.ids),
        tokens.mask,
        text_encoder.embed_tokens(lyrics.ids),
        lyrics.mask,
        timbres[owners][:, None],
        jnp.ones((owners.shape[0], 1), bool),
    )
    lengths = jnp.full((owners.shape[0],), mask.shape[1]) if attend_to_padding else mask.sum(1)
    return Condition(condition, lengths.astype(jnp.int32))


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def decode(vae: AutoencoderOobleck, latents: jax.Array, lengths: jax.Array, scaled: jax.Array) -> jax.Array:
    """Decode latents [B, T, C] to audio [B, channels, samples] float32.

    Args:
        lengths: [B] int32, latent frames; silence follows.
        scaled: [B] bool, which songs are scaled to a peak of -1 dBFS.
    """
    waveform = vae.decode(latents, lengths).astype(jnp.float32)
    ends = lengths[:, None, None] * vae.hop_length
    waveform = jnp.where(jnp.arange(waveform.shape[-1]) < ends, waveform, 0.0)
    peak = jnp.max(jnp.abs(waveform), axis=(1, 2), keepdims=True)
    return waveform * jnp.where(scaled[:, None, None], PEAK / jnp.maximum(peak, 1e-6), 1.0)
