"""Pre-norm transformer encoder, which the text, lyric and timbre encoders, the pooler and the detokenizer share."""

import jax
from flax import nnx

from acestep_jax.distributed import shard
from acestep_jax.models.attention import Attention
from acestep_jax.models.config import AttentionConfig
from acestep_jax.models.layers import RMSNorm, SwiGLU, rotary_embedding, scan_layers, stack_layers


class EncoderLayer(nnx.Module):
    """x <- x + self_attn(norm(x)),  x <- x + mlp(norm(x)).

    Source: diffusers `AceStepEncoderLayer`; with `causal`, transformers `Qwen3DecoderLayer`.
    """

    def __init__(self, config: AttentionConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, config, rngs=rngs)

    def __call__(self, x, *, rope, window=None, causal=False, lengths=None):  # [B, T, D] -> [B, T, D]
        x = x + self.self_attn(self.input_layernorm(x), rope=rope, window=window, causal=causal, key_lengths=lengths)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return shard(x, "batch", "sequence", None)


class Encoder(nnx.Module):
    """Stacked layers and a final norm. Networks derive from it and add what comes before and after.

    Args:
        windows: one entry a layer: its sliding window, or None for full attention.
    """

    def __init__(self, config: AttentionConfig, windows: tuple[int | None, ...], *, rngs: nnx.Rngs):
        self.config = config
        self.windows = windows
        self.layers = stack_layers(lambda rngs: EncoderLayer(config, rngs=rngs), len(windows), rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config)

    def encode(self, x: jax.Array, *, causal: bool = False, lengths: jax.Array | None = None) -> jax.Array:
        """x: [B, T, D] at positions 0..T-1; lengths: [B], what follows is padding. Returns [B, T, D]."""
        rope = rotary_embedding(x.shape[1], self.config.head_dim, self.config.rope_theta)

        def apply(x, layer, window, _, shared):
            rope, lengths = shared
            return layer(x, rope=rope, window=window, causal=causal, lengths=lengths)

        shared = rope, lengths
        return self.norm(scan_layers(apply, self.layers, x, self.windows, shared=shared, remat=self.config.remat))
