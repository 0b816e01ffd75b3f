"""Qwen3 as the text encoder, last hidden states of the prompt, and as the planner, a causal language model.

The planner's tokens are text, then audio codes: `first_code + N` is code N. It reads the next token's logits from the
embedding, either of text or of codes, for what a plan needs is never both.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from acestep_jax.distributed import shard
from acestep_jax.models.attention import KeysValues, attention
from acestep_jax.models.config import PlannerConfig, TextEncoderConfig
from acestep_jax.models.encoder import Encoder, EncoderLayer
from acestep_jax.models.kernels.stack import multiply_rows, pick, restored, split, stored
from acestep_jax.models.kv_cache import KVCache, attend_to_cache, empty_cache
from acestep_jax.models.layers import apply_rotary, rotary_embedding, rotary_frequencies
from acestep_jax.models.quantization import QuantizedEmbed
from acestep_jax.models.runtime import DEFAULT_RUNTIME, Runtime

Cache = TypeVar("Cache", KVCache, None)


class Head(NamedTuple):
    """Rows of the embedding that logits are read from, [V, D], and their scales, [V], where they are quantised."""

    rows: jax.Array
    scale: jax.Array | None


HEAD_MULTIPLE = 128  # rows of the head of codes: what divides over a mesh, and fills tiles


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


class Qwen3ForCausalLM(Qwen3Model):
    """The 5 Hz language model of ACE-Step 1.5, with the embedding as its head.

        hidden, cache = model.prefill(prompts, start, model.init_cache(batch, slots))
        hidden, cache = model.decode(token, position, start, cache, window=window)      # as often as need be
        logits = model.code_logits(hidden)  or  model.text_logits(hidden)

    Prompts of several songs are padded at their left: the tokens of song b before `start[b]` are padding. So all songs
    write their next token into one slot, and a token's position is its index less `start`.

    Source: transformers `Qwen3ForCausalLM`.
    """

    def __init__(self, config: PlannerConfig, *, runtime: Runtime = DEFAULT_RUNTIME, rngs: nnx.Rngs):
        super().__init__(config, runtime=runtime, rngs=rngs)
        self.planner = config

    def split(self) -> "Qwen3ForCausalLM":
        """Return this model, with its weights where decoding reads them fastest: see `models.kernels.stack`. What is
        split is for use only, not to be saved."""
        self.layers = split(self.layers)
        table = self.embed_tokens
        table.embedding = nnx.Param(stored(table.embedding[...]))
        return self

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Return the embeddings of tokens [B, T] int32, [B, T, D]."""
        table = self.embed_tokens
        if isinstance(table, QuantizedEmbed):
            return table(tokens)
        return self._rows(jnp.take(table.embedding[...], tokens, axis=0))

    def init_cache(self, batch: int, slots: int) -> KVCache:
        """Return an empty cache for `batch` songs of up to `slots` tokens, prompts included."""
        config = self.planner
        return empty_cache(config, config.num_hidden_layers, batch, slots, jnp.dtype(self.runtime.dtype))

    def prefill(self, tokens: jax.Array, start: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Read prompts into slots 0 to P - 1 of a cache.

        Args:
            tokens: [B, P] int32, padded at the left.
            start: [B] int32, index of the first token that is no padding.
            cache: of at least P slots.

        Returns:
            The hidden state of the last token, [B, D], and the cache.
        """
        length = tokens.shape[1]
        rope = rotary_embedding(length, self.config.head_dim, self.config.rope_theta)

        def block(x, layer: EncoderLayer, cache, index):
            normed, part = layer.input_layernorm(x), layer.self_attn
            k, v = part.keys_values(normed, time="sequence", rope=rope)
            q = part.queries(normed, time="sequence", rope=rope)
            y = attention(q, k, v, causal=True, kernel=part.kernel, products=part.products)
            cache = cache.write(KeysValues(_roll(k, start), _roll(v, start)), index, 0)
            return x + part.to_out(y.reshape(*x.shape[:2], -1)), cache

        # Rotated to begin at 0, rows are padded at the right, where causal attention does not see padding.
        x = self.embed(_roll(tokens, -start))
        x, cache = self._loop(block, x, cache)
        last = jnp.take_along_axis(x, (length - 1 - start)[:, None, None], axis=1)[:, 0]
        return self.norm(last), cache

    def decode(
        self, token: jax.Array, position: jax.Array, start: jax.Array, cache: KVCache, *, window: int
    ) -> tuple[jax.Array, KVCache]:
        """Read one more token of each song.

        Args:
            token: [B] int32.
            position: scalar int32, the slot that the token is written to; those before it are full.
            start: see `prefill`.
            window: static; the slots that are attended to, of which `position` is one. Fewer cost less.

        Returns:
            The hidden state of the token, [B, D], and the cache.
        """
        config = self.planner
        phase = (position - start).astype(jnp.float32)[:, None] * rotary_frequencies(config.head_dim, config.rope_theta)
        rope = jnp.cos(phase)[:, None], jnp.sin(phase)[:, None]  # [B, 1, H / 2]

        def block(x, layer: EncoderLayer, cache, index):
            normed, part = layer.input_layernorm(x), layer.self_attn
            k, v = part.keys_values(normed)
            cache = cache.write(KeysValues(_rotate(k, rope), v), index, position)
            q = _rotate(part.queries(normed), rope)[:, 0]
            keys, values = cache.read(index, window, q.dtype)
            y = attend_to_cache(q, keys, values, start, position)
            return x + part.to_out(y.reshape(*x.shape[:2], -1)), cache

        x, cache = self._loop(block, self.embed(token[:, None]), cache)
        return self.norm(x)[:, 0], cache

    def hidden_states(self, tokens: jax.Array, start: jax.Array) -> jax.Array:
        """Return the hidden states [B, T, D] of all tokens [B, T], padded at the left, see `prefill`. What stands at
        padding has no meaning."""
        rope = rotary_embedding(tokens.shape[1], self.config.head_dim, self.config.rope_theta)

        def block(x, layer: EncoderLayer, cache, index):
            return x + layer.self_attn(layer.input_layernorm(x), rope=rope, causal=True), cache

        x, _ = self._loop(block, self.embed(_roll(tokens, -start)), None)
        return _roll(self.norm(x), start)

    def text_logits(self, hidden: jax.Array, head: Head | None = None) -> jax.Array:
        """Return the logits of the tokens that are text, [..., first_code] float32.

        Args:
            head: `text_head()`, where it is to be computed once, before a loop.
        """
        return self._logits(hidden, self.text_head() if head is None else head)

    def text_head(self) -> Head:
        """Return the rows of the embedding that `text_logits` reads, [first_code, D]."""
        return self._head(lambda table: table[: self.planner.first_code])

    def code_logits(self, hidden: jax.Array, head: Head | None = None) -> jax.Array:
        """Return the logits of the end of the turn and of the audio codes, [..., padded] float32.

        Column 0 is the end, column 1 + N is code N; what fills the rest to a multiple of 128 is -inf.

        Args:
            head: `code_head()`, where it is to be computed once, before a loop.
        """
        logits = self._logits(hidden, self.code_head() if head is None else head)
        valid = jnp.arange(logits.shape[-1]) <= self.planner.num_codes
        return jnp.where(valid, logits, -jnp.inf)

    def code_head(self) -> Head:
        """Return the rows of the embedding that `code_logits` reads, [padded, D]."""
        config = self.planner

        def chosen(x: jax.Array) -> jax.Array:
            codes = x[config.first_code : config.first_code + config.num_codes]
            rows = jnp.concatenate([x[config.eos_token_id][None], codes])
            padding = ((0, -len(rows) % HEAD_MULTIPLE), *[(0, 0)] * (x.ndim - 1))
            return shard(jnp.pad(rows, padding), "vocab", *[None] * (x.ndim - 1))

        return self._head(chosen)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return the logits of the whole vocabulary, [..., V] float32."""
        return self._logits(hidden, self._head(lambda table: table))

    def _head(self, chosen: Callable[[jax.Array], jax.Array]) -> Head:
        """Return the head of the rows that are chosen of the embedding's table, and of its scales."""
        table = self.embed_tokens
        if isinstance(table, QuantizedEmbed):
            return Head(restored(chosen(table.embedding[...]), table.kind), chosen(table.scale[...]))
        return Head(self._rows(chosen(table.embedding[...])), None)

    def _rows(self, rows: jax.Array) -> jax.Array:
        """Return rows of the embedding's table as values."""
        return restored(rows, jnp.dtype(self.runtime.param_dtype)).astype(self.runtime.dtype)

    def _logits(self, hidden: jax.Array, head: Head) -> jax.Array:
        rows = head.rows
        if head.scale is not None:
            # Within a loop, XLA would convert all rows before it, and read them in twice the bytes or more.
            rows, hidden = jax.lax.optimization_barrier((rows, hidden))
        logits = multiply_rows(hidden, rows.astype(hidden.dtype))
        return logits if head.scale is None else logits * head.scale

    def _loop(self, block, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Apply all layers, of which `block` is the part with attention. The cache is a carry: XLA updates it in place,
        where it would write one that is scanned anew."""

        def body(index, carry):
            x, cache = carry
            layer = pick(self.layers, index)
            x, cache = block(x, layer, cache, index)
            return x + layer.mlp(layer.post_attention_layernorm(x)), cache

        return jax.lax.fori_loop(0, self.planner.num_hidden_layers, body, (x, cache))


def _rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate one token of each song, [B, 1, N, H], by tables of its own, [B, 1, H / 2] each."""
    return jax.vmap(apply_rotary)(x[:, None], rope)[:, 0]


def _roll(x: jax.Array, by: jax.Array) -> jax.Array:
    """Rotate axis 1 of x [B, T, ...] by so many places to the right as `by` [B] says."""
    return jax.vmap(lambda row, n: jnp.roll(row, n, axis=0))(x, by)
