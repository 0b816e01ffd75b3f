"""The compiled programs before and after the denoising loop: encoding of texts and audio, and decoding."""

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

REFERENCE_FRAMES = 750  # latent frames of a timbre reference (30 s); silence if there is none
PEAK = 10.0 ** (-1.0 / 20.0)  # -1 dBFS, the loudest sample of every song


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def encode_audio(
    vae: AutoencoderOobleck, audio: jax.Array, lengths: jax.Array, keys: jax.Array | None = None
) -> jax.Array:
    """Encode audio [B, channels, samples] to latents [B, samples // hop, C] float32.

    Args:
        lengths: [B] int32, samples.
        keys: [B], one for each song, to sample from the posterior; None: its mean.
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
    """Encode latents [B, T, C] to codes [B, ceil(T / 5)] int32; the last window of an item is padded with silence."""
    size = audio_tokenizer.config.pool_window_size
    silence = condition_encoder.silence(size)[0].astype(latents.dtype)  # [5, 64]
    past = jnp.arange(latents.shape[1]) - lengths[:, None]  # [B, T], number of frames after the end
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
def encode_timbres(
    condition_encoder: AceStepConditionEncoder,
    references: jax.Array | None = None,
    silent: jax.Array | None = None,
) -> jax.Array:
    """Encode reference clips to tokens [N, D], followed by the token of silence if that is given.

    Args:
        references: [N, 750, C], latents of the clips; None: silence, which is one clip.
        silent: [1, D], the token of silence.
    """
    clips = condition_encoder.silence(REFERENCE_FRAMES) if references is None else references
    tokens = condition_encoder.timbre_encoder(clips.astype(condition_encoder.runtime.dtype))
    return tokens if silent is None else jnp.concatenate([tokens, silent])


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
    """Encode prompts, lyrics and timbres to the condition of B songs.

    Args:
        tokens: tokens of the prompts.
        timbres: [N, D], see `encode_timbres`.
        owners: [B] int32, index into `timbres` for each song.
        attend_to_padding: whether to treat padding as valid, as diffusers does.
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
        lengths: [B] int32, latent frames; later samples are silent.
        scaled: [B] bool, whether to normalise a song to a peak of -1 dBFS.
    """
    waveform = vae.decode(latents, lengths)
    ends = lengths[:, None, None] * vae.hop_length
    waveform = jnp.where(jnp.arange(waveform.shape[-1]) < ends, waveform, 0.0)
    peak = jnp.max(jnp.abs(waveform), axis=(1, 2), keepdims=True)
    return waveform * jnp.where(scaled[:, None, None], PEAK / jnp.maximum(peak, 1e-6), 1.0)
