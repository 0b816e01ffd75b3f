"""Guidance rules, which combine the velocities with and without the condition. Pure functions, in float32."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

APG_MOMENTUM = -0.75
APG_NORM_THRESHOLD = 2.5
ADG_MIN_WEIGHT = 1e-3
ADG_MAX_ANGLE = 3.14 / 6
ADG_MIN_ANGLE = float(np.arccos(1 - 1e-6))


class Guided(NamedTuple):
    """The arguments of a rule: the velocities with and without the condition, at x and t.

    cond, null, x: [B, T, C]; t: scalar; momentum: state from the previous step, [B, T, C], zeros before the first step;
    None for rules without momentum.
    """

    cond: jax.Array
    null: jax.Array
    x: jax.Array
    t: jax.Array
    momentum: jax.Array | None


def cfg(g: Guided, scale: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Return null + scale * (cond - null), classifier-free guidance. Source: Ho and Salimans, arXiv 2207.12598."""
    return g.null + scale * (g.cond - g.null), g.momentum


def apg(g: Guided, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Apply adaptive projected guidance; return the velocity and the new momentum, both [B, T, C].

    d = cond - null, m <- d - 0.75 m, clipped to a norm of 2.5; its part orthogonal to cond, times (scale - 1), is added
    to cond. Norms and projections are over time, for each batch item and channel.
    Source: Sadat et al., arXiv 2410.02416, as ACE-Step 1.5 uses it.
    """
    assert g.momentum is not None
    momentum = (g.cond - g.null) + APG_MOMENTUM * g.momentum
    norm = jnp.linalg.norm(momentum, axis=1, keepdims=True)
    update = momentum * jnp.minimum(1.0, APG_NORM_THRESHOLD / jnp.maximum(norm, 1e-30))
    direction = g.cond / jnp.maximum(jnp.linalg.norm(g.cond, axis=1, keepdims=True), 1e-12)
    orthogonal = update - jnp.sum(update * direction, axis=1, keepdims=True) * direction
    return g.cond + (scale - 1.0) * orthogonal, momentum


def adg(g: Guided, scale: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Apply angle-based guidance: rotate the predicted x0 of each frame away from the prediction without condition.

    The rotation is the angle between both, times w = max(scale - 1, 0) + 0.001, and at most 30 degrees.
    Source: ACE-Step 1.5.
    """
    inner = lambda a, b: jnp.sum(a * b, axis=-1, keepdims=True)  # noqa: E731  over channels, for each frame
    with_condition, without = g.x - g.t * g.cond, g.x - g.t * g.null
    weight = jnp.maximum(scale - 1.0, 0.0) + ADG_MIN_WEIGHT
    away = with_condition - without
    away = away - inner(away, without) / (inner(without, without) + 1e-8) * without
    # The arc cosine of the original, in a form that is accurate for small angles.
    along = inner(with_condition, without) / jnp.sqrt(jnp.maximum(inner(without, without), 1e-30))
    angle = jnp.arctan2(jnp.sqrt(inner(away, away)), along)
    angle = jnp.clip(angle, ADG_MIN_ANGLE, np.pi - ADG_MIN_ANGLE)
    turned = jnp.clip(weight * angle, -ADG_MAX_ANGLE, ADG_MAX_ANGLE)
    sine = jnp.sin(angle)
    factor = jnp.where(sine > 1e-3, jnp.sin(turned) / jnp.maximum(sine, 1e-3), weight)
    x0 = jnp.cos(turned) * with_condition + factor * away
    return (g.x - x0) / g.t, g.momentum


GUIDANCE: dict[str, Callable[[Guided, jax.Array], tuple[jax.Array, jax.Array | None]]] = {
    "apg": apg,
    "adg": adg,
    "cfg": cfg,
}
