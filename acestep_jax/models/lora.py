"""Low-rank adapters on the linear layers of a network: LoRA (Hu et al., arXiv 2106.09685) and DoRA (arXiv 2402.09353).

Adapter i turns the weight W of a layer into W_i = (W + s A B) m / |W + s A B|, with s = alpha / r, the norm over the
input axis, and the quotient 1 without DoRA. Several adapters, at scales k_i, add up: W + sum_i k_i (W_i - W). There are
three ways to use them:

    add_lora        one adapter, to be trained
    apply_adapters  any number, computed alongside the unchanged weights at inference; their scales are data
    merge_loras     any number, added to the weights: they cost nothing at inference, and cannot be removed

The parameters of a layer `P` are `P.lora_a` [in, r], `P.lora_b` [r, out] and, for DoRA, `P.lora_magnitude` [out], with
a leading [L] axis where the layer is stacked. Other kinds of adapters replace A B with another product, which is not of
low rank, so they are always merged:

    LoKr    W1 x W2, the Kronecker product of `P.lokr_w1` [i, o] and `P.lokr_w2` [in / i, out / o] (arXiv 2309.14859)
    LoHa    (A1 B1) * (A2 B2), elementwise, of `P.loha_a1`, `P.loha_a2` [in, r] and `P.loha_b1`, `P.loha_b2` [r, out]
            (arXiv 2108.06098)
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from acestep_jax.errors import InputError
from acestep_jax.models.config import LoRAConfig
from acestep_jax.models.kernels.products import dot_general
from acestep_jax.models.quantization import QuantizedLinear
from acestep_jax.models.scan import KEPT

Network = TypeVar("Network", bound=nnx.Module)

# The arrays of an adapter, float32, by dotted path, such as `P.lora_a` and `P.lora_b` for each adapted layer P.
Parameters = Mapping[str, jax.Array | np.ndarray]
# The arrays that each kind of adapter has for a layer; DoRA also has `lora_magnitude`.
PARTS = {
    "lora": ("lora_a", "lora_b"),
    "lokr": ("lokr_w1", "lokr_w2"),
    "loha": ("loha_a1", "loha_b1", "loha_a2", "loha_b2"),
}


class DropoutKey(nnx.Variable):
    """A JAX key, or one for each layer of a stack. It is state of the network, so the scan over layers slices it."""


class LoRALinear(nnx.Module):
    """y = (x W + s dropout(x) A B) m / |W + s A B| + b: a linear layer with an adapter to be trained.

    W and b are the weights of the linear layer that it replaces, under the same names. A and B are float32, whatever W
    is, and are cast to the dtype of the computation. The derivative treats the norm, over the input axis, as constant.
    """

    def __init__(self, base: nnx.Linear, config: LoRAConfig, *, rngs: nnx.Rngs):
        self.kernel, self.bias, self.dtype = base.kernel, base.bias, base.dtype
        self.scaling, self.dropout = config.scaling, config.dropout
        *stack, inputs, outputs = base.kernel.shape
        axes = base.kernel.get_metadata("out_sharding", None) or (None,) * base.kernel.ndim
        # As in PEFT: A initialised like torch's linear layer, B zero, so that training starts from the base network.
        bound = inputs**-0.5
        a = jax.random.uniform(rngs.params(), (*stack, inputs, config.rank), minval=-bound, maxval=bound)
        self.lora_a = lora_parameter(a, *axes[:-1], None)
        self.lora_b = lora_parameter(jnp.zeros((*stack, config.rank, outputs)), *axes[:-2], None, axes[-1])
        self.lora_magnitude = nnx.data(None)
        if config.use_dora:
            self.lora_magnitude = lora_parameter(column_norm(self.kernel[...]), *axes[:-2], axes[-1])
        self.dropout_key = nnx.data(None)
        if config.dropout:
            key = rngs.params()
            self.dropout_key = DropoutKey(jax.random.split(key, tuple(stack)) if stack else key)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        a, b = self.lora_a[...].astype(self.dtype), self.lora_b[...].astype(self.dtype)
        y = _matmul(x, self.kernel[...].astype(self.dtype))
        dropped = x
        if self.dropout_key is not None:
            # Kept for the backward pass: recomputing random numbers is slower, and takes much longer to compile.
            keep = checkpoint_name(_bernoulli(self.dropout_key[...], 1.0 - self.dropout, x.shape), KEPT)
            dropped = jnp.where(keep, x / (1.0 - self.dropout), 0)
        y = y + _expand(_matmul(dropped, a) * self.scaling, b)
        if self.lora_magnitude is not None:
            weight = _sum(self.kernel[...], self.lora_a[...], self.lora_b[...], self.scaling)
            y = y * (self.lora_magnitude[...] / jax.lax.stop_gradient(column_norm(weight))).astype(y.dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def targets(network: nnx.Module, patterns: Iterable[str]) -> list[str]:
    """Return the dotted paths of the linear layers that `patterns` select, in the order of the network.

    Each pattern is a regular expression for the end of a path, after a dot: "to_q" selects `layers.self_attn.to_q` and
    `layers.cross_attn.to_q`, "self_attn.to_." all four of the self-attention, ".*" every linear layer.

    Raises:
        InputError: if a pattern is not a regular expression, or selects nothing.
    """
    names = list(linear_layers(network))
    found = set()
    for pattern in patterns:
        try:
            chosen = [name for name in names if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name)]
        except re.error as error:
            raise InputError(f"lora.targets: {pattern!r} is not a regular expression ({error})") from None
        if not chosen:
            raise InputError(f"lora.targets: {pattern!r} matches no linear layer; there are {', '.join(sorted(names))}")
        found |= set(chosen)
    return sorted(found, key=names.index)


def add_lora(network: Network, config: LoRAConfig, *, rngs: nnx.Rngs) -> Network:
    """Return a copy of the network that shares its arrays and has adapters on `config.targets`, without effect so far.

    Raises:
        InputError: see `targets`; or if the network is quantised.
    """
    check_unquantized(network, "an adapter is trained")
    network = nnx.merge(*nnx.split(network))
    layers = linear_layers(network)
    for name in targets(network, config.targets):
        replace_layer(network, name, LoRALinear(layers[name], config, rngs=rngs))
    return network


def without_dropout(network: Network) -> Network:
    """Return a copy of the network that shares its arrays and whose adapters have no dropout."""
    network = nnx.merge(*nnx.split(network))
    for _, module in nnx.iter_modules(network):
        if isinstance(module, LoRALinear):
            module.dropout_key = nnx.data(None)
    return network


def merge_loras(network: Network, adapters: Sequence[tuple[Parameters, float, float]]) -> Network:
    """Return a copy of the network with W <- W + sum_i k_i (W_i - W), in W's dtype and sharding.

    The order does not matter, and a scale of zero changes nothing. The sum is computed in float32 and rounded once.

    Args:
        adapters: the parameters, scaling s = alpha / r, and scale k of each adapter.

    Raises:
        InputError: if an adapter's layers or shapes do not match the network, or the network is quantised.
    """
    check_unquantized(network, "adapters are merged")
    network = nnx.merge(*nnx.split(network))
    layers = linear_layers(network)
    shapes = {name: layer.kernel.shape for name, layer in layers.items()}
    for parameters, _, _ in adapters:
        check_shapes(parameters, shapes)
    for name, layer in layers.items():
        merge_into(layer, [(parts_of(parameters, name), scaling, k) for parameters, scaling, k in adapters])
    return network


def merge_into(layer: nnx.Linear, adapters: Sequence[tuple[Mapping[str, jax.Array], float, float]]) -> None:
    """Merge adapters, each given as (arrays of the layer, scaling, scale), into the kernel of a layer, in place."""
    adapters = [(parts, scaling, k) for parts, scaling, k in adapters if parts and k]
    if not adapters:
        return
    kernel = layer.kernel[...]
    merge = jax.jit(_merge, out_shardings=kernel.sharding)
    merged = merge(kernel, [dict(parts) for parts, _, _ in adapters], [(s, k) for _, s, k in adapters])
    layer.kernel = layer.kernel.replace(merged)  # pyright: ignore[reportAttributeAccessIssue]


def check_shapes(parameters: Parameters, kernels: Mapping[str, tuple[int, ...]], source: str = "adapter") -> None:
    """Check that an adapter matches a network.

    Args:
        parameters: the adapter's parameters, arrays or anything with a shape.
        kernels: the shape of the kernel of each linear layer of the network, by dotted path.
        source: name of the adapter in error messages.

    Raises:
        InputError: if a parameter is for another layer or has another shape; the message names the first.
    """
    for leaf, value in parameters.items():
        name, _, part = leaf.rpartition(".")
        if name not in kernels:
            raise InputError(
                f"{source}: {name} is not a linear layer of this network; the adapter is for another model"
            )
        *stack, inputs, outputs = kernels[name]
        rank = value.shape[-2 if part in ("lora_b", "loha_b1", "loha_b2") else -1] if value.ndim else 0
        if part.startswith("lokr_"):
            first, second = (np.shape(parameters.get(f"{name}.{other}", ()))[-2:] for other in PARTS["lokr"])
            fits = len(first) == len(second) == 2 and tuple(np.multiply(first, second)) == (inputs, outputs)
            if not fits or value.shape != (*stack, *value.shape[-2:]):
                raise InputError(
                    f"{source}: the factors of {name} have shapes {list(first)} and {list(second)}, expected a "
                    f"Kronecker product of shape {[inputs, outputs]}; the adapter is for another model"
                )
            continue
        expected = {
            **dict.fromkeys(("lora_a", "loha_a1", "loha_a2"), (*stack, inputs, rank)),
            **dict.fromkeys(("lora_b", "loha_b1", "loha_b2"), (*stack, rank, outputs)),
            "lora_magnitude": (*stack, outputs),
        }[part]
        if value.shape != expected:
            raise InputError(
                f"{source}: {leaf} has shape {list(value.shape)}, expected {list(expected)}; the adapter is for "
                "another model"
            )


def check_unquantized(network: nnx.Module, what: str) -> None:
    """Raise InputError if a network has 8-bit weights. `what`: how they would be used, for the message."""
    for _, module in nnx.iter_modules(network):
        if isinstance(module, QuantizedLinear):
            raise InputError(
                f"quantised weights: {what} with weights in float32, bfloat16 or float16 only, found "
                f"{module.kernel.dtype}; most changes are less than one 8-bit step. Load the model that they were "
                "made from; the result can be quantised"
            )


def linear_layers(network: nnx.Module) -> dict[str, nnx.Linear]:
    """Return the linear layers without adapters by dotted path, in the order of the network."""
    return {".".join(map(str, path)): m for path, m in nnx.iter_modules(network) if isinstance(m, nnx.Linear)}


def replace_layer(network: nnx.Module, name: str, layer: nnx.Module) -> None:
    *parents, last = name.split(".")
    parent = network
    for part in parents:
        parent = getattr(parent, part)
    setattr(parent, last, layer)


def parts_of(parameters: Parameters, name: str) -> dict[str, Any]:
    """Return the adapter's arrays for a layer, such as `lora_a`; empty if it does not change the layer."""
    every = (part for parts in (*PARTS.values(), ("lora_magnitude",)) for part in parts)
    return {part: parameters[leaf] for part in every if (leaf := f"{name}.{part}") in parameters}


def low_rank_product(a: jax.Array, b: jax.Array, scaling: float) -> jax.Array:
    """Return s A B in float32 precision, [..., in, out], from A [..., in, r], B [..., r, out] and the scaling s."""
    # The default precision of an accelerator would round the factors to bfloat16.
    return scaling * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def weight_delta(parts: Mapping[str, jax.Array], scaling: float) -> jax.Array:
    """Return the change of W by an adapter's arrays for one layer, before the magnitude of DoRA."""
    if "lora_a" in parts:
        return low_rank_product(parts["lora_a"], parts["lora_b"], scaling)
    if "lokr_w1" in parts:
        return scaling * jnp.kron(parts["lokr_w1"], parts["lokr_w2"])
    first = low_rank_product(parts["loha_a1"], parts["loha_b1"], scaling)
    return first * low_rank_product(parts["loha_a2"], parts["loha_b2"], 1.0)


def _merge(kernel: jax.Array, factors: list[dict], scales: list[tuple[float, float]]) -> jax.Array:
    """Return the merged kernel. `factors`: the arrays of each adapter; `scales`: its scaling and scale."""
    if kernel.ndim == 3:  # one layer at a time: in float32 a stack takes gigabytes
        return jax.lax.map(lambda layer: _merge(*layer, scales=scales), (kernel, factors))
    base = weight = kernel.astype(jnp.float32)
    for parts, (scaling, scale) in zip(factors, scales, strict=True):
        change = weight_delta(parts, scaling)
        if (magnitude := parts.get("lora_magnitude")) is not None:
            adapted = base + change
            change = adapted * (magnitude / column_norm(adapted)) - base
        weight = weight + scale * change
    return weight.astype(kernel.dtype)


def _sum(kernel: jax.Array, a: jax.Array, b: jax.Array, scaling: float) -> jax.Array:
    product = jnp.einsum("...ir,...ro->...io", a, b, preferred_element_type=jnp.float32)
    return kernel.astype(jnp.float32) + scaling * product


def column_norm(weight: jax.Array) -> jax.Array:  # [..., in, out] -> [..., out]
    return jnp.linalg.norm(weight.astype(jnp.float32), axis=-2)


def _bernoulli(key: jax.Array, p: float, shape: tuple[int, ...]) -> jax.Array:
    """Draw booleans, true with probability p to within 2^-16: two per random word, which dominates dropout's cost."""
    *rows, columns = shape
    words = jax.random.bits(key, (*rows, -(-columns // 2)))
    halves = jnp.concatenate([words >> 16, words & 0xFFFF], axis=-1)[..., :columns]
    return halves < round(p * 2**16)


@jax.custom_vjp
def _expand(h: jax.Array, b: jax.Array) -> jax.Array:  # [..., r], [r, out] -> [..., out]
    return _matmul(h, b)


def _expand_backward(residuals, dy):
    """Return the gradients of h and B. JAX's own derivative computes the transpose of B's gradient, for which XLA for
    CPUs would transpose dy [..., out]."""
    h, b = residuals
    rows = tuple(range(h.ndim - 1))
    return dot_general(dy, b, (((dy.ndim - 1,), (1,)), ((), ()))), dot_general(h, dy, ((rows, rows), ((), ())))


_expand.defvjp(lambda h, b: (_expand(h, b), (h, b)), _expand_backward)


def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    return dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def lora_parameter(value: jax.Array, *axes: str | None) -> nnx.LoRAParam:
    return nnx.LoRAParam(value, out_sharding=axes, eager_sharding=False)
