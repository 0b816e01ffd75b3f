"""Arrays of an Orbax checkpoint on a local disk, read by one copy.

Orbax reads a file into a buffer, decodes that into an array, and JAX copies it to the device. A CPU is a device too:
loading is then bound by pages that are written for the first time. Here TensorStore, which Orbax reads by, maps the
files and decodes them into memory that JAX for CPUs takes as it is.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts

from acestep_jax.io.files import is_remote

STATE = "state"  # Orbax's name of a checkpoint's only tree
GROUP_BYTES = 256 * 2**20  # read at once
ALIGNMENT = 64  # bytes; JAX for CPUs copies what is less aligned


def is_mapped(weights: Path, targets: Iterable[jax.ShapeDtypeStruct]) -> bool:
    """Return whether `read` takes these: of a local disk, in the format that this package writes, onto one device."""
    if is_remote(weights) or not all(isinstance(x.sharding, jax.sharding.SingleDeviceSharding) for x in targets):
        return False
    try:
        values = json.loads((weights / STATE / "_METADATA").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return values.get("use_ocdbt") is True and values.get("use_zarr3") is True


def read(weights: Path, targets: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, jax.Array]]:
    """Yield arrays by their dotted names, as shapes, dtypes and devices of `targets` say.

    Raises:
        ValueError: if one is absent, damaged, or of another shape.
    """
    context = ts.Context({"file_io_mode": {"mode": "memmap"}})
    stores = {name: ts.open(_spec(weights, name), context=context, open=True, read=True) for name in targets}
    group: list[str] = []
    size = 0
    for name, target in targets.items():
        group.append(name)
        size += target.size * target.dtype.itemsize
        if size >= GROUP_BYTES:
            yield from _read(group, stores, targets, context)
            group, size = [], 0
    yield from _read(group, stores, targets, context)


def _read(names: list[str], stores, targets: Mapping[str, jax.ShapeDtypeStruct], context: ts.Context):
    arrays, reads = [], []
    for name in names:
        store, target = stores[name].result(), targets[name]
        if store.shape != target.shape:
            raise ValueError(f"{name}: expected shape {target.shape}, found {store.shape}")
        arrays.append(_empty(store.shape, store.dtype.numpy_dtype))
        reads.append(ts.array(arrays[-1], context=context).write(store))
    for name, array, done in zip(names, arrays, reads, strict=True):
        done.result()
        target = targets[name]
        yield name, jax.device_put(array.astype(target.dtype, copy=False), target.sharding)


def _spec(weights: Path, name: str) -> dict:
    kvstore = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{(weights / STATE).absolute()}/"},
        "path": f"{name}/",
    }
    checks = {"recheck_cached_data": False, "recheck_cached_metadata": False, "fill_missing_data_reads": False}
    return {"driver": "zarr3", "kvstore": kvstore, **checks}


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
