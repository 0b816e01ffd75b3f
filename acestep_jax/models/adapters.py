"""Adapters at inference: computed alongside the weights of a network, which do not change.

In the notation of `acestep_jax.models.lora`, the weight W + sum_i k_i (W_i - W) gives

    y = x W c + sum_i k_i s_i x A_i B_i gain_i + b
    gain_i = m_i / |W + s_i A_i B_i|, 1 without DoRA
    c = 1 + sum_i k_i (gain_i - 1)

Only k_i s_i and c depend on the scales k_i: new scales are new data for the same compiled program.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from acestep_jax.distributed import partition_spec
from acestep_jax.errors import InputError
from acestep_jax.models.kernels.products import accumulated, float16_dot_general
from acestep_jax.models.lora import (
    Network,
    Parameters,
    check_shapes,
    column_norm,
    linear_layers,
    lora_parameter,
    low_rank_product,
    merge_into,
    parts_of,
    replace_layer,
)
from acestep_jax.models.quantization import QuantizedLinear, dequantize


class AdaptedLinear(nnx.Module):
    """y = (x W) c + ((x A) u) B + b: a linear layer with the sum of several adapters, for inference.

    A [in, R] and B [R, out] hold the factors of all adapters, concatenated along the rank, in the dtype of the
    computation; the B of a DoRA adapter is multiplied by its gain. The arrays that depend on the scales are float32:
    u [R] is k_i s_i along the ranks of adapter i; c [out] is absent if no adapter is DoRA.

    W and b are the weights of the linear layer that it replaces, under the same names; in a quantised layer, W is its
    kernel and `scale`, see `models.quantization`.
    """

    def __init__(self, base: nnx.Linear, a: jax.Array, b: jax.Array, scale: jax.Array, gain: jax.Array | None):
        self.kernel, self.bias, self.dtype = base.kernel, base.bias, base.dtype
        self.scale = nnx.data(base.scale if isinstance(base, QuantizedLinear) else None)
        is_own = base.dot_general is float16_dot_general or self.scale is not None
        self.product = base.dot_general if is_own else accumulated
        axes = _axes(base.kernel)
        self.lora_a = lora_parameter(a, *axes["lora_a"])
        self.lora_b = lora_parameter(b, *axes["lora_b"])
        self.set_scale(scale, gain)

    def set_scale(self, scale: jax.Array, gain: jax.Array | None) -> None:
        """Set u and c, in place."""
        axes = _axes(self.kernel)
        self.lora_scale = lora_parameter(scale, *axes["lora_scale"])
        self.lora_gain = nnx.data(None if gain is None else lora_parameter(gain, *axes["lora_gain"]))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        if self.scale is None:
            y = _accumulate(x, self.kernel[...].astype(self.dtype), self.product)
        else:
            y = _accumulate(x, self.kernel[...], self.product) * self.scale[...]
        if self.lora_gain is not None:
            y = y * self.lora_gain[...]
        h = _accumulate(x, self.lora_a[...]) * self.lora_scale[...]
        # Rounded once, before the bias, as without adapters, so that a scale of 0 changes no bit.
        y = (y + _accumulate(h.astype(self.dtype), self.lora_b[...])).astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Factors(NamedTuple):
    """An adapter prepared for the weights of a network, see `prepare_adapter`.

    parameters: float32, by dotted path, see `models.lora`.
    scaling: s = alpha / r.
    gains: m / |W + s A B| by layer, [L, out] or [out] float32; empty without DoRA.
    """

    parameters: Parameters
    scaling: float
    gains: Mapping[str, jax.Array]


def prepare_adapter(network: nnx.Module, parameters: Parameters, scaling: float) -> Factors:
    """Prepare an adapter for `apply_adapters`; for DoRA, compute the gain of each output of its layers.

    A gain needs the norm of an adapted weight, which is computed in float32 for one layer at a time.

    Args:
        network: the network, without adapters.
        parameters: see `Factors`.
        scaling: s = alpha / r.

    Raises:
        InputError: if the adapter's layers or shapes do not match the network.
    """
    layers = linear_layers(network)
    check_shapes(parameters, {name: layer.kernel.shape for name, layer in layers.items()})
    gains = {}
    for name, layer in layers.items():
        parts = parts_of(parameters, name)
        if (magnitude := parts.get("lora_magnitude")) is not None:
            sharding = _sharding(layer.kernel, "lora_gain", magnitude.shape)
            gain = jax.jit(dora_gain, out_shardings=sharding)
            own = layer.scale[...] if isinstance(layer, QuantizedLinear) else None
            gains[name] = gain(layer.kernel[...], parts["lora_a"], parts["lora_b"], magnitude, scaling, own)
    return Factors(parameters, scaling, gains)


def apply_adapters(network: Network, adapters: Sequence[Factors], scales: Sequence[float]) -> Network:
    """Return a copy of the network that shares its arrays and computes with W + sum_i k_i (W_i - W) for each weight W.

    LoRA and DoRA allocate nothing of the size of W. Their total rank is compiled in, the scales are data. LoKr and LoHa
    change a copy of W. For a quantised layer this copy is not quantised, because most changes are smaller than one
    8-bit step. The order of the adapters does not matter.

    Args:
        network: the network, without adapters, on one device or a mesh; factors are sharded like their weights.
        adapters: results of `prepare_adapter` for this network.
        scales: k of each adapter: 1 is the adapter as trained, 0 has no effect, below 0 is the opposite.

    Raises:
        InputError: if both a DoRA adapter and a LoKr or LoHa adapter change a layer: DoRA's gain would also scale the
            change of the other.
    """
    network = nnx.merge(*nnx.split(network))
    for name, layer in linear_layers(network).items():
        dense = [
            (parts, adapter.scaling, k)
            for adapter, k in zip(adapters, scales, strict=True)
            if (parts := parts_of(adapter.parameters, name)) and "lora_a" not in parts
        ]
        if dense and any(name in adapter.gains for adapter in adapters):
            raise InputError(
                f"{name}: changed by a DoRA adapter and by a LoKr or LoHa adapter, which cannot be computed together; "
                "merge one of them into the checkpoint with acestep-jax convert merge-lora"
            )
        if isinstance(layer, QuantizedLinear) and any(parts and k for parts, _, k in dense):
            layer = layer.restored()
            replace_layer(network, name, layer)
        merge_into(layer, dense)
        if used := _adapting(adapters, scales, name):
            a, b = _join(layer, [adapter for adapter, _ in used], name)
            replace_layer(network, name, AdaptedLinear(layer, a, b, *_scale(layer.kernel, used, name)))
    return network


def is_merged(adapter: Factors) -> bool:
    """Return whether an adapter changes a copy of the weights, so that other scales need `apply_adapters` again."""
    return not all(leaf.rpartition(".")[2].startswith("lora_") for leaf in adapter.parameters)


def rescale_adapters(network: Network, adapters: Sequence[Factors], scales: Sequence[float]) -> Network:
    """Return a copy of a result of `apply_adapters` with other scales; it shares all arrays, including the factors.

    `is_merged` must be false for all of the adapters.
    """
    network = nnx.merge(*nnx.split(network))
    for path, layer in nnx.iter_modules(network):
        if isinstance(layer, AdaptedLinear):
            name = ".".join(map(str, path))
            scale, gain = _scale(layer.kernel, _adapting(adapters, scales, name), name)
            layer.set_scale(scale, gain)
    return network


def _axes(kernel: nnx.Variable) -> dict[str, tuple[str | None, ...]]:
    """Return the logical axes of an adapter's arrays in a layer: the kernel's axes, and None along the rank."""
    *stack, inputs, outputs = kernel.get_metadata("out_sharding", None) or (None,) * kernel.ndim
    return {
        "lora_a": (*stack, inputs, None),
        "lora_b": (*stack, None, outputs),
        "lora_scale": (*stack, None),
        "lora_gain": (*stack, outputs),
    }


def _sharding(kernel: nnx.Variable, part: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """Return the sharding of a part of an adapter, on the mesh or the device of the kernel."""
    found = kernel[...].sharding
    if not isinstance(found, NamedSharding):
        return found
    return NamedSharding(found.mesh, partition_spec(_axes(kernel)[part], shape, found.mesh))


def _adapting(adapters: Sequence[Factors], scales: Sequence[float], name: str) -> list[tuple[Factors, float]]:
    """Return the adapters that change a layer, with their scales."""
    return [(a, k) for a, k in zip(adapters, scales, strict=True) if f"{name}.lora_a" in a.parameters]


def _join(layer: nnx.Linear, adapters: Sequence[Factors], name: str) -> tuple[jax.Array, jax.Array]:
    """Return A [..., in, R] and B [..., R, out] of `AdaptedLinear`, placed like the kernel."""
    parts = [(parts_of(adapter.parameters, name), adapter.gains.get(name)) for adapter in adapters]
    factors = [(found["lora_a"], found["lora_b"], gain) for found, gain in parts]
    *stack, inputs, outputs = layer.kernel.shape
    rank = sum(a.shape[-1] for a, _, _ in factors)

    shardings = (
        _sharding(layer.kernel, "lora_a", (*stack, inputs, rank)),
        _sharding(layer.kernel, "lora_b", (*stack, rank, outputs)),
    )
    return jax.jit(_join_factors, static_argnames="dtype", out_shardings=shardings)(factors, dtype=layer.dtype)


def _join_factors(factors: list[tuple], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    # In the dtype of the computation: the rounding error is proportional to the adapter's part of y, while rounding a
    # merged weight has an error proportional to the whole weight. Relative error of y in bfloat16, width 2048, rank 64,
    # by the size of s A B relative to W: 0.05, 0.17% (merged 0.23%); 0.3, 0.19% (0.23%); 1, 0.26% (0.23%). With float32
    # factors it is 0.17%, which is the rounding of y, but their products run at half the rate or less.
    grown = [b if gain is None else b * gain[..., None, :] for _, b, gain in factors]
    a, b = jnp.concatenate([a for a, _, _ in factors], axis=-1), jnp.concatenate(grown, axis=-2)
    return a.astype(dtype), b.astype(dtype)


def _scale(
    kernel: nnx.Variable, adapters: Sequence[tuple[Factors, float]], name: str
) -> tuple[jax.Array, jax.Array | None]:
    """Return u [..., R] and c [..., out] of `AdaptedLinear` for these adapters and scales."""
    *stack, _, outputs = kernel.shape
    ranks = [adapter.parameters[f"{name}.lora_a"].shape[-1] for adapter, _ in adapters]
    per_rank = np.repeat(np.array([k * adapter.scaling for adapter, k in adapters], np.float32), ranks)
    per_rank = np.broadcast_to(per_rank, (*stack, per_rank.size))
    scale = jax.device_put(per_rank, _sharding(kernel, "lora_scale", per_rank.shape))
    gains = [(adapter.gains[name], np.float32(k)) for adapter, k in adapters if name in adapter.gains]
    if not gains:
        return scale, None
    sum_gains = jax.jit(_sum_gains, out_shardings=_sharding(kernel, "lora_gain", (*stack, outputs)))
    return scale, sum_gains(gains)


def _sum_gains(gains: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    return sum((k * (gain - 1) for gain, k in gains), jnp.float32(1))


def dora_gain(
    kernel: jax.Array,
    a: jax.Array,
    b: jax.Array,
    magnitude: jax.Array,
    scaling: float,
    scale: jax.Array | None = None,
) -> jax.Array:
    """Return m / |W + s A B|, [..., out] float32. `scale`: scales of a quantised kernel."""
    if kernel.ndim == 3:  # one layer at a time: in float32 a stack takes gigabytes

        def one_layer(layer: tuple) -> jax.Array:
            kernel, a, b, magnitude, scale = layer
            return dora_gain(kernel, a, b, magnitude, scaling, scale)

        return jax.lax.map(one_layer, (kernel, a, b, magnitude, scale))
    weight = kernel.astype(jnp.float32) if scale is None else dequantize(kernel, scale)
    return magnitude / column_norm(weight + low_rank_product(a, b, scaling))


def _accumulate(x: jax.Array, w: jax.Array, product: Callable = accumulated) -> jax.Array:
    """Return x w in float32, in which the product accumulates anyway, before it is rounded to the operands' dtype."""
    dimensions = (((x.ndim - 1,), (0,)), ((), ()))
    return product(x, w, dimensions, preferred_element_type=jnp.float32)
