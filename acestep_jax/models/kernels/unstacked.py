"""Layers in the form that a GPU runs fastest: each layer has its own arrays, and linear layers with the same input are
fused. On a GPU, the planner is split into such layers when it is loaded; on a CPU, its linear layers with the same
input are fused, see `kernels.stack`.

A network is loaded, trained and saved with stacks of weights [L, in, out], and loops over them. On GPUs, XLA's matrix
products do not read a slice of a stack in place: the loop first copies the weights of each layer, in every denoising
step. Unstacked layers need no such copies. They take the memory of the layers a second time, and their loop is
unrolled, so it takes longer to compile.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from acestep_jax.models.kernels.platform import platform

# Groups of a block's linear layers that share their input, of the transformer and of Qwen3 alike.
SHARED_INPUT = (("self_attn.to_q", "self_attn.to_k", "self_attn.to_v"), ("mlp.gate_proj", "mlp.up_proj"))


class FusedLinear(nnx.Module):
    """x -> (x W_0 + b_0, x W_1 + b_1, ...) as one matrix product: linear layers side by side."""

    def __init__(self, linears: Sequence[nnx.Linear]):
        sizes = [linear.kernel.shape[-1] for linear in linears]
        self.ends = tuple(int(end) for end in np.cumsum(sizes)[:-1])
        self.linear = linears[0]
        for name in ("kernel", "scale", "bias"):  # quantised layers have scales
            if (first := getattr(self.linear, name, None)) is not None:
                first.set_value(jnp.concatenate([getattr(linear, name)[...] for linear in linears], -1))

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        return jnp.split(self.linear(x), self.ends, -1)


def project(x: jax.Array, *linears: Any) -> list[jax.Array]:
    """Return linear(x) for each linear layer, even if `unstack` has fused them into the first one."""
    return linears[0](x) if isinstance(linears[0], FusedLinear) else [linear(x) for linear in linears]


def unstacking_pays(needed: int, limit: int | None) -> bool:
    """Return whether to keep unstacked layers in addition to the stacks: on a GPU, if a quarter of `limit`, the memory
    that JAX may use, remains for batches of songs. needed: bytes for both and for one song."""
    return platform() == "gpu" and limit is not None and needed <= 0.75 * limit


def unstack(layers: nnx.Module, groups: Sequence[tuple[str, ...]] = (), *, consume: bool = False) -> nnx.List:
    """Return the layers of a stack as separate modules with their own arrays, for inference only.

    Args:
        layers: leaves [L, ...].
        groups: dotted names of linear layers with the same input. The layers of a group are fused, unless one of them
            has an adapter, or only some are quantised.
        consume: whether to drop each stack as soon as its rows exist, which leaves `layers` unusable.
    """
    graph, state = nnx.split(layers)
    paths, variables = zip(*nnx.to_flat_state(state), strict=True)

    def row(variable: nnx.Variable, i: int) -> nnx.Variable:
        axes = variable.get_metadata("out_sharding", None)
        return variable.replace(variable[...][i], out_sharding=axes and axes[1:])

    columns = []
    for variable in variables:
        columns.append([row(variable, i) for i in range(variable.shape[0])])
        if consume:
            variable.set_value(columns[-1][0][...])
    rows = nnx.List()
    for _ in range(len(columns[0])):
        variables = [column.pop(0) for column in columns]  # so that what is fused is dropped layer by layer
        layer = nnx.merge(graph, nnx.from_flat_state(zip(paths, variables, strict=True)))
        for names in groups:
            fuse(layer, names)
        rows.append(layer)
    return rows


def fuse(layer: nnx.Module, names: tuple[str, ...]) -> None:
    """Replace the first of these linear layers, which may be stacked, with the fused layer; the others with None."""
    places = []
    for name in names:
        *path, last = name.split(".")
        owner: Any = layer
        for part in path:
            owner = getattr(owner, part)
        places.append((owner, last))
    linears = [getattr(owner, last) for owner, last in places]
    if not isinstance(linears[0], nnx.Linear) or len({type(linear) for linear in linears}) > 1:
        return  # one has an adapter, or only some are quantised after a merge
    fused = FusedLinear(linears)
    for i, (owner, last) in enumerate(places):
        setattr(owner, last, nnx.data(None) if i else fused)
