"""Scaled dot-product attention in two portable forms behind one function, and the module that uses it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from acestep_jax.config import AttentionConfig
from acestep_jax.models.layers import RMSNorm, apply_rotary, linear
from acestep_jax.sharding import shard

# Queries that share one pass over the keys in full attention: no array of [T, T] scores is ever made.
QUERY_BLOCK = 512


class KeysValues(NamedTuple):
    """Projected and normalised keys and values, [B, S, K, H] each."""

    keys: jax.Array
    values: jax.Array


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None = None,
    causal: bool = False,
    key_mask: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, the softmax in float32.

    Args:
        q: [B, T, N, H].
        k, v: [B, S, K, H]; N is a multiple of K, and query head n reads key head n // (N / K).
        window: key j is visible to query i if |i - j| <= window. Costs O(T * window).
        causal: key j is visible to query i if j <= i. Not together with `window`.
        key_mask: [B, S] bool, False for keys nobody sees.
        dropout: the share of attention weights to drop; none without `dropout_key`.

    Returns:
        [B, T, N, H] in q's dtype. A query that sees no key gets the mean of the values at hand.
    """
    if causal and window is not None:
        raise ValueError("attention is causal or has a window, not both")
    b, t, n, h = q.shape
    groups = k.shape[2]
    q = q.reshape(b, t, groups, n // groups, h)
    if dropout_key is None:
        dropout = 0.0
    if window is not None and k.shape[1] > window + 1:
        y = _banded(q, k, v, window, key_mask, dropout, dropout_key)
    else:
        y = _full(q, k, v, causal, key_mask, dropout, dropout_key)
    return y.reshape(b, t, n, h)


def _softmax_weighted(q, k, v, mask, dropout, dropout_key):
    """q: [..., T, K, G, H]; k, v: [..., S, K, H]; mask broadcasts to [..., K, G, T, S]."""
    scores = jnp.einsum("...tkgh,...skh->...kgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if mask is not None:
        # The lowest finite score, not -inf: a row without any visible key gives the mean, not NaN.
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if dropout:
        keep = jax.random.bernoulli(dropout_key, 1.0 - dropout, weights.shape)
        weights = jnp.where(keep, weights / (1.0 - dropout), 0.0)
    return jnp.einsum("...kgts,...skh->...tkgh", weights.astype(v.dtype), v)


def _full(q, k, v, causal, key_mask, dropout, dropout_key):
    """All keys, a block of queries at a time."""
    t, s = q.shape[1], k.shape[1]

    def attend(q, first, key):
        mask = None if key_mask is None else key_mask[:, None, None, None, :]
        if causal:
            visible = jnp.arange(s) <= first + jnp.arange(q.shape[1])[:, None]
            mask = visible if mask is None else mask & visible
        return _softmax_weighted(q, k, v, mask, dropout, key)

    if t <= QUERY_BLOCK:
        return attend(q, 0, dropout_key)
    num_blocks = -(-t // QUERY_BLOCK)
    size = -(-t // num_blocks)
    blocks = _pad_time(q, 0, num_blocks * size - t).reshape(q.shape[0], num_blocks, size, *q.shape[2:])

    # Recomputing a block in the backward pass keeps its scores out of memory there too.
    @jax.checkpoint
    def block(args):
        i, q = args
        return attend(q, i * size, None if dropout_key is None else jax.random.fold_in(dropout_key, i))

    y = jax.lax.map(block, (jnp.arange(num_blocks), jnp.moveaxis(blocks, 1, 0)))
    return jnp.moveaxis(y, 0, 1).reshape(q.shape[0], num_blocks * size, *q.shape[2:])[:, :t]


def _banded(q, k, v, window, key_mask, dropout, dropout_key):
    """Blocks of `window` queries, each against its own and both neighbouring blocks of keys."""
    b, t = q.shape[:2]
    num_blocks = -(-t // window)
    tail = num_blocks * window - t

    def blocks(x):  # [B, T, ...] -> [B, blocks, window, ...]
        return x.reshape(b, -1, window, *x.shape[2:])

    def neighbourhood(x):  # [B, T, ...] -> [B, blocks, 3 * window, ...]
        x = blocks(_pad_time(x, window, tail + window))
        return jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)

    query = jnp.arange(num_blocks * window).reshape(num_blocks, window, 1)
    key = jnp.arange(num_blocks)[:, None, None] * window + jnp.arange(-window, 2 * window)
    mask = (abs(query - key) <= window) & (key >= 0) & (key < t)  # [blocks, window, 3 * window]
    mask = mask[None, :, None, None]
    if key_mask is not None:
        mask = mask & neighbourhood(key_mask)[:, :, None, None, None, :]
    y = _softmax_weighted(blocks(_pad_time(q, 0, tail)), neighbourhood(k), neighbourhood(v), mask, dropout, dropout_key)
    return y.reshape(b, num_blocks * window, *y.shape[3:])[:, :t]


def _pad_time(x, before, after):
    return jnp.pad(x, ((0, 0), (before, after)) + ((0, 0),) * (x.ndim - 2))


class Attention(nnx.Module):
    """Grouped-query attention with RMS-normalised queries and keys; cross-attention where `context` is given.

        q = rope(norm_q(x Wq)),  k = rope(norm_k(c Wk)),  v = c Wv,  c = context or x,
        y = softmax(q k^T / sqrt(H)) v Wo

    Source: diffusers `AceStepAttention`; Qwen3's attention is the same with `causal`.
    """

    def __init__(self, config: AttentionConfig, *, rngs: nnx.Rngs):
        hidden, bias = config.hidden_size, config.attention_bias
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        self.to_q = linear(hidden, query_size, ("embed", "heads"), config, use_bias=bias, rngs=rngs)
        self.to_k = linear(hidden, key_size, ("embed", "heads"), config, use_bias=bias, rngs=rngs)
        self.to_v = linear(hidden, key_size, ("embed", "heads"), config, use_bias=bias, rngs=rngs)
        self.to_out = linear(query_size, hidden, ("heads", "embed"), config, use_bias=bias, rngs=rngs)
        self.norm_q = RMSNorm(config.head_dim, config.rms_norm_eps, config)
        self.norm_k = RMSNorm(config.head_dim, config.rms_norm_eps, config)

    def _heads(self, x: jax.Array) -> jax.Array:
        return shard(x.reshape(*x.shape[:2], -1, self.head_dim), "batch", "sequence", "heads", None)

    def keys_values(self, context: jax.Array) -> KeysValues:
        """The part of cross-attention that depends on the context alone. context: [B, S, D]."""
        return KeysValues(self.norm_k(self._heads(self.to_k(context))), self._heads(self.to_v(context)))

    def __call__(
        self,
        x: jax.Array,  # [B, T, D]
        context: jax.Array | KeysValues | None = None,  # [B, S, D], or its `keys_values`
        *,
        rope: tuple[jax.Array, jax.Array] | None = None,  # [T, H / 2] each
        window: int | None = None,
        causal: bool = False,
        key_mask: jax.Array | None = None,  # [B, S]
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:  # [B, T, D]
        q = self.norm_q(self._heads(self.to_q(x)))
        if not isinstance(context, KeysValues):
            context = self.keys_values(x if context is None else context)
        k, v = context
        if rope is not None:
            q, k = apply_rotary(q, rope), apply_rotary(k, rope)
        y = attention(
            q,
            k,
            v,
            window=window,
            causal=causal,
            key_mask=key_mask,
            dropout=self.dropout,
            dropout_key=dropout_key,
        )  # [B, T, N, H]
        return self.to_out(y.reshape(*x.shape[:2], -1))
