"""25 Hz latents to 5 Hz codes and back: attention pooler, residual finite scalar quantisation (FSQ), detokenizer.

Sources: diffusers `AceStepAudioTokenizer` and `AceStepAudioTokenDetokenizer`; FSQ: Mentzer et al., arXiv 2309.15505.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from acestep_jax.models.config import AudioTokenDetokenizerConfig, AudioTokenizerConfig
from acestep_jax.models.encoder import Encoder
from acestep_jax.models.layers import linear, parameter
from acestep_jax.models.runtime import DEFAULT_RUNTIME, Runtime


class ResidualFSQ(nnx.Module):
    """Residual FSQ: each component of a projected vector is rounded to one of a few levels in [-1, 1].

    Level k of L stands for 2k / (L - 1) - 1, and an index is the number whose mixed-radix digits are the levels.
    With several quantizers, quantizer q quantises the residual of the earlier ones, on a grid finer by levels^-q.
    Everything is in float32, whatever the network's dtype: a rounding error here can change the code.
    """

    def __init__(self, config: AudioTokenizerConfig, *, runtime: Runtime, rngs: nnx.Rngs):
        self.levels = config.fsq_input_levels
        self.num_quantizers = config.fsq_input_num_quantizers
        self.dtype = runtime.dtype
        dims = len(self.levels)
        self.project_in = linear(config.fsq_dim, dims, ("embed", None), runtime, use_bias=True, rngs=rngs)
        self.project_out = linear(dims, config.fsq_dim, (None, "embed"), runtime, use_bias=True, rngs=rngs)

    @property
    def codebook_size(self) -> int:
        return math.prod(self.levels)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:  # [..., D] -> [..., D], [..., Q] int32
        levels = np.asarray(self.levels, np.float32)
        x = _float32_linear(self.project_in, x)
        bound = 1.0 + 1.0 / (levels - 1.0)
        residual = jnp.tanh(x / bound) * bound
        total, indices = jnp.float32(0.0), []
        for scale in self._scales():
            code = _round_to_levels(residual / scale, levels)
            residual = residual - code * scale
            total = total + code * scale
            digits = jnp.round((code + 1.0) * (levels - 1.0) / 2.0).astype(jnp.int32)
            indices.append(jnp.sum(digits * self._basis(), axis=-1))
        return _float32_linear(self.project_out, total).astype(self.dtype), jnp.stack(indices, axis=-1)

    def get_output_from_indices(self, indices: jax.Array) -> jax.Array:
        """Return the vectors [..., D] for indices [..., Q], as `__call__` returns them."""
        levels = np.asarray(self.levels, np.int32)
        digits = (indices[..., None] // self._basis()) % levels  # [..., Q, dims]
        codes = digits.astype(jnp.float32) * np.float32(2.0) / (levels - 1).astype(np.float32) - 1.0
        total = jnp.sum(codes * np.stack(self._scales()), axis=-2)
        return _float32_linear(self.project_out, total).astype(self.dtype)

    def _basis(self) -> np.ndarray:
        return np.cumprod((1, *self.levels[:-1]), dtype=np.int32)

    def _scales(self) -> list[np.ndarray]:
        return [np.asarray(self.levels, np.float32) ** -i for i in range(self.num_quantizers)]


def _float32_linear(layer: nnx.Linear, x: jax.Array) -> jax.Array:
    assert layer.bias is not None
    kernel, bias = layer.kernel[...].astype(jnp.float32), layer.bias[...].astype(jnp.float32)
    return x.astype(jnp.float32) @ kernel + bias


def _round_to_levels(x: jax.Array, levels: np.ndarray) -> jax.Array:
    """Round to the nearest of `levels` equidistant values in [-1, 1]; ties round up."""
    steps = levels - np.float32(1.0)
    return jnp.floor(steps * (jnp.clip(x, -1.0, 1.0) + 1.0) / 2.0 + 0.5) * (np.float32(2.0) / steps) - 1.0


class AttentionPooler(Encoder):
    """Summarises each window of frames in a learned token prepended to it: [B, n, window, D] -> [B, n, D]."""

    def __init__(self, config: AudioTokenizerConfig, *, runtime: Runtime, rngs: nnx.Rngs):
        super().__init__(config, config.windows(config.num_attention_pooler_hidden_layers), runtime=runtime, rngs=rngs)
        hidden = config.hidden_size
        self.embed_tokens = linear(hidden, hidden, ("embed", "mlp"), runtime, use_bias=True, rngs=rngs)
        self.special_token = _special_tokens((1, 1, hidden), runtime, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, num_windows, size, _ = x.shape
        x = self.embed_tokens(x)
        token = jnp.broadcast_to(self.special_token[...].astype(x.dtype), (batch, num_windows, 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=2).reshape(batch * num_windows, size + 1, -1)
        return self.encode(x)[:, 0].reshape(batch, num_windows, -1)


class AceStepAudioTokenizer(nnx.Module):
    """Latents at 25 Hz -> codes at 5 Hz, with the vectors that the codes stand for."""

    def __init__(self, config: AudioTokenizerConfig, *, runtime: Runtime = DEFAULT_RUNTIME, rngs: nnx.Rngs):
        self.config, self.runtime = config, runtime
        self.audio_acoustic_proj = linear(
            config.audio_acoustic_hidden_dim, config.hidden_size, (None, "embed"), runtime, use_bias=True, rngs=rngs
        )
        self.attention_pooler = AttentionPooler(config, runtime=runtime, rngs=rngs)
        self.quantizer = ResidualFSQ(config, runtime=runtime, rngs=rngs)

    def __call__(self, hidden_states: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Quantise [B, n, pool_window_size, 64] to vectors [B, n, D] and indices [B, n, Q] int32."""
        return self.quantizer(self.attention_pooler(self.audio_acoustic_proj(hidden_states)))

    def tokenize(self, latents: jax.Array, silence_latent: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Quantise [B, T, 64]; T is padded to whole windows with `silence_latent` [1, *, 64]."""
        batch, frames, channels = latents.shape
        size = self.config.pool_window_size
        fill = jnp.broadcast_to(silence_latent[:, : -frames % size], (batch, -frames % size, channels))
        latents = jnp.concatenate([latents, fill.astype(latents.dtype)], axis=1)
        return self(latents.reshape(batch, -1, size, channels))


class AceStepAudioTokenDetokenizer(Encoder):
    """Quantised vectors at 5 Hz -> latents at 25 Hz: [B, n, D] -> [B, n * pool_window_size, 64]."""

    def __init__(self, config: AudioTokenDetokenizerConfig, *, runtime: Runtime = DEFAULT_RUNTIME, rngs: nnx.Rngs):
        super().__init__(config, config.windows(config.num_attention_pooler_hidden_layers), runtime=runtime, rngs=rngs)
        self.config: AudioTokenDetokenizerConfig = config
        hidden = config.hidden_size
        self.embed_tokens = linear(hidden, hidden, ("embed", "mlp"), runtime, use_bias=True, rngs=rngs)
        self.special_tokens = _special_tokens((1, config.pool_window_size, hidden), runtime, rngs)
        self.proj_out = linear(
            hidden, config.audio_acoustic_hidden_dim, ("embed", None), runtime, use_bias=True, rngs=rngs
        )

    def __call__(self, quantized: jax.Array) -> jax.Array:
        batch, num_codes, _ = quantized.shape
        x = self.embed_tokens(quantized)[:, :, None]  # [B, n, 1, D]
        x = x + self.special_tokens[...].astype(x.dtype)  # [B, n, window, D]
        x = self.encode(x.reshape(batch * num_codes, self.config.pool_window_size, -1))
        return self.proj_out(x).reshape(batch, num_codes * self.config.pool_window_size, -1)


def _special_tokens(shape: tuple[int, ...], runtime: Runtime, rngs: nnx.Rngs) -> nnx.Param:
    value = 0.02 * jax.random.normal(rngs.params(), shape)
    return parameter(value.astype(runtime.param_dtype), None, None, None)
