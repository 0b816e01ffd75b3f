"""The KV cache: keys and values of earlier tokens, which a causal model reads instead of recomputing them.

    carried = cache.carried()                                    what the loop over layers carries
    y, carried = cache.attend(carried, part, x, layer, step)     in each layer
    cache = cache.settled(carried, position)

Axis letters: L layers, B songs, S slots, K key heads, G query heads of a key head, H head dim.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from acestep_jax.distributed import shard
from acestep_jax.models.attention import Attention, KeysValues, Rope
from acestep_jax.models.config import AttentionConfig
from acestep_jax.models.kernels import token_gpu
from acestep_jax.models.kernels.stack import read_dtype, restored, row_major, storage_dtype, stored
from acestep_jax.models.layers import apply_rotary

AXES = "layers", "batch", "heads", None, None  # of keys and of values of all layers, on a mesh


class Step(NamedTuple):
    """What all layers share when they process one token of each song.

    rope: cos and sin of its position, [B, 1, H / 2] each.
    first: [B] int32, the first slot that it attends to.
    position: scalar int32, its own slot, the last that it attends to.
    window: static, the number of slots that are read.
    """

    rope: Rope
    first: jax.Array
    position: jax.Array
    window: int


class KVCache(NamedTuple):
    """Keys, rotated by their positions, [L, B, K, H, S], and values, [L, B, K, S, H], of all layers, stored as in
    `kernels.stack`. In these layouts XLA for CPUs multiplies by them without a copy; scores from keys in the layout of
    the values take 3.5 times as long there."""

    keys: jax.Array
    values: jax.Array

    def write(self, new: KeysValues, layer: jax.Array, slot: int | jax.Array) -> "KVCache":
        """Return the cache with keys and values [B, T, K, H] of a layer in the slots `slot` to `slot + T - 1`.

        XLA updates the cache in place if it is the carry of a loop or donated.
        """
        keys, values = stored(new.keys).transpose(0, 2, 3, 1)[None], stored(new.values).transpose(0, 2, 1, 3)[None]
        return KVCache(
            _place(jax.lax.dynamic_update_slice(self.keys, keys, (layer, 0, 0, 0, slot))),
            _place(row_major(jax.lax.dynamic_update_slice(self.values, values, (layer, 0, 0, slot, 0)), AXES)),
        )

    def read(self, layer: jax.Array, window: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Return the keys [B, K, H, window] and values [B, K, window, H] of a layer in the first `window` slots, as
        `dtype`."""
        at, (_, b, k, h, _) = (layer, 0, 0, 0, 0), self.keys.shape
        keys = jax.lax.dynamic_slice(self.keys, at, (1, b, k, h, window))[0]
        values = jax.lax.dynamic_slice(self.values, at, (1, b, k, window, h))[0]
        return restored(keys, dtype), restored(values, dtype)

    def carried(self) -> "KVCache":
        """Return what a loop over layers carries: the cache, which XLA updates in place."""
        return self

    def attend(
        self, carried: Any, part: Attention, x: jax.Array, layer: jax.Array, step: Step
    ) -> tuple[jax.Array, "KVCache"]:
        """Compute the attention of a token to the slots up to its own.

        Args:
            carried: of the layer before.
            part: the layer's attention, of which the last product is left to the caller.
            x: [B, 1, D], its input.
            step: what all layers share.

        Returns:
            [B, N, H] in x's dtype, and what the next layer is given.
        """
        q, new = token_heads(part, x, step.rope)
        carried = carried.write(new, layer, step.position)
        keys, values = carried.read(layer, step.window, q.dtype)
        return attend_to_cache(q, keys, values, step.first, step.position), carried

    def settled(self, carried: Any, position: jax.Array) -> "KVCache":
        """Return the cache after a token, with what the loop over layers carried in the slot `position`."""
        return carried

    def grown(self, slots: int) -> "KVCache":
        """Return the cache, which has all slots from the start."""
        return self

    def split(self, dtype: jnp.dtype, *, plain: bool = False) -> "SplitCache | KernelCache":
        """Return the cache with separate arrays for each layer.

        Args:
            dtype: of the values.
            plain: whether to do without the kernel that a GPU has.
        """
        parts = ((restored(x[i], dtype).astype(read_dtype(dtype)) for i in range(x.shape[0])) for x in self)
        kind = KernelCache if not plain and token_gpu.suits(*self.keys.shape[-2:]) else SplitCache
        return kind(*(tuple(part) for part in parts))


class SplitCache(NamedTuple):
    """Keys [B, K, H, S] and values [B, K, S, H] of each layer as separate arrays, on a CPU in float32: the form in
    which a CPU or GPU reads them in place, with the interface of `KVCache`.

    Out of the stack of all layers, XLA for CPUs and GPUs copies a layer before it multiplies by it. On a CPU, it also
    copies an array that is read after it was written in the same step, or of which fewer slots are read than there are,
    or that holds half precision as bits. So a step only reads the layers, attends to the new token separately, and
    writes what is new at its end; and the cache has as many slots as the window, with which it grows.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    def carried(self) -> KeysValues:
        """Return where a loop over layers gathers the new keys and values, [L, B, K, H] each."""
        b, k, h, _ = self.keys[0].shape
        empty = jnp.zeros((len(self.keys), b, k, h), self.keys[0].dtype)
        return KeysValues(empty, empty)

    def attend(
        self, carried: Any, part: Attention, x: jax.Array, layer: jax.Array, step: Step
    ) -> tuple[jax.Array, KeysValues]:
        """Compute what `KVCache.attend` does, with a window of all slots."""
        q, new = token_heads(part, x, step.rope)
        (b, n, h), size, kind = q.shape, _slots(self, step.window), self.keys[0].dtype
        key, value = (x[:, 0].astype(kind) for x in new)  # [B, K, H]
        carried = KeysValues(*(_put(whole, x, layer) for whole, x in zip(carried, (key, value), strict=True)))
        slots = jnp.arange(size)
        is_new = slots == step.position
        hidden = (slots < step.first[:, None]) | (slots > step.position)  # [B, S]
        heads = q.astype(kind).reshape(b, key.shape[1], -1, h)
        scores = _by_layer("bkgh,bkhs->bkgs", heads, self.keys, layer)
        own = (heads.astype(jnp.float32) * key[:, :, None]).sum(-1, keepdims=True)
        scores = jnp.where(is_new, own, scores) * h**-0.5
        weights = jax.nn.softmax(jnp.where(hidden[:, None, None], jnp.finfo(jnp.float32).min, scores), axis=-1)
        y = _by_layer("bkgs,bksh->bkgh", jnp.where(is_new, 0, weights).astype(kind), self.values, layer)
        y += jnp.where(is_new, weights, 0).sum(-1, keepdims=True) * value[:, :, None]
        return y.astype(q.dtype).reshape(b, n, h), carried

    def settled(self, carried: Any, position: jax.Array) -> "SplitCache":
        """Return the cache with the new keys and values of all layers in the slot `position`, written in place."""
        zero = jnp.zeros_like(position)
        keys = (
            jax.lax.dynamic_update_slice(old, new[..., None], (zero, zero, zero, position))
            for old, new in zip(self.keys, carried.keys, strict=True)
        )
        values = (
            jax.lax.dynamic_update_slice(old, new[:, :, None], (zero, zero, position, zero))
            for old, new in zip(self.values, carried.values, strict=True)
        )
        return SplitCache(tuple(keys), tuple(values))

    def grown(self, slots: int) -> "SplitCache":
        """Return the cache with so many slots, of which what is added is zeros."""
        return SplitCache(*_padded(self, slots))


class KernelCache(NamedTuple):
    """A `SplitCache` on a GPU that has a kernel for the attention of a token, `kernels.token_gpu`. It reads only the
    blocks of slots that are filled, and writes the new key and value of its layer in place."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    def carried(self) -> "KernelCache":
        """Return what a loop over layers carries: the cache."""
        return self

    def attend(
        self, carried: Any, part: Attention, x: jax.Array, layer: int, step: Step
    ) -> tuple[jax.Array, "KernelCache"]:
        """Compute what `KVCache.attend` does, with a window of all slots; layer: static."""
        _slots(self, step.window)
        y, *new = token_gpu.attend(
            part.queries_keys_values(x)[:, 0],
            (part.norm_q.scale[...], part.norm_k.scale[...]),
            (step.rope[0][:, 0], step.rope[1][:, 0]),
            carried.keys[layer],
            carried.values[layer],
            step.first,
            step.position,
            eps=part.norm_q.eps,
        )
        made = ((*old[:layer], x, *old[layer + 1 :]) for old, x in zip(carried, new, strict=True))
        return y, KernelCache(*made)

    def settled(self, carried: Any, position: jax.Array) -> "KernelCache":
        """Return the cache after a token: what the loop over layers carried."""
        return carried

    def grown(self, slots: int) -> "KernelCache":
        """Return the cache with so many slots, of which what is added is zeros."""
        return KernelCache(*_padded(self, slots))


Cache = KVCache | SplitCache | KernelCache


def _slots(cache: SplitCache | KernelCache, window: int) -> int:
    """Return the number of slots of a cache; raise ValueError if the window is another."""
    if window != (size := cache.keys[0].shape[-1]):
        raise ValueError(f"a split cache of {size} slots is read as a whole, not {window} of them")
    return size


def _padded(cache: SplitCache | KernelCache, slots: int) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Return the keys and the values with zeros up to `slots` slots."""
    if not (more := slots - cache.keys[0].shape[-1]):
        return cache
    add = lambda x, axis: jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])  # noqa: E731
    return tuple(add(x, 3) for x in cache.keys), tuple(add(x, 2) for x in cache.values)


def token_heads(part: Attention, x: jax.Array, rope: Rope) -> tuple[jax.Array, KeysValues]:
    """Return the queries [B, N, H] of one token of each song, x [B, 1, D], and its keys and values [B, 1, K, H].

    rope: cos and sin of the token's position in each song, [B, 1, H / 2] each.
    """
    q, k, v = part.projections(x, None, time=None)
    turned = lambda x: jax.vmap(apply_rotary)(x[:, None], rope)[:, 0]  # noqa: E731
    return turned(q)[:, 0], KeysValues(turned(k), v)


def empty_cache(config: AttentionConfig, layers: int, batch: int, slots: int, dtype) -> KVCache:
    """Return a cache of zeros for `batch` songs of up to `slots` tokens, with values of `dtype`."""
    rows, kind = (layers, batch, config.num_key_value_heads), storage_dtype(dtype)
    keys, values = (*rows, config.head_dim, slots), (*rows, slots, config.head_dim)
    return KVCache(_place(jnp.zeros(keys, kind)), _place(jnp.zeros(values, kind)))


def attend_to_cache(q: jax.Array, keys: jax.Array, values: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
    """Compute softmax(q k^T / sqrt(H)) v over the slots `first` to `last`, with the softmax in float32.

    Args:
        q: [B, N, H], one token of each song; N is a multiple of K, and query head n reads key head n // (N / K).
        keys, values: [B, K, H, S] and [B, K, S, H].
        first: [B] int32, first visible slot of each song.
        last: scalar int32, last visible slot, inclusive.

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
    return shard(x, *AXES)


def _put(stack: jax.Array, x: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, x, layer, 0)


def _by_layer(equation: str, x: jax.Array, layers: tuple[jax.Array, ...], layer: jax.Array) -> jax.Array:
    """Return the product, float32, of x and the array of a layer, a counter of `kernels.stack.loop`."""
    product = lambda array, x: jnp.einsum(equation, x, array, preferred_element_type=jnp.float32)  # noqa: E731
    if isinstance(layer, int):
        return product(layers[layer], x)
    return jax.lax.switch(layer, [functools.partial(product, array) for array in layers], x)
