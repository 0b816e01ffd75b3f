"""The programs that an NVIDIA GPU would run, compiled without one."""

from importlib import util

import pytest

from tests.processes import printed_rows

pytestmark = pytest.mark.slow


def compile_for_gpu(*arguments: str) -> list[dict[str, str]]:
    """The rows that `benchmarks.gpu_aot` prints with these arguments, by column."""
    if not any(util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        pytest.skip("compiling for NVIDIA GPUs needs their plugin: pip install '.[cuda13]'")
    return printed_rows("benchmarks.gpu_aot", *arguments)


def kernels(text: str) -> dict[str, int]:
    """'55: 30 elementwise, ...': how many there are of each kind."""
    words = [entry.split(maxsplit=1) for entry in text.split(": ", 1)[1].split(", ")]
    return {kind: int(n) for n, kind in words}


def test_a_layer_with_a_window_and_one_without():
    """Each attention is the one kernel that was meant: Pallas' for the window, cuDNN's for the others. Queries, keys
    and values are split by another one of Pallas. No weights are copied."""
    row, other = compile_for_gpu(*"--stage denoise --size 2B --layers 2 --seconds 60 --card h100 t4".split())
    found = kernels(row["kernels"])
    assert found["cuDNN attention"] == 3 * 8 and found["Pallas"] == 3 * 8
    assert row["fits"] == "yes" and float(row["copied GB a step"]) < 0.02
    # A card without bfloat16 has neither kernel.
    assert not {"cuDNN attention", "Pallas"} & kernels(other["kernels"]).keys()


def test_kernels_of_a_pair_of_layers():
    rows = [
        *compile_for_gpu(*"--stage denoise --size 2B --layers 2 --seconds 240".split()),
        *compile_for_gpu(*"--stage denoise --size 2B --layers 4 --seconds 240".split()),
    ]
    two, four = (sum(kernels(row["kernels"]).values()) for row in rows)
    # The modulation of another pair is one more kernel of a step; keys and values of the condition are made once.
    assert (four - two) // 8 <= 31


def test_the_decoder_is_made_of_convolutions():
    (row,) = compile_for_gpu(*"--stage decode --seconds 20 --card a100".split())
    assert kernels(row["kernels"])["cuDNN convolution"] >= 37
