"""The compiled program of `timestamps`: the noisy song, and noise alone, through the transformer's first layers."""

import functools

import jax
import jax.numpy as jnp

from acestep_jax.diffusion.denoise import Condition, context_latents
from acestep_jax.models.alignment import cross_attention
from acestep_jax.models.condition_encoder import AceStepConditionEncoder
from acestep_jax.models.kernels.compiler import COMPILER_OPTIONS
from acestep_jax.models.transformer import AceStepTransformer1DModel


@functools.partial(jax.jit, static_argnames="heads", compiler_options=COMPILER_OPTIONS)
def attention_maps(
    transformer: AceStepTransformer1DModel,
    condition_encoder: AceStepConditionEncoder,
    condition: Condition,
    noise_and_song: jax.Array,
    times: jax.Array,
    source: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    *,
    heads: tuple[tuple[int, tuple[int, ...]], ...],
) -> jax.Array:
    """Return the attention probabilities of the heads at each timestep, [N, heads, S, T / patch] float32.

    Args:
        condition: condition of one song.
        noise_and_song: [2, T, C] float32.
        times: [N] float32, the timesteps t; the input is x = t noise + (1 - t) song.
        source: source latents, the silent part of them, chunk mask and lengths of the song, see `denoise.Inputs`.
        heads: static, by layer.
    """
    latents, silent, mask, lengths = source
    noise, song = noise_and_song
    silence = condition_encoder.silence(noise.shape[0]).astype(jnp.float32)
    context = context_latents(jnp.asarray(latents), silence, jnp.asarray(silent), jnp.asarray(mask))
    t = times[:, None, None]
    repeat = lambda x: jnp.repeat(jnp.asarray(x), len(times), axis=0)  # noqa: E731
    return cross_attention(
        transformer,
        t * noise + (1 - t) * song,
        times,
        repeat(condition.tokens),
        repeat(context),
        heads=dict(heads),
        lengths=repeat(lengths),
        encoder_lengths=repeat(condition.lengths),
    )
