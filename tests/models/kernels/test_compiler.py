"""What the compiler makes of a training step."""

import jax
import numpy as np
import pytest

from acestep_jax.models.kernels import compiler

pytestmark = pytest.mark.unit


def test_a_library_computes_products_but_no_sums():
    """In a training step on a CPU; the sums are those of a norm's derivative."""
    x, w = np.ones((1, 96, 64), np.float32), np.ones((64, 32), np.float32)
    products_and_sums = lambda x, w: ((x * x).sum(1), (x * x).sum(2), x[0] @ w)  # noqa: E731

    def library_calls(options):
        text = jax.jit(products_and_sums, compiler_options=options).lower(x, w).compile().as_text()
        return [line for line in text.splitlines() if "ynn_fusion" in line and " fusion(" in line]

    assert not all("dot_general" in line for line in library_calls(compiler.COMPILER_OPTIONS))
    library = library_calls(compiler.training_options(jax.devices("cpu")))
    assert library and all("dot_general" in line for line in library), library


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(compiler, "_CPU_TRAINING_OPTIONS", {"xla_cpu_no_such_option": "true"})
    compiler._cpu_options_exist.cache_clear()
    try:
        assert compiler.training_options(jax.devices("cpu")) == compiler.COMPILER_OPTIONS
    finally:
        compiler._cpu_options_exist.cache_clear()
