"""Replicas as actors of a Ray cluster, each with its own resources, such as a GPU; see `serve.replicas`."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from acestep_jax.errors import InputError
from acestep_jax.serve.batch_message import BatchMessage, Outcome
from acestep_jax.serve.engine import EngineLost
from acestep_jax.serve.models import Model
from acestep_jax.serve.replica import Offered, Progress, Replica
from acestep_jax.serve.replicas import ReplicaEngine

logger = logging.getLogger(__name__)

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LOOK_SECONDS = 30.0  # timeout for a progress report; an actor that compiles may take a while


class Actor(Replica):
    """A replica in an actor. It makes a batch in one thread, and reports on it in others."""

    def pid(self) -> int:
        """Return the process id, once the process exists."""
        return os.getpid()


class RayRemote:
    """An actor, see `replicas.Remote`.

    Args:
        offered: see `Replica`.
        resources: resources of the actor, such as `{"GPU": 1}`.
    """

    def __init__(self, offered: Offered, resources: Mapping[str, float]):
        others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
        options: dict[str, Any] = dict(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            resources=others,
            max_concurrency=3,  # making a batch, reporting on it, and halting it
            max_restarts=0,  # the dispatcher starts a new actor, because it must know that nothing is compiled there
        )
        self._actor: Any = ray.remote(Actor).options(**options).remote(offered)
        self._ready: Any = self._actor.pid.remote()
        self._batch: Any = None
        self.pid: int | None = None

    def ready(self, seconds: float) -> bool:
        """See `Remote`."""
        try:
            self.pid = _get(self._ready, seconds)
        except GetTimeoutError:
            return False
        return True

    def begin(self, message: BatchMessage) -> None:
        """See `Remote`."""
        self._batch = self._actor.make.remote(message)

    def look(self, seconds: float) -> Outcome | Progress:
        """See `Remote`."""
        try:
            return _get(self._batch, seconds)
        except GetTimeoutError:
            pass
        try:
            return _get(self._actor.progress.remote(), LOOK_SECONDS)
        except GetTimeoutError:
            return Progress("queued")  # it is busy

    def halt(self) -> None:
        """See `Remote`."""
        self._actor.halt.remote()

    def close(self) -> None:
        """See `Remote`."""
        try:
            ray.kill(self._actor)
        except Exception as error:  # the cluster may be gone
            logger.warning("an actor could not be ended: %s", error)


class RayEngine(ReplicaEngine):
    """Makes songs in actors of a Ray cluster: the one at RAY_ADDRESS, or one running on this machine, or a new one.

    Args:
        models, options: see `ReplicaEngine`.
        offered: function that returns models and adapters; called in each actor, with the files of its machine.
        resources: resources of each actor.

    Raises:
        InputError: if there is no cluster at RAY_ADDRESS.
    """

    def __init__(
        self,
        models: Sequence[Model],
        offered: Offered,
        replicas: int,
        *,
        resources: Mapping[str, float] | None = None,
        **options: Any,
    ):
        self._joined = not ray.is_initialized()
        if self._joined:
            try:
                ray.init(log_to_driver=True, logging_level=logging.WARNING)
            except (ConnectionError, RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())[:200]
                raise InputError(f"RAY_ADDRESS: the Ray cluster cannot be joined ({reason})") from None
        taken = dict(resources or {"CPU": 1})
        super().__init__(models, lambda: RayRemote(offered, taken), replicas, **options)

    def stop(self, grace: float) -> None:
        """See `Engine`."""
        super().stop(grace)
        if self._joined and ray.is_initialized():
            ray.shutdown()


def _get(reference: Any, seconds: float) -> Any:
    """Return the reply of an actor.

    Raises:
        GetTimeoutError: if there is no reply in time.
        EngineLost: if the actor is gone.
    """
    try:
        return ray.get(reference, timeout=seconds)
    except (GetTimeoutError, RayTaskError):
        raise
    except RayError as error:
        raise EngineLost(_reason(error)) from None


def _reason(error: RayError) -> str:
    """Return Ray's long coloured message as one line: its first line, and its last one, which has the exception."""
    lines = [line.strip() for line in COLOUR.sub("", str(error)).splitlines() if line.strip()]
    return " ... ".join(line[:300] for line in dict.fromkeys([*lines[:1], *lines[-1:]]))
