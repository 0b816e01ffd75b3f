"""Low-rank adapters on the linear layers of a network: LoRA (Hu et al., arXiv 2106.09685) and DoRA (arXiv 2402.09353).

`add_lora` makes a network trainable through adapters; `merge_loras` folds trained ones into its kernels, which then
cost nothing at inference. The parameters of a layer `P` are `P.lora_a` [in, r], `P.lora_b` [r, out] and, for DoRA,
`P.lora_magnitude` [out], with a leading [L] axis where the layer is stacked.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from acestep_jax.errors import InputError
from acestep_jax.models.config import LoRAConfig
from acestep_jax.models.layers import KEPT, dot_general

Network = TypeVar("Network", bound=nnx.Module)


class DropoutKey(nnx.Variable):
    """A JAX key, or one a layer. It is part of the network's state, so that a scan over layers deals it out."""


class LoRALinear(nnx.Module):
    """y = (x W + s dropout(x) A B) m / |W + s A B| + b with s = alpha / r; without DoRA the quotient is 1.

    W and b are those of the linear layer it replaces, under the same names. A and B are float32, whatever W is, and
    are cast to the dtype of the computation. The norm, over the input axis, counts as a constant in the derivative.
    """

    def __init__(self, base: nnx.Linear, config: LoRAConfig, *, rngs: nnx.Rngs):
        self.kernel, self.bias, self.dtype = base.kernel, base.bias, base.dtype
        self.scaling, self.dropout = config.scaling, config.dropout
        *stack, inputs, outputs = base.kernel.shape
        axes = base.kernel.get_metadata("out_sharding", None) or (None,) * base.kernel.ndim
        # As PEFT: A as torch initialises a linear layer, B zero, so that training starts at the network itself.
        bound = inputs**-0.5
        a = jax.random.uniform(rngs.params(), (*stack, inputs, config.rank), minval=-bound, maxval=bound)
        self.lora_a = _lora_parameter(a, *axes[:-1], None)
        self.lora_b = _lora_parameter(jnp.zeros((*stack, config.rank, outputs)), *axes[:-2], None, axes[-1])
        self.lora_magnitude = nnx.data(None)
        if config.use_dora:
            self.lora_magnitude = _lora_parameter(_column_norm(self.kernel[...]), *axes[:-2], axes[-1])
        self.dropout_key = nnx.data(None)
        if config.dropout:
            key = rngs.params()
            self.dropout_key = DropoutKey(jax.random.split(key, stack) if stack else key)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        a, b = self.lora_a[...].astype(self.dtype), self.lora_b[...].astype(self.dtype)
        y = _matmul(x, self.kernel[...].astype(self.dtype))
        dropped = x
        if self.dropout_key is not None:
            # Kept for the backward pass: random numbers cost more to make again, and much more to compile again.
            keep = checkpoint_name(_bernoulli(self.dropout_key[...], 1.0 - self.dropout, x.shape), KEPT)
            dropped = jnp.where(keep, x / (1.0 - self.dropout), 0)
        y = y + _expand(_matmul(dropped, a) * self.scaling, b)
        if self.lora_magnitude is not None:
            weight = _sum(self.kernel[...], self.lora_a[...], self.lora_b[...], self.scaling)
            y = y * (self.lora_magnitude[...] / jax.lax.stop_gradient(_column_norm(weight))).astype(y.dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def targets(network: nnx.Module, patterns: Iterable[str]) -> list[str]:
    """The dotted paths of the linear layers that `patterns` select, in the order of the network.

    Each is a regular expression for the end of a path, from a dot on: "to_q" selects `layers.self_attn.to_q` and
    `layers.cross_attn.to_q`, "self_attn.to_." all four of the former, ".*" every linear layer.

    Raises:
        InputError: if a pattern is no regular expression, or selects nothing.
    """
    names = [".".join(map(str, path)) for path, m in nnx.iter_modules(network) if isinstance(m, nnx.Linear)]
    found = set()
    for pattern in patterns:
        try:
            chosen = [name for name in names if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name)]
        except re.error as error:
            raise InputError(f"lora.targets: {pattern!r} is no regular expression ({error})") from None
        if not chosen:
            raise InputError(f"lora.targets: {pattern!r} matches no linear layer; there are {', '.join(sorted(names))}")
        found |= set(chosen)
    return sorted(found, key=names.index)


def add_lora(network: Network, config: LoRAConfig, *, rngs: nnx.Rngs) -> Network:
    """A copy of the network, with the same arrays, whose `config.targets` have adapters that change nothing yet.

    Raises:
        InputError: see `targets`.
    """
    network = nnx.merge(*nnx.split(network))
    for name in targets(network, config.targets):
        *parents, last = name.split(".")
        parent = network
        for part in parents:
            parent = getattr(parent, part)
        setattr(parent, last, LoRALinear(getattr(parent, last), config, rngs=rngs))
    return network


def without_dropout(network: Network) -> Network:
    """A copy of the network, with the same arrays, whose adapters drop nothing."""
    network = nnx.merge(*nnx.split(network))
    for _, module in nnx.iter_modules(network):
        if isinstance(module, LoRALinear):
            module.dropout_key = nnx.data(None)
    return network


def merge_loras(network: Network, adapters: Sequence[tuple[Mapping[str, jax.Array], float, float]]) -> Network:
    """A copy of the network with W <- W + sum_i k_i (W_i - W), in W's dtype and sharding.

    W_i is what adapter i alone makes of W: (W + s A B) m / |W + s A B|, without DoRA W + s A B. So the order does not
    matter, a strength of zero is none at all, and for LoRA the sum is W + sum_i k_i s_i A_i B_i. It is computed in
    float32 and rounded once.

    Args:
        adapters: for each its leaves, `P.lora_a`, `P.lora_b` and perhaps `P.lora_magnitude` of each adapted layer P;
            its scaling s = alpha / r; and the strength k that is asked for.

    Raises:
        InputError: if an adapter is for other layers or shapes than the network's.
    """
    network = nnx.merge(*nnx.split(network))
    layers = {".".join(map(str, path)): m for path, m in nnx.iter_modules(network) if isinstance(m, nnx.Linear)}
    shapes = {name: layer.kernel.shape for name, layer in layers.items()}
    factors: dict[str, list[tuple]] = {}
    strengths: dict[str, list[tuple[float, float]]] = {}
    for leaves, scaling, strength in adapters:
        check_shapes(leaves, shapes)
        for name in {leaf.rpartition(".")[0] for leaf in leaves} if strength else ():
            parts = tuple(leaves.get(f"{name}.{part}") for part in ("lora_a", "lora_b", "lora_magnitude"))
            factors.setdefault(name, []).append(parts)
            strengths.setdefault(name, []).append((scaling, strength))
    for name, layer in layers.items():
        if name in factors:
            kernel = layer.kernel[...]
            merge = jax.jit(_merge, out_shardings=kernel.sharding)
            layer.kernel = layer.kernel.replace(merge(kernel, factors[name], strengths[name]))
    return network


def check_shapes(
    leaves: Mapping[str, jax.Array], kernels: Mapping[str, tuple[int, ...]], source: str = "adapter"
) -> None:
    """Whether an adapter fits a network.

    Args:
        leaves: see `merge_loras`; anything with a shape will do.
        kernels: the shape of the kernel of each linear layer of the network, by dotted path.
        source: what an error message calls the adapter.

    Raises:
        InputError: naming the first leaf that does not fit.
    """
    for leaf, value in leaves.items():
        name, _, part = leaf.rpartition(".")
        if name not in kernels:
            raise InputError(f"{source}: {name} is no linear layer of this network; the adapter is for another model")
        *stack, inputs, outputs = kernels[name]
        rank = value.shape[-2 if part == "lora_b" else -1] if value.ndim else 0
        expected = {
            "lora_a": (*stack, inputs, rank),
            "lora_b": (*stack, rank, outputs),
            "lora_magnitude": (*stack, outputs),
        }[part]
        if value.shape != expected:
            raise InputError(
                f"{source}: {leaf} has shape {list(value.shape)}, expected {list(expected)}; the adapter is for "
                "another model"
            )


def _merge(kernel: jax.Array, factors: list[tuple], strengths: list[tuple[float, float]]) -> jax.Array:
    """The merged kernel: `factors` are A, B and the magnitude of each adapter, `strengths` its scaling and strength."""
    if kernel.ndim == 3:  # a layer at a time: in float32 a stack takes gigabytes
        return jax.lax.map(lambda layer: _merge(*layer, strengths), (kernel, factors))
    base = weight = kernel.astype(jnp.float32)
    for (a, b, magnitude), (scaling, strength) in zip(factors, strengths, strict=True):
        # An accelerator's default would round the factors to bfloat16.
        change = scaling * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        if magnitude is not None:
            adapted = base + change
            change = adapted * (magnitude / _column_norm(adapted)) - base
        weight = weight + strength * change
    return weight.astype(kernel.dtype)


def _sum(kernel: jax.Array, a: jax.Array, b: jax.Array, scaling: float) -> jax.Array:
    product = jnp.einsum("...ir,...ro->...io", a, b, preferred_element_type=jnp.float32)
    return kernel.astype(jnp.float32) + scaling * product


def _column_norm(weight: jax.Array) -> jax.Array:  # [..., in, out] -> [..., out]
    return jnp.linalg.norm(weight.astype(jnp.float32), axis=-2)


def _bernoulli(key: jax.Array, p: float, shape: tuple[int, ...]) -> jax.Array:
    """True with probability p, to 2^-16: two of one random word, which is most of the cost of dropout."""
    *rows, columns = shape
    words = jax.random.bits(key, (*rows, -(-columns // 2)))
    halves = jnp.concatenate([words >> 16, words & 0xFFFF], axis=-1)[..., :columns]
    return halves < round(p * 2**16)


@jax.custom_vjp
def _expand(h: jax.Array, b: jax.Array) -> jax.Array:  # [..., r], [r, out] -> [..., out]
    return _matmul(h, b)


def _expand_backward(residuals, dy):
    """JAX's own derivative makes the transpose of B's gradient, for which XLA on a CPU transposes dy [..., out]."""
    h, b = residuals
    rows = tuple(range(h.ndim - 1))
    return dot_general(dy, b, (((dy.ndim - 1,), (1,)), ((), ()))), dot_general(h, dy, ((rows, rows), ((), ())))


_expand.defvjp(lambda h, b: (_expand(h, b), (h, b)), _expand_backward)


def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    return dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def _lora_parameter(value: jax.Array, *axes: str | None) -> nnx.LoRAParam:
    return nnx.LoRAParam(value, out_sharding=axes, eager_sharding=False)
