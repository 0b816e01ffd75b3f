"""Weights of loops that are bound by reading them, such as decoding one token at a time for a few songs.

A TPU reads a layer in place from the stack of all layers. XLA for CPUs and GPUs would first copy it out of the stack,
which takes at least twice the time. `split` turns stacks into what the platform reads in place, and `pick` takes a
layer from either form: on a GPU separate layers, over which the loop is unrolled; on a CPU, where that would take long
to compile, each matrix is a separate array, a *row*, and a `switch` over the layers uses it.

A row is the transposed matrix, as the matrices of separate layers on a GPU are, see `rows_gpu`. On a CPU, products with
few vectors are computed in float32: on two cores of an Intel Xeon, [2, 1024] x [1024, 3072] in bfloat16 takes 0.55 ms,
against 0.9 ms not transposed and 1.3 ms with a bfloat16 result. In float32 it is read at 16 to 19 GB/s as the left
operand, see `multiply_rows`, at 11 to 12 as the right one, and at 9 to 11 not transposed. For many vectors, none of
this helps.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from acestep_jax.distributed import partition_spec
from acestep_jax.models.kernels import products, rows_gpu
from acestep_jax.models.kernels.platform import platform
from acestep_jax.models.kernels.unstacked import fuse, unstack

Layer = TypeVar("Layer", bound=nnx.Module)
Carry = TypeVar("Carry")


def split(layers: Layer, groups: Sequence[tuple[str, ...]] = ()) -> Layer | nnx.List:
    """Return stacked layers as a list of layers on a GPU, where matrices are transposed, with the matrices of their
    linear layers as rows on a CPU, and unchanged on a TPU.

    Stacks are replaced one after another, so that at most one group of them is in memory twice; on a GPU one stack, and
    then one layer.

    Args:
        groups: dotted names of linear layers with the same input, which become one: fewer, larger products.
    """
    if platform() == "gpu":
        separate = unstack(layers, groups, consume=True)
        for linear in _linears(separate):
            if linear.dot_general is products.dot_general and _is_float(linear.kernel.dtype):
                linear.kernel = nnx.Param(linear.kernel[...].T)
                linear.dot_general = rows_gpu.dot_general
        return separate
    if platform() == "cpu":
        for names in groups:
            fuse(layers, names)
        for linear in _linears(layers):
            stack = linear.kernel[...]
            rows: Any = nnx.List([nnx.Param(_arranged(stack[i])) for i in range(stack.shape[0])])
            linear.kernel = rows
    return layers


def is_split(layers: nnx.Module) -> bool:
    """Return whether `split` has changed the layers."""
    return isinstance(layers, nnx.List) or any(isinstance(linear.kernel, nnx.List) for linear in _linears(layers))


def loop(count: int, body: Callable[[Any, Carry], Carry], carry: Carry, layers: nnx.Module) -> Carry:
    """Return the carry after carry = body(index, carry) for each of `count` layers, unrolled over separate layers."""
    if not isinstance(layers, nnx.List):
        return jax.lax.fori_loop(0, count, body, carry)
    for index in range(count):
        carry = body(index, carry)
    return carry


def pick(layers: nnx.Module, index: Any) -> Any:
    """Return layer `index`, a counter of `loop`, of stacked layers or of a result of `split`."""
    if isinstance(layers, nnx.List):
        return layers[index]
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
    """Compute `dot_general` with row `index` in place of the given matrix."""
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
        return made if quantised else made.astype(x.dtype)  # a quantised product is scaled later, see QuantizedLinear

    return jax.lax.switch(index, [functools.partial(multiply, row) for row in rows], x)


def multiply_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Return the products of a few vectors [..., D] with rows [N, D] of any dtype, as [..., N] float32.

    A GPU has a kernel for it, see `rows_gpu`. XLA for CPUs reads float32 rows fastest as the left operand, which it
    splits over cores and does not pack. With 2-D rows, XLA would make them the right operand again, to save a transpose
    of the small result.
    """
    if rows_gpu.suits(x, rows):
        return rows_gpu.multiply(x, rows, dtype=jnp.float32)
    rows = rows.astype(x.dtype)
    is_few = x.size // x.shape[-1] <= products.FEW and jax.sharding.get_abstract_mesh().empty
    if rows.dtype == jnp.float32 and platform() == "cpu" and is_few and len(rows) % 2 == 0:
        halves, vectors = rows.reshape(2, -1, rows.shape[1]), x.reshape(-1, x.shape[-1])
        made = jnp.einsum("bd,snd->sbn", vectors, halves, preferred_element_type=jnp.float32)
        return made.transpose(1, 0, 2).reshape(*x.shape[:-1], len(rows))
    return products.multiply(x, rows, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def storage_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the storage dtype for values of `dtype` in an array that a loop reads and writes in parts: on a CPU, half
    precision and float8 are stored as bits. Otherwise XLA would widen the whole array to float32 at each write, and
    before a loop that reads it."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return dtype  # random keys have a dtype that NumPy does not know
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(jnp.dtype(dtype).itemsize)
    return jnp.dtype(bits) if bits is not None and platform() == "cpu" else jnp.dtype(dtype)


def stored(x: jax.Array) -> jax.Array:
    """Return values in their `storage_dtype`."""
    kind = storage_dtype(x.dtype)
    return x if kind == x.dtype else jax.lax.bitcast_convert_type(x, kind)


def restored(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return the values of `dtype` that `stored` got."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def pick_row(stack: jax.Array, index: jax.Array) -> jax.Array:
    """Return stack[index], read in place: see `storage_dtype`."""
    if storage_dtype(stack.dtype) != stack.dtype:
        # Without this, XLA would copy the whole stack as bits before the loop that reads its layers.
        stack, index = jax.lax.optimization_barrier((stack, index))
    return restored(
        jax.lax.dynamic_index_in_dim(stored(stack), index, keepdims=False, allow_negative_indices=False), stack.dtype
    )


def row_major(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Return x, an array that a loop updates, in the layout of its shape on a TPU. There, XLA would give it the layout
    of the product that the update comes from, and copy what each iteration reads of it.

    axes: logical names of its axes on a mesh, where each device has a part: of a whole array with a constraint, XLA
        would gather all parts on each device.
    """
    if platform() != "tpu":
        return x
    mesh = jax.sharding.get_abstract_mesh()
    constrain = lambda part: with_layout_constraint(part, Layout(tuple(range(part.ndim))))  # noqa: E731
    if mesh.empty:
        return constrain(x)
    spec = partition_spec(axes, x.shape, mesh)
    return jax.shard_map(constrain, in_specs=spec, out_specs=spec, check_vma=False)(x)


def read_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype of values of `dtype` in an array that a loop reads in every iteration and hardly ever writes:
    float32 on a CPU, where XLA would widen half precision at each product."""
    return jnp.dtype(jnp.float32) if platform() == "cpu" else jnp.dtype(dtype)


def _is_float(dtype: jnp.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize > 1


def _linears(module: nnx.Module) -> list[nnx.Linear]:
    return [node for _, node in nnx.iter_modules(module) if isinstance(node, nnx.Linear)]
