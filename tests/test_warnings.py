"""Deprecations of JAX and Flax fail the tests, those inside other libraries do not."""

import warnings

import pytest

pytestmark = pytest.mark.unit


def warn(module: str) -> None:
    warnings.warn_explicit("old", DeprecationWarning, f"{module}.py", 1, module)


@pytest.mark.parametrize("module", ["acestep_jax.models.layers", "acestep_jax", "flax.nnx.module", "jax", "tests.x"])
def test_deprecation_is_an_error(module):
    with pytest.raises(DeprecationWarning, match="old"):
        warn(module)


@pytest.mark.parametrize("module", ["orbax.checkpoint", "jaxtyping", "librosa.core"])
def test_deprecation_inside_another_library_is_not(module):
    warn(module)
