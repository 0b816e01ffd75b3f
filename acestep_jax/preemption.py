"""SIGTERM, which schedulers send before they take a machine back: work stops where the same command can resume.

Inside `handled`, the signal only sets a flag. Loops call `requested` at points where stopping loses nothing, and raise
`Preempted`, for which the command line exits with `EXIT_CODE`.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from acestep_jax import distributed
from acestep_jax.errors import Preempted

# The status of a process killed by SIGTERM, 128 + 15, so that schedulers and scripts always see the same status.
EXIT_CODE = 128 + signal.SIGTERM

_NOTICE = "acestep-jax/preempted"
_received = threading.Event()


@contextlib.contextmanager
def handled(*, in_step: bool = False) -> Iterator[None]:
    """Keep SIGTERM from ending this process; a second one still does. Outside of the main thread, do nothing.

    Args:
        in_step: whether several processes make the same steps. JAX then receives the signal, and the processes agree on
            the step after which all of them stop.
    """
    if threading.current_thread() is not threading.main_thread() or (in_step and jax.process_count() > 1):
        yield
        return

    def receive(number: int, frame: object) -> None:
        _received.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    _received.clear()
    before = signal.signal(signal.SIGTERM, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _received.clear()


def requested() -> bool:
    """Return whether this process, or another one with its own part of the work, has received SIGTERM."""
    if _received.is_set():
        distributed.announce(_NOTICE)
        return True
    return distributed.is_announced(_NOTICE)


def requested_at(step: int) -> bool:
    """Return whether to stop after a step; this becomes true at the same step in all processes."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return _received.is_set()


def check() -> None:
    """Raise Preempted if `requested`."""
    if requested():
        raise Preempted
