"""Scaled dot-product attention as one function, whatever the backend or mesh, and the module that uses it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from acestep_jax.distributed import log_once, partition_spec, shard
from acestep_jax.models.config import AttentionConfig
from acestep_jax.models.kernels import heads_gpu
from acestep_jax.models.kernels.attention import attend, choose_kernel
from acestep_jax.models.kernels.heads import Rope, keep_layout, normalise, suits
from acestep_jax.models.kernels.products import to_float16
from acestep_jax.models.kernels.unstacked import FusedLinear
from acestep_jax.models.layers import RMSNorm, apply_rotary, linear
from acestep_jax.models.runtime import DEFAULT_RUNTIME, Runtime


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
    key_lengths: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    kernel: str = "auto",
    products: str | None = None,
) -> jax.Array:
    """Compute softmax(q k^T / sqrt(H)) v with the softmax in float32, without an array of [T, S] scores.

    Under `jax.set_mesh` it runs within `jax.shard_map`: the batch is split over data and fsdp, heads over tensor, and
    queries over sequence. With queries split, attention with a window exchanges a halo of keys between neighbouring
    devices, and full attention gathers all keys.

    Args:
        q: [B, T, N, H].
        k, v: [B, S, K, H]; N is a multiple of K, and query head n reads key head n // (N / K).
        window: key j is visible to query i if |i - j| <= window, which costs O(T * window) and requires S = T.
        causal: key j is visible to query i if j <= i. Not together with `window`.
        key_lengths: [B] int32, number of valid keys of each item; later keys are padding and masked. None: S.
        dropout: dropout rate of the attention weights; it has no effect without `dropout_key`.
        kernel: "xla", plain JAX; "cudnn", for GPUs, with a Pallas kernel if there is a window; "splash", Pallas on
            TPUs; "auto", the fastest of these for the backend. Causal attention and dropout always use plain JAX.
            "cudnn" without a window and "splash" have no forward-mode derivative: choose "xla" for `jax.jvp` on an
            accelerator.
        products: see `Runtime.products`.

    Returns:
        [B, T, N, H] in q's dtype. The result of a query that sees no key is arbitrary, but finite.

    Raises:
        InputError: if the kernel is unknown, or does not support this backend or dtype.
    """
    if causal and window is not None:
        raise ValueError("attention is causal or has a window, not both")
    if window is not None and window >= k.shape[1] - 1:
        window = None  # it masks nothing
    if dropout_key is None:
        dropout = 0.0
    if products is not None:
        # Only values need a scale, since queries and keys are normalised. The result is a mean of values, so it has the
        # same scale.
        half, scale = to_float16(v, (1, 3))  # scale: [B, 1, K, 1]
        y = attention(
            q.astype(products),
            k.astype(products),
            half,
            window=window,
            causal=causal,
            key_lengths=key_lengths,
            dropout=dropout,
            dropout_key=dropout_key,
            kernel=kernel,
        )
        return y.astype(q.dtype) * jnp.repeat(scale, q.shape[2] // k.shape[2], axis=2).astype(q.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    local = functools.partial(
        attend,
        window=window,
        causal=causal,
        dropout=dropout,
        dropout_key=dropout_key if dropout else None,
        kernel=choose_kernel(kernel, q, k),
    )
    # With dropout, XLA partitions the computation, so that the same weights are dropped on every mesh.
    if mesh.empty or mesh.size == 1 or dropout:
        return local(q, k, v, key_lengths)
    return _sharded(local, mesh, q, k, v, key_lengths, window, causal)


def _sharded(local, mesh, q, k, v, key_lengths, window, causal):
    b, t, n, _ = q.shape
    batch, sequence, heads, _ = partition_spec(("batch", "sequence", "heads", None), q.shape, mesh)
    if sequence and window is not None:
        shards = mesh.shape["sequence"]
        if t // shards < window:
            log_once(f"{t} tokens on sequence={shards} are fewer than the window of {window} each: replicated")
            sequence = None
        elif key_lengths is None:  # a device does not know the total number of keys
            key_lengths = jnp.full((b,), t)

    key_heads = heads if heads and k.shape[2] % mesh.shape["tensor"] == 0 else None
    local_heads = n // mesh.shape["tensor"] if heads else n
    # Query heads can be split further than key heads if all query heads of a device read the same key head.
    if heads and not key_heads and (n // k.shape[2]) % local_heads:
        log_once(f"{n} query and {k.shape[2]} key heads do not divide by tensor={mesh.shape['tensor']}: replicated")
        heads, local_heads = None, n

    def run(q, k, v, key_lengths):
        if heads and not key_heads:
            index = jax.lax.axis_index("tensor") * local_heads // (n // k.shape[2])
            k, v = (jax.lax.dynamic_slice_in_dim(x, index, 1, axis=2) for x in (k, v))
        first_query, halo = 0, None
        if sequence:
            first_query = jax.lax.axis_index("sequence") * q.shape[1]
            if window is not None:
                halo = functools.partial(_exchange_halo, window=window, shards=mesh.shape["sequence"])
        return local(q, k, v, key_lengths, halo=halo, first_query=first_query)

    queries = P(batch, sequence, heads, None)
    keys = P(batch, sequence if window is not None else None, key_heads, None)
    lengths = None if key_lengths is None else P(batch)
    run = jax.shard_map(run, in_specs=(queries, keys, keys, lengths), out_specs=queries, check_vma=False)
    return run(q, k, v, key_lengths)


def _exchange_halo(x: jax.Array, window: int, shards: int) -> jax.Array:
    """Extend one device's [B, T, K, H] by `window` keys from each neighbour, or by zeros at the ends of the mesh."""
    before = jax.lax.ppermute(x[:, -window:], "sequence", [(i, i + 1) for i in range(shards - 1)])
    after = jax.lax.ppermute(x[:, :window], "sequence", [(i + 1, i) for i in range(shards - 1)])
    return jnp.concatenate([before, x, after], axis=1)


class Attention(nnx.Module):
    """Grouped-query attention with RMS-normalised queries and keys; cross-attention if `context` is given.

        q = rope(norm_q(x Wq)),  k = rope(norm_k(c Wk)),  v = c Wv,  c = context or x,
        y = softmax(q k^T / sqrt(H)) v Wo

    Source: diffusers `AceStepAttention`; with `causal`, it is Qwen3's attention.
    """

    def __init__(self, config: AttentionConfig, *, runtime: Runtime = DEFAULT_RUNTIME, rngs: nnx.Rngs):
        hidden, bias = config.hidden_size, config.attention_bias
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        self.kernel, self.products = runtime.attention, runtime.products
        self.to_q = linear(hidden, query_size, ("embed", "heads"), runtime, use_bias=bias, rngs=rngs)
        self.to_k = linear(hidden, key_size, ("embed", "heads"), runtime, use_bias=bias, rngs=rngs)
        self.to_v = linear(hidden, key_size, ("embed", "heads"), runtime, use_bias=bias, rngs=rngs)
        self.to_out = linear(query_size, hidden, ("heads", "embed"), runtime, use_bias=bias, rngs=rngs)
        self.norm_q = RMSNorm(config.head_dim, config.rms_norm_eps, runtime)
        self.norm_k = RMSNorm(config.head_dim, config.rms_norm_eps, runtime)

    def _heads(self, x: jax.Array, time: str | None) -> jax.Array:
        return shard(x.reshape(*x.shape[:2], -1, self.head_dim), "batch", time, "heads", None)

    def _normalised(self, x: jax.Array, norm: RMSNorm, time: str | None, rope: Rope | None) -> jax.Array:
        if self.kernel == "xla" or not suits(self.head_dim):
            x = norm(self._heads(x, time))
            return x if rope is None else apply_rotary(x, rope)
        x = self._heads(keep_layout(x), time)
        local = functools.partial(normalise, eps=norm.eps)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return local(x, norm.scale[...], rope)
        spec = partition_spec(("batch", time, "heads", None), x.shape, mesh)
        tables = None if rope is None else (P(spec[1]), P(spec[1]))
        sharded = jax.shard_map(local, in_specs=(spec, P(), tables), out_specs=spec, check_vma=False)
        return sharded(x, norm.scale[...], rope)

    def queries(self, x: jax.Array, *, time: str | None = None, rope: Rope | None = None) -> jax.Array:
        """Project x [B, T, D] to normalised queries [B, T, N, H].

        Args:
            time: logical name of the time axis on a mesh, "sequence" if it may be split; None: it is replicated.
            rope: cos and sin of the rotation, [T, H / 2] each; None: no rotation.
        """
        return self._normalised(self.to_q(x), self.norm_q, time, rope)

    def keys_values(self, context: jax.Array, *, time: str | None = None, rope: Rope | None = None) -> KeysValues:
        """Project a context [B, S, D] to normalised keys and to values. Other arguments: see `queries`."""
        keys = self._normalised(self.to_k(context), self.norm_k, time, rope)
        return KeysValues(keys, self._heads(self.to_v(context), time))

    def queries_keys_values(self, x: jax.Array) -> jax.Array:
        """Project x [B, T, D] to queries, keys and values side by side, [B, T, (N + 2 K) * H], not normalised."""
        if isinstance(self.to_q, FusedLinear):
            return self.to_q.linear(x)
        return jnp.concatenate([linear(x) for linear in (self.to_q, self.to_k, self.to_v)], -1)

    def projections(
        self, x: jax.Array, rope: Rope | None, *, time: str | None = "sequence"
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Project x [B, T, D] to queries and keys, both normalised, and values. Other arguments: see `queries`."""
        if isinstance(self.to_q, FusedLinear):  # with to_k and to_v
            if rope is None:
                q, k, v = self.to_q(x)
                q, k = self._normalised(q, self.norm_q, time, None), self._normalised(k, self.norm_k, time, None)
                return q, k, self._heads(v, time)
            scales, ends, eps = (self.norm_q.scale[...], self.norm_k.scale[...]), self.to_q.ends, self.norm_q.eps
            return heads_gpu.split(
                self.queries_keys_values(x), *scales, rope, ends=ends, eps=eps, plain=self.kernel == "xla"
            )
        k, v = self.keys_values(x, time=time, rope=rope)
        return self.queries(x, time=time, rope=rope), k, v

    def __call__(
        self,
        x: jax.Array,  # [B, T, D]
        context: jax.Array | KeysValues | None = None,  # [B, S, D], or its `keys_values`
        *,
        rope: Rope | None = None,  # [T, H / 2] each, for self-attention
        window: int | None = None,
        causal: bool = False,
        key_lengths: jax.Array | None = None,  # [B]
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:  # [B, T, D]
        if context is None:
            q, k, v = self.projections(x, rope)
        else:
            q = self.queries(x, time="sequence", rope=rope)
            k, v = context if isinstance(context, KeysValues) else self.keys_values(context)
        y = attention(
            q,
            k,
            v,
            window=window,
            causal=causal,
            key_lengths=key_lengths,
            dropout=self.dropout,
            dropout_key=dropout_key,
            kernel=self.kernel,
            products=self.products,
        )  # [B, T, N, H]
        return self.to_out(y.reshape(*x.shape[:2], -1))
