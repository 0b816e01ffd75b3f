"""Reading one floating-point tensor of a file that `torch.save` wrote, without PyTorch and without running its code.

Such a file is a zip archive: `NAME/data.pkl`, a pickle that describes the tensor, and `NAME/data/0`, its bytes. A
pickle is a program, which may call anything. Here it may use only the few instructions that a tensor needs, and names
are resolved only to the functions listed here; any other file is rejected.
"""

import io
import math
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from acestep_jax.errors import InputError

_STORAGES = {"FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16}
# Excludes BUILD, NEWOBJ and all others that create or change objects; REDUCE calls only what `find_class` allows.
_INSTRUCTIONS = frozenset(
    "PROTO FRAME GLOBAL STACK_GLOBAL MARK TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_TUPLE EMPTY_DICT REDUCE BINPERSID NONE "
    "NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE SHORT_BINUNICODE BINPUT BINGET MEMOIZE STOP".split()
)
_MOST_BYTES = 64 * 1024  # maximum size of the pickle; one tensor takes about 200 bytes


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    count: int


class _View(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensor(file: Path) -> np.ndarray:
    """Return the tensor of a file that `torch.save` wrote, float32, float16 or bfloat16.

    Raises:
        InputError: if the file is missing or damaged, or holds anything but one such tensor.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(names) != 1:
                raise InputError(f"{file}: not a tensor saved by torch (no data.pkl); download it again")
            folder = names[0].removesuffix("data.pkl")
            if f"{folder}byteorder" in archive.namelist():
                if (order := _content(archive, file, f"{folder}byteorder", 16)) != b"little":
                    raise InputError(f"{file}: its byte order is {order!r}; expected little-endian numbers")
            view = _describe(file, _content(archive, file, names[0], _MOST_BYTES))
            most = view.storage.count * view.storage.dtype.itemsize
            content = _content(archive, file, f"{folder}data/{view.storage.key}", most)
    except FileNotFoundError:
        raise InputError(f"{file}: missing; the checkpoint is incomplete, download the file") from None
    except zipfile.BadZipFile as error:
        raise InputError(
            f"{file}: not a tensor saved by torch as a zip file ({error}); download it again. If it comes from before "
            "torch 1.6, load it in torch and save it again"
        ) from None
    last = view.offset + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
    inside = last < view.storage.count and math.prod(view.shape) <= view.storage.count
    if len(content) != most or math.prod(view.shape) and not inside:
        raise InputError(f"{file}: the tensor is larger than its {len(content)} bytes; download it again")
    flat = np.frombuffer(content, view.storage.dtype)[view.offset :]
    strides = [stride * flat.itemsize for stride in view.strides]
    return np.lib.stride_tricks.as_strided(flat, view.shape, strides, writeable=False).copy()


def _content(archive: zipfile.ZipFile, file: Path, name: str, most: int) -> bytes:
    try:
        entry = archive.getinfo(name)
    except KeyError:
        raise InputError(f"{file}: not a tensor saved by torch (no {name}); download it again") from None
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > most:
        raise InputError(f"{file}: not a tensor saved by torch ({name} is compressed or too large)")
    return archive.read(entry)


def _describe(file: Path, program: bytes) -> _View:
    """Return the pickle's description of the tensor; raise InputError if it is more than one tensor."""
    refused = f"{file}: refused, because it is more than a tensor and may hold code"
    advice = "take the file from the publisher of the model"
    try:
        for instruction, argument, _ in pickletools.genops(program):
            if instruction.name in ("GLOBAL", "STACK_GLOBAL", *_INSTRUCTIONS):
                continue
            raise InputError(f"{refused} (instruction {instruction.name}, {argument!r}); {advice}")
        found = _Unpickler(program, refused, advice).load()
    except InputError:
        raise
    except Exception as error:  # pickles fail in many ways
        raise InputError(f"{file}: not a tensor saved by torch ({error}); download it again") from None
    if not isinstance(found, _View):
        raise InputError(f"{file}: expected a tensor, found {type(found).__name__}; download it again")
    return found


class _Unpickler(pickle.Unpickler):
    """An unpickler that raises an error for every name not listed here."""

    def __init__(self, program: bytes, refused: str, advice: str):
        super().__init__(io.BytesIO(program))
        self.refused, self.advice = refused, advice

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name == "torch" and global_name in _STORAGES:
            return np.dtype(_STORAGES[global_name])
        if (module_name, global_name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return _no_hooks
        raise InputError(f"{self.refused} (it names {module_name}.{global_name}); {self.advice}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not _is_count(count) or not isinstance(key, str):
            raise ValueError("its storage is of no known kind")
        return _Storage(dtype, key, count)


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(map(_is_count, numbers)) or len(shape) != len(strides):
        raise ValueError("its shape is of no known kind")
    return _View(storage, offset, tuple(shape), tuple(strides))


def _no_hooks() -> None:
    """Stand in for the empty dictionary of hooks that every tensor has."""


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
