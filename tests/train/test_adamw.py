"""The optimizer, against optax's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from acestep_jax.train.adamw import AdamW, apply, definition
from acestep_jax.train.config import AdamConfig
from tests.parity import normal

pytestmark = pytest.mark.unit

CONFIG = AdamConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.1)
SHAPES = {"layers.kernel": (3, 8, 16), "norm.scale": (5,), "table": (6, 16)}
SCALES = 0.01, 3.0, np.nan, 0.5  # of the gradients of each step: not clipped, clipped, skipped


def run(optimizer, divisor):
    params = {name: jnp.asarray(normal(*shape)) for name, shape in SHAPES.items()}
    state = optimizer.init(params)
    step = jax.jit(functools.partial(apply, optimizer))
    norms = []
    for seed, scale in enumerate(SCALES, start=1):
        gradients = {name: jnp.asarray(normal(*shape, seed=seed) * scale) for name, shape in SHAPES.items()}
        params, state, norm = step(gradients, state, params, divisor)
        norms.append(norm)
    return params, state, norms


def test_it_is_optax():
    """Weights, moments, counters and norms of several steps, one of which is skipped."""
    found, expected = (run(optimizer, 2.0) for optimizer in (AdamW(CONFIG, 100), definition(CONFIG, 100)))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-6, atol=1e-7)
    assert int(found[1].total_notfinite) == 1 and int(optax.tree.get(found[1].inner_state[1][0], "count")) == 3


def test_a_norm_that_overflows_skips_the_step():
    """Optax would take it, with gradients of zero."""
    optimizer = AdamW(CONFIG, 100)
    params = {name: jnp.asarray(normal(*shape)) for name, shape in SHAPES.items()}
    state = optimizer.init(params)
    gradients = {name: jnp.full(shape, 1e25, jnp.float32) for name, shape in SHAPES.items()}
    made = jax.jit(functools.partial(apply, optimizer))(gradients, state, params)
    assert not np.isfinite(made.norm) and int(made.state.total_notfinite) == 1
    for name in params:
        np.testing.assert_array_equal(made.params[name], params[name])


def test_it_is_in_place():
    """Nothing of the size of a weight is made beside what was donated, and the schedule's cosine is computed once."""
    optimizer = AdamW(CONFIG, 100)
    params = {"layers.kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    state = jax.eval_shape(optimizer.init, params)

    def step(params, state, gradients):
        return apply(optimizer, gradients, state, params, 2.0)

    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    bodies = [body for body in program.as_text().split("\n\n") if " cosine(" in body]
    assert bodies and not any("f32[512,512]" in body for body in bodies)
    assert program.memory_analysis().temp_size_in_bytes < 512 * 512 * 4 / 2
