"""The diffusion transformer of ACE-Step 1.5.

It predicts the velocity v = noise - x0 of x_t = t * noise + (1 - t) * x0 over 25 Hz stereo-audio latents.
Source: diffusers `AceStepTransformer1DModel`, whose module tree and names these are. Axis letters: see layers.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from acestep_jax.distributed import shard
from acestep_jax.models.attention import Attention, KeysValues
from acestep_jax.models.config import TransformerConfig
from acestep_jax.models.layers import (
    RMSNorm,
    SwiGLU,
    TimestepEmbedding,
    linear,
    parameter,
    rotary_embedding,
    scan_layers,
    stack_layers,
)


class TimeEmbedding(NamedTuple):
    """What the network needs of its two timesteps."""

    temb: jax.Array  # [B, D]
    modulation: jax.Array  # [B, 6, D]


class AceStepTransformerBlock(nnx.Module):
    """One layer, with m = scale_shift_table + modulation, in the order shift, scale, gate:

    x <- x + m2 * self_attn(norm(x) * (1 + m1) + m0)
    x <- x + cross_attn(norm(x), condition)
    x <- x + m5 * mlp(norm(x) * (1 + m4) + m3)
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn_norm = RMSNorm(hidden, eps, config)
        self.self_attn = Attention(config, rngs=rngs)
        self.cross_attn_norm = RMSNorm(hidden, eps, config)
        self.cross_attn = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(hidden, eps, config)
        self.mlp = SwiGLU(hidden, config.intermediate_size, config, rngs=rngs)
        self.scale_shift_table = _scale_shift_table(6, config, rngs)

    def __call__(
        self,
        x: jax.Array,  # [B, T, D]
        modulation: jax.Array,  # [B, 6, D]
        condition: jax.Array | KeysValues,  # [B, S, D], or this layer's keys and values of it
        *,
        rope: tuple[jax.Array, jax.Array],
        window: int | None,
        lengths: jax.Array | None = None,  # [B], of x
        condition_lengths: jax.Array | None = None,  # [B]
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:  # [B, T, D]
        self_key, cross_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        table = self.scale_shift_table[...].astype(x.dtype) + modulation.astype(x.dtype)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(table, 6, axis=1)  # [B, 1, D] each

        h = self.self_attn_norm(x) * (1 + scale) + shift
        x = x + gate * self.self_attn(h, rope=rope, window=window, key_lengths=lengths, dropout_key=self_key)

        h = self.cross_attn_norm(x)
        x = x + self.cross_attn(h, condition, key_lengths=condition_lengths, dropout_key=cross_key)

        h = self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift
        x = x + mlp_gate * self.mlp(h)
        return shard(x, "batch", "sequence", None)


class AceStepTransformer1DModel(nnx.Module):
    """x_t, t, r, condition, context -> velocity.

    `layers` is one block whose leaves carry a leading [L] axis; row i is torch's `layers.i`.

    Args:
        config: see `TransformerConfig`; its defaults are the 2B model.
        rngs: of the initial weights.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.config = config
        self.windows = config.windows(config.num_hidden_layers)
        self.layers = stack_layers(
            lambda rngs: AceStepTransformerBlock(config, rngs=rngs), config.num_hidden_layers, rngs
        )
        self.proj_in_conv = Patchify(config, rngs=rngs)
        self.time_embed = TimestepEmbedding(hidden, config, rngs=rngs)
        self.time_embed_r = TimestepEmbedding(hidden, config, rngs=rngs)
        condition_size = config.encoder_hidden_size or hidden
        self.condition_embedder = linear(condition_size, hidden, ("embed", "mlp"), config, use_bias=True, rngs=rngs)
        self.norm_out = RMSNorm(hidden, config.rms_norm_eps, config)
        self.proj_out_conv = Unpatchify(config, rngs=rngs)
        self.scale_shift_table = _scale_shift_table(2, config, rngs)

    def embed_time(self, timestep: jax.Array, timestep_r: jax.Array) -> TimeEmbedding:
        """Of t and t - r; at inference r = t, but the embedding of 0 is not 0. Both [B] float32 in [0, 1]."""
        temb, modulation = self.time_embed(timestep)
        temb_r, modulation_r = self.time_embed_r(timestep - timestep_r)
        return TimeEmbedding(temb + temb_r, modulation + modulation_r)

    def embed_condition(self, encoder_hidden_states: jax.Array) -> KeysValues:
        """Keys and values of the condition for all layers, [L, B, S, K, H] each; they are the same at every step."""
        condition = self._embed(encoder_hidden_states)
        return jax.lax.map(lambda attn: attn.keys_values(condition), self.layers.cross_attn)

    def _embed(self, encoder_hidden_states: jax.Array) -> jax.Array:  # [B, S, E] -> [B, S, D]
        condition = self.condition_embedder(encoder_hidden_states.astype(self.config.dtype))
        # Not left to XLA's partitioner: on a mesh of data, fsdp and tensor it gets this kernel's gradient wrong.
        return shard(condition, "batch", None, None)

    def __call__(
        self,
        hidden_states: jax.Array,
        timestep: jax.Array,
        timestep_r: jax.Array,
        encoder_hidden_states: jax.Array | KeysValues,
        context_latents: jax.Array,
        *,
        lengths: jax.Array | None = None,
        encoder_lengths: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """The velocity at `hidden_states`.

        Args:
            hidden_states: [B, T, 64], the noisy latents x_t.
            timestep: [B], t in [0, 1].
            timestep_r: [B], r; equal to t at inference.
            encoder_hidden_states: [B, S, E], the condition tokens, or what `embed_condition` made of them.
            context_latents: [B, T, 128], source latents and chunk mask.
            lengths: [B] int32, the frames of each item; what follows is padding, and zero in the result. None: T.
            encoder_lengths: [B] int32, likewise of the condition tokens; the torch model attends to padding.
            dropout_key: of the attention dropout; without it there is none.

        Returns:
            [B, T, 64] in the config's dtype.
        """
        time = self.embed_time(timestep, timestep_r)
        return self.velocity(
            hidden_states,
            time,
            encoder_hidden_states,
            context_latents,
            lengths=lengths,
            encoder_lengths=encoder_lengths,
            dropout_key=dropout_key,
        )

    def velocity(
        self,
        hidden_states: jax.Array,
        time: TimeEmbedding,
        encoder_hidden_states: jax.Array | KeysValues,
        context_latents: jax.Array,
        *,
        lengths: jax.Array | None = None,
        encoder_lengths: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """As `__call__`, with the timesteps already embedded."""
        config = self.config
        frames = hidden_states.shape[1]
        x = jnp.concatenate([context_latents, hidden_states], axis=-1).astype(config.dtype)  # [B, frames, 192]
        tokens = valid = None
        if lengths is not None:
            valid = (jnp.arange(frames) < lengths[:, None])[:, :, None]  # [B, frames, 1]
            x = jnp.where(valid, x, 0)  # the last token of an odd number of frames is half zeros, as without padding
            tokens = (lengths + config.patch_size - 1) // config.patch_size
        x = self.proj_in_conv(x)  # [B, T, D]
        x = shard(x, "batch", "sequence", None)
        rope = rotary_embedding(x.shape[1], config.head_dim, config.rope_theta)

        per_layer = condition = None
        if isinstance(encoder_hidden_states, KeysValues):
            per_layer = encoder_hidden_states
        else:
            condition = self._embed(encoder_hidden_states)
        keys = None if dropout_key is None else jax.random.split(dropout_key, config.num_hidden_layers)

        def apply(x, layer, window, extra, shared):
            keys_values, key = extra
            modulation, condition, rope, lengths, condition_lengths = shared
            return layer(
                x,
                modulation,
                condition if keys_values is None else keys_values,
                rope=rope,
                window=window,
                lengths=lengths,
                condition_lengths=condition_lengths,
                dropout_key=key,
            )

        x = scan_layers(
            apply,
            self.layers,
            x,
            self.windows,
            per_layer=(per_layer, keys),
            shared=(time.modulation, condition, rope, tokens, encoder_lengths),
            remat=config.remat,
        )

        table = self.scale_shift_table[...].astype(x.dtype) + time.temb[:, None].astype(x.dtype)
        shift, scale = jnp.split(table, 2, axis=1)  # [B, 1, D] each
        velocity = self.proj_out_conv(self.norm_out(x) * (1 + scale) + shift)[:, :frames]
        return velocity if valid is None else jnp.where(valid, velocity, 0)


class Patchify(nnx.Module):
    """[B, frames, C] -> [B, ceil(frames / P), D]: a convolution of kernel and stride P, as a matrix product.

    Zeros fill the last patch. kernel: [P, C, D].
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        shape = (config.patch_size, config.in_channels, config.hidden_size)
        self.kernel = parameter(init(rngs.params(), shape, jnp.dtype(config.param_dtype)), None, None, "embed")
        self.bias = parameter(jnp.zeros((config.hidden_size,), config.param_dtype), "embed")

    def __call__(self, x: jax.Array) -> jax.Array:
        patch, channels, hidden = self.kernel.shape
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % patch), (0, 0))).reshape(x.shape[0], -1, patch * channels)
        kernel = self.kernel[...].reshape(patch * channels, hidden)
        return x @ kernel.astype(x.dtype) + self.bias[...].astype(x.dtype)


class Unpatchify(nnx.Module):
    """[B, T, D] -> [B, T * P, C]: the transposed convolution of kernel and stride P. kernel: [D, P, C]."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        shape = (config.hidden_size, config.patch_size, config.audio_acoustic_hidden_dim)
        self.kernel = parameter(init(rngs.params(), shape, jnp.dtype(config.param_dtype)), "embed", None, None)
        self.bias = parameter(jnp.zeros((config.audio_acoustic_hidden_dim,), config.param_dtype), None)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden, patch, channels = self.kernel.shape
        x = x @ self.kernel[...].reshape(hidden, patch * channels).astype(x.dtype)  # [B, T, P * C]
        return x.reshape(x.shape[0], -1, channels) + self.bias[...].astype(x.dtype)


def _scale_shift_table(rows: int, config: TransformerConfig, rngs: nnx.Rngs) -> nnx.Param:
    value = jax.random.normal(rngs.params(), (1, rows, config.hidden_size)) / config.hidden_size**0.5
    return parameter(value.astype(config.param_dtype), None, None, None)
