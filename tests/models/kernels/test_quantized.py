"""Products with weights of 8 bits against float64, and the bounds of rounding to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax.models.kernels import quantized
from acestep_jax.models.kernels.quantized import KINDS, both, quantize, suited, weight_only
from tests.jaxprs import equations
from tests.parity import normal, relative_error

pytestmark = pytest.mark.unit

INNER = (((2,), (0,)), ((), ()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [-1, -2])
def test_rounding_stays_within_half_a_step(kind, axis):
    """Of int8, half of s; of float8, half of the last of its bits, or of the smallest number that it has."""
    x = normal(3, 40, 50) * np.float32([1e-20, 1, 1e20])[:, None, None]
    values, scale = (np.asarray(v, np.float64) for v in jax.jit(quantize, static_argnums=(1, 2))(x, kind, axis))
    top = KINDS[kind][1]
    assert np.isfinite(values).all() and np.abs(values).max() == top
    np.testing.assert_allclose(scale * top, np.abs(x).max(axis, keepdims=True), rtol=1e-6)
    bound = scale / 2 if kind == "int8" else np.maximum(np.abs(x) * 2.0**-4, scale * 2.0**-10)
    assert (np.abs(values * scale - x) <= bound * 1.0001).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_what_is_quantised_already_stay(kind):
    x = normal(6, 8)
    x[:, 3] = 0
    values, scale = quantize(jnp.asarray(x), kind, -2)
    assert scale[0, 3] == 1 and not np.asarray(values, np.float32)[:, 3].any()
    again, _ = quantize(values.astype(jnp.float32) * scale, kind, -2)
    np.testing.assert_array_equal(np.asarray(again, np.float32), np.asarray(values, np.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weight_only_products_equal_float64(kind, dtype):
    """8 bits are exact in every dtype, so that only x is rounded, and sums are float32."""
    x, w = jnp.asarray(normal(3, 5, 64), dtype), normal(64, 16)
    values, _ = quantize(jnp.asarray(w), kind, 0)
    found = weight_only(x, values, INNER)
    assert found.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(values, np.float64)
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_both_equal_float64(kind):
    """With each row of x rounded by a scale of its own, whatever its size."""
    x, w = normal(3, 5, 64), normal(64, 16)
    x *= np.float32(10.0) ** np.arange(-3, 2)[None, :, None].astype(np.float32)
    values, _ = quantize(jnp.asarray(w), kind, 0)
    rows, scale = (np.asarray(v, np.float64) for v in quantize(jnp.asarray(x), kind, -1))
    found = both(jnp.asarray(x), values, INNER)
    assert found.dtype == jnp.float32
    assert relative_error(found, (rows @ np.asarray(values, np.float64)) * scale) < 1e-6
    error = relative_error(found, x.astype(np.float64) @ np.asarray(values, np.float64))
    assert error < {"int8": 0.02, "fp8": 0.08}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_both_are_those_of_the_weights_alone(kind):
    x, w = normal(3, 5, 64), quantize(jnp.asarray(normal(64, 16)), kind, 0)[0]
    slope = normal(3, 5, 16)
    for f in (both, weight_only):
        _, tangent = jax.jvp(lambda x, f=f: f(x, w, INNER), (x,), (0.3 * x,))
        gradient = jax.grad(lambda x, f=f: (f(x, w, INNER) * slope).sum())(x)
        expected = (0.3 * x.astype(np.float64)) @ np.asarray(w, np.float64), slope @ np.asarray(w, np.float64).T
        assert relative_error(tangent, expected[0]) < 1e-6 and relative_error(gradient, expected[1]) < 1e-6


@pytest.mark.parametrize(
    "platform, capability, natives",
    [("cpu", 0, []), ("tpu", 0, ["int8"]), ("gpu", 8.0, []), ("gpu", 8.9, ["fp8"]), ("gpu", 9.0, ["fp8"])],
)
def test_form_of_a_device(monkeypatch, platform, capability, natives):
    """int8 by int8 on TPUs, float8 by float8 on GPUs that have it; elsewhere x stays as it is."""
    monkeypatch.setattr(quantized, "platform", lambda: platform)
    monkeypatch.setattr(quantized, "compute_capability", lambda: capability)
    for kind, (dtype, _) in KINDS.items():
        x, w = jnp.ones((2, 3, 8), jnp.bfloat16), jnp.ones((8, 4)).astype(dtype)
        (product,) = equations(lambda x, w: suited(x, w, INNER), x, w, name="dot_general")
        expected = {str(dtype)} if kind in natives else {"bfloat16"}
        assert {str(v.aval.dtype) for v in product.invars} == expected
        assert str(product.outvars[0].aval.dtype) == ("int32" if "int8" in expected else "float32")
