"""Sampling of the language model's tokens, in float32 throughout:

    legal tokens -> guidance -> repetition penalty -> / temperature -> top-k -> top-p -> sample

Nothing is sorted. Tokens are kept if their weight w = exp(logit - max logit) is at least a threshold, which is found by
bisection: non-negative floats have the same order as the integers with the same bits, so 30 halvings find it exactly.
Sampling uses the Gumbel-max trick: the argmax of logit + noise.

Source: the order of nano-vllm as ACE-Step 1.5 uses it, except that penalties come after guidance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.errors import InputError, check_number, check_text

A = TypeVar("A")  # jax.Array within a program, np.ndarray outside

_ONE = int(np.float32(1).view(np.int32))  # the bits of the greatest weight


@dataclass(frozen=True)
class LanguageSampling:
    """Sampling settings of the language model.

    Attributes:
        temperature: sampling temperature; 0 takes the likeliest token.
        cfg_scale: scale of classifier-free guidance, only for audio codes; 1 turns it off.
        top_k: number of likeliest tokens to sample from; 0: all.
        top_p: probability mass of the likeliest tokens to sample from; 1: all.
        repetition_penalty: values above 1 make tokens that were written before less likely.
        negative_prompt: text that guidance steers away from.

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
        check_number("top_k", self.top_k, integer=True)
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
    """Sampling settings of B songs, see `LanguageSampling`; [B] each, float32 except for `top_k`, int32."""

    temperature: A
    cfg_scale: A
    top_k: A
    top_p: A
    repetition_penalty: A

    @classmethod
    def of(cls, sampling: LanguageSampling, count: int) -> "Drawing[np.ndarray]":
        """Return the same settings for each of `count` songs."""
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
    """Return the mask of tokens to sample from, [B, V] bool: the top k, and of these the smallest set of likeliest
    tokens with a mass of at least p. The likeliest token is always kept; tokens with equal logits are kept together.

    Args:
        logits: [B, V] float32, divided by the temperature; -inf where a token is illegal.
        top_k: [B] int32, 0: all.
        top_p: [B] float32, 1: all.
    """
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))  # [B, V], 0 to 1

    def at_least(bits: jax.Array) -> jax.Array:
        return weights >= jax.lax.bitcast_convert_type(bits, jnp.float32)[:, None]

    def threshold(enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Return the bits of the greatest weight for which the tokens of at least that weight are enough; 0 if none."""

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
    """Sample an index of each row, [B] int32.

    Args:
        logits: [B, V] float32, -inf where a token is illegal.
        keys: [B], keys of this step.
        greedy: [B] bool, whether to take the likeliest; None: only at a temperature of 0.
    """
    cold = drawing.temperature <= 0
    cold = cold if greedy is None else cold | greedy
    logits = logits / jnp.where(cold, 1.0, drawing.temperature)[:, None]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    drawn = jnp.where(kept(logits, drawing.top_k, drawing.top_p), logits + noise, -jnp.inf)
    return jnp.argmax(jnp.where(cold[:, None], logits, drawn), -1).astype(jnp.int32)


def step_keys(keys: jax.Array, step: jax.Array) -> jax.Array:
    """Return the keys of a step from the keys of the songs, [B] each."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)
