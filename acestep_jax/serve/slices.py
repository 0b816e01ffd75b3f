"""An engine of several processes that share a mesh: the leader has the queue and HTTP, the followers run the same
programs.

    leader -> followers   batch (songs and their files), before each step: step {stop}, end; finally: leave
    follower -> leader    ended {kind, message}, after each batch

If a process dies, the whole slice ends, because the others wait for it on their devices: all exit with status 1, so
that the scheduler restarts them together. Accepted songs are on the leader's disk, and are made after the restart.
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
from acestep_jax.serve.analysis import AnalysisResult
from acestep_jax.serve.batch_message import (
    BatchMessage,
    Outcome,
    decode_batch,
    encode_batch,
    made_by,
    outcome_of,
    with_names,
)
from acestep_jax.serve.batcher import Program
from acestep_jax.serve.channel import Channel, LeaderSocket, Message, connect
from acestep_jax.serve.engine import EngineLost, Listener, Work
from acestep_jax.serve.local import LocalEngine
from acestep_jax.serve.models import Model
from acestep_jax.song import Song

logger = logging.getLogger(__name__)

LATE_SECONDS = 120.0  # maximum time between the ends of a batch in two processes; then the slice is broken
LEAVE_SECONDS = 20.0  # for the HTTP server to shut down, once the slice is broken
STATUS = 1  # exit status of all processes of a broken slice


def accept_followers(models: Sequence[Model], adapters: Mapping[str, str], **settings: Any) -> dict[int, Channel]:
    """Connect to the other processes, in process 0; return the channels by process index. See `connect_to_leader`."""
    listening = LeaderSocket(leader_host())
    found = _agree(models, adapters, settings, port=listening.port, key=listening.key)
    return listening.accept(len(found) - 1)


def connect_to_leader(models: Sequence[Model], adapters: Mapping[str, str], **settings: Any) -> Channel:
    """Connect to process 0, which calls `accept_followers` at the same time; return the channel.

    Args:
        settings: other settings that must be the same in all processes, as values that JSON can hold.

    Raises:
        InputError: in all processes, if they were started with different models, adapters or settings.
    """
    found = _agree(models, adapters, settings)
    return connect(leader_host(), found[0]["port"], found[0]["key"], jax.process_index())


def _agree(
    models: Sequence[Model], adapters: Mapping[str, str], settings: Mapping[str, Any], **place: Any
) -> list[dict[str, Any]]:
    """Exchange the settings of all processes, which must be equal, and their addresses; return them."""
    about = dict(settings, adapters=list(adapters))
    about["models"] = [[model.name, model.planner, repr(sorted(model.configs.items()))] for model in models]
    found = [json.loads(text) for text in exchange(json.dumps(dict(about=about, **place)))]
    for index, other in enumerate(found):
        for name, value in found[0]["about"].items():
            if other["about"].get(name) != value:
                raise InputError(f"distributed: {name} of process {index} differs; start all of them the same way")
    return found


class LeaderEngine(LocalEngine):
    """The engine of process 0; the followers make its batches together with it.

    Args:
        channels: channels to the followers, by process index.
        models, options: see `LocalEngine`.
    """

    is_single_process = False

    def __init__(self, models: Sequence[Model], channels: Mapping[int, Channel], **options: Any):
        super().__init__(models, **options)
        self._channels = channels
        self._ends: queue.Queue[tuple[int, Outcome]] = queue.Queue()
        self._broken: str | None = None
        self._leaving = False
        self._batch = 0
        for index, channel in channels.items():
            threading.Thread(
                target=self._receive_loop, args=(index, channel), name=f"follower {index}", daemon=True
            ).start()

    @property
    def broken(self) -> bool:
        """Whether a follower is gone, so that this process has to exit without waiting for anything."""
        return self._broken is not None

    def start(self, listener: Listener) -> None:
        """See `Engine`."""
        super().start(listener)
        if self._broken is not None:
            listener.died(EngineLost(self._broken))

    def songs(self, works: list[Work], program: Program) -> list[Song]:
        """See `LocalEngine`.

        Raises:
            EngineLost: if a follower's outcome differs from this process's.
        """
        return self._together(super().songs, works, program)

    def plans(self, works: list[Work], program: Program) -> list[Plan | AnalysisResult]:
        """See `LocalEngine` and `songs`."""
        return self._together(super().plans, works, program)

    def stop(self, grace: float) -> None:
        """See `Engine`: the followers leave as well."""
        if self._broken is not None:  # the thread may wait on a device forever
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
        message = encode_batch(works, program)
        failure: Exception | None = None
        made: list[Any] = []
        originals = [work.request for work in works]
        with tempfile.TemporaryDirectory(prefix="acestep-jax-", ignore_cleanup_errors=True) as folder:
            # Use copies of the files, like the followers: the files of a song may be deleted meanwhile, and an error in
            # only this process would leave the others waiting on their devices.
            copies, _, names = decode_batch(message, folder)
            self._tell_all("batch", *message)
            try:
                for work, copy in zip(works, copies, strict=True):
                    work.request = copy.request  # only this thread reads it while a batch is made
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
                self._break(f"process {index} is gone ({error})")
        if self._broken is not None and not self._leaving:
            raise EngineLost(self._broken)

    def _wait_for_all(self, failure: Exception | None) -> None:
        """Wait until the followers have finished the batch; raise EngineLost if an outcome differs from this one."""
        mine = "done" if failure is None else "cancelled" if isinstance(failure, Cancelled) else "failed"
        waiting = set(self._channels)
        while waiting:
            try:
                index, outcome = self._ends.get(timeout=LATE_SECONDS)
            except queue.Empty:
                self._break(f"process {min(waiting)} has not finished a batch that was {mine} here")
                raise EngineLost(self._broken) from None
            if self._broken is not None:
                raise EngineLost(self._broken)
            waiting.discard(index)
            if outcome.kind != mine and mine != "failed":
                self._break(f"a batch was {mine} here, but {outcome.kind} in process {index}: {outcome.message}")
                raise EngineLost(self._broken)

    def _receive_loop(self, index: int, channel: Channel) -> None:
        """Receive a follower's outcomes, and notice if it is gone; runs in its own thread."""
        while True:
            try:
                message = channel.receive()
            except (OSError, ValueError) as error:
                if not self._leaving:
                    self._break(f"process {index} is gone ({error})")
                    self._ends.put((index, Outcome("internal")))  # so that no one keeps waiting for it
                return
            outcome = Outcome(message.about["kind"], message.about["message"])
            if outcome.kind not in ("done", "cancelled"):
                # Unless the same error is raised here, this process would wait for the follower forever.
                timer = threading.Timer(LATE_SECONDS, self._check, (self._batch, index, outcome.message))
                timer.daemon = True
                timer.start()
            self._ends.put((index, outcome))

    def _check(self, batch: int, index: int, message: str) -> None:
        if self._batch == batch and self._running:
            self._break(f"a batch that is still running here has failed in process {index}: {message}")

    def _break(self, reason: str) -> None:
        with self._changed:
            if self._broken is not None or self._leaving:
                return
            self._broken = reason
        logger.critical("the slice is broken: %s; all processes exit", reason)
        self._error = self._error or EngineLost(reason)
        timer = threading.Timer(LEAVE_SECONDS, leave)  # the shutdown of HTTP may hang as well
        timer.daemon = True
        timer.start()
        if self._listener is not None:
            self._listener.died(self._error)


class FollowerEngine(LocalEngine):
    """The engine of another process, without a queue: it makes the leader's batches."""

    is_single_process = False

    def __init__(self, models: Sequence[Model], channel: Channel, **options: Any):
        super().__init__(models, **options)
        self._channel = channel
        self._messages: queue.Queue[Message] = queue.Queue()

    def receive_loop(self) -> None:
        """Pass on the leader's messages, and exit if the leader is gone; runs in its own thread."""
        while True:
            try:
                message = self._channel.receive()
            except (OSError, ValueError) as error:
                leave(f"process 0 is gone ({error}); this process exits too")
                return
            self._messages.put(message)
            if message.kind == "leave":
                return

    def follow(self) -> None:
        """Make the leader's batches until it tells all processes to leave."""
        while (message := self._messages.get()).kind != "leave":
            if message.kind != "batch":  # belongs to a batch that ended here earlier than there
                continue
            with tempfile.TemporaryDirectory(prefix="acestep-jax-") as folder:
                works, program, names = decode_batch(BatchMessage(message.about, message.blobs), folder)
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
    """Make the leader's batches until it tells all processes to leave; return the exit status.

    Schedulers send SIGTERM to all processes of a slice, but only the leader acts on it; a second one ends this process.
    """
    engine = FollowerEngine(models, channel, **options)
    threading.Thread(target=engine.receive_loop, name="leader", daemon=True).start()

    def receive(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        print("acestep-jax: SIGTERM; this process exits when process 0 does", file=sys.stderr, flush=True)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, receive)
    try:
        engine.follow()
    except BaseException:  # in any case, the others must not wait for this process
        logger.critical("this process cannot follow any longer", exc_info=True)
        leave()
    return 0


def leave(message: str | None = None) -> None:
    """Exit this process of a broken slice at once, because JAX waits for the others in an orderly exit."""
    if message is not None:
        print(f"acestep-jax: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STATUS)
