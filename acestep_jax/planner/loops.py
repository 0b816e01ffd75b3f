"""Audio codes that repeat themselves: a known failure of language models, which makes a song sound stuck."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.planner.metadata import CODES_PER_SECOND

LONGEST_RUN = 10 * CODES_PER_SECOND  # codes; a longer run of one code is a loop
LONGEST_REPEAT = 20 * CODES_PER_SECOND  # codes; a longer repetition with a period of up to `PERIODS` is a loop
PERIODS = 8


class Loop(NamedTuple):
    """A repetition of `length` codes starting at code `start`. `distinct`: number of distinct codes in the song."""

    start: int
    length: int
    period: int
    distinct: int

    def __str__(self) -> str:
        what = "one code" if self.period == 1 else f"{self.period} codes"
        start, length = self.start / CODES_PER_SECOND, self.length / CODES_PER_SECOND
        return f"{what} repeated for {length:g} s from {start:g} s on ({self.distinct} distinct codes in the song)"


def find_loop(codes: np.ndarray) -> Loop | None:
    """Return the longest loop in codes [n]: one code repeated for more than 10 s, or a period of up to 8 codes for more
    than 20 s; None if there is none."""
    distinct = len(np.unique(codes))
    longest: Loop | None = None
    for period in range(1, PERIODS + 1):
        same = np.concatenate([[False], codes[period:] == codes[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1]).reshape(-1, 2)  # start and end of each run of equal codes
        for begin, end in edges:
            length = int(end - begin) + period
            if length > (LONGEST_RUN if period == 1 else LONGEST_REPEAT) and (not longest or length > longest.length):
                longest = Loop(int(begin), length, period, distinct)
    return longest


def count_repeats(repeats: jax.Array, tokens: jax.Array, token: jax.Array, step: jax.Array) -> jax.Array:
    """Return, for p = 1 to `PERIODS`, the number of last codes of each song that equal the code p places before.

    Args:
        repeats: [B, PERIODS] int32, the counts before this code.
        tokens: [B, N] int32, of which the first `step` are written.
        token: [B] int32, the next code.
        step: int32.
    """
    periods = jnp.arange(1, PERIODS + 1)
    earlier = jnp.take(tokens, jnp.maximum(step - periods, 0), axis=1)  # [B, PERIODS]
    return jnp.where((earlier == token[:, None]) & (step >= periods), repeats + 1, 0)


def is_loop(repeats: jax.Array) -> jax.Array:
    """Return whether `find_loop` would find a loop that ends with the last code, [B] bool; see `count_repeats`."""
    most = np.array([LONGEST_RUN if period == 1 else LONGEST_REPEAT for period in range(1, PERIODS + 1)])
    return (repeats + np.arange(1, PERIODS + 1) > most).any(-1)
