"""Running the programs of `benchmarks.gpu_aot`: on a CPU, where a small one stands for them."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.programs import Program
from benchmarks.targets import CARDS

pytestmark = pytest.mark.unit


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def program(**changes):
    """Return a program that takes an array to change, weights, a count, a flag and a key."""
    made = jax.jit(lambda state, inputs: state + inputs["weights"].sum() * inputs["count"], donate_argnums=0)
    inputs = dict(
        weights=shape(64, 32, dtype=jnp.bfloat16),
        bias=shape(32),
        count=shape(2, 2, dtype=jnp.int32),
        flag=shape(dtype=bool),
        keys=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3)),
        given=np.arange(3),
    )
    return Program("small", made, (shape(2, 2), inputs), {}, flops=1e9, **changes)


def test_random_arguments_have_the_values_that_a_program_needs():
    state, inputs = gpu.random_arguments(program(values={"['count']": (3, 4)}))
    weights = np.asarray(inputs["weights"], np.float32)
    assert state.shape == (2, 2) and weights.dtype == np.float32 and 0.05 < weights.std() < 0.25
    assert (np.asarray(inputs["bias"]) == 1).all() and not inputs["flag"]
    np.testing.assert_array_equal(inputs["count"], [[3, 4], [3, 4]])
    np.testing.assert_array_equal(inputs["given"], np.arange(3))
    assert inputs["keys"].shape == (3,)


def test_a_program_that_consumes_an_argument_runs_again():
    options = argparse.Namespace(runs=3, hlo=None, xla=[])
    cells, _ = gpu.measure(program(passes=2), CARDS["h100"], options, ("small", "1 s", "1"))
    row = dict(zip((*gpu.aot.MEMORY[:4], *gpu.COLUMNS), cells, strict=True))
    assert float(row["ms"]) > 0 and float(row["floor ms"]) == float(f"{1e12 / CARDS['h100'].peak:.4g}")
