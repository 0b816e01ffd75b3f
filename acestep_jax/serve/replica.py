"""A process of `serve.replicas`: the code that runs in it, and its interface for the server."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from acestep_jax.serve.batch_message import BatchMessage, Outcome, decode_batch, made_by, outcome_of
from acestep_jax.serve.local import LocalEngine
from acestep_jax.serve.models import Model

Offered = Callable[[], tuple[Sequence[Model], Mapping[str, str]]]  # models and adapters, by their names


class Progress(NamedTuple):
    """The progress of a batch.

    Attributes:
        stage, step, steps: see `Work`.
        seconds: time since the start of denoising; 0 in other stages.
    """

    stage: str
    step: int = 0
    steps: int = 0
    seconds: float = 0.0


class Replica(LocalEngine):
    """The remote side: runs in its own process, without a queue, and makes one batch at a time.

    Args:
        offered: function that returns the models and adapters; called in this process, which has the devices.
    """

    def __init__(self, offered: Offered):
        models, adapters = offered()
        super().__init__(models, adapters=adapters)

    def make(self, message: BatchMessage) -> Outcome:
        """Make a batch; return its outcome."""
        with tempfile.TemporaryDirectory(prefix="acestep-jax-") as folder:
            works, program, names = decode_batch(message, folder)
            self._running = works
            try:
                outcome = outcome_of(lambda: made_by(self, works, program), names)
            finally:
                self._running = []
            stepping = self._last_step - self._second_step
            return dataclasses.replace(outcome, step=works[0].step, stepping=stepping, aligning=self._aligning)

    def progress(self) -> Progress:
        """Return the progress of the current batch; called from another thread."""
        if not (works := self._running):
            return Progress("queued")
        first = works[0]
        seconds = time.monotonic() - self._first_step if first.stage == "denoising" else 0.0
        return Progress(first.stage, first.step, first.steps, seconds)

    def halt(self) -> None:
        """Stop the current batch before its next step; called from another thread."""
        for work in self._running:
            work.cancelled = True


class Remote(Protocol):
    """The server's interface of a replica. All methods except `close` raise EngineLost once its process is gone."""

    def ready(self, seconds: float) -> bool:
        """Wait at most `seconds` for it to start; return whether it has."""
        ...

    def begin(self, message: BatchMessage) -> None:
        """Start making a batch."""
        ...

    def look(self, seconds: float) -> Outcome | Progress:
        """Wait at most `seconds` for the outcome of the batch; return it, or the progress."""
        ...

    def halt(self) -> None:
        """Stop the batch before its next step."""
        ...

    def close(self) -> None:
        """End the process; never raise."""
        ...
