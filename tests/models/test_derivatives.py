"""Derivatives of the transformer in forward mode, against reverse mode and finite differences."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax.models.attention import attention
from acestep_jax.models.config import TransformerConfig
from acestep_jax.models.kernels import blockwise
from acestep_jax.models.runtime import Runtime
from tests.parity import assert_close, normal, random_network

CONFIG = TransformerConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    # Of one kind, which compiles in half the time: a window over the frames, full attention to the condition.
    layer_types=("sliding_attention",) * 2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=4,
    audio_acoustic_hidden_dim=8,
    in_channels=24,
)
FRAMES, TOKENS = 31, 5


def dot(x, y):
    """The sum of products of two trees of arrays, in float64."""
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return sum(np.sum(np.asarray(a, np.float64) * np.asarray(b, np.float64)) for a, b in pairs)


def like(tree, seed):
    """A tree of standard normal arrays of the same shapes."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([normal(*np.shape(leaf), seed=seed + i) for i, leaf in enumerate(leaves)])


@functools.cache
def case(remat="none", lengths=True):
    """A function of the network, x, t and r, and where to derive it."""
    network = random_network("transformer", CONFIG, Runtime(remat=remat))
    condition, context = normal(2, TOKENS, 32, seed=1), normal(2, FRAMES, 16, seed=2)
    keywords = dict(lengths=np.array([FRAMES, 22]), encoder_lengths=np.array([TOKENS, 3])) if lengths else {}

    def velocity(network, x, t, r):
        return network(x, t, r, condition, context, **keywords)

    t = np.array([0.9, 0.3], np.float32)
    return velocity, (network, normal(2, FRAMES, 8), t, t / 3)


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "lengths"), [("none", True), ("none", False), ("dots", True), ("full", True)])
def test_forward_mode_is_the_transpose_of_reverse_mode(remat, lengths):
    """<v, J u> both ways, u in each of the parameters, x, t and r on its own."""
    velocity, point = case(remat, lengths)

    @jax.jit
    def both(point, tangents, cotangent):
        y, backward = jax.vjp(velocity, *point)
        return y, jax.lax.map(lambda tangent: jax.jvp(velocity, point, tangent)[1], tangents), backward(cotangent)

    moved = like(point, seed=10)
    alone = [
        tuple(part if i == n else jax.tree.map(np.zeros_like, part) for i, part in enumerate(moved)) for n in range(4)
    ]
    cotangent = normal(2, FRAMES, 8, seed=3)
    y, slopes, gradients = both(point, jax.tree.map(lambda *parts: np.stack(parts), *alone), cotangent)
    assert np.isfinite(y).all()
    for n, slope in enumerate(slopes):
        found, expected = dot(cotangent, slope), dot(gradients[n], moved[n])
        scale = np.linalg.norm(cotangent) * np.linalg.norm(slope)
        assert abs(found - expected) <= 1e-5 * scale and scale > 0, (n, found, expected)


@pytest.mark.parametrize("argument", [pytest.param(2, id="t", marks=pytest.mark.slow), pytest.param(3, id="r")])
def test_derivatives_in_time_are_those_of_finite_differences(argument):
    """Mean flow needs them. A timestep is multiplied by 1000 before its sinusoids, so steps must be small."""
    velocity, (network, *arrays) = case()
    run = jax.jit(lambda *arrays: velocity(network, *arrays))

    def at(step):
        return np.asarray(run(*(x + np.float32(step) if i == argument else x for i, x in enumerate(arrays, 1))), float)

    tangents = tuple(np.ones_like(x) if i == argument else np.zeros_like(x) for i, x in enumerate(arrays, 1))
    slope = jax.jit(lambda *arrays: jax.jvp(run, arrays, tangents)[1])(*arrays)
    # Of fourth order. In float32 the velocity is within 1e-6, and a timestep within 6e-8 of 2e-4.
    h = 2e-4
    numeric = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    assert_close(slope, numeric, 1e-2)


@pytest.mark.slow
def test_jacobians_of_both_modes_agree():
    """By default `test_forward_mode_is_the_transpose_of_reverse_mode` shows it, of each argument."""
    velocity, (network, x, t, r) = case()
    both = jax.jit(
        lambda t, r: [
            jacobian(lambda *ts: velocity(network, x, *ts)[:, 3], (0, 1))(t, r) for jacobian in (jax.jacfwd, jax.jacrev)
        ]
    )
    for forward, reverse in zip(*both(t, r), strict=True):
        assert forward.shape == (2, 8, 2)
        assert_close(forward, reverse, 1e-5)


@pytest.mark.slow
def test_vmap_and_linearize():
    velocity, (network, x, t, r) = case(lengths=False)
    xs = np.stack([x, normal(*x.shape, seed=5)])
    found = jax.jit(jax.vmap(lambda x: velocity(network, x, t, r)))(xs)
    expected = jax.jit(lambda xs: [velocity(network, x, t, r) for x in xs])(xs)
    assert_close(found, np.stack(expected), 1e-6)
    y, push = jax.jit(lambda x: jax.linearize(lambda x: velocity(network, x, t, r), x))(x)
    assert_close(y, expected[0], 1e-6)
    slope = jax.jit(lambda x, u: jax.jvp(lambda x: velocity(network, x, t, r), (x,), (u,))[1])(x, xs[1])
    assert_close(jax.jit(push)(xs[1]), slope, 1e-5)


# With the target stopped, the gradient is a part of the one without. By default forward mode is compared with reverse.
@pytest.mark.slow
@pytest.mark.parametrize("stop", [pytest.param(True, id="stopped"), False])
def test_mean_flow_has_gradients(stop):
    """Reverse mode over forward mode: of a loss that holds the total derivative of the velocity in time."""
    velocity, (network, x, t, r) = case()

    def loss(network):
        slopes = x, np.ones_like(t), np.zeros_like(r)
        u, total = jax.jvp(functools.partial(velocity, network), (x, t, r), slopes)
        target = x - (t - r)[:, None, None] * total
        return jnp.mean((u - (jax.lax.stop_gradient(target) if stop else target)) ** 2)

    direction = like(network, seed=20)
    gradient = jax.jit(jax.grad(loss))(network)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    if not stop:
        # Forward over forward, which no transposition takes part in.
        push = lambda network: jax.jvp(loss, (network,), (direction,))[1]  # noqa: E731
        assert dot(gradient, direction) == pytest.approx(float(jax.jit(push)(network)), rel=1e-4)


def heads(t=21, s=21):
    return tuple(normal(2, n, count, 8, seed=i) for i, (n, count) in enumerate([(t, 4), (s, 2), (s, 2)]))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention(window, dropout, monkeypatch):
    """With lengths, one of them zero, and of each argument on its own; the others then stay out of the derivative.

    With dropout, which is the same mask in every derivative, of all arguments at once.
    """
    monkeypatch.setattr(blockwise, "QUERY_BLOCK", 8)
    arrays = heads()
    keywords = dict(window=window, key_lengths=np.array([17, 0]), dropout=dropout, dropout_key=jax.random.key(0))
    tangents, cotangent = like(arrays, seed=5), normal(*arrays[0].shape, seed=9)

    @jax.jit
    def both(arrays, tangents, cotangent):
        run = lambda *x: attention(*x, **keywords)  # noqa: E731
        pairs = []
        for n in range(0 if dropout else 3):
            one = lambda x, n=n: run(*(x if m == n else y for m, y in enumerate(arrays)))  # noqa: E731
            pairs.append((jax.jvp(one, (arrays[n],), (tangents[n],))[1], jax.vjp(one, arrays[n])[1](cotangent)[0]))
        return pairs, jax.jvp(run, arrays, tangents)[1], jax.vjp(run, *arrays)[1](cotangent)

    pairs, whole, gradients = both(arrays, tangents, cotangent)
    scale = np.linalg.norm(cotangent) * np.linalg.norm(whole)
    assert abs(dot(cotangent, whole) - dot(gradients, tangents)) <= 1e-5 * scale
    assert not np.asarray(whole)[1].any()  # of the item that sees nothing
    if not dropout:
        assert_close(sum(np.asarray(slope, np.float64) for slope, _ in pairs), whole, 1e-5)
    for n, (slope, gradient) in enumerate(pairs):
        assert_close(gradient, gradients[n], 1e-6)
        scale = np.linalg.norm(cotangent) * np.linalg.norm(slope)
        assert abs(dot(cotangent, slope) - dot(gradient, tangents[n])) <= 1e-5 * scale
        assert not np.asarray(slope)[1].any()  # of the item that sees nothing


@pytest.mark.parametrize("window", [None, 4])
def test_half_precision_derivatives(window):
    """Of bfloat16 as near to those of float32 as bfloat16 is."""
    arrays = heads()
    tangents, cotangent = like(arrays, seed=5), normal(*arrays[0].shape, seed=9)

    @jax.jit
    def both(arrays, tangents, cotangent):
        run = functools.partial(attention, window=window)
        return jax.jvp(run, arrays, tangents)[1], jax.vjp(run, *arrays)[1](cotangent)

    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (arrays, tangents, cotangent))
    found = both(*half)
    expected = both(*jax.tree.map(lambda x: x.astype(jnp.float32), half))
    for ours, exact in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert_close(ours, exact, 2e-2)


def test_the_backward_pass_has_five_products_and_no_reduction_of_scores():
    """Scores, dv, dw, dq and dk after the forward pass's two; there, the maximum and the sum of exponentials are taken,
    in the backward pass only dy y is summed, which JAX writes as two sums, one of them over an axis of one."""
    q, k, v = normal(2, 16, 8), normal(24, 8, seed=1), normal(24, 8, seed=2)

    def gradients(q, k, v, dy):
        attend = blockwise._recomputed(lambda *x: blockwise._attend(*x, None, None, 0.0))
        return jax.vjp(attend, q, k, v)[1](dy)

    text = str(jax.make_jaxpr(gradients)(q, k, v, q))
    found = Counter(re.findall(r"= (dot_general|reduce_\w+|log|exp)\b", text))
    assert found == {"dot_general": 7, "reduce_max": 1, "reduce_sum": 3, "log": 1, "exp": 2}
