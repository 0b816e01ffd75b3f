"""One of the processes of `serve.replicas`: what runs in it, and how it is seen from the server."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from acestep_jax.serve.local import LocalEngine
from acestep_jax.serve.models import Model
from acestep_jax.serve.parcel import Outcome, Parcel, made_by, outcome_of, unpack

Offered = Callable[[], tuple[Sequence[Model], Mapping[str, str]]]  # models and adapters, by their names


class Progress(NamedTuple):
    """How far a batch is.

    Attributes:
        stage, step, steps: see `Work`.
        seconds: since the first step of denoising began; 0 in other stages.
    """

    stage: str
    step: int = 0
    steps: int = 0
    seconds: float = 0.0


class Replica(LocalEngine):
    """The far end: what runs in a process of its own, without a queue, and makes one batch at a time.

    Args:
        offered: returns the models and the adapters; called here, where the devices are.
    """

    def __init__(self, offered: Offered):
        models, adapters = offered()
        super().__init__(models, adapters=adapters)

    def make(self, parcel: Parcel) -> Outcome:
        """Make a batch; return how it ended."""
        with tempfile.TemporaryDirectory(prefix="acestep-jax-") as folder:
            works, program, names = unpack(parcel, folder)
            self._running = works
            try:
                outcome = outcome_of(lambda: made_by(self, works, program), names)
            finally:
                self._running = []
            stepping = self._last_step - self._second_step
            return dataclasses.replace(outcome, step=works[0].step, stepping=stepping, aligning=self._aligning)

    def progress(self) -> Progress:
        """Return how far the batch under way is; called from another thread."""
        if not (works := self._running):
            return Progress("queued")
        first = works[0]
        seconds = time.monotonic() - self._first_step if first.stage == "denoising" else 0.0
        return Progress(first.stage, first.step, first.steps, seconds)

    def halt(self) -> None:
        """End the batch under way before its next step; called from another thread."""
        for work in self._running:
            work.cancelled = True


class Remote(Protocol):
    """A replica seen from here. Everything raises EngineLost once its process has gone."""

    def ready(self, seconds: float) -> bool:
        """Return whether it has started, after waiting at most so long."""
        ...

    def begin(self, parcel: Parcel) -> None:
        """Have it make a batch."""
        ...

    def look(self, seconds: float) -> Outcome | Progress:
        """Return how the batch has ended, or, after some seconds, how far it is."""
        ...

    def halt(self) -> None:
        """End the batch before its next step."""
        ...

    def close(self) -> None:
        """End the process; never raises."""
        ...
