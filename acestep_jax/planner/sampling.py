"""How the language model's tokens are drawn, in float32 throughout:

    legal tokens -> guidance -> repetition penalty -> / temperature -> top-k -> top-p -> a draw

Nothing is sorted. The kept tokens are those whose weight w = exp(logit - greatest logit) is at least a threshold, which
is found by bisection: non-negative floats are ordered as the integers of the same bits are, so that 30 halvings find it
exactly. The draw is that of Gumbel: the greatest of logit + noise.

Source: the order is that of nano-vllm as ACE-Step 1.5 uses it, but that penalties come after guidance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.errors import InputError, check_number, check_text

A = TypeVar("A")  # jax.Array within a program; np.ndarray before it is called

_ONE = int(np.float32(1).view(np.int32))  # the bits of the greatest weight


@dataclass(frozen=True)
class LanguageSampling:
    """How the language model's tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest token.
        cfg_scale: of classifier-free guidance, for audio codes only; 1 turns it off.
        top_k: how many of the likeliest tokens are drawn from; 0: all.
        top_p: the mass of the likeliest tokens that are drawn from; 1: all.
        repetition_penalty: above 1, makes tokens that were written before less likely.
        negative_prompt: what guidance leads away from.

    Raises:
        InputError: if a value is of the wrong type or out of range.
    """

    temperature: float = 0.85
    cfg_scale: float = 2.0
    top_k: int = 0
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    negative_prompt: str = ""

    def __post_init__(self):
        check_text("negative_prompt", self.negative_prompt)
        check_number("top_k", self.top_k, whole=True)
        for name in ("temperature", "cfg_scale", "top_p", "repetition_penalty"):
            check_number(name, value := getattr(self, name))
            if not math.isfinite(value):
                raise InputError(f"{name}: expected a finite number, found {value}")
        for name, least in (("temperature", 0), ("cfg_scale", 1), ("top_k", 0)):
            if not getattr(self, name) >= least:
                raise InputError(f"{name}: expected a number of at least {least}, found {getattr(self, name):g}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: expected a number above 0 and up to 1, found {self.top_p:g}")
        if not self.repetition_penalty > 0:
            raise InputError(f"repetition_penalty: expected a number above 0, found {self.repetition_penalty:g}")


class Drawing(NamedTuple, Generic[A]):
    """How B songs are sampled, see `LanguageSampling`; [B] each, float32 but for `top_k`, int32."""

    temperature: A
    cfg_scale: A
    top_k: A
    top_p: A
    repetition_penalty: A

    @classmethod
    def of(cls, sampling: LanguageSampling, count: int) -> "Drawing[np.ndarray]":
        """Return the same for each of `count` songs."""
        values = (getattr(sampling, name) for name in cls._fields)
        kinds = (np.int32 if name == "top_k" else np.float32 for name in cls._fields)
        return Drawing(*(np.full(count, value, kind) for value, kind in zip(values, kinds, strict=True)))


def guide(conditional: jax.Array, unconditional: jax.Array, scale: jax.Array) -> jax.Array:
    """Return u + scale (c - u), [B, V]; scale [B]. Where both are -inf it is NaN, so mask afterwards."""
    return unconditional + scale[:, None] * (conditional - unconditional)


def penalise(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Return logits [B, V] made less likely where seen [B, V]: negative ones times the penalty [B], others over it."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def kept(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Return which tokens are drawn from, [B, V] bool: those not below the k-th likeliest, and of them those before
    which, in order of likelihood, there is a mass below p. The likeliest always stays; equals share their fate.

    Args:
        logits: [B, V] float32, over the temperature; -inf where a token is illegal.
        top_k: [B] int32, 0: all.
        top_p: [B] float32, 1: all.
    """
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))  # [B, V], 0 to 1

    def at_least(bits: jax.Array) -> jax.Array:
        return weights >= jax.lax.bitcast_convert_type(bits, jnp.float32)[:, None]

    def threshold(enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Return the bits of the greatest weight at which the tokens of at least that weight are enough; 0 if none."""

        def halve(_, bounds):
            low, high = bounds  # enough at `low`, not at `high`
            middle = low + (high - low) // 2
            is_enough = enough(middle)
            return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

        zeros = jnp.zeros(logits.shape[:1], jnp.int32)
        return jax.lax.fori_loop(0, 30, halve, (zeros, zeros + (_ONE + 1)))[0]

    def by_rank() -> jax.Array:
        bits = threshold(lambda bits: at_least(bits).sum(-1) >= top_k)
        return (top_k <= 0)[:, None] | at_least(bits)

    among = jax.lax.cond((top_k > 0).any(), by_rank, lambda: jnp.ones(logits.shape, bool))

    def by_mass() -> jax.Array:
        ranked = jnp.where(among, weights, 0.0)
        mass = top_p * ranked.sum(-1)
        bits = threshold(lambda bits: jnp.where(at_least(bits), ranked, 0.0).sum(-1) >= mass)
        return (top_p >= 1)[:, None] | at_least(bits)

    among &= jnp.isfinite(logits)
    return among & jax.lax.cond((top_p < 1).any(), by_mass, lambda: jnp.ones(logits.shape, bool))


def draw(logits: jax.Array, keys: jax.Array, drawing: Drawing[jax.Array], greedy: jax.Array | None = None) -> jax.Array:
    """Draw an index of each row, [B] int32.

    Args:
        logits: [B, V] float32, -inf where a token is illegal.
        keys: [B], of this step.
        greedy: [B] bool, where the likeliest is taken; None: nowhere but at a temperature of 0.
    """
    cold = drawing.temperature <= 0
    cold = cold if greedy is None else cold | greedy
    logits = logits / jnp.where(cold, 1.0, drawing.temperature)[:, None]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    drawn = jnp.where(kept(logits, drawing.top_k, drawing.top_p), logits + noise, -jnp.inf)
    return jnp.argmax(jnp.where(cold[:, None], logits, drawn), -1).astype(jnp.int32)


def step_keys(keys: jax.Array, step: jax.Array) -> jax.Array:
    """Return the keys of a step, [B], of those of songs."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)
