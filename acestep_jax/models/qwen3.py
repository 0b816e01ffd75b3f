"""Qwen3 as the text encoder (last hidden states of the prompt) and as the planner (a causal language model).

The planner's vocabulary is text, then audio codes: `first_code + N` is code N. It computes logits from the embedding,
for either text or codes, because a plan never needs both at once.
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
from acestep_jax.models.kernels.stack import is_split, loop, multiply_rows, pick, restored, split, stored
from acestep_jax.models.kernels.unstacked import SHARED_INPUT
from acestep_jax.models.kv_cache import Cache, KVCache, Step, empty_cache
from acestep_jax.models.layers import rotary_embedding, rotary_frequencies
from acestep_jax.models.quantization import QuantizedEmbed
from acestep_jax.models.runtime import DEFAULT_RUNTIME, Runtime

Carried = TypeVar("Carried")  # by the loop over layers


class Head(NamedTuple):
    """Rows of the embedding that logits are computed from, [V, D], and their scales, [V], if they are quantised."""

    rows: jax.Array
    scale: jax.Array | None


HEAD_MULTIPLE = 128  # rows of the head of codes: divides over a mesh, and fills tiles


class Qwen3Model(Encoder):
    """Token ids -> hidden states after the final norm. Causal, so right padding does not affect earlier tokens.

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
        hidden, cache = model.decode(token, position, start, cache, window=window)      # once per token
        logits = model.code_logits(hidden)  or  model.text_logits(hidden)

    Prompts of several songs are padded on the left: the tokens of song b before `start[b]` are padding. So all songs
    write their next token to the same slot, and a token's position is its index minus `start`.

    Source: transformers `Qwen3ForCausalLM`.
    """

    def __init__(self, config: PlannerConfig, *, runtime: Runtime = DEFAULT_RUNTIME, rngs: nnx.Rngs):
        super().__init__(config, runtime=runtime, rngs=rngs)
        self.planner = config

    def split(self) -> "Qwen3ForCausalLM":
        """Return this model with its weights in the layout that decoding reads fastest, see `models.kernels.stack`. It
        is for inference only and cannot be saved."""
        self.layers = split(self.layers, SHARED_INPUT)
        table = self.embed_tokens
        table.embedding = nnx.Param(stored(table.embedding[...]))
        return self

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Return the embeddings of tokens [B, T] int32, [B, T, D]."""
        table = self.embed_tokens
        if isinstance(table, QuantizedEmbed):
            return table(tokens)
        return self._rows(jnp.take(table.embedding[...], tokens, axis=0))

    def init_cache(self, batch: int, slots: int, window: int | None = None) -> KVCache:
        """Return an empty cache for `batch` songs of up to `slots` tokens, prompts included.

        Args:
            window: how many of the slots are needed at first, see `grow`; all of them by default.
        """
        config = self.planner
        if window is not None and is_split(self.layers):
            slots = window
        return empty_cache(config, config.num_hidden_layers, batch, slots, jnp.dtype(self.runtime.dtype))

    def grow(self, cache: Cache, window: int) -> Cache:
        """Return the cache that `decode` is given for a wider window. Most have all slots from the start."""
        return cache.grown(window)

    def prefill(self, tokens: jax.Array, start: jax.Array, cache: KVCache) -> tuple[jax.Array, Cache]:
        """Read prompts into slots 0 to P - 1 of a cache.

        Args:
            tokens: [B, P] int32, padded on the left.
            start: [B] int32, index of the first token that is not padding.
            cache: a cache of at least P slots.

        Returns:
            The hidden state of the last token, [B, D], and the cache.
        """
        length = tokens.shape[1]
        rope = rotary_embedding(length, self.config.head_dim, self.config.rope_theta)

        def block(x, layer: EncoderLayer, cache, index):
            normed, part = layer.input_layernorm(x), layer.self_attn
            q, k, v = part.projections(normed, rope)
            y = attention(q, k, v, causal=True, kernel=part.kernel, products=part.products)
            cache = cache.write(KeysValues(_roll(k, start), _roll(v, start)), index, 0)
            return x + part.to_out(y.reshape(*x.shape[:2], -1)), cache

        # Rolled to start at 0, rows are padded on the right, where causal attention masks the padding.
        x = self.embed(_roll(tokens, -start))
        x, cache = self._loop(block, x, cache)
        last = jnp.take_along_axis(x, (length - 1 - start)[:, None, None], axis=1)[:, 0]
        plain = self.runtime.attention == "xla"
        return self.norm(last), cache.split(x.dtype, plain=plain) if is_split(self.layers) else cache

    def decode(
        self, token: jax.Array, position: jax.Array, start: jax.Array, cache: Cache, *, window: int
    ) -> tuple[jax.Array, Cache]:
        """Process the next token of each song.

        Args:
            token: [B] int32.
            position: scalar int32, the slot that the token is written to; all slots before it are filled.
            start: see `prefill`.
            window: static; number of slots to attend to, more than `position`. Fewer slots cost less.

        Returns:
            The hidden state of the token, [B, D], and the cache.
        """
        config = self.planner
        phase = (position - start).astype(jnp.float32)[:, None] * rotary_frequencies(config.head_dim, config.rope_theta)
        rope = jnp.cos(phase)[:, None], jnp.sin(phase)[:, None]  # [B, 1, H / 2]
        step = Step(rope, start, position, window)

        def block(x, layer: EncoderLayer, carried, index):
            part, normed = layer.self_attn, layer.input_layernorm(x)
            y, carried = cache.attend(carried, part, normed, index, step)
            return x + part.to_out(y.reshape(*x.shape[:2], -1)), carried

        x, carried = self._loop(block, self.embed(token[:, None]), cache.carried())
        return self.norm(x)[:, 0], cache.settled(carried, position)

    def hidden_states(self, tokens: jax.Array, start: jax.Array) -> jax.Array:
        """Return the hidden states [B, T, D] of all tokens [B, T], padded on the left, see `prefill`. The states of
        padding are arbitrary."""
        rope = rotary_embedding(tokens.shape[1], self.config.head_dim, self.config.rope_theta)

        def block(x, layer: EncoderLayer, cache, index):
            return x + layer.self_attn(layer.input_layernorm(x), rope=rope, causal=True), cache

        x, _ = self._loop(block, self.embed(_roll(tokens, -start)), None)
        return _roll(self.norm(x), start)

    def text_logits(self, hidden: jax.Array, head: Head | None = None) -> jax.Array:
        """Return the logits of the text tokens, [..., first_code] float32.

        Args:
            head: `text_head()`, to compute it only once, before a loop.
        """
        logits = self._logits(hidden, self.text_head() if head is None else head)
        return logits[..., : self.planner.first_code]

    def text_head(self) -> Head:
        """Return the rows of the embedding for `text_logits`, [first_code, D]. If that is odd, one row more: two cores
        read an even number faster, see `multiply_rows`."""
        count = self.planner.first_code
        return self._head(lambda table: table[: count + count % 2])

    def code_logits(self, hidden: jax.Array, head: Head | None = None) -> jax.Array:
        """Return the logits of the end of the turn and of the audio codes, [..., padded] float32.

        Column 0 is the end, column 1 + N is code N; the padding to a multiple of 128 is -inf.

        Args:
            head: `code_head()`, to compute it only once, before a loop.
        """
        logits = self._logits(hidden, self.code_head() if head is None else head)
        valid = jnp.arange(logits.shape[-1]) <= self.planner.num_codes
        return jnp.where(valid, logits, -jnp.inf)

    def code_head(self) -> Head:
        """Return the rows of the embedding for `code_logits`, [padded, D]."""
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
        """Return the head of the rows that `chosen` takes from the embedding table and its scales."""
        table = self.embed_tokens
        if isinstance(table, QuantizedEmbed):
            return Head(restored(chosen(table.embedding[...]), table.kind), chosen(table.scale[...]))
        return Head(self._rows(chosen(table.embedding[...])), None)

    def _rows(self, rows: jax.Array) -> jax.Array:
        """Return rows of the embedding table as values."""
        return restored(rows, jnp.dtype(self.runtime.param_dtype)).astype(self.runtime.dtype)

    def _logits(self, hidden: jax.Array, head: Head) -> jax.Array:
        rows = head.rows
        if head.scale is not None:
            # Without this, XLA would convert all rows before a loop, and read twice the bytes or more in it.
            rows, hidden = jax.lax.optimization_barrier((rows, hidden))
        logits = multiply_rows(hidden, rows)
        return logits if head.scale is None else logits * head.scale

    def _loop(self, block, x: jax.Array, cache: Carried) -> tuple[jax.Array, Carried]:
        """Apply all layers, with `block` as the attention part. The cache is a carry, so XLA updates it in place; a
        scanned cache would be written anew."""

        def body(index, carry):
            x, cache = carry
            layer: EncoderLayer = pick(self.layers, index)
            x, cache = block(x, layer, cache, index)
            return x + layer.mlp(layer.post_attention_layernorm(x)), cache

        return loop(self.planner.num_hidden_layers, body, (x, cache), self.layers)


def _roll(x: jax.Array, by: jax.Array) -> jax.Array:
    """Roll axis 1 of x [B, T, ...] to the right, by `by` [B] places."""
    return jax.vmap(lambda row, n: jnp.roll(row, n, axis=0))(x, by)
