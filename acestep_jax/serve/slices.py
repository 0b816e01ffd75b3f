"""One engine of several processes that share a mesh: the leader has the queue and HTTP, the followers run the same
programs.

    leader -> followers   batch (songs and their files), before each step: step {stop}, end; at last: leave
    follower -> leader    ended {kind, message}, after each batch

A process that has gone takes the slice with it, because the others wait for it on their devices: all end with status 1,
so that whatever started them starts them again together. What was accepted lies on the leader's disk, and is made then.
"""

import json
import logging
import os
import queue
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from acestep_jax.distributed import exchange, leader_host
from acestep_jax.errors import Cancelled, InputError
from acestep_jax.planner.plan import Plan
from acestep_jax.serve.batcher import Program
from acestep_jax.serve.channel import Channel, Listening, Message, connect
from acestep_jax.serve.engine import EngineLost, Listener, Work
from acestep_jax.serve.local import LocalEngine
from acestep_jax.serve.models import Model
from acestep_jax.serve.parcel import Outcome, Parcel, made_by, outcome_of, pack, unpack, with_names
from acestep_jax.song import Song

logger = logging.getLogger(__name__)

LATE_SECONDS = 120.0  # between the ends of one batch in two processes, after which the slice is broken
LEAVE_SECONDS = 20.0  # for the HTTP server to end, once the slice is broken
STATUS = 1  # of all processes of a broken slice


def lead(models: Sequence[Model], adapters: Mapping[str, str], **settings: Any) -> dict[int, Channel]:
    """Return the channels to the other processes by their index; in process 0, see `join`."""
    listening = Listening(leader_host())
    found = _agree(models, adapters, settings, port=listening.port, key=listening.key)
    return listening.accept(len(found) - 1)


def join(models: Sequence[Model], adapters: Mapping[str, str], **settings: Any) -> Channel:
    """Return the channel to process 0, which calls `lead` meanwhile.

    Args:
        settings: what else must be the same in all processes, as JSON can hold it.

    Raises:
        InputError: in all of them, if they were started with different models, adapters or settings.
    """
    found = _agree(models, adapters, settings)
    return connect(leader_host(), found[0]["port"], found[0]["key"], jax.process_index())


def _agree(
    models: Sequence[Model], adapters: Mapping[str, str], settings: Mapping[str, Any], **place: Any
) -> list[dict[str, Any]]:
    """Return what each process has told: how it was started, which must be alike, and where it listens."""
    about = dict(settings, adapters=list(adapters))
    about["models"] = [[model.name, model.planner, repr(sorted(model.configs.items()))] for model in models]
    found = [json.loads(text) for text in exchange(json.dumps(dict(about=about, **place)))]
    for index, other in enumerate(found):
        for name, value in found[0]["about"].items():
            if other["about"].get(name) != value:
                raise InputError(f"distributed: {name} of process {index} differs; start all processes alike")
    return found


class LeaderEngine(LocalEngine):
    """The engine of process 0, whose batches the followers make with it.

    Args:
        channels: to the followers, by their index.
        models, options: see `LocalEngine`.
    """

    alone = False

    def __init__(self, models: Sequence[Model], channels: Mapping[int, Channel], **options: Any):
        super().__init__(models, **options)
        self._channels = channels
        self._ends: queue.Queue[tuple[int, Outcome]] = queue.Queue()
        self._broken: str | None = None
        self._leaving = False
        self._batch = 0
        for index, channel in channels.items():
            threading.Thread(target=self._hear, args=(index, channel), name=f"follower {index}", daemon=True).start()

    @property
    def broken(self) -> bool:
        """Whether a follower has gone, so that this process has to end without waiting for anything."""
        return self._broken is not None

    def start(self, listener: Listener) -> None:
        """See `Engine`."""
        super().start(listener)
        if self._broken is not None:
            listener.died(EngineLost(self._broken))

    def songs(self, works: list[Work], program: Program) -> list[Song]:
        """See `LocalEngine`.

        Raises:
            EngineLost: if the followers did not end the batch as this process did.
        """
        return self._together(super().songs, works, program)

    def plans(self, works: list[Work], program: Program) -> list[Plan]:
        """See `LocalEngine` and `songs`."""
        return self._together(super().plans, works, program)

    def stop(self, grace: float) -> None:
        """See `Engine`: the followers leave as well."""
        if self._broken is not None:  # the thread may wait on a device for ever
            with self._changed:
                self._stopping = 0.0
                self._changed.notify_all()
            return
        super().stop(grace)
        if not self._leaving:
            self._leaving = True
            self._tell_all("leave")

    def _together(self, make: Callable[[list[Work], Program], list[Any]], works: list[Work], program: Program) -> Any:
        self._batch += 1
        parcel = pack(works, program)
        failure: Exception | None = None
        made: list[Any] = []
        originals = [work.request for work in works]
        with tempfile.TemporaryDirectory(prefix="acestep-jax-", ignore_cleanup_errors=True) as folder:
            # Of the files that were sent, as the followers do: those of a song that was deleted meanwhile are gone, and
            # an error in this process alone leaves the others waiting on their devices.
            copies, _, names = unpack(parcel, folder)
            self._tell_all("batch", *parcel)
            try:
                for work, copy in zip(works, copies, strict=True):
                    work.request = copy.request  # which only this thread reads while a batch is made
                made = make(works, program)
            except InputError as error:
                failure = type(error)(with_names(error, names))  # InputError, or ServerError
            except Exception as error:
                failure = error
            finally:
                for work, request in zip(works, originals, strict=True):
                    work.request = request
        self._tell_all("end")
        self._wait_for_all(failure)
        if failure is not None:
            raise failure
        return made

    def _is_over(self, works: Sequence[Work]) -> bool:
        stop = super()._is_over(works)
        self._tell_all("step", dict(stop=stop))
        return stop

    def _tell_all(self, kind: str, about: dict[str, Any] | None = None, blobs: Sequence[bytes] = ()) -> None:
        for index, channel in self._channels.items():
            try:
                channel.send(kind, about, blobs)
            except OSError as error:
                self._break(f"process {index} has gone ({error})")
        if self._broken is not None and not self._leaving:
            raise EngineLost(self._broken)

    def _wait_for_all(self, failure: Exception | None) -> None:
        """Wait until the followers have ended the batch, and raise EngineLost if that was not as here."""
        mine = "done" if failure is None else "cancelled" if isinstance(failure, Cancelled) else "failed"
        waiting = set(self._channels)
        while waiting:
            try:
                index, outcome = self._ends.get(timeout=LATE_SECONDS)
            except queue.Empty:
                self._break(f"process {min(waiting)} has not ended a batch that was {mine} here")
                raise EngineLost(self._broken) from None
            if self._broken is not None:
                raise EngineLost(self._broken)
            waiting.discard(index)
            if outcome.kind != mine and mine != "failed":
                self._break(f"a batch was {mine} here, but {outcome.kind} in process {index}: {outcome.message}")
                raise EngineLost(self._broken)

    def _hear(self, index: int, channel: Channel) -> None:
        """Note how batches end in a follower, and that it has gone; runs in a thread of its own."""
        while True:
            try:
                message = channel.receive()
            except (OSError, ValueError) as error:
                if not self._leaving:
                    self._break(f"process {index} has gone ({error})")
                    self._ends.put((index, Outcome("internal")))  # nobody waits for it any longer
                return
            outcome = Outcome(message.about["kind"], message.about["message"])
            if outcome.kind not in ("done", "cancelled"):
                # The same error is raised here, or this process waits for the other one for ever.
                timer = threading.Timer(LATE_SECONDS, self._check, (self._batch, index, outcome.message))
                timer.daemon = True
                timer.start()
            self._ends.put((index, outcome))

    def _check(self, batch: int, index: int, message: str) -> None:
        if self._batch == batch and self._running:
            self._break(f"a batch that goes on here has failed in process {index}: {message}")

    def _break(self, reason: str) -> None:
        with self._changed:
            if self._broken is not None or self._leaving:
                return
            self._broken = reason
        logger.critical("the slice is broken: %s; this process ends, and the others with it", reason)
        self._error = self._error or EngineLost(reason)
        timer = threading.Timer(LEAVE_SECONDS, leave)  # the end of HTTP may hang as well
        timer.daemon = True
        timer.start()
        if self._listener is not None:
            self._listener.died(self._error)


class FollowerEngine(LocalEngine):
    """The engine of another process: without a queue, it makes the batches of the leader."""

    alone = False

    def __init__(self, models: Sequence[Model], channel: Channel, **options: Any):
        super().__init__(models, **options)
        self._channel = channel
        self._messages: queue.Queue[Message] = queue.Queue()

    def hear(self) -> None:
        """Pass on what the leader sends, and end this process if it has gone; runs in a thread of its own."""
        while True:
            try:
                message = self._channel.receive()
            except (OSError, ValueError) as error:
                leave(f"process 0 has gone ({error}); this process ends with it")
                return
            self._messages.put(message)
            if message.kind == "leave":
                return

    def follow(self) -> None:
        """Make what the leader makes, until it says that all leave."""
        while (message := self._messages.get()).kind != "leave":
            if message.kind != "batch":  # of a batch that has ended here before it did there
                continue
            with tempfile.TemporaryDirectory(prefix="acestep-jax-") as folder:
                works, program, names = unpack(Parcel(message.about, message.blobs), folder)
                outcome = outcome_of(lambda: made_by(self, works, program), names)  # noqa: B023  (called at once)
            self._channel.send("ended", dict(kind=outcome.kind, message=outcome.message))

    def _is_over(self, works: Sequence[Work]) -> bool:
        message = self._messages.get()
        if message.kind != "step":
            if message.kind == "leave":
                self._messages.put(message)
            raise RuntimeError("the batch has failed in process 0; see its message")
        return message.about["stop"]


def follow(models: Sequence[Model], channel: Channel, **options: Any) -> int:
    """Make what the leader makes, until it says that all leave; return the exit status.

    SIGTERM, which schedulers send to all processes of a slice, is the leader's to heed; a second one ends this process.
    """
    engine = FollowerEngine(models, channel, **options)
    threading.Thread(target=engine.hear, name="leader", daemon=True).start()

    def receive(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        print("acestep-jax: SIGTERM; this process ends when process 0 does", file=sys.stderr, flush=True)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, receive)
    try:
        engine.follow()
    except BaseException:  # whatever it is, the others must not wait for this process
        logger.critical("this process cannot follow any longer", exc_info=True)
        leave()
    return 0


def leave(message: str | None = None) -> None:
    """End this process as one of a broken slice: at once, because JAX waits for the others at an orderly end."""
    if message is not None:
        print(f"acestep-jax: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STATUS)
