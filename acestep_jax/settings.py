"""JAX's process-wide settings that would change results: what this library computes with, whatever a process has set.

A seed gives the same song, and a run of training the same weights, also where an environment variable, a notebook or
another library has set another generator, 64-bit numbers or stricter promotion. `jax_default_matmul_precision` is a
user's choice of speed and stays.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")

PRNG = "threefry2x32"


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Compute with this library's settings within the block, in this thread only."""
    with (
        jax.enable_x64(False),
        jax.default_prng_impl(PRNG),
        jax.threefry_partitionable(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def with_own_settings(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function as it runs within `own_settings`."""

    @functools.wraps(function)
    def run(*args: P.args, **keywords: P.kwargs) -> R:
        with own_settings():
            return function(*args, **keywords)

    return run
