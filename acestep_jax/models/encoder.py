"""The pre-norm transformer encoder that the text, lyric and timbre encoders, the pooler and the detokenizer share."""

import jax
from flax import nnx

from acestep_jax.distributed import shard
from acestep_jax.models.attention import Attention
from acestep_jax.models.config import AttentionConfig
from acestep_jax.models.layers import RMSNorm, SwiGLU, rotary_embedding
from acestep_jax.models.runtime import Runtime
from acestep_jax.models.scan import scan_layers, stack_layers


class EncoderLayer(nnx.Module):
    """x <- x + self_attn(norm(x)),  x <- x + mlp(norm(x)).

    Source: diffusers `AceStepEncoderLayer`; with `causal`, transformers `Qwen3DecoderLayer`.
    """

    def __init__(self, config: AttentionConfig, *, runtime: Runtime, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, runtime)
        self.self_attn = Attention(config, runtime=runtime, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, runtime)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, runtime, rngs=rngs)

    def __call__(self, x, *, rope, window=None, causal=False, lengths=None):  # [B, T, D] -> [B, T, D]
        x = x + self.self_attn(self.input_layernorm(x), rope=rope, window=window, causal=causal, key_lengths=lengths)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return shard(x, "batch", "sequence", None)


class Encoder(nnx.Module):
    """Stacked layers and a final norm. Networks derive from it and add their inputs and outputs.

    Args:
        windows: the sliding window of each layer, or None for full attention.
    """

    def __init__(self, config: AttentionConfig, windows: tuple[int | None, ...], *, runtime: Runtime, rngs: nnx.Rngs):
        self.config, self.runtime = config, runtime
        self.windows = windows
        self.layers = stack_layers(lambda rngs: EncoderLayer(config, runtime=runtime, rngs=rngs), len(windows), rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, runtime)

    def encode(self, x: jax.Array, *, causal: bool = False, lengths: jax.Array | None = None) -> jax.Array:
        """Encode x [B, T, D], at positions 0..T-1, to [B, T, D]. lengths: [B], valid tokens; later ones are padding."""
        rope = rotary_embedding(x.shape[1], self.config.head_dim, self.config.rope_theta)

        def block(x, layer, window, _):
            return layer(x, rope=rope, window=window, causal=causal, lengths=lengths), None

        x, _ = scan_layers(block, self.layers, x, self.windows, remat=self.runtime.remat)
        return self.norm(x)
