"""Writing a safetensors file one tensor at a time, which the safetensors library cannot.

Format: https://github.com/huggingface/safetensors#format. Eight bytes of header length, a JSON header, the data.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_safetensors(
    path: Path, tensors: Sequence[tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]]
) -> None:
    """Write tensors in the order given, each as (name, shape, dtype, read).

    Only one tensor is in memory at a time: `read` is called when its turn comes.

    Raises:
        ValueError: if what `read` returns does not have the promised shape and dtype.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype, _ in tensors:
        size = int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype.name], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, shape, dtype, read in tensors:
            value = np.ascontiguousarray(read())
            if value.shape != tuple(shape) or value.dtype != dtype:
                raise ValueError(f"{name}: promised {shape} {dtype}, found {value.shape} {value.dtype}")
            file.write(value.reshape(-1).view(np.uint8).data)
            del value  # before the next one is read
