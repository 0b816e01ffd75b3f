"""Qwen3 as the text encoder: last hidden states of the prompt, and only embeddings for the lyrics."""

import jax
import jax.numpy as jnp
from flax import nnx

from acestep_jax.models.config import DEFAULT_RUNTIME, Runtime, TextEncoderConfig
from acestep_jax.models.encoder import Encoder


class Qwen3Model(Encoder):
    """Token ids -> hidden states after the final norm. Causal, so right padding does not reach the tokens before it.

    Source: transformers `Qwen3Model`, as diffusers' `AceStepPipeline.encode_prompt` calls it.
    """

    def __init__(self, config: TextEncoderConfig, *, runtime: Runtime = DEFAULT_RUNTIME, rngs: nnx.Rngs):
        super().__init__(config, (None,) * config.num_hidden_layers, runtime=runtime, rngs=rngs)
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=jnp.dtype(runtime.dtype),
            param_dtype=jnp.dtype(runtime.param_dtype),
            embedding_metadata={"out_sharding": ("vocab", "embed"), "eager_sharding": False},
            rngs=rngs,
        )

    def __call__(self, input_ids: jax.Array) -> jax.Array:  # [B, T] int32 -> [B, T, D]
        return self.encode(self.embed_tokens(input_ids), causal=True)
