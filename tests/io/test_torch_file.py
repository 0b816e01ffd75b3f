"""A tensor saved by torch is read without torch, and nothing else is: no code of a pickle runs."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from acestep_jax import InputError
from acestep_jax.io.torch_file import read_tensor


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("form", ["plain", "transposed", "part", "scalar", "empty"])
def test_tensors_of_torch(tmp_path, dtype, form):
    import torch

    value = torch.randn(2, 3, 5).to(getattr(torch, dtype))
    value = {
        "plain": value,
        "transposed": value.transpose(1, 2),
        "part": value[1, ::2, 1:],
        "scalar": value[0, 0, 0],
        "empty": value[:0],
    }[form]
    torch.save(value, tmp_path / "x.pt")
    found = read_tensor(tmp_path / "x.pt")
    assert found.dtype.name == dtype and found.shape == tuple(value.shape) and found.flags.owndata
    np.testing.assert_array_equal(found.astype(np.float32), value.float().numpy())


def test_a_parameter_and_a_dictionary_are_no_tensors(tmp_path):
    import torch

    for value in (torch.nn.Parameter(torch.zeros(2)), {"a": torch.zeros(2)}, [1], torch.zeros(2, dtype=torch.int32)):
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(InputError, match="x.pt: (refused|expected a tensor)"):
            read_tensor(tmp_path / "x.pt")


def test_the_legacy_format_is_refused(tmp_path):
    import torch

    torch.save(torch.zeros(2), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="x.pt: not a tensor saved by torch as a zip file.*before torch 1.6"):
        read_tensor(tmp_path / "x.pt")


STORAGE = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
TENSOR = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + STORAGE + b"K%sK\x02K\x03\x86K%sK\x01\x86\x89}tR."
DATA = np.arange(6, dtype="<f4").tobytes()


def tensor(offset=0, stride=3):
    """The pickle of a tensor [2, 3]."""
    return TENSOR.replace(b"%s", bytes([offset]), 1).replace(b"%s", bytes([stride]), 1)


def write(path, program, data=DATA, order=b"little", **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("x/data.pkl", program)
        archive.writestr("x/byteorder", order)
        archive.writestr("x/data/0", data)


@pytest.mark.unit
def test_the_format(tmp_path):
    """A file written by hand, so that this test is about bytes and not about torch."""
    write(tmp_path / "x.pt", tensor())
    np.testing.assert_array_equal(read_tensor(tmp_path / "x.pt"), np.arange(6.0).reshape(2, 3))
    write(tmp_path / "x.pt", tensor(stride=0))
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(read_tensor(tmp_path / "x.pt"), [[0, 1, 2], [0, 1, 2]])


class Evil:
    """What unpickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil(path, protocol=2):
    return pickle.dumps(Evil(os.mkdir, str(path)), protocol)


BAD = {
    "a call": (evil, "refused, because it is more than a tensor and may hold code.*mkdir"),
    "a call, newer protocol": (lambda path: evil(path, 4), "refused.*mkdir"),
    "a builtin": (lambda path: pickle.dumps(Evil(eval, f"open({str(path)!r}, 'w')"), 2), "refused.*eval"),
    "a module's attribute": (lambda path: b"\x80\x02cos\nmkdir\n.", "refused.*os.mkdir"),
    "a dotted name": (lambda path: b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "refused"),
    "an object's state": (lambda path: tensor()[:-1] + b"}b.", "refused.*BUILD"),
    "a class": (lambda path: b"\x80\x02ccollections\nOrderedDict\n)\x81.", "refused.*NEWOBJ"),
    "an old instance": (lambda path: b"(ios\nmkdir\n.", "refused.*INST"),
    "an extension": (lambda path: b"\x80\x02\x82\x01.", "refused.*EXT1"),
    "no tensor": (lambda path: b"\x80\x02K\x01.", "expected a tensor, found int"),
    "a dtype": (lambda path: b"\x80\x02ctorch\nFloatStorage\n.", "expected a tensor"),
    "integers": (lambda path: tensor().replace(b"FloatStorage", b"LongStorage"), "refused.*torch.LongStorage"),
    "nothing": (lambda path: b"", "not a tensor saved by torch"),
    "half": (lambda path: tensor()[:60], "not a tensor saved by torch"),
    "a call of a number": (lambda path: b"\x80\x02K\x01)R.", "not a tensor saved by torch"),
    "too large": (lambda path: b"\x80\x02" + b"K\x010" * 40_000 + b".", "compressed or too large"),
    "beyond its bytes": (lambda path: tensor(offset=1), "larger than its 24 bytes"),
    "beyond its bytes by strides": (lambda path: tensor(stride=4), "larger than its 24 bytes"),
}


@pytest.mark.unit
@pytest.mark.parametrize("case", BAD)
def test_anything_else_is_refused(tmp_path, case):
    make, message = BAD[case]
    write(tmp_path / "x.pt", make(tmp_path / "ran"))
    with pytest.raises(InputError, match=f"x.pt: .*{message}"):
        read_tensor(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.unit
def test_the_evil_pickle_is_one(tmp_path):
    """Otherwise the test above would prove nothing."""
    pickle.loads(evil(tmp_path / "ran"))
    assert (tmp_path / "ran").is_dir()


@pytest.mark.unit
def test_damaged_archives(tmp_path):
    path = tmp_path / "x.pt"

    def refused(message):
        with pytest.raises(InputError, match=f"x.pt: {message}"):
            read_tensor(path)

    refused("missing")
    write(path, tensor())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("not a tensor saved by torch")
    path.write_bytes(whole.replace(DATA, DATA[::-1]))
    refused("not a tensor saved by torch as a zip file .Bad CRC")
    write(path, tensor(), data=DATA[:20])
    refused("the tensor is larger than its 20 bytes")
    write(path, tensor(), data=DATA * 2)
    refused("not a tensor saved by torch .x/data/0 is compressed or too large")
    write(path, tensor(), compression=zipfile.ZIP_DEFLATED)
    refused("not a tensor saved by torch .x/byteorder is compressed")
    write(path, tensor(), order=b"big")
    refused("its byte order is b'big'")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", tensor())
    refused("not a tensor saved by torch .no x/data/0")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/readme.txt", "x")
    refused("not a tensor saved by torch .no data.pkl")
