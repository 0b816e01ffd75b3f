"""Layers that the networks share: parameters, norm, SwiGLU, timestep embedding, rotary embedding.

Axis letters: B batch, T frames or tokens, S condition tokens, N query heads, K key heads, H head dim, D hidden,
F mlp, L layers.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from acestep_jax.distributed import shard
from acestep_jax.models.kernels.products import product_of
from acestep_jax.models.kernels.unstacked import project
from acestep_jax.models.runtime import Runtime

_shapes_only = contextvars.ContextVar("shapes_only", default=False)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Draw no initial values in networks that are made within the block: tracing the random numbers takes most of the
    time when a network is traced only for the shapes of its parameters."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


def lecun_normal(in_axis: int | Sequence[int] = -2, out_axis: int | Sequence[int] = -1) -> Callable[..., jax.Array]:
    """Return the initialiser of that name; within `shapes_only` it returns zeros."""
    init = nnx.initializers.lecun_normal(in_axis=in_axis, out_axis=out_axis)

    def drawn(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros(shape, dtype) if _shapes_only.get() else init(key, shape, dtype)

    return drawn


def parameter(value: jax.Array, *axes: str | None) -> nnx.Param:
    """Return a parameter with logical axis names, which apply when it is loaded or created on a mesh."""
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def linear(
    in_features: int,
    out_features: int,
    axes: tuple[str | None, str | None],
    runtime: Runtime,
    *,
    use_bias: bool = False,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """Return the module y = x W + b with W [in, out], computed in the runtime's dtype. `axes`: logical axes of W."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=jnp.dtype(runtime.dtype),
        param_dtype=jnp.dtype(runtime.param_dtype),
        kernel_init=lecun_normal(),
        kernel_metadata={"out_sharding": axes, "eager_sharding": False},
        bias_metadata={"out_sharding": axes[1:], "eager_sharding": False},
        dot_general=product_of(runtime.products),
        rngs=rngs,
    )


class RMSNorm(nnx.Module):
    """y = w * x / rms(x) over the last axis.

    Statistics in float32, then a cast to x's dtype, then the scale: the order of operations in Qwen3's and diffusers'
    norms, so that the results are bit-equal in bfloat16.
    """

    def __init__(self, dim: int, eps: float, runtime: Runtime):
        self.eps = eps
        self.scale = parameter(jnp.ones((dim,), runtime.param_dtype), None)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Compute `RMSNorm` with a scale [D]."""
    f = x.astype(jnp.float32)
    f = f * jax.lax.rsqrt(jnp.mean(f * f, -1, keepdims=True) + eps)
    return scale.astype(x.dtype) * f.astype(x.dtype)


class SwiGLU(nnx.Module):
    """y = (silu(x W_gate) * (x W_up)) W_down."""

    def __init__(self, hidden_size: int, intermediate_size: int, runtime: Runtime, *, rngs: nnx.Rngs):
        self.gate_proj = linear(hidden_size, intermediate_size, ("embed", "mlp"), runtime, rngs=rngs)
        self.up_proj = linear(hidden_size, intermediate_size, ("embed", "mlp"), runtime, rngs=rngs)
        self.down_proj = linear(intermediate_size, hidden_size, ("mlp", "embed"), runtime, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, T, D]
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(shard(jax.nn.silu(gate) * up, "batch", "sequence", "mlp"))


def sinusoid(t: jax.Array, channels: int = 256, max_period: float = 10000.0) -> jax.Array:
    """Embed t [B] as [B, channels] float32: cosines, then sines, at `channels / 2` geometric frequencies.

    The frequencies are NumPy constants, each rounded once. Phases reach 1000, so the last bit of a frequency, in which
    backends differ, would show in the result.
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

    def __init__(self, hidden_size: int, runtime: Runtime, *, rngs: nnx.Rngs):
        self.linear_1 = linear(256, hidden_size, (None, "mlp"), runtime, use_bias=True, rngs=rngs)
        self.linear_2 = linear(hidden_size, hidden_size, ("mlp", "embed"), runtime, use_bias=True, rngs=rngs)
        self.time_proj = linear(hidden_size, 6 * hidden_size, ("embed", "mlp"), runtime, use_bias=True, rngs=rngs)

    def __call__(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:  # [B] -> [B, D], [B, 6, D]
        temb = self.linear_2(jax.nn.silu(self.linear_1(sinusoid(t.astype(jnp.float32) * 1000.0))))
        return temb, self.time_proj(jax.nn.silu(temb)).reshape(t.shape[0], 6, -1)


def rotary_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """Return theta^(-2i / H), [H / 2] float32."""
    return np.float32(1.0) / np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)


def rotary_embedding(length: int, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin, each [T, H / 2] float32, for positions 0..T-1 at frequencies theta^(-2i / H)."""
    phase = jnp.arange(length, dtype=jnp.float32)[:, None] * rotary_frequencies(head_dim, theta)
    return jnp.cos(phase), jnp.sin(phase)


def apply_rotary(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate pairs (i, i + H / 2) of each head. x: [B, T, N, H]; computed in float32, returned in x's dtype."""
    cos, sin = (table[:, None, :] for table in rope)  # [T, 1, H / 2]
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
