"""The parts that the networks share: parameters, norm, SwiGLU, time embedding, rotary embedding, layer stacks.

Axis letters: B batch, T frames or tokens, S condition tokens, N query heads, K key heads, H head dim, D hidden,
F mlp, L layers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.custom_derivatives import SymbolicZero

from acestep_jax.distributed import platform, shard
from acestep_jax.models.config import NetworkConfig

# The name, for `jax.checkpoint`, of results besides products with weights that cost much to compute again.
KEPT = "kept"

# By `NetworkConfig.remat`, what the backward pass finds instead of computing it again: products with weights and what
# is named KEPT, the products alone, or nothing. Elementwise work costs less to do again than to keep, and a layer's
# weights, sliced out of their stack, would be kept as a copy of all weights.
_PRODUCTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_SAVEABLE = {
    "none": jax.checkpoint_policies.save_from_both_policies(
        _PRODUCTS, jax.checkpoint_policies.save_only_these_names(KEPT)
    ),
    "dots": _PRODUCTS,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def parameter(value: jax.Array, *axes: str | None) -> nnx.Param:
    """A parameter with logical axis names. They take effect where it is loaded or created on a mesh, not here."""
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def linear(
    in_features: int,
    out_features: int,
    axes: tuple[str | None, str | None],
    config: NetworkConfig,
    *,
    use_bias: bool = False,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """y = x W + b with W: [in, out], computed in the config's dtype. `axes`: the logical names of W's axes."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_metadata={"out_sharding": axes, "eager_sharding": False},
        bias_metadata={"out_sharding": axes[1:], "eager_sharding": False},
        dot_general=dot_general,
        rngs=rngs,
    )


def dot_general(x: jax.Array, w: jax.Array, dimensions, **options) -> jax.Array:
    """`jax.lax.dot_general`. On a CPU, half-precision products are told to give float32 and then rounded: the same
    result, but only so does XLA use the processor's own bfloat16 products, at more than twice the rate."""
    if x.dtype == jnp.float32 or platform() != "cpu":
        return jax.lax.dot_general(x, w, dimensions, **options)
    options["preferred_element_type"] = jnp.float32
    return jax.lax.dot_general(x, w, dimensions, **options).astype(x.dtype)


class RMSNorm(nnx.Module):
    """y = w * x / rms(x) over the last axis.

    Statistics in float32, then back to x's dtype, then the scale: the order of operations of Qwen3's and diffusers'
    norms, and so bit-equal to theirs in bfloat16.
    """

    def __init__(self, dim: int, eps: float, config: NetworkConfig):
        self.eps = eps
        self.scale = parameter(jnp.ones((dim,), config.param_dtype), None)

    def __call__(self, x: jax.Array) -> jax.Array:
        f = x.astype(jnp.float32)
        f = f * jax.lax.rsqrt(jnp.mean(f * f, -1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * f.astype(x.dtype)


class SwiGLU(nnx.Module):
    """y = (silu(x W_gate) * (x W_up)) W_down."""

    def __init__(self, hidden_size: int, intermediate_size: int, config: NetworkConfig, *, rngs: nnx.Rngs):
        self.gate_proj = linear(hidden_size, intermediate_size, ("embed", "mlp"), config, rngs=rngs)
        self.up_proj = linear(hidden_size, intermediate_size, ("embed", "mlp"), config, rngs=rngs)
        self.down_proj = linear(intermediate_size, hidden_size, ("mlp", "embed"), config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, T, D]
        hidden = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(shard(hidden, "batch", "sequence", "mlp"))


def sinusoid(t: jax.Array, channels: int = 256, max_period: float = 10000.0) -> jax.Array:
    """[B] -> [B, channels] float32: cosines, then sines, of t at `channels / 2` geometric frequencies.

    The frequencies are NumPy constants, each rounded once: a phase reaches 1000, so that one bit of a frequency, which
    backends differ in, would show in the result.
    """
    half = channels // 2
    exponent = -np.log(max_period).astype(np.float32) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    phase = t.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


class TimestepEmbedding(nnx.Module):
    """temb = W2 silu(W1 sinusoid(1000 t)) and its projection to six modulations, W3 silu(temb).

    Source: diffusers `AceStepTimestepEmbedding`.
    """

    def __init__(self, hidden_size: int, config: NetworkConfig, *, rngs: nnx.Rngs):
        self.linear_1 = linear(256, hidden_size, (None, "mlp"), config, use_bias=True, rngs=rngs)
        self.linear_2 = linear(hidden_size, hidden_size, ("mlp", "embed"), config, use_bias=True, rngs=rngs)
        self.time_proj = linear(hidden_size, 6 * hidden_size, ("embed", "mlp"), config, use_bias=True, rngs=rngs)

    def __call__(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:  # [B] -> [B, D], [B, 6, D]
        temb = self.linear_2(jax.nn.silu(self.linear_1(sinusoid(t.astype(jnp.float32) * 1000.0))))
        return temb, self.time_proj(jax.nn.silu(temb)).reshape(t.shape[0], 6, -1)


def rotary_embedding(length: int, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each [T, H / 2] float32, of positions 0..T-1 at frequencies theta^(-2i / H)."""
    frequency = np.float32(1.0) / np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    phase = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency
    return jnp.cos(phase), jnp.sin(phase)


def apply_rotary(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pairs (i, i + H / 2) of each head. x: [B, T, N, H]; computed in float32, returned in x's dtype."""
    cos, sin = (table[:, None, :] for table in rope)  # [T, 1, H / 2]
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """One module whose leaves carry a leading [L] axis; row i is layer i."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    @nnx.transform_metadata(in_axes=0, out_axes=0, partition="layers")
    def stack(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return stack(rngs)


def period(pattern: tuple) -> int:
    """The length of the shortest prefix that, repeated a whole number of times, gives `pattern`."""
    n = len(pattern)
    return next(p for p in range(1, n + 1) if n % p == 0 and pattern == pattern[:p] * (n // p))


def scan_layers(
    apply: Callable[[jax.Array, Any, int | None, Any, Any], jax.Array],
    layers: nnx.Module,
    x: jax.Array,
    windows: tuple[int | None, ...],
    *,
    per_layer: Any = None,
    shared: Any = None,
    remat: str = "none",
) -> jax.Array:
    """x <- apply(x, layers[i], windows[i], per_layer[i], shared) for each layer i, as a scan over periods of `windows`.

    The window of a layer is static, so a period is unrolled within the body of the scan: two layers for the usual
    sliding, full, sliding, full, ...; all of them where the pattern does not repeat.

    Args:
        layers: a stacked module, leaves [L, ...].
        per_layer: a pytree with leaves [L, ...], sliced along with the layers.
        shared: what `apply` needs besides. It must not close over arrays.
        remat: see `NetworkConfig.remat`; of the derivative alone.
    """
    size = period(windows)
    stacks = layers, per_layer

    def run(x, pick, shared):
        for i, window in enumerate(windows[:size]):
            layer, extra = pick(i)
            x = apply(x, layer, window, extra, shared)
        return x

    # Two forms of one loop. Where each layer is sliced out of the whole stack, XLA reads the weights in place; sliced a
    # period at a time, it copies them first. But the derivative of the former adds up gradients of the whole stack.
    @jax.custom_jvp
    def loop(x, stacks, shared):
        def body(x, group):
            def pick(i):
                return jax.tree.map(
                    lambda leaf: jax.lax.dynamic_index_in_dim(leaf, group * size + i, keepdims=False), stacks
                )

            return run(x, pick, shared), None

        return jax.lax.scan(body, x, jnp.arange(len(windows) // size))[0]

    # What has no tangent, such as frozen weights under an adapter, stays out of the derivative: a tangent of zeros
    # would be multiplied with like any other.
    @functools.partial(loop.defjvp, symbolic_zeros=True)
    def derivative(primals, tangents):
        leaves, treedef = jax.tree.flatten(primals)
        slopes = treedef.flatten_up_to(tangents)
        moving = [not isinstance(slope, SymbolicZero) for slope in slopes]

        def run(*moved):
            values = iter(moved)
            x, stacks, shared = treedef.unflatten(next(values) if m else x for m, x in zip(moving, leaves, strict=True))
            return loop_by_period(x, stacks, shared, treedef.unflatten(moving)[1])

        return jax.jvp(run, *([x for x, m in zip(part, moving, strict=True) if m] for part in (leaves, slopes)))

    def loop_by_period(x, stacks, shared, moving):
        """`moving`: which leaves of `stacks` have gradients; the others are read in place, as above."""
        leaves, treedef = jax.tree.flatten(stacks)
        moving = treedef.flatten_up_to(moving)
        learning = [leaf.reshape(-1, size, *leaf.shape[1:]) for leaf, m in zip(leaves, moving, strict=True) if m]

        def body(x, xs):
            group, learning = xs

            def pick(i):
                values = iter(learning)
                return treedef.unflatten(
                    next(values)[i] if m else jax.lax.dynamic_index_in_dim(leaf, group * size + i, keepdims=False)
                    for leaf, m in zip(leaves, moving, strict=True)
                )

            return run(x, pick, shared), None

        body = jax.checkpoint(body, prevent_cse=False, policy=_SAVEABLE[remat])
        return jax.lax.scan(body, x, (jnp.arange(len(windows) // size), learning))[0]

    return loop(x, stacks, shared)
