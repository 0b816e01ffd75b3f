"""AdamW with gradient clipping, as optax defines it, in fewer passes over gradients, moments and weights.

    g <- g min(1, max_norm / |g|)
    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    w <- w - rate (m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + eps) + decay w)

If the norm of the gradients is not finite, weights and moments are left unchanged.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from acestep_jax.train.config import AdamConfig

DECAYING = ("kernel", "lora_a", "lora_b")

Params = dict[str, jax.Array]  # parameters by dotted path


class Applied(NamedTuple):
    """The result of one optimizer step."""

    params: Params
    state: Any
    norm: jax.Array  # norm of the gradients, before clipping


def apply(
    optimizer: "Optimizer", gradients: Params, state: Any, params: Params, divisor: jax.Array | float = 1.0
) -> Applied:
    """Apply gradients / divisor to the parameters; if the gradients are not finite, only count the step.

    Args:
        state: optimizer state, as `optax.apply_if_finite` keeps it.
    """
    if isinstance(optimizer, AdamW):
        return optimizer.apply(gradients, state, params, divisor)
    gradients = jax.tree.map(lambda g: g / divisor, gradients)
    updates, state = optimizer.update(gradients, state, params)
    made: Any = optax.apply_updates(params, updates)
    return Applied(made, state, optax.tree.norm(gradients))


def learning_rate(config: AdamConfig, steps: int) -> optax.Schedule:
    """Return the schedule: linear warm-up, then cosine decay to 1% of the peak at the last of `steps`."""
    peak = config.learning_rate
    warmup = min(100, steps // 10) if config.warmup_steps is None else config.warmup_steps
    if not warmup:
        return optax.cosine_decay_schedule(peak, steps, 0.01)
    # The warm-up starts above 0: at 0 the first step would learn nothing.
    return optax.warmup_cosine_decay_schedule(peak / warmup, peak, warmup, steps, 0.01 * peak)


def definition(config: AdamConfig, steps: int) -> optax.GradientTransformation:
    """Return the same optimizer built from optax; `AdamW` uses the layout of its state."""
    chain = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate(config, steps),
            config.beta1,
            config.beta2,
            config.eps,
            weight_decay=config.weight_decay,
            mask=_decaying,
        ),
    )
    return optax.apply_if_finite(chain, max_consecutive_errors=2**30)


def _decaying(params: Any) -> dict[str, bool]:
    return {name: decays(name) for name in params}


def decays(name: str) -> bool:
    """Return whether weight decay applies to the parameter of this name."""
    return name.rpartition(".")[2] in DECAYING


class AdamW:
    """Compute what `definition` does, except that a step is also skipped if the norm of finite gradients overflows.

    With the optax chain, XLA for CPUs allocates zeros for a skipped step, reads all gradients once more to look for
    non-finite values, writes them again when they are clipped, and computes the schedule once per element.

    Args:
        config: see `AdamConfig`.
        steps: number of steps of the whole run, for the schedule.
    """

    def __init__(self, config: AdamConfig, steps: int):
        self.config, self.schedule = config, learning_rate(config, steps)
        self.init = definition(config, steps).init

    def apply(self, gradients: Params, state: Any, params: Params, divisor: jax.Array | float = 1.0) -> Applied:
        """See the function `apply`."""
        config = self.config
        norm = optax.tree.norm(gradients) / divisor
        finite = jnp.isfinite(norm)
        # The states of optax.chain and optax.adamw, in the order of their parts.
        clip, (adam, decay, by_schedule) = state.inner_state
        count = optax.safe_increment(adam.count)

        def scalars() -> tuple[Any, ...]:
            scale = jnp.where(norm < config.max_grad_norm, 1.0, config.max_grad_norm / norm) / divisor
            rate = jnp.asarray(self.schedule(by_schedule.count), jnp.float32)
            return scale, rate, 1.0 - config.beta1**count, 1.0 - config.beta2**count

        # In a branch: XLA for CPUs would otherwise compute the schedule's cosine for each element of each array.
        scale, rate, m_bias, v_bias = jax.lax.cond(finite, scalars, lambda: (jnp.float32(1.0),) * 4)
        mu: Params = {}
        nu: Params = {}
        made: Params = {}
        for name, w in params.items():
            m, v, g = adam.mu[name], adam.nu[name], gradients[name] * scale
            mu[name] = jnp.where(finite, config.beta1 * m + (1.0 - config.beta1) * g, m)
            nu[name] = jnp.where(finite, config.beta2 * v + (1.0 - config.beta2) * g * g, v)
            step = mu[name] / m_bias / (jnp.sqrt(nu[name] / v_bias) + config.eps)
            if decays(name):
                step = step + config.weight_decay * w
            made[name] = jnp.where(finite, w - rate * step, w)
        adam = adam._replace(count=jnp.where(finite, count, adam.count), mu=mu, nu=nu)
        by_schedule = by_schedule._replace(
            count=jnp.where(finite, optax.safe_increment(by_schedule.count), by_schedule.count)
        )
        skipped = 1 - finite.astype(jnp.int32)
        state = state._replace(
            notfinite_count=jnp.where(finite, 0, optax.safe_increment(state.notfinite_count)),
            last_finite=finite,
            total_notfinite=state.total_notfinite + skipped,
            inner_state=(clip, (adam, decay, by_schedule)),
        )
        return Applied(made, state, norm)


Optimizer = AdamW | optax.GradientTransformation
