"""Audio codes that repeat themselves: a known fault of language models, to which the song would sound stuck."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.planner.metadata import CODES_PER_SECOND

LONGEST_RUN = 10 * CODES_PER_SECOND  # codes; more of the same are a loop
LONGEST_REPEAT = 20 * CODES_PER_SECOND  # codes that repeat those of at most `PERIODS` before
PERIODS = 8


class Loop(NamedTuple):
    """Where codes repeat themselves: `length` codes from code `start` on; `distinct` is the number of codes in use."""

    start: int
    length: int
    period: int
    distinct: int

    def __str__(self) -> str:
        what = "one code" if self.period == 1 else f"{self.period} codes"
        start, length = self.start / CODES_PER_SECOND, self.length / CODES_PER_SECOND
        return f"{what} repeated for {length:g} s from {start:g} s on ({self.distinct} distinct codes in the song)"


def find_loop(codes: np.ndarray) -> Loop | None:
    """Return the longest part of codes [n] that repeats one code for more than 10 s, or up to 8 codes for more than
    20 s; None if there is none."""
    distinct = len(np.unique(codes))
    longest: Loop | None = None
    for period in range(1, PERIODS + 1):
        same = np.concatenate([[False], codes[period:] == codes[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1]).reshape(-1, 2)  # begin and end of each stretch of equals
        for begin, end in edges:
            length = int(end - begin) + period
            if length > (LONGEST_RUN if period == 1 else LONGEST_REPEAT) and (not longest or length > longest.length):
                longest = Loop(int(begin), length, period, distinct)
    return longest


def count_repeats(repeats: jax.Array, tokens: jax.Array, token: jax.Array, step: jax.Array) -> jax.Array:
    """Return how many of the last codes of each song equal those of p before, for p = 1 to `PERIODS`.

    Args:
        repeats: [B, PERIODS] int32, before this code.
        tokens: [B, N] int32, of which the first `step` are written.
        token: [B] int32, the next one.
        step: int32.
    """
    periods = jnp.arange(1, PERIODS + 1)
    earlier = jnp.take(tokens, jnp.maximum(step - periods, 0), axis=1)  # [B, PERIODS]
    return jnp.where((earlier == token[:, None]) & (step >= periods), repeats + 1, 0)


def is_loop(repeats: jax.Array) -> jax.Array:
    """Return for which songs `find_loop` finds a loop that ends with the last code, [B] bool; see `count_repeats`."""
    most = np.array([LONGEST_RUN if period == 1 else LONGEST_REPEAT for period in range(1, PERIODS + 1)])
    return (repeats + np.arange(1, PERIODS + 1) > most).any(-1)
