"""Products of a few vectors with a matrix in one kernel, in interpret mode, against plain products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax.models.kernels import rows_gpu
from tests.parity import assert_close, normal

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize(("shape", "size"), [((2, 1), 2048), ((1,), 640), ((2,), 128)])
def test_kernel(dtype, limit, shape, size):
    x, rows = (jnp.asarray(normal(*dims, size), dtype) for dims in (shape, (12,)))
    expected = np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T
    product = jax.jit(lambda x, rows: rows_gpu.multiply(x, rows, interpret=True))
    assert product(x, rows).dtype == dtype
    assert_close(np.asarray(product(x, rows), np.float32), expected, limit)


def test_sums_in_float32_are_not_rounded():
    x, rows = (jnp.asarray(normal(*dims), jnp.bfloat16) for dims in ((2, 256), (6, 256)))
    y = rows_gpu.multiply(x, rows, dtype=jnp.float32, interpret=True)
    assert y.dtype == jnp.float32
    assert_close(y, np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T, 1e-6)


def test_a_cpu_multiplies_by_the_transposed_matrix():
    x, rows = normal(2, 3, 128), normal(6, 128)
    assert not rows_gpu.suits(x, rows)
    y = jax.jit(lambda *args: rows_gpu.dot_general(*args, (((2,), (0,)), ((), ()))))(x, rows)
    assert_close(y, x @ rows.T, 1e-6)
