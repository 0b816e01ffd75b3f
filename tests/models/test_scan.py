"""The loop over layers, against a Python loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from acestep_jax.models.scan import scan_layers, stack_layers
from tests.parity import assert_close, normal

WINDOWS = {"alternating": (3, None, 3, None), "aperiodic": (None, 3, 3, None), "full": (None,) * 4}


class Layer(nnx.Module):
    """A product with a scale that the window changes, and a number of its own."""

    def __init__(self, *, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (4, 4)) / 2)
        self.number = nnx.Variable(jax.random.randint(rngs.params(), (), 0, 5))

    def __call__(self, x, window, extra):
        return jnp.tanh(x @ self.kernel[...] + extra) * (1.5 if window else 1.0) + self.number[...]


def loop(layers, x, windows, shared, per_layer):
    outputs = []
    for i, window in enumerate(windows):
        layer, extra = jax.tree.map(lambda leaf, i=i: leaf[i], (layers, per_layer))
        outputs.append({"before": x, "sum": x.sum()})
        x = layer(x, window, extra * shared)
    return x, jax.tree.map(lambda *rows: jnp.stack(rows), *outputs)


def scanned(layers, x, windows, shared, per_layer, remat="none"):
    def block(x, layer, window, extra):  # closes over an array
        return layer(x, window, extra * shared), {"before": x, "sum": x.sum()}

    return scan_layers(block, layers, x, windows, per_layer=per_layer, remat=remat)


@functools.cache
def arrays():
    layers = stack_layers(lambda rngs: Layer(rngs=rngs), 4, nnx.Rngs(0))
    return layers, normal(2, 4), normal(4, seed=1), normal(4, 1, 4, seed=2)


@pytest.mark.parametrize("pattern", WINDOWS)
def test_layers_and_outputs_are_those_of_a_loop(pattern):
    layers, x, shared, per_layer = arrays()
    windows = WINDOWS[pattern]
    found = jax.jit(lambda *a: scanned(a[0], a[1], windows, *a[2:]))(layers, x, shared, per_layer)
    expected = jax.jit(lambda *a: loop(a[0], a[1], windows, *a[2:]))(layers, x, shared, per_layer)
    assert found[1]["before"].shape == (4, 2, 4) and found[1]["sum"].shape == (4,)
    for ours, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(ours, reference, 1e-6)


def derivatives(run, pattern):
    """Of the stack, of what is shared and of what belongs to a layer, in both modes."""
    layers, x, shared, per_layer = arrays()
    graphdef, params, rest = nnx.split(layers, nnx.Param, ...)

    def loss(run, params, x, shared, per_layer):
        y, outputs = run(nnx.merge(graphdef, params, rest), x, WINDOWS[pattern], shared, per_layer)
        return jnp.sum(y**2) + jnp.sum(jnp.sin(outputs["before"])) + jnp.prod(outputs["sum"])

    point = params, x, shared, per_layer
    tangent = jax.tree.map(lambda leaf: jnp.cos(leaf + 1), point)

    of = functools.partial(loss, run)
    return jax.jit(lambda point: (jax.grad(of, argnums=range(4))(*point), jax.jvp(of, point, tangent)[1]))(point)


@functools.cache
def derivatives_of_the_loop(pattern):
    return derivatives(loop, pattern)


# What is recomputed is a turn of the loop, whatever the pattern.
@pytest.mark.parametrize(
    "pattern, remat",
    [
        pytest.param(pattern, remat, marks=[pytest.mark.slow] * (remat != "none" and pattern != "alternating"))
        for pattern in WINDOWS
        for remat in ("none", "dots", "full")
    ],
)
def test_derivatives_are_those_of_a_loop(pattern, remat):
    """Through outputs as well."""
    found, expected = derivatives(functools.partial(scanned, remat=remat), pattern), derivatives_of_the_loop(pattern)
    for ours, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(ours, reference, 1e-5)


def test_frozen_weights_stay_out_of_the_derivative():
    """No product with a tangent of zeros: only with the input's, in forward mode."""
    layers, x, shared, per_layer = arrays()
    run = lambda x: scanned(layers, x, WINDOWS["full"], shared, per_layer)[0]  # noqa: E731
    text = str(jax.make_jaxpr(lambda x, u: jax.jvp(run, (x,), (u,)))(x, x))
    assert text.count("dot_general[") == 2, text


def test_gradients_of_the_stack_are_not_summed_over_layers():
    """Each turn of the backward loop writes its own part: it carries no array of the size of the stack."""
    layers, x, shared, per_layer = arrays()
    graphdef, params, rest = nnx.split(layers, nnx.Param, ...)
    loss = lambda params: jnp.sum(  # noqa: E731
        scanned(nnx.merge(graphdef, params, rest), x, WINDOWS["full"], shared, per_layer)[0]
    )
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params)
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert len(scans) == 2
    for scan in scans:
        first, count = scan.params["num_consts"], scan.params["num_carry"]
        carried = [v.aval.shape for v in scan.invars[first : first + count]]
        assert (4, 4, 4) not in carried, carried


def test_vmap():
    layers, x, shared, per_layer = arrays()
    xs = np.stack([x, 2 * x])
    run = lambda x: scanned(layers, x, WINDOWS["alternating"], shared, per_layer)[0]  # noqa: E731
    assert_close(jax.jit(jax.vmap(run))(xs), np.stack([run(x) for x in xs]), 1e-6)
