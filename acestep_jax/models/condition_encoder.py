"""Text, lyrics and reference audio to the single sequence of condition tokens that the transformer attends to.

Source: diffusers `AceStepConditionEncoder` and its sub-networks.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from acestep_jax.models.config import ConditionEncoderConfig
from acestep_jax.models.encoder import Encoder
from acestep_jax.models.layers import linear, parameter
from acestep_jax.models.runtime import DEFAULT_RUNTIME, Runtime

SILENCE_FRAMES = 15000  # ten minutes of encoded silence ship with every checkpoint


class Buffer(nnx.Variable):
    """An array that is stored in the checkpoint but never trained."""


class AceStepLyricEncoder(Encoder):
    """Embeddings of lyric tokens, [B, T, text_hidden_dim] -> [B, T, D]; bidirectional, up to `lengths` [B]."""

    def __init__(self, config: ConditionEncoderConfig, *, runtime: Runtime, rngs: nnx.Rngs):
        super().__init__(config, config.windows(config.num_lyric_encoder_hidden_layers), runtime=runtime, rngs=rngs)
        self.embed_tokens = linear(
            config.text_hidden_dim, config.hidden_size, (None, "embed"), runtime, use_bias=True, rngs=rngs
        )

    def __call__(self, inputs_embeds: jax.Array, lengths: jax.Array) -> jax.Array:
        return self.encode(self.embed_tokens(inputs_embeds), lengths=lengths)


class AceStepTimbreEncoder(Encoder):
    """Latents of a reference clip, [N, T, 64] -> one token each, [N, D]: the first position after the final norm.

    That is the first frame or a special token, see `ConditionEncoderConfig.timbre_special_token`.
    """

    def __init__(self, config: ConditionEncoderConfig, *, runtime: Runtime, rngs: nnx.Rngs):
        super().__init__(config, config.timbre_windows(), runtime=runtime, rngs=rngs)
        self.config: ConditionEncoderConfig = config
        self.embed_tokens = linear(
            config.timbre_hidden_dim, config.hidden_size, (None, "embed"), runtime, use_bias=True, rngs=rngs
        )
        # Part of every checkpoint, whether it is used or not.
        self.special_token = _token(config.hidden_size, runtime, rngs)

    def __call__(self, reference_latents: jax.Array) -> jax.Array:
        x = self.embed_tokens(reference_latents)
        if self.config.timbre_special_token:
            token = jnp.broadcast_to(self.special_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
            x = jnp.concatenate([token, x], axis=1)
        return self.encode(x)[:, 0]


class AceStepConditionEncoder(nnx.Module):
    """Packs lyric, timbre and text tokens in this order, with valid tokens first.

    `null_condition_emb` [1, 1, D] replaces every token in the unconditional branch of guidance;
    `silence_latent` [1, 15000, 64] is silence, encoded by the autoencoder.
    """

    def __init__(self, config: ConditionEncoderConfig, *, runtime: Runtime = DEFAULT_RUNTIME, rngs: nnx.Rngs):
        self.config, self.runtime = config, runtime
        self.text_projector = linear(config.text_hidden_dim, config.hidden_size, (None, "embed"), runtime, rngs=rngs)
        self.lyric_encoder = AceStepLyricEncoder(config, runtime=runtime, rngs=rngs)
        self.timbre_encoder = AceStepTimbreEncoder(config, runtime=runtime, rngs=rngs)
        self.null_condition_emb = _token(config.hidden_size, runtime, rngs)
        self.silence_latent = Buffer(jnp.zeros((1, SILENCE_FRAMES, config.timbre_hidden_dim), runtime.param_dtype))

    def __call__(
        self,
        text_hidden_states: jax.Array,
        text_attention_mask: jax.Array,
        lyric_hidden_states: jax.Array,
        lyric_attention_mask: jax.Array,
        refer_audio_acoustic_hidden_states_packed: jax.Array,
        refer_audio_order_mask: jax.Array,
        *,
        max_references: int = 1,
    ) -> tuple[jax.Array, jax.Array]:
        """Encode text, lyrics and references to condition tokens and their mask.

        Args:
            text_hidden_states: [B, S_text, 1024] from the text encoder.
            text_attention_mask: [B, S_text], true for tokens, false for padding.
            lyric_hidden_states: [B, S_lyric, 1024] from the text encoder's embedding table.
            lyric_attention_mask: [B, S_lyric]; padding on the right.
            refer_audio_acoustic_hidden_states_packed: [N, frames, 64], the reference clips of the whole batch.
            refer_audio_order_mask: [N] int, the batch item that each clip belongs to.
            max_references: maximum number of clips of an item; further ones are dropped.

        Returns:
            [B, S_lyric + max_references + S_text, D], valid tokens first, and a bool mask of the same two axes.
        """
        clips = self.timbre_encoder(refer_audio_acoustic_hidden_states_packed.astype(self.runtime.dtype))
        timbre, timbre_mask = _unpack(clips, refer_audio_order_mask, text_hidden_states.shape[0], max_references)
        return self.combine(
            text_hidden_states, text_attention_mask, lyric_hidden_states, lyric_attention_mask, timbre, timbre_mask
        )

    def combine(
        self,
        text_hidden_states: jax.Array,
        text_attention_mask: jax.Array,
        lyric_hidden_states: jax.Array,
        lyric_attention_mask: jax.Array,
        timbre: jax.Array,
        timbre_mask: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Compute `__call__` for encoded references: `timbre` [B, references, D] and a mask of the valid ones."""
        text = self.text_projector(text_hidden_states)
        lyric = self.lyric_encoder(lyric_hidden_states, lyric_attention_mask.astype(jnp.int32).sum(1))
        tokens = jnp.concatenate([lyric, timbre.astype(text.dtype), text], axis=1)
        mask = jnp.concatenate([lyric_attention_mask, timbre_mask, text_attention_mask], axis=1).astype(bool)
        return _pack(tokens, mask)

    def silence(self, frames: int) -> jax.Array:
        """Return the latents of silence [1, frames, 64], repeated past ten minutes."""
        latent = self.silence_latent[...]
        return jnp.tile(latent, (1, -(-frames // latent.shape[1]), 1))[:, :frames]


def _token(hidden: int, runtime: Runtime, rngs: nnx.Rngs) -> nnx.Param:
    value = jax.random.normal(rngs.params(), (1, 1, hidden))
    return parameter(value.astype(runtime.param_dtype), None, None, None)


def _pack(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Move valid tokens before padding with a stable order. [B, S, D], [B, S]."""
    order = jnp.argsort(~mask, axis=1, stable=True)
    return jnp.take_along_axis(tokens, order[:, :, None], axis=1), jnp.take_along_axis(mask, order, axis=1)


def _unpack(clips: jax.Array, owner: jax.Array, batch: int, slots: int) -> tuple[jax.Array, jax.Array]:
    """Scatter [N, D] clips to their batch items: [B, slots, D] and a mask of the slots in use, [B, slots]."""
    same = owner[:, None] == owner[None, :]
    slot = jnp.sum(jnp.tril(same, -1), axis=1)  # how many earlier clips have the same owner
    timbre = jnp.zeros((batch, slots, clips.shape[-1]), clips.dtype).at[owner, slot].set(clips, mode="drop")
    mask = jnp.zeros((batch, slots), bool).at[owner, slot].set(True, mode="drop")
    return timbre, mask
