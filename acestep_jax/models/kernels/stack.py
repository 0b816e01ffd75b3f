"""Reading weights, where a loop is bound by reading them: a token of a few songs at a time.

An accelerator reads a layer within the stack of all of them. XLA for CPUs would first copy it out of the stack, which
doubles the time or more; there, each matrix is an array of its own, and a `switch` over the layers multiplies by it
where it lies. `split` makes such rows of stacks, and `pick` takes a layer of either.

Such a row is the transposed matrix, and a product of few vectors is computed in float32: on two cores of an Intel Xeon,
[2, 1024] x [1024, 3072] in bfloat16 takes 0.55 ms, against 0.9 ms not transposed and 1.3 ms with a bfloat16 result. In
float32 it is read at 16 to 19 GB/s where it is the left operand, see `multiply_rows`, at 11 to 12 as the right one, and
at 9 to 11 not transposed. For many vectors, none of this gains anything.
"""

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from acestep_jax.models.kernels import products
from acestep_jax.models.kernels.platform import platform

Layer = TypeVar("Layer", bound=nnx.Module)


def split(layers: Layer) -> Layer:
    """Return stacked layers with the matrices of their linear layers as rows, on a CPU; elsewhere, as they are.

    One stack after the other is replaced, so that no more than one of them is in memory twice.
    """
    if platform() == "cpu":
        for linear in _linears(layers):
            stack = linear.kernel[...]
            rows: Any = nnx.List([nnx.Param(_arranged(stack[i])) for i in range(stack.shape[0])])
            linear.kernel = rows
    return layers


def pick(layers: Layer, index: jax.Array) -> Layer:
    """Return the layer `index`, which a loop counts, of stacked layers or what `split` made of them."""
    is_rows = lambda node: isinstance(node, nnx.List)  # noqa: E731
    layer = jax.tree.map(
        lambda leaf: nnx.Param(leaf[0][...]) if is_rows(leaf) else pick_row(leaf, index), layers, is_leaf=is_rows
    )
    for linear, whole in zip(_linears(layer), _linears(layers), strict=True):
        if is_rows(whole.kernel):
            rows = [row[...] for row in whole.kernel]
            linear.dot_general = functools.partial(_product, rows, index, whole.dot_general)
    return layer


def _arranged(matrix: jax.Array) -> jax.Array:
    return matrix.T if _is_float(matrix.dtype) else matrix


def _product(rows: list[jax.Array], index: jax.Array, dot_general, x: jax.Array, _: jax.Array, *dimensions, **options):
    """Compute `dot_general` with the row `index` in place of the matrix that is given."""
    ((contracted, _), batch), *rest = dimensions
    transposed, quantised = _is_float(rows[0].dtype), rows[0].dtype.itemsize == 1
    numbers = ((contracted, (1,) if transposed else (0,)), batch)
    few = transposed and x.size // x.shape[-1] <= products.FEW
    if few:
        options |= {"preferred_element_type": jnp.float32}
    is_plain = few and dot_general is products.dot_general

    def multiply(row: jax.Array, x: jax.Array) -> jax.Array:
        if is_plain:
            return multiply_rows(x, row.astype(x.dtype)).astype(x.dtype)
        made = dot_general(x, row.astype(x.dtype), numbers, *rest, **options)
        return made if quantised else made.astype(x.dtype)  # what is quantised has a scale to come, see QuantizedLinear

    return jax.lax.switch(index, [functools.partial(multiply, row) for row in rows], x)


def multiply_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Return the products of few vectors [..., D] and rows [N, D], [..., N] float32.

    XLA for CPUs reads float32 rows fastest as the left operand, which two cores share, and as which nothing is packed.
    Rows of two dimensions would become the right operand again, to save a transpose of the small result.
    """
    is_few = x.size // x.shape[-1] <= products.FEW and jax.sharding.get_abstract_mesh().empty
    if rows.dtype == jnp.float32 and platform() == "cpu" and is_few and len(rows) % 2 == 0:
        halves, vectors = rows.reshape(2, -1, rows.shape[1]), x.reshape(-1, x.shape[-1])
        made = jnp.einsum("bd,snd->sbn", vectors, halves, preferred_element_type=jnp.float32)
        return made.transpose(1, 0, 2).reshape(*x.shape[:-1], len(rows))
    return jnp.einsum("...d,vd->...v", x, rows, preferred_element_type=jnp.float32)


def storage_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype of an array that a loop reads and writes in parts, of values of `dtype`: on a CPU, the bits of
    half precision and of float8. XLA would widen the whole array to float32 at each write, and before the loop where it
    is read."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return dtype  # random keys have one that NumPy does not know
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(jnp.dtype(dtype).itemsize)
    return jnp.dtype(bits) if bits is not None and platform() == "cpu" else jnp.dtype(dtype)


def stored(x: jax.Array) -> jax.Array:
    """Return values as `storage_dtype` keeps them."""
    kind = storage_dtype(x.dtype)
    return x if kind == x.dtype else jax.lax.bitcast_convert_type(x, kind)


def restored(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return the values, of `dtype`, that `stored` was given."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def pick_row(stack: jax.Array, index: jax.Array) -> jax.Array:
    """Return stack[index], read in place: see `storage_dtype`."""
    if storage_dtype(stack.dtype) != stack.dtype:
        # XLA would take the bits of the whole stack, which are a copy of it, before the loop that reads layers.
        stack, index = jax.lax.optimization_barrier((stack, index))
    return restored(
        jax.lax.dynamic_index_in_dim(stored(stack), index, keepdims=False, allow_negative_indices=False), stack.dtype
    )


def _is_float(dtype: jnp.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize > 1


def _linears(module: nnx.Module) -> list[nnx.Linear]:
    return [node for _, node in nnx.iter_modules(module) if isinstance(node, nnx.Linear)]
