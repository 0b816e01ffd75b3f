"""Errors that a user can fix, and the checks that raise them."""

import difflib
import numbers
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Something the caller gave cannot be used; the message says what, where, what was expected and what to do.

    The command line prints only the message; any other exception keeps its traceback, because it is a bug.
    """


def check_number(name: str, value: Any, *, integer: bool = False) -> None:
    """Raise InputError unless the value is a number; with `integer`, a whole number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if integer else numbers.Real):
        raise InputError(f"{name}: expected a {'whole ' if integer else ''}number, found {value!r}")


def check_text(name: str, value: Any) -> None:
    """Raise InputError unless the value is text."""
    if not isinstance(value, str):
        raise InputError(f"{name}: expected text, found {value!r}")


class Cancelled(Exception):
    """A song was stopped between two steps, as requested."""


class Preempted(Exception):
    """SIGTERM has ended the work at a point where the same command can resume, see `acestep_jax.preemption`."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the advice for an unknown name: the nearest known name, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known) or 'none'}"
