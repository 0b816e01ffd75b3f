"""Overrides JAX's process-wide settings that would change results.

A seed gives the same song, and a training run the same weights, even if an environment variable, a notebook or another
library has set another generator, 64-bit types or stricter promotion. `jax_default_matmul_precision` is left alone,
because it is the user's trade-off between speed and precision.
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
    """Compute with this library's settings inside the block, in this thread only."""
    with (
        jax.enable_x64(False),
        jax.default_prng_impl(PRNG),
        jax.threefry_partitionable(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def with_own_settings(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function so that it runs inside `own_settings`."""

    @functools.wraps(function)
    def run(*args: P.args, **keywords: P.kwargs) -> R:
        with own_settings():
            return function(*args, **keywords)

    return run
