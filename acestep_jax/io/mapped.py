"""Uses arrays of an Orbax checkpoint on a local disk in place, in mapped files.

Orbax reads a file into a buffer, decodes that into an array, and JAX copies it to the device. On a CPU, loading is then
bound by first-time writes to memory pages. Here files are mapped, and an array that is stored in the requested dtype
becomes a JAX array without a copy: it is read on first use, and arrays that are never used take no memory.

An array is copied once, into memory that JAX for CPUs uses as it is, if it has another dtype or is not aligned.
TensorStore, which Orbax uses for reading, decodes arrays that are stored in other forms.
"""

import contextlib
import json
import mmap
import re
import struct
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from acestep_jax.io.files import is_remote

STATE = "state"  # Orbax's name of a checkpoint's only tree
GROUP_BYTES = 256 * 2**20  # decoded at once
ALIGNMENT = 64  # bytes; JAX for CPUs copies arrays with less alignment

_LOCATION = re.compile(r"value:(.*):(\d+):(\d+)")  # path in two parts, offset, size
_INDEX = struct.Struct("<QQI")  # after the array: offset, size and checksum
_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_changes = threading.Lock()  # held while `_maps` changes or is listed


def is_mapped(weights: Path, targets: Iterable[jax.ShapeDtypeStruct]) -> bool:
    """Return whether `read` supports these: a local disk, the format that this package writes, and one device."""
    return all(isinstance(x.sharding, jax.sharding.SingleDeviceSharding) for x in targets) and _is_known(weights)


def stored(weights: Path) -> dict[str, jax.ShapeDtypeStruct] | None:
    """Return shape and dtype of every stored array by dotted name; None if `read` does not support
    the checkpoint, or the files are damaged."""
    if not _is_known(weights):
        return None
    found = {}
    for key, entry in _entries(weights / STATE).items():
        name, _, last = key.rpartition("/")
        if last == "zarr.json":
            try:
                values = json.loads(entry["inline_value"])
                found[name] = jax.ShapeDtypeStruct(tuple(values["shape"]), ts.dtype(values["data_type"]).numpy_dtype)
            except (LookupError, TypeError, ValueError):
                return None
    return found or None


def read(weights: Path, targets: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, jax.Array]]:
    """Yield arrays by their dotted names, with the shapes, dtypes and devices of `targets`.

    Raises:
        ValueError: if one is absent, damaged, or of another shape.
    """
    views = _views(weights / STATE, targets)
    context = ts.Context({"file_io_mode": {"mode": "memmap"}})
    others = (name for name in targets if name not in views)
    stores = {name: ts.open(_spec(weights, name), context=context, open=True, read=True) for name in others}
    group: list[str] = []
    size = 0
    for name, target in targets.items():
        if name in views:
            yield name, _placed(views.pop(name), target)
            continue
        group.append(name)
        size += target.size * target.dtype.itemsize
        if size >= GROUP_BYTES:
            yield from _decoded(group, stores, targets, context)
            group, size = [], 0
    yield from _decoded(group, stores, targets, context)


def release() -> None:
    """Release the pages of all arrays in mapped files; the system still has them in its file cache. Arrays stay valid,
    and pages that are used again count as memory of this process again."""
    if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        with _changes:
            files = list(_maps)
        for file in files:
            with contextlib.suppress(OSError):  # pages of a process that locks its memory stay
                file.madvise(mmap.MADV_DONTNEED)


def _is_known(weights: Path) -> bool:
    """Return whether these weights are on a local disk, in the format that this package writes."""
    if is_remote(weights):
        return False
    try:
        values = json.loads((weights / STATE / "_METADATA").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return values.get("use_ocdbt") is True and values.get("use_zarr3") is True


def _placed(array: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
    (device,) = target.sharding.device_set
    is_aligned = device.platform != "cpu" or array.ctypes.data % ALIGNMENT == 0
    if array.dtype != target.dtype or not is_aligned:
        copy = _empty(target.shape, target.dtype)
        np.copyto(copy, array, casting="unsafe")
        array = copy
    return jax.device_put(array, target.sharding)


def _decoded(names: list[str], stores, targets: Mapping[str, jax.ShapeDtypeStruct], context: ts.Context):
    arrays, reads = [], []
    for name in names:
        store, target = stores[name].result(), targets[name]
        if store.shape != target.shape:
            raise ValueError(f"{name}: expected shape {target.shape}, found {store.shape}")
        arrays.append(_empty(store.shape, store.dtype.numpy_dtype))
        reads.append(ts.array(arrays[-1], context=context).write(store))
    for name, array, done in zip(names, arrays, reads, strict=True):
        done.result()
        yield name, _placed(array, targets[name])


def _views(folder: Path, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """Return the arrays that are stored in one piece in the files of `folder`, by name."""
    entries = _entries(folder)
    files: dict[Path, mmap.mmap | None] = {}
    found = {}
    for name, target in targets.items():
        dtype = _plain_dtype(entries.get(f"{name}/zarr.json", {}).get("inline_value", b""), target.shape)
        key = "/".join([name, "c", *["0"] * len(target.shape)])
        match = _LOCATION.fullmatch(entries.get(key, {}).get("indirect_value", ""))
        if dtype is None or match is None:
            continue
        file, start, size = folder / match[1].replace(":", ""), int(match[2]), int(match[3])
        count = target.size * dtype.itemsize
        if file not in files:
            files[file] = _map(file)
        data = files[file]
        if data is None or len(data) < start + size or size != count + _INDEX.size:
            continue
        if _INDEX.unpack_from(data, start + count)[:2] == (0, count):
            found[name] = np.frombuffer(data, dtype, target.size, start).reshape(target.shape)
    return found


def _entries(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Return the entries of the newest version of a checkpoint by key; empty if its tree has several nodes, which takes
    about a million keys."""
    try:
        base = ts.KvStore.open({"driver": "file", "path": f"{folder.absolute()}/"}).result()
        newest = ts.ocdbt.dump(base).result()["versions"][-1]
        node = ts.ocdbt.dump(base, newest["root"]["location"]).result() if newest["root_height"] == 0 else {}
    except (ValueError, LookupError):  # damaged; decoding raises the error
        return {}
    return {entry["key"].decode(): entry for entry in node.get("entries", ())}


def _plain_dtype(text: bytes, shape: tuple[int, ...]) -> np.dtype | None:
    """Return the dtype of a Zarr 3 array that is stored as plain contiguous bytes; None if it is stored otherwise."""
    if not text:
        return None
    values, plain = json.loads(text), [{"configuration": {"endian": "little"}, "name": "bytes"}]
    try:
        (codec,), chunk = values["codecs"], values["chunk_grid"]["configuration"]["chunk_shape"]
        parts, inner = codec["configuration"]["chunk_shape"], codec["configuration"]["codecs"]
        dtype = ts.dtype(values["data_type"]).numpy_dtype
    except (LookupError, TypeError, ValueError):
        return None
    is_whole = list(shape) == values.get("shape") == chunk == parts and values.get("storage_transformers") is None
    if dtype.itemsize == 1:
        plain = [{"name": "bytes"}, *plain]
    return dtype if is_whole and len(inner) == 1 and inner[0] in plain else None


def _map(file: Path) -> mmap.mmap | None:
    try:
        with file.open("rb") as opened:
            made = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # absent, or empty
        return None
    with _changes:
        _maps.add(made)
    return made


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
