"""8-bit weights, int8 or float8_e4m3fn, with a float32 scale for each output: half the bytes of bfloat16.

    s = max |W| / top over the inputs,    Q = round(W / s),    top = 127 (int8) or 448 (fp8)
    y = (x Q) s + b

The linear layers within stacks of layers are quantised, which are nearly all of the weights, and the embedding tables
of the language models, with a scale for each row. Norms, biases, modulations, the timestep embedding, and the input and
output projections of a network keep the dtype that they are loaded in.

The language models quantise only the weights: with few tokens they are bound by reading the weights, and their
activations have outliers. The transformer is bound by its matrix products, so it also quantises its activations where
the device multiplies 8 bits by 8 bits, see `kernels.quantized`.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from acestep_jax.models.kernels import quantized
from acestep_jax.models.kernels.products import float16_dot_general, product_of
from acestep_jax.models.kernels.stack import restored, stored
from acestep_jax.models.layers import parameter
from acestep_jax.models.runtime import Runtime

Network = TypeVar("Network", bound=nnx.Module)

# The networks that are quantised, and whether their activations are too on devices with 8-bit products.
NETWORKS: Mapping[str, bool] = MappingProxyType(
    {"transformer": True, "condition_encoder": False, "text_encoder": False, "planner": False}
)


def quantized_layers(leaves: Mapping[str, Any]) -> set[str]:
    """Return the dotted names of the 8-bit layers. `leaves`: anything with a `dtype`, by dotted name."""
    return {name.rpartition(".")[0] for name, leaf in leaves.items() if jnp.dtype(leaf.dtype).itemsize == 1}


class QuantizedLinear(nnx.Linear):
    """y = (x Q) s + b: a linear layer whose kernel Q [in, out] has 8 bits, with scales s [out] float32.

    It replaces a linear layer, under the same names. Its `dot_general` returns x Q in float32.
    """

    def __init__(self, base: nnx.Linear, values: Any, scale: nnx.Param, *, activations: bool):
        self.kernel, self.scale, self.bias = values, scale, base.bias
        self.in_features, self.out_features, self.use_bias = base.in_features, base.out_features, base.use_bias
        self.dtype, self.param_dtype = base.dtype, base.param_dtype
        if base.dot_general is float16_dot_general:
            self.dot_general = float16_dot_general
        else:
            self.dot_general = quantized.suited if activations else quantized.weight_only

    def accumulate(self, x: jax.Array) -> jax.Array:
        """Return x W in float32, before it is rounded to the dtype of the computation."""
        dimensions = (((x.ndim - 1,), (0,)), ((), ()))
        return self.dot_general(x.astype(self.dtype), self.kernel[...], dimensions) * self.scale[...]

    def restored(self) -> nnx.Linear:
        """Return a plain layer with the dequantised weights, in the dtype of weights that are not quantised."""
        kernel = self.kernel[...]
        restore = jax.jit(_restored, static_argnames="dtype", out_shardings=kernel.sharding)
        layer = nnx.eval_shape(
            lambda: nnx.Linear(
                *kernel.shape[-2:],
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                dot_general=product_of("float16" if self.dot_general is float16_dot_general else None),
                rngs=nnx.Rngs(0),
            )
        )
        weight = restore(kernel, self.scale[...], dtype=jnp.dtype(self.param_dtype))
        restored: Any = self.kernel.replace(weight)
        layer.kernel, layer.bias = restored, self.bias
        return layer

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        y = self.accumulate(inputs).astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class QuantizedEmbed(nnx.Embed):
    """An 8-bit embedding table Q [V, D] with a scale for each row, s [V] float32."""

    def __init__(self, base: nnx.Embed, values: nnx.Param, scale: nnx.Param):
        self.embedding, self.scale = values, scale
        self.num_embeddings, self.features, self.dtype = base.num_embeddings, base.features, base.dtype
        self.kind = jnp.dtype(values.dtype)  # dtype of the values, which may be stored as bits, see `kernels.stack`

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        rows = restored(jnp.take(stored(self.embedding[...]), inputs, axis=0), self.kind).astype(jnp.float32)
        return (rows * jnp.take(self.scale[...], inputs, axis=0)[..., None]).astype(self.dtype)


class Part(NamedTuple):
    """The scales of a quantised leaf, by dotted path, and the axis that they reduce."""

    scale: str
    axis: int


def quantize(network: Network, kind: str, *, activations: bool = False) -> Network:
    """Return a copy of the network with its weights quantised to 8 bits.

    Args:
        kind: one of `runtime.QUANTIZATIONS`.
        activations: see `NETWORKS`.
    """
    network = nnx.merge(*nnx.split(network))
    modules: list[tuple[tuple[str, ...], Any]] = [
        (tuple(map(str, p)), module) for p, module in nnx.iter_modules(network)
    ]
    for path, module in modules:
        if isinstance(runtime := getattr(module, "runtime", None), Runtime):
            module.runtime = dataclasses.replace(runtime, quantization=kind)
        if isinstance(module, QuantizedLinear | QuantizedEmbed):
            raise ValueError(f"{'.'.join(path)}: quantised already")
        if isinstance(module, nnx.Linear) and "layers" in path:
            made = QuantizedLinear(module, *_parameters(module.kernel, kind, -2), activations=activations)
        elif isinstance(module, nnx.Embed):
            made = QuantizedEmbed(module, *_parameters(module.embedding, kind, -1))
        else:
            continue
        parent: Any = network
        for name in path[:-1]:
            parent = getattr(parent, name)
        setattr(parent, path[-1], made)
    return network


def parts(network: nnx.Module) -> dict[str, Part]:
    """Return the quantised leaves of a network, by dotted path."""
    found = {}
    for path, module in nnx.iter_modules(network):
        name = ".".join(map(str, path))
        if isinstance(module, QuantizedLinear):
            found[f"{name}.kernel"] = Part(f"{name}.scale", -2)
        elif isinstance(module, QuantizedEmbed):
            found[f"{name}.embedding"] = Part(f"{name}.scale", -1)
    return found


def quantize_array(weight: jax.Array, kind: str, axis: int) -> tuple[jax.Array, jax.Array]:
    """Return 8-bit values and their float32 scales, which lack `axis`: -2 for kernels, -1 for embedding tables."""
    values, scale = quantized.quantize(weight, kind, axis)
    return values, jnp.squeeze(scale, axis)


def dequantize(values: jax.Array, scale: jax.Array, axis: int = -2) -> jax.Array:
    """Return the float32 weights that values and scales represent."""
    return values.astype(jnp.float32) * jnp.expand_dims(scale, axis)


def _restored(values: jax.Array, scale: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """Dequantise a stack one layer at a time: in float32 all layers together take gigabytes."""
    if values.ndim == 3:
        return jax.lax.map(lambda layer: _restored(*layer, dtype=dtype), (values, scale))
    return dequantize(values, scale).astype(dtype)


def _parameters(weight: nnx.Variable, kind: str, axis: int) -> tuple[Any, nnx.Param]:
    """Return the values and scales of a weight as parameters with its logical axes."""
    axes = list(weight.get_metadata("out_sharding", None) or (None,) * len(weight.shape))
    values, scale = quantize_array(weight[...], kind, axis)
    del axes[axis]
    return weight.replace(values), parameter(scale, *axes)
