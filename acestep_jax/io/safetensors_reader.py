"""Reading safetensors files one tensor at a time; 8-bit floats are multiplied by their scales as they are read.

Scales of 8-bit floats, as ComfyUI and its converters write them: `X.weight` float8 has the scale `X.scale_weight` if
there is a tensor `scaled_fp8`, or `X.weight_scale` if there is `X.comfy_quant`, the format as JSON. A scale is one
number or one for each row. Scales of activations (`X.scale_input`, `X.input_scale`) matter only for 8-bit products, so
they are skipped.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from acestep_jax.errors import InputError

_DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_FLOAT8 = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)}
_FROM_FLOAT8 = _DTYPES["BF16"]  # the dtype of the published weights, and of ComfyUI's computation
_SCALES = (".weight_scale", ".scale_weight")
_SKIPPED = (".scale_input", ".input_scale")


class Tensor(NamedTuple):
    """A tensor's shape and dtype, the function that reads it, and its file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    file: Path | None = None


def read_header(file: Path, dtype: np.dtype | None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, which are cast to `dtype` when read (None: float8 to bfloat16).

    Raises:
        InputError: if the file is missing or damaged, or holds tensors that are not floating-point or have an unknown
            quantisation.
    """
    if not file.is_file():
        raise InputError(f"{file}: missing; the checkpoint is incomplete, download the file")
    try:
        with safe_open(file, framework="np") as reader:  # checks the header against the size of the file
            metadata = reader.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{file}: damaged or truncated ({error}); download it again") from None
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        entries = json.loads(opened.read(size))
    entries.pop("__metadata__", None)
    _check_formats(file, entries, metadata, 8 + size)
    scales = {}
    for name in [name for name in entries if name.endswith(_SCALES)]:
        weight = f"{name.rpartition('.')[0]}.weight"
        if weight in entries and entries[weight]["dtype"] in _FLOAT8:
            scales[weight] = _Entry(file, name, entries.pop(name), 8 + size)
    tensors = {}
    for name, values in entries.items():
        if name.endswith((*_SKIPPED, ".comfy_quant")) or name.rpartition(".")[2] == "scaled_fp8":
            continue
        entry = _Entry(file, name, values, 8 + size)
        if entry.code in _FLOAT8:
            kind, read = dtype or _FROM_FLOAT8, _scaled(entry, scales.get(name), dtype or _FROM_FLOAT8)
        elif entry.code in _DTYPES:
            kind, read = dtype or _DTYPES[entry.code], _cast(entry, dtype)
        else:
            raise InputError(
                f"{file}: {name} is {entry.code}; expected one of {', '.join((*_DTYPES, *_FLOAT8))}. Weights quantised "
                "to integers are not read; take the file in bfloat16 or float8"
            )
        tensors[name] = Tensor(entry.shape, kind, read, file)
    return tensors


class _Entry:
    """One tensor of a file, as its header describes it."""

    def __init__(self, file: Path, name: str, values: dict[str, Any], data: int):
        self.file, self.name, self.code = file, name, values["dtype"]
        self.shape = tuple(values["shape"])
        self.start = data + values["data_offsets"][0]

    def read(self) -> np.ndarray:
        """Return the tensor in its own dtype."""
        dtype = (_DTYPES | _FLOAT8)[self.code]
        count = math.prod(self.shape) * dtype.itemsize
        with self.file.open("rb") as opened:  # no file stays open or mapped into memory between two tensors
            opened.seek(self.start)
            found = np.fromfile(opened, np.uint8, count)
        if len(found) != count:
            raise InputError(f"{self.file}: {self.name} is cut off; the file has changed, download it again")
        return found.view(dtype).reshape(self.shape)


def _cast(entry: _Entry, dtype: np.dtype | None) -> Callable[[], np.ndarray]:
    return entry.read if dtype is None else lambda: entry.read().astype(dtype, copy=False)


def _scaled(entry: _Entry, scale: _Entry | None, dtype: np.dtype) -> Callable[[], np.ndarray]:
    """Return the function that reads a float8 tensor, times its scale in float32, rounded once."""
    if scale is None:
        return lambda: entry.read().astype(dtype)
    rows = entry.shape[0] if entry.shape else 1
    if scale.code not in _DTYPES or math.prod(scale.shape) not in (1, rows):
        raise InputError(
            f"{entry.file}: {scale.name} is {scale.code} {list(scale.shape)}; expected one number or {rows} of them, "
            "one for each row"
        )
    shape = (-1,) + (1,) * (len(entry.shape) - 1)
    return lambda: (entry.read().astype(np.float32) * scale.read().astype(np.float32).reshape(shape)).astype(dtype)


def _check_formats(file: Path, entries: dict[str, Any], metadata: dict[str, str], data: int) -> None:
    """Raise InputError if a layer is quantised to something else than 8-bit floats with a plain scale."""
    formats: dict[str, Any] = {}
    for name, values in entries.items():
        if name.endswith(".comfy_quant"):
            with file.open("rb") as opened:
                opened.seek(data + values["data_offsets"][0])
                formats[name] = opened.read(min(values["data_offsets"][1] - values["data_offsets"][0], 4096))
    try:
        found = {name: json.loads(text) for name, text in formats.items()}
        found |= json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        for name, layer in found.items():
            kind = layer.get("format", "")
            if not kind.startswith("float8_"):
                raise InputError(
                    f"{file}: {name.removesuffix('.comfy_quant')} is quantised as {kind}; expected float8 or no "
                    "quantisation; take the file in bfloat16 or float8"
                )
    except (ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: its notes on quantisation are damaged ({error}); download it again") from None
