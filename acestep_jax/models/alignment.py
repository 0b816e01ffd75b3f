"""The alignment between the frames of a song and the tokens of its lyrics: the probabilities of those cross-attention
heads of the transformer that follow the singing.

Source: ACE-Step 1.5, `lyric_alignment_layers_config` and acestep/core/generation/handler/lyric_timestamp.py.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from acestep_jax.errors import InputError
from acestep_jax.models.config import TransformerConfig
from acestep_jax.models.layers import rotary_embedding
from acestep_jax.models.scan import scan_layers
from acestep_jax.models.transformer import AceStepTransformer1DModel

Heads = Mapping[int, tuple[int, ...]]  # attention heads by layer

HEADS_2B: Heads = {2: (6,), 3: (10, 11), 4: (3,), 5: (8, 9), 6: (8,)}


def alignment_heads(config: TransformerConfig) -> Heads:
    """Return the alignment heads, whose attention follows the singing: those of the config, or the known ones of the 2B
    models.

    Raises:
        InputError: if the config names none and the model has another size, or it names heads that do not exist.
    """
    found = dict(config.lyric_alignment_layers_config or ())
    published = TransformerConfig()
    if not found:
        sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers", "encoder_hidden_size")
        if any(getattr(config, name) != getattr(published, name) for name in sizes):
            raise InputError(
                "timestamps: this transformer's config has no lyric_alignment_layers_config, and the alignment heads "
                "are known only for the 2B models; use one of these, or add the key to config.json"
            )
        return HEADS_2B
    for layer, heads in found.items():
        if layer >= config.num_hidden_layers or max(heads) >= config.num_attention_heads:
            raise InputError(
                f"lyric_alignment_layers_config: heads {list(heads)} of layer {layer}, but the transformer has "
                f"{config.num_hidden_layers} layers of {config.num_attention_heads} heads"
            )
    return found


def cross_attention(
    transformer: AceStepTransformer1DModel,
    hidden_states: jax.Array,
    timestep: jax.Array,
    encoder_hidden_states: jax.Array,
    context_latents: jax.Array,
    *,
    heads: Heads,
    lengths: jax.Array,
    encoder_lengths: jax.Array,
) -> jax.Array:
    """Return the attention probabilities of frames over condition tokens, [B, heads, S, T / patch] float32.

    Args:
        hidden_states, encoder_hidden_states, context_latents, lengths, encoder_lengths: see the transformer.
        timestep: [B], t and r.
        heads: static, by layer; later layers are not computed. The result has the heads in the order of layers.
    """
    config, frames = transformer.config, hidden_states.shape[1]
    _, modulation = transformer.embed_time(timestep, timestep)
    condition = transformer.condition_embedder(encoder_hidden_states.astype(transformer.runtime.dtype))
    x = jnp.concatenate([context_latents, hidden_states], axis=-1).astype(transformer.runtime.dtype)
    x = jnp.where((jnp.arange(frames) < lengths[:, None])[:, :, None], x, 0)
    x = transformer.proj_in_conv(x)
    rope = rotary_embedding(x.shape[1], config.head_dim, config.rope_theta)
    token_lengths = (lengths + config.patch_size - 1) // config.patch_size
    options = dict(rope=rope, lengths=token_lengths)

    depth = max(heads) + 1
    layers = jax.tree.map(lambda leaf: leaf[:depth], transformer.layers)

    def block(x, layer, window, _):
        # The layer computes this again; XLA eliminates the duplicate.
        query = layer.cross_attn_norm(layer.self_attend(x, modulation, window=window, **options))
        x = layer(x, modulation, condition, window=window, condition_lengths=encoder_lengths, **options)
        return x, query

    _, queries = scan_layers(block, layers, x, transformer.windows[:depth])  # [depth, B, T, D]
    visible = jnp.arange(condition.shape[1]) < encoder_lengths[:, None]  # [B, S]
    found = []
    for index in sorted(heads):
        part = jax.tree.map(lambda leaf, index=index: leaf[index], layers.cross_attn)
        wanted = jnp.array(heads[index])
        q = part.queries(queries[index])[:, :, wanted]  # [B, T, heads, H]
        keys = part.keys_values(condition).keys
        keys = keys[:, :, wanted // (config.num_attention_heads // config.num_key_value_heads)]  # [B, S, heads, H]
        scores = jnp.einsum("bthd,bshd->bhts", q, keys, preferred_element_type=jnp.float32) * config.head_dim**-0.5
        scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
        found.append(jax.nn.softmax(scores, axis=-1).swapaxes(2, 3))
    return jnp.concatenate(found, axis=1)
