"""Layers stacked on a leading axis, and the loop over them.

    x, outputs = scan_layers(block, layers, x, windows)

is x, outputs[i] = block(x, layers[i], windows[i], per_layer[i]) for i = 0 .. L - 1.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero

from acestep_jax.models.kernels.stack import pick_row

Layer = TypeVar("Layer", bound=nnx.Module)

# Modules give this name (`jax.ad_checkpoint.checkpoint_name`) to results, other than products with weights, that are
# expensive to recompute.
KEPT = "kept"

# What the backward pass reads from memory instead of recomputing, by `Runtime.remat`: products with weights and results
# named KEPT, only the products, or nothing. Elementwise results are always recomputed, which is cheaper than storing
# them; storing the weights of each layer, sliced out of their stack, would copy all weights.
_PRODUCTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_SAVEABLE = {
    "none": jax.checkpoint_policies.save_from_both_policies(
        _PRODUCTS, jax.checkpoint_policies.save_only_these_names(KEPT)
    ),
    "dots": _PRODUCTS,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def stack_layers(make: Callable[[nnx.Rngs], Layer], num_layers: int, rngs: nnx.Rngs) -> Layer:
    """Return one module whose parameters have a leading axis of length L; row i is layer i."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    @nnx.transform_metadata(in_axes=0, out_axes=0, partition="layers")
    def stack(rngs: nnx.Rngs) -> Layer:
        return make(rngs)

    return stack(rngs)


def period(pattern: tuple) -> int:
    """Return the length of the shortest prefix whose repetition gives `pattern`."""
    n = len(pattern)
    return next(p for p in range(1, n + 1) if n % p == 0 and pattern == pattern[:p] * (n // p))


def scan_layers(
    block: Callable[[jax.Array, Any, int | None, Any], tuple[jax.Array, Any]],
    layers: nnx.Module,
    x: jax.Array,
    windows: tuple[int | None, ...],
    *,
    per_layer: Any = None,
    remat: str = "none",
) -> tuple[jax.Array, Any]:
    """Compute x, outputs[i] <- block(x, layers[i], windows[i], per_layer[i]) for each layer, as a scan.

    Windows are static, so the scan runs over the periods of `windows`, and its body holds the layers of one period: two
    for the usual pattern of sliding, full, sliding, full, ...; all of them if the pattern does not repeat.

    Args:
        block: one layer; it may close over arrays, which all layers share.
        layers: a stacked module, leaves [L, ...]; or a list of L modules, over which the loop is unrolled.
        windows: the sliding window of each layer, None for full attention.
        per_layer: a pytree with leaves [L, ...], or lists of length L instead, scanned along with the layers.
        remat: see `Runtime.remat`; it applies only to derivatives, and not to a list of modules.

    Returns:
        The last x, and the outputs of all layers, leaves [L, ...].
    """
    if isinstance(layers, nnx.List):  # see `kernels.unstacked`
        outputs = []
        for i, (layer, window) in enumerate(zip(layers, windows, strict=True)):
            extra = jax.tree.map(operator.itemgetter(i), per_layer, is_leaf=lambda node: isinstance(node, list))
            x, output = block(x, layer, window, extra)
            outputs.append(output)
        return x, jax.tree.map(lambda *rows: jnp.stack(rows), *outputs)
    size = period(windows)
    stacks = layers, per_layer
    periods = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), stacks)
    stacks = jax.lax.stop_gradient(stacks)  # the derivative is that of `periods`, see `_pick`

    def body(x, scanned):
        group, rows = scanned
        outputs = []
        for i, window in enumerate(windows[:size]):
            pick = functools.partial(_pick, layer=group * size + i, row=i)
            layer, extra = jax.tree.map(pick, stacks, rows)
            x, output = block(x, layer, window, extra)
            outputs.append(output)
        return x, jax.tree.map(lambda *rows: jnp.stack(rows), *outputs)

    body = jax.checkpoint(body, prevent_cse=False, policy=_SAVEABLE[remat])
    x, outputs = jax.lax.scan(body, x, (jnp.arange(len(windows) // size), periods))
    return x, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)


def map_layers(function: Callable[[Any], Any], layers: nnx.Module, part: str) -> Any:
    """Return function(layers[i].part) for each layer: leaves [L, ...], or lists of L for a list of modules."""
    if isinstance(layers, nnx.List):
        return jax.tree.map(lambda *rows: list(rows), *(function(getattr(layer, part)) for layer in layers))
    return jax.lax.map(function, getattr(layers, part))


def _pick(stack: jax.Array, rows: jax.Array, *, layer: jax.Array, row: int) -> jax.Array:
    """Return stack[layer], which equals rows[row]; the value is read from `stack`, the derivative goes to `rows`.

    `stack` is the whole array, `rows` the slice of it that the scan passes to this period. XLA reads an index into the
    whole stack in place, but copies a scanned slice first. The compiler's estimate for a TPU (2B, 240 s, v5e 2x2) is
    0.211 s with `stack` and was 0.276 s with `rows`; on a CPU (four layers of width 512, 30 s) a forward program
    accesses 0.28 GB instead of 0.31, and a gradient of all weights 1.43 GB instead of 1.49. However, the derivative
    with respect to the whole stack would sum arrays of its size over all periods, whereas with respect to the slices
    each period writes only its own part. Integers and 8-bit floats have no derivative.
    """
    if not jnp.issubdtype(stack.dtype, jnp.inexact) or stack.dtype.itemsize == 1:
        return pick_row(stack, layer)
    return _read(stack, rows, layer, row)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _read(stack, rows, layer, row):
    return pick_row(stack, layer)


# Symbolic zeros keep arrays without a tangent, such as frozen weights under an adapter, out of the derivative.
@functools.partial(_read.defjvp, symbolic_zeros=True)
def _read_jvp(row, primals, tangents):
    stack, rows, layer = primals
    _, slopes, _ = tangents
    value = _read(stack, rows, layer, row)
    return value, SymbolicZero.from_primal_value(value) if isinstance(slopes, SymbolicZero) else slopes[row]
