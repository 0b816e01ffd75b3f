"""Tensors of safetensors files, in particular 8-bit ones with their scales."""

import json

import ml_dtypes
import numpy as np
import pytest

from acestep_jax import InputError
from acestep_jax.io.safetensors_reader import read_header

pytestmark = pytest.mark.unit

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "uint8": "U8", "int8": "I8"}
CODES |= {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


def write(path, arrays, metadata=None):
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, value in arrays.items():
        value = np.asarray(value)
        offsets = [len(data), len(data) + value.nbytes]
        header[name] = {"dtype": CODES[value.dtype.name], "shape": list(value.shape), "data_offsets": offsets}
        data += value.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read(path, dtype=None):
    return {name: tensor.read() for name, tensor in read_header(path, dtype).items()}


def note(layer):
    """`comfy_quant`: JSON as bytes."""
    return np.frombuffer(json.dumps(layer).encode(), np.uint8)


VALUES = np.linspace(-3, 3, 6, dtype=np.float32).reshape(3, 2)
ONE, ROWS = np.float32(0.37), np.array([0.5, 0.3, 7.0], np.float32)
SCALED = {
    "no scale": ({}, 1),
    "old": ({"a.scale_weight": ONE, "scaled_fp8": np.zeros(2, np.float32), "a.scale_input": ONE}, ONE),
    "old, prefixed": ({"a.scale_weight": ONE[None], "m.scaled_fp8": np.zeros(0, ml_dtypes.float8_e4m3fn)}, ONE),
    "new": ({"a.weight_scale": ONE, "a.input_scale": ONE, "a.comfy_quant": note({"format": "float8_e4m3fn"})}, ONE),
    "rows": ({"a.weight_scale": ROWS[:, None]}, ROWS[:, None]),
    "flat rows": ({"a.weight_scale": ROWS.astype(ml_dtypes.bfloat16)}, ROWS.astype(ml_dtypes.bfloat16)[:, None]),
}


@pytest.mark.parametrize("case", SCALED)
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_float8(tmp_path, case, kind):
    """Each value times its scale, in float32, rounded once; what belongs to the scales is no tensor of the model."""
    extra, scale = SCALED[case]
    stored = VALUES.astype(getattr(ml_dtypes, kind))
    write(tmp_path / "x.safetensors", {"a.weight": stored, "a.bias": ROWS} | extra)
    exact = stored.astype(np.float32) * np.asarray(scale, np.float32)
    for dtype, expected in ((None, ml_dtypes.bfloat16), (np.dtype("float32"), np.float32)):
        found = read(tmp_path / "x.safetensors", dtype)
        assert found.keys() == {"a.weight", "a.bias"} and found["a.weight"].dtype == expected
        np.testing.assert_array_equal(found["a.weight"], exact.astype(expected))
        assert found["a.bias"].dtype == np.float32 and np.array_equal(found["a.bias"], ROWS)


def test_mixed_dtypes(tmp_path):
    arrays = {kind: VALUES.astype(getattr(ml_dtypes, kind, kind)) for kind in ("float32", "bfloat16", "float16")}
    arrays["scalar"] = np.float32(2)
    write(tmp_path / "x.safetensors", arrays)
    found = read(tmp_path / "x.safetensors")
    assert {name: value.dtype for name, value in found.items()} == {n: v.dtype for n, v in arrays.items()}
    assert all(np.array_equal(found[name], value) for name, value in arrays.items())
    assert {value.dtype.name for value in read(tmp_path / "x.safetensors", np.dtype("float16")).values()} == {"float16"}


QUARTER = VALUES.astype(ml_dtypes.float8_e4m3fn)
BAD = {
    "integers": ({"a.weight": VALUES.astype(np.int8), "a.weight_scale": ONE}, None, "a.weight is I8; expected"),
    "four bits": (
        {"a.weight": VALUES.astype(np.uint8), "a.comfy_quant": note({"format": "nvfp4"})},
        None,
        "a is quantised as nvfp4",
    ),
    "four bits, noted in the header": (
        {"a.weight": VALUES.astype(np.uint8)},
        {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "mxfp8"}}})},
        "a is quantised as mxfp8",
    ),
    "a scale for each block": ({"a.weight": QUARTER, "a.weight_scale": VALUES[:, :2]}, None, "one for each row"),
    "notes that are no JSON": ({"a.weight": QUARTER, "a.comfy_quant": note([])[:1]}, None, "notes on quantisation"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_quantisation_is_named(tmp_path, case):
    arrays, metadata, message = BAD[case]
    write(tmp_path / "x.safetensors", arrays, metadata)
    with pytest.raises(InputError, match=f"x.safetensors: .*{message}"):
        read_header(tmp_path / "x.safetensors", None)


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    write(tmp_path / "x.safetensors", {"a.weight": VALUES})
    tensor = read_header(tmp_path / "x.safetensors", None)["a.weight"]
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-4])
    with pytest.raises(InputError, match="a.weight is cut off"):
        tensor.read()
