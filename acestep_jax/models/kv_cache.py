"""Keys and values of earlier tokens, which a causal model reads instead of computing them again.

Axis letters: L layers, B songs, S slots, K key heads, G query heads of a key head, H head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from acestep_jax.distributed import shard
from acestep_jax.models.attention import KeysValues
from acestep_jax.models.config import AttentionConfig
from acestep_jax.models.kernels.stack import restored, storage_dtype, stored


class KVCache(NamedTuple):
    """Keys, rotated by their positions, and values of all layers, [L, B, S, K, H] each, as `kernels.stack` keeps
    them."""

    keys: jax.Array
    values: jax.Array

    def write(self, new: KeysValues, layer: jax.Array, slot: int | jax.Array) -> "KVCache":
        """Return the cache with keys and values [B, T, K, H] of a layer in the slots `slot` to `slot + T - 1`.

        Where the cache is the carry of a loop, or donated, XLA does this in place.
        """
        at = (layer, 0, slot, 0, 0)
        keys, values = (stored(x)[None] for x in new)
        return KVCache(
            _place(jax.lax.dynamic_update_slice(self.keys, keys, at)),
            _place(jax.lax.dynamic_update_slice(self.values, values, at)),
        )

    def read(self, layer: jax.Array, window: int, dtype: jnp.dtype) -> KeysValues:
        """Return keys and values [B, window, K, H], of `dtype`, of a layer in the first `window` slots."""
        size = (1, self.keys.shape[1], window, *self.keys.shape[3:])
        keys, values = (jax.lax.dynamic_slice(x, (layer, 0, 0, 0, 0), size)[0] for x in self)
        return KeysValues(restored(keys, dtype), restored(values, dtype))


def empty_cache(config: AttentionConfig, layers: int, batch: int, slots: int, dtype) -> KVCache:
    """Return a cache of zeros for `batch` songs of up to `slots` tokens, of values of `dtype`."""
    shape = (layers, batch, slots, config.num_key_value_heads, config.head_dim)
    kind = storage_dtype(dtype)
    return KVCache(_place(jnp.zeros(shape, kind)), _place(jnp.zeros(shape, kind)))


def attend_to_cache(q: jax.Array, cached: KeysValues, first: jax.Array, last: jax.Array) -> jax.Array:
    """Compute softmax(q k^T / sqrt(H)) v over the slots `first` to `last`, the softmax in float32.

    Args:
        q: [B, N, H], one token of each song; N is a multiple of K, and query head n reads key head n // (N / K).
        cached: [B, S, K, H] each.
        first: [B] int32.
        last: scalar int32.

    Returns:
        [B, N, H] in q's dtype.
    """
    b, n, h = q.shape
    keys, values = cached
    slots = jnp.arange(keys.shape[1])
    visible = (slots >= first[:, None]) & (slots <= last)  # [B, S]
    q = q.reshape(b, keys.shape[2], -1, h)
    scores = jnp.einsum("bkgh,bskh->bkgs", q, keys, preferred_element_type=jnp.float32) * h**-0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    y = jnp.einsum("bkgs,bskh->bkgh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return y.astype(q.dtype).reshape(b, n, h)


def _place(x: jax.Array) -> jax.Array:
    return shard(x, "layers", "batch", None, "heads", None)
