"""The forms of a convolution that a TPU and a CPU get, against the plain one."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax.models.kernels import convolution, products
from acestep_jax.models.kernels.convolution import convolve, convolve_transposed
from tests.jaxprs import equations
from tests.parity import assert_close, normal

pytestmark = pytest.mark.unit


@pytest.fixture
def on_tpu(monkeypatch):
    """Short rows, so that short inputs are cut."""

    def switch():
        monkeypatch.setattr(convolution, "platform", lambda: "tpu")
        monkeypatch.setattr(convolution, "ROW", 200)

    return switch


@pytest.mark.parametrize("length", [1280, 1370, 1366, 150])
@pytest.mark.parametrize("size, dilation", [(7, 1), (7, 9), (3, 1), (1, 1)])
def test_rows_give_what_one_row_gives(on_tpu, length, size, dilation):
    """Lengths that divide well, badly, and not at all; and too short to be cut."""
    x, kernel = normal(2, length, 5), normal(size, 5, 6)
    options = dict(dilation=dilation, padding=(size - 1) * dilation // 2)
    expected = convolve(x, kernel, **options)
    on_tpu()
    assert_close(convolve(x, kernel, **options), expected, 1e-6)
    convolutions = equations(functools.partial(convolve, **options), x, kernel, name="conv_general_dilated")
    assert len(convolutions) == (size > 1)  # of size one: a product
    for equation in convolutions:
        rows = equation.invars[0].aval.shape[0] // len(x)
        if length in (1280, 1370):
            assert rows >= 8 and length % rows == 0 and length // rows <= 200
        else:
            assert rows == 1


@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("length", [30, 64, 150])
def test_taps_in_bfloat16(monkeypatch, length, padding):
    """With many channels, where bfloat16 is multiplied fast: one block, and several, of which the last is padded."""
    monkeypatch.setattr(convolution, "TAPS_FROM", 5)
    monkeypatch.setattr(convolution, "BLOCK", 64)
    monkeypatch.setattr(products, "cpu_favours_bfloat16", lambda: True)
    x, kernel = (jnp.asarray(value, jnp.bfloat16) for value in (normal(2, length, 5), normal(7, 5, 6)))
    run = functools.partial(convolve, dilation=3, padding=padding)
    expected = convolution._convolve(x.astype(jnp.float32), kernel.astype(jnp.float32), 1, 3, padding)
    y = run(x, kernel)
    assert y.dtype == jnp.bfloat16
    assert_close(np.asarray(y, np.float32), expected, 2**-8)
    assert not equations(run, x, kernel, name="conv_general_dilated")


@pytest.mark.parametrize("length", [40, 320])
@pytest.mark.parametrize("stride", [2, 4, 10])
def test_transposed(on_tpu, length, stride):
    """Against the sum that defines it, in float64, on both kinds of backend."""
    x, kernel = normal(1, length, 3), normal(2, 3, stride, 4)
    whole = np.zeros((1, (length + 1) * stride, 4))
    for tap in range(2):  # the first of our taps reads the frame before
        y = np.einsum("bti,iro->btro", x.astype(float), kernel[tap].astype(float)).reshape(1, -1, 4)
        begin = stride * (1 - tap)
        whole[:, begin : begin + y.shape[1]] += y
    expected = whole[:, stride // 2 : -(stride - stride // 2)]
    assert_close(convolve_transposed(x, kernel), expected, 1e-6)
    on_tpu()
    assert_close(convolve_transposed(x, kernel), expected, 1e-6)


def test_strides_are_left_alone(on_tpu):
    x, kernel = normal(1, 1280, 3), normal(8, 3, 4)
    expected = convolve(x, kernel, stride=4, padding=2)
    on_tpu()
    assert_close(convolve(x, kernel, stride=4, padding=2), expected, 1e-6)
