"""The diffusion transformer of ACE-Step 1.5.

It predicts the velocity v = noise - x0 of x_t = t * noise + (1 - t) * x0 over 25 Hz stereo-audio latents.
Source: diffusers `AceStepTransformer1DModel`, with the same module tree and names. Axis letters: see layers.py.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from acestep_jax.distributed import shard
from acestep_jax.models.attention import Attention, KeysValues
from acestep_jax.models.config import TransformerConfig
from acestep_jax.models.kernels.unstacked import SHARED_INPUT, unstack
from acestep_jax.models.layers import (
    RMSNorm,
    SwiGLU,
    TimestepEmbedding,
    lecun_normal,
    linear,
    parameter,
    rotary_embedding,
)
from acestep_jax.models.runtime import DEFAULT_RUNTIME, Runtime
from acestep_jax.models.scan import map_layers, scan_layers, stack_layers


class TimeEmbedding(NamedTuple):
    """The embedded timesteps: `temb` for the output norm, `modulation` for the layers."""

    temb: jax.Array  # [B, D]
    modulation: jax.Array  # [B, 6, D]


class AceStepTransformerBlock(nnx.Module):
    """One layer.

    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = scale_shift_table + modulation
    x <- x + gate * self_attn(norm(x) * (1 + scale) + shift)
    x <- x + cross_attn(norm(x), condition)
    x <- x + mlp_gate * mlp(norm(x) * (1 + mlp_scale) + mlp_shift)
    """

    def __init__(self, config: TransformerConfig, *, runtime: Runtime, rngs: nnx.Rngs):
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn_norm = RMSNorm(hidden, eps, runtime)
        self.self_attn = Attention(config, runtime=runtime, rngs=rngs)
        self.cross_attn_norm = RMSNorm(hidden, eps, runtime)
        self.cross_attn = Attention(config, runtime=runtime, rngs=rngs)
        self.mlp_norm = RMSNorm(hidden, eps, runtime)
        self.mlp = SwiGLU(hidden, config.intermediate_size, runtime, rngs=rngs)
        self.scale_shift_table = _scale_shift_table(6, hidden, runtime, rngs)

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
        x = self.self_attend(x, modulation, rope=rope, window=window, lengths=lengths, dropout_key=self_key)

        h = self.cross_attn_norm(x)
        x = x + self.cross_attn(h, condition, key_lengths=condition_lengths, dropout_key=cross_key)

        mlp_shift, mlp_scale, mlp_gate = self._modulation(x, modulation)[3:]
        h = self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift
        x = x + mlp_gate * self.mlp(h)
        return shard(x, "batch", "sequence", None)

    def self_attend(
        self,
        x: jax.Array,
        modulation: jax.Array,
        *,
        rope: tuple[jax.Array, jax.Array],
        window: int | None,
        lengths: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Compute only the first of the three updates, the input of cross-attention. Arguments as in `__call__`."""
        shift, scale, gate = self._modulation(x, modulation)[:3]
        h = self.self_attn_norm(x) * (1 + scale) + shift
        return x + gate * self.self_attn(h, rope=rope, window=window, key_lengths=lengths, dropout_key=dropout_key)

    def _modulation(self, x: jax.Array, modulation: jax.Array) -> list[jax.Array]:  # six of [B, 1, D]
        table = self.scale_shift_table[...].astype(x.dtype) + modulation.astype(x.dtype)  # [B, 6, D]
        return jnp.split(table, 6, axis=1)


class AceStepTransformer1DModel(nnx.Module):
    """x_t, t, r, condition, context -> velocity.

    `layers` is one block whose parameters have a leading axis of length L; row i is torch's `layers.i`.

    Args:
        config: see `TransformerConfig`; its defaults are the 2B model.
        runtime: dtypes, rematerialisation and attention kernel, see `Runtime`.
        rngs: random keys of the initial weights.
    """

    def __init__(self, config: TransformerConfig, *, runtime: Runtime = DEFAULT_RUNTIME, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.config, self.runtime = config, runtime
        self.windows = config.windows(config.num_hidden_layers)
        self.layers = stack_layers(
            lambda rngs: AceStepTransformerBlock(config, runtime=runtime, rngs=rngs), config.num_hidden_layers, rngs
        )
        self.proj_in_conv = Patchify(config, runtime=runtime, rngs=rngs)
        self.time_embed = TimestepEmbedding(hidden, runtime, rngs=rngs)
        self.time_embed_r = TimestepEmbedding(hidden, runtime, rngs=rngs)
        condition_size = config.encoder_hidden_size or hidden
        self.condition_embedder = linear(condition_size, hidden, ("embed", "mlp"), runtime, use_bias=True, rngs=rngs)
        self.norm_out = RMSNorm(hidden, config.rms_norm_eps, runtime)
        self.proj_out_conv = Unpatchify(config, runtime=runtime, rngs=rngs)
        self.scale_shift_table = _scale_shift_table(2, hidden, runtime, rngs)

    def __call__(
        self,
        hidden_states: jax.Array,
        timestep: jax.Array | TimeEmbedding,
        timestep_r: jax.Array | None,
        encoder_hidden_states: jax.Array | KeysValues,
        context_latents: jax.Array,
        *,
        lengths: jax.Array | None = None,
        encoder_lengths: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Predict the velocity at `hidden_states`.

        Args:
            hidden_states: [B, F, 64], the noisy latents x_t.
            timestep: [B], t in [0, 1]; or the result of `embed_time` for both timesteps.
            timestep_r: [B], r, equal to t at inference; None if `timestep` is a result of `embed_time`.
            encoder_hidden_states: [B, S, E], the condition tokens; or the result of `embed_condition`.
            context_latents: [B, F, 128], source latents and chunk mask.
            lengths: [B] int32, number of frames of each item; later frames are padding, and zero in the result.
                None: F.
            encoder_lengths: [B] int32, number of valid condition tokens of each item; None: all of them, as in the
                torch model.
            dropout_key: random key of the attention dropout; None: no dropout.

        Returns:
            [B, F, 64] in the runtime's dtype.

        Raises:
            ValueError: if a timestep is missing.
        """
        config, frames = self.config, hidden_states.shape[1]
        if isinstance(timestep, TimeEmbedding):
            temb, modulation = timestep
        elif timestep_r is None:
            raise ValueError("timestep_r: expected an array; it may be None only if timestep is a result of embed_time")
        else:
            temb, modulation = self.embed_time(timestep, timestep_r)
        if isinstance(encoder_hidden_states, KeysValues):
            condition, keys_values = None, encoder_hidden_states
        else:
            condition, keys_values = self._embed(encoder_hidden_states), None  # [B, S, D]

        x = jnp.concatenate([context_latents, hidden_states], axis=-1).astype(self.runtime.dtype)  # [B, F, 192]
        token_lengths = valid = None
        if lengths is not None:
            valid = (jnp.arange(frames) < lengths[:, None])[:, :, None]  # [B, F, 1]
            # For an odd number of frames, half of the last token is then zeros, as without padding.
            x = jnp.where(valid, x, 0)
            token_lengths = (lengths + config.patch_size - 1) // config.patch_size
        x = shard(self.proj_in_conv(x), "batch", "sequence", None)  # [B, T, D]

        rope = rotary_embedding(x.shape[1], config.head_dim, config.rope_theta)  # [T, H / 2] each
        keys = None if dropout_key is None else jax.random.split(dropout_key, config.num_hidden_layers)

        def block(x, layer, window, per_layer):
            keys_values, key = per_layer
            x = layer(
                x,
                modulation,
                condition if keys_values is None else keys_values,
                rope=rope,
                window=window,
                lengths=token_lengths,
                condition_lengths=encoder_lengths,
                dropout_key=key,
            )
            return x, None

        per_layer = keys_values, keys
        x, _ = scan_layers(block, self.layers, x, self.windows, per_layer=per_layer, remat=self.runtime.remat)

        table = self.scale_shift_table[...].astype(x.dtype) + temb[:, None].astype(x.dtype)  # [B, 2, D]
        shift, scale = jnp.split(table, 2, axis=1)  # [B, 1, D] each
        velocity = self.proj_out_conv(self.norm_out(x) * (1 + scale) + shift)[:, :frames]  # [B, F, 64]
        return velocity if valid is None else jnp.where(valid, velocity, 0)

    def embed_time(self, timestep: jax.Array, timestep_r: jax.Array) -> TimeEmbedding:
        """Embed t and t - r, both [B] float32 in [0, 1]. At inference r = t, but the embedding of 0 is not 0."""
        temb, modulation = self.time_embed(timestep)
        temb_r, modulation_r = self.time_embed_r(timestep - timestep_r)
        return TimeEmbedding(temb + temb_r, modulation + modulation_r)

    def embed_condition(self, encoder_hidden_states: jax.Array) -> KeysValues:
        """Compute the condition's keys and values for all layers, [L, B, S, K, H] each; all steps share them."""
        condition = self._embed(encoder_hidden_states)
        return map_layers(lambda attn: attn.keys_values(condition), self.layers, "cross_attn")

    def unstacked(self) -> Self:
        """Return this network with its layers in the form that GPUs run fastest, for inference: see
        `kernels.unstacked`."""
        network = nnx.merge(*nnx.split(self))
        network.layers = unstack(network.layers, SHARED_INPUT)
        return network

    def _embed(self, encoder_hidden_states: jax.Array) -> jax.Array:  # [B, S, E] -> [B, S, D]
        condition = self.condition_embedder(encoder_hidden_states.astype(self.runtime.dtype))
        # Without this, XLA's partitioner computes a wrong kernel gradient on a mesh with data, fsdp and tensor.
        return shard(condition, "batch", None, None)


class Patchify(nnx.Module):
    """[B, F, C] -> [B, ceil(F / P), D]: a convolution with kernel size and stride P, as a matrix product.

    The last patch is padded with zeros. kernel: [P, C, D].
    """

    def __init__(self, config: TransformerConfig, *, runtime: Runtime, rngs: nnx.Rngs):
        init = lecun_normal(in_axis=(0, 1), out_axis=2)
        shape = (config.patch_size, config.in_channels, config.hidden_size)
        self.kernel = parameter(init(rngs.params(), shape, jnp.dtype(runtime.param_dtype)), None, None, "embed")
        self.bias = parameter(jnp.zeros((config.hidden_size,), runtime.param_dtype), "embed")

    def __call__(self, x: jax.Array) -> jax.Array:
        patch, channels, hidden = self.kernel.shape
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % patch), (0, 0)))
        x = x.reshape(x.shape[0], -1, patch * channels)  # [B, T, P * C]
        kernel = self.kernel[...].reshape(patch * channels, hidden)
        return x @ kernel.astype(x.dtype) + self.bias[...].astype(x.dtype)  # [B, T, D]


class Unpatchify(nnx.Module):
    """[B, T, D] -> [B, T * P, C]: the transposed convolution with kernel size and stride P. kernel: [D, P, C]."""

    def __init__(self, config: TransformerConfig, *, runtime: Runtime, rngs: nnx.Rngs):
        init = lecun_normal(in_axis=0, out_axis=(1, 2))
        shape = (config.hidden_size, config.patch_size, config.audio_acoustic_hidden_dim)
        self.kernel = parameter(init(rngs.params(), shape, jnp.dtype(runtime.param_dtype)), "embed", None, None)
        self.bias = parameter(jnp.zeros((config.audio_acoustic_hidden_dim,), runtime.param_dtype), None)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden, patch, channels = self.kernel.shape
        x = x @ self.kernel[...].reshape(hidden, patch * channels).astype(x.dtype)  # [B, T, P * C]
        x = x.reshape(x.shape[0], -1, channels)  # [B, T * P, C]
        return x + self.bias[...].astype(x.dtype)


def _scale_shift_table(rows: int, hidden: int, runtime: Runtime, rngs: nnx.Rngs) -> nnx.Param:
    value = jax.random.normal(rngs.params(), (1, rows, hidden)) / hidden**0.5
    return parameter(value.astype(runtime.param_dtype), None, None, None)
