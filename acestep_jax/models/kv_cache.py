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
    """Keys, rotated by their positions, [L, B, K, H, S], and values, [L, B, K, S, H], of all layers, as `kernels.stack`
    keeps them: in these orders XLA for CPUs multiplies by them as they lie. (Scores by keys in the order of the values
    take 3.5 times as long there.)"""

    keys: jax.Array
    values: jax.Array

    def write(self, new: KeysValues, layer: jax.Array, slot: int | jax.Array) -> "KVCache":
        """Return the cache with keys and values [B, T, K, H] of a layer in the slots `slot` to `slot + T - 1`.

        Where the cache is the carry of a loop, or donated, XLA does this in place.
        """
        keys, values = stored(new.keys).transpose(0, 2, 3, 1)[None], stored(new.values).transpose(0, 2, 1, 3)[None]
        return KVCache(
            _place(jax.lax.dynamic_update_slice(self.keys, keys, (layer, 0, 0, 0, slot))),
            _place(jax.lax.dynamic_update_slice(self.values, values, (layer, 0, 0, slot, 0))),
        )

    def read(self, layer: jax.Array, window: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Return keys [B, K, H, window] and values [B, K, window, H], of `dtype`, of a layer in the first `window`
        slots."""
        at, (_, b, k, h, _) = (layer, 0, 0, 0, 0), self.keys.shape
        keys = jax.lax.dynamic_slice(self.keys, at, (1, b, k, h, window))[0]
        values = jax.lax.dynamic_slice(self.values, at, (1, b, k, window, h))[0]
        return restored(keys, dtype), restored(values, dtype)


def empty_cache(config: AttentionConfig, layers: int, batch: int, slots: int, dtype) -> KVCache:
    """Return a cache of zeros for `batch` songs of up to `slots` tokens, of values of `dtype`."""
    rows, kind = (layers, batch, config.num_key_value_heads), storage_dtype(dtype)
    keys, values = (*rows, config.head_dim, slots), (*rows, slots, config.head_dim)
    return KVCache(_place(jnp.zeros(keys, kind)), _place(jnp.zeros(values, kind)))


def attend_to_cache(q: jax.Array, keys: jax.Array, values: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
    """Compute softmax(q k^T / sqrt(H)) v over the slots `first` to `last`, the softmax in float32.

    Args:
        q: [B, N, H], one token of each song; N is a multiple of K, and query head n reads key head n // (N / K).
        keys, values: [B, K, H, S] and [B, K, S, H].
        first: [B] int32.
        last: scalar int32.

    Returns:
        [B, N, H] in q's dtype.
    """
    b, n, h = q.shape
    slots = jnp.arange(keys.shape[-1])
    visible = (slots >= first[:, None]) & (slots <= last)  # [B, S]
    q = q.reshape(b, keys.shape[1], -1, h)
    scores = jnp.einsum("bkgh,bkhs->bkgs", q, keys, preferred_element_type=jnp.float32) * h**-0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    y = jnp.einsum("bkgs,bksh->bkgh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return y.astype(q.dtype).reshape(b, n, h)


def _place(x: jax.Array) -> jax.Array:
    return shard(x, "layers", "batch", "heads", None, None)
