"""Products of bfloat16 on a CPU, in either form; and layers that are read out of their stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax.models.attention import attention
from acestep_jax.models.kernels import products
from acestep_jax.models.kernels.stack import multiply_rows, pick_row
from tests.jaxprs import equations
from tests.parity import normal

pytestmark = pytest.mark.unit


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def favours(request, monkeypatch):
    """Whether the processor is taken to multiply bfloat16 faster than float32."""
    monkeypatch.setattr(products, "cpu_favours_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("rows", [products.FEW, products.FEW + 1])
def test_a_product_is_that_of_its_rounded_operands(favours, rows):
    """Summed in float32, and rounded once. Of few rows, the matrix is not widened."""
    x, w = (jnp.asarray(normal(*shape), jnp.bfloat16) for shape in ((rows, 96), (96, 40)))
    multiply = lambda x, w: products.dot_general(x, w, (((1,), (0,)), ((), ())))  # noqa: E731
    found = multiply(x, w)
    assert found.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    assert np.abs(np.asarray(found, np.float64) - exact).max() <= 2.0**-8 * np.abs(exact).max()
    widened = "f32[96,40]" in str(jax.make_jaxpr(multiply)(x, w))
    assert widened == (not favours and rows > products.FEW)


@pytest.mark.parametrize("shape", [(1, 96), (1, 1, 96), (96,)])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_single_vector_in_bfloat16_is_not_alone(shape, transposed):
    """Otherwise XLA would widen the whole matrix."""
    x, w = jnp.asarray(normal(*shape), jnp.bfloat16), jnp.asarray(normal(96, 40), jnp.bfloat16)
    if transposed:
        multiply, given = multiply_rows, w.T
    else:
        multiply, given = lambda x, w: products.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ()))), w
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    found = np.asarray(multiply(x, given), np.float64)
    assert found.shape == exact.shape and np.abs(found - exact).max() <= 2.0**-8 * np.abs(exact).max()
    (product,) = equations(multiply, x, given, name="dot_general")
    assert (2, 96) in [v.aval.shape for v in product.invars]


def test_the_gradient_of_a_matrix_needs_no_transposed_copy():
    """It is one product of both arrays as they are."""
    x, w, slope = normal(1, 24, 96), normal(96, 40, seed=1), normal(1, 24, 40, seed=2)
    multiply = lambda w: products.dot_general(x, w, (((2,), (0,)), ((), ())))  # noqa: E731
    program = jax.jit(lambda w, slope: jax.vjp(multiply, w)[1](slope)[0]).lower(w, slope).compile()
    assert "transpose(%" not in program.as_text() and "copy(%" not in program.as_text()
    expected = x[0].astype(np.float64).T @ slope[0]
    assert np.abs(np.asarray(program(w, slope)) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.heavy
@pytest.mark.parametrize("window", [None, 16])
def test_attention_of_either_form_is_that_of_float32(favours, window):
    q, k, v = (jnp.asarray(normal(1, 80, heads, 8, seed=heads), jnp.bfloat16) for heads in (4, 2, 2))
    found = attention(q, k, v, window=window, kernel="xla")
    expected = attention(*(x.astype(jnp.float32) for x in (q, k, v)), window=window, kernel="xla")
    assert found.dtype == jnp.bfloat16
    assert np.abs(np.asarray(found, np.float32) - np.asarray(expected)).max() < 0.02 * np.abs(expected).max()


def test_a_layer_is_read_out_of_its_stack():
    """The whole stack is neither widened nor copied."""
    stack = jnp.asarray(normal(16, 64, 64), jnp.bfloat16)
    x = jnp.asarray(normal(32, 64), jnp.bfloat16)

    def run(x, stack):
        def body(x, i):
            return products.dot_general(x, pick_row(stack, i), (((1,), (0,)), ((), ()))), None

        return jax.lax.scan(body, x, jnp.arange(16))[0]

    program = jax.jit(run).lower(x, stack).compile()
    assert program.memory_analysis().temp_size_in_bytes < stack.nbytes / 2
    expected = x
    for w in stack:
        expected = products.dot_general(expected, w, (((1,), (0,)), ((), ())))
    np.testing.assert_array_equal(np.asarray(program(x, stack), np.float32), np.asarray(expected, np.float32))
