"""How operations end, without HTTP and without a model."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile

from acestep_jax.planner.plan import Plan
from acestep_jax.request import Request, Sampling
from acestep_jax.serve import operations, sounds
from acestep_jax.serve.analysis import AnalysisResult
from acestep_jax.serve.engine import Work
from acestep_jax.serve.operations import Operation
from acestep_jax.serve.planner_task import PlannerTask

pytestmark = pytest.mark.unit

PLAN = Plan(caption="piano")


def begun(service, uploads=None):
    """Return an operation in the queue."""
    work = Work(Request("piano", seed=0), Sampling(), "small", planner_task=PlannerTask(required=True), is_song=False)
    return service.submit(Operation([work], "127.0.0.1", uploads))


def planned(service, operation, **files):
    """Finish an operation, which found files."""
    operation.works[0].analysis = AnalysisResult(PLAN, **files)
    service.operations.planned(operation.works[0], PLAN)


class SlowDisk:
    """Lets folders be removed only on demand, and tells when that begins."""

    def __init__(self, monkeypatch):
        self.begun, self._may_end = threading.Event(), threading.Event()
        self._rmtree = operations.shutil.rmtree
        monkeypatch.setattr(operations.shutil, "rmtree", self._slow)

    def during(self, ending, check):
        """Run `ending` in a thread, and `check` while it removes a folder; return what `check` returned."""
        with ThreadPoolExecutor(2) as threads:
            try:
                end = threads.submit(ending)
                assert self.begun.wait(10)
                return threads.submit(check).result(10)
            finally:
                self._may_end.set()
                end.result(10)

    def _slow(self, folder, **options):
        self.begun.set()
        assert self._may_end.wait(30)
        self._rmtree(folder, **options)


@pytest.mark.parametrize("status", ["cancelled", "done", "failed"])
def test_uploads_are_removed_before_the_end_and_nobody_waits_for_it(service, monkeypatch, status):
    made = service(started=False)
    operation = begun(made, made.store.new_folder())
    (work,) = operation.works
    ending = dict(
        cancelled=lambda: made.operations.cancel(operation),
        done=lambda: made.operations.planned(work, PLAN),
        failed=lambda: made.operations.failed(work, "no"),
    )[status]

    def check():
        made.waiting()  # the event loop acquires the same lock
        made.operations.changed(work)  # too late
        return operation.status, operation.final

    assert SlowDisk(monkeypatch).during(ending, check) == ("queued", False)
    assert operation.status == status and not operation.uploads.exists()
    assert operation.error == ("no" if status == "failed" else None)


def test_who_cancels_waits_until_the_operation_has_ended(service, monkeypatch):
    made = service(started=False)
    operation, asked = begun(made, made.store.new_folder()), threading.Event()
    found = []

    def cancel_again():
        asked.set()
        made.operations.cancel(operation)
        found.append(operation.status)

    thread = threading.Thread(target=cancel_again)
    SlowDisk(monkeypatch).during(lambda: made.operations.cancel(operation), lambda: (thread.start(), asked.wait(10)))
    thread.join(10)
    assert found == ["cancelled"]


def test_nobody_waits_for_what_is_forgotten(service, monkeypatch):
    made, latents = service(started=False), np.zeros((50, 64), np.float32)
    first, second = begun(made), begun(made)
    planned(made, first, latents=latents)
    assert first.files.exists()
    monkeypatch.setattr(operations, "KEPT_BYTES", 1)
    _, status = SlowDisk(monkeypatch).during(
        lambda: planned(made, second, latents=latents), lambda: (made.waiting(), second.status)
    )
    assert status == "done"
    assert list(made.operations.all) == [second.id] and second.files.exists() and not first.files.exists()


def test_nobody_waits_for_files_of_what_was_cancelled(service, monkeypatch):
    made = service(started=False)
    operation = begun(made)
    made.operations.cancel(operation)
    late = dict(latents=np.zeros((50, 64), np.float32))
    SlowDisk(monkeypatch).during(lambda: planned(made, operation, **late), made.waiting)
    assert operation.status == "cancelled" and operation.files is None and not list(made.store.incoming.iterdir())


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), soundfile.SoundFileError("cannot be opened")])
def test_a_sound_that_is_removed_while_it_is_converted_is_not_there(service, monkeypatch, error):
    made = service(started=False)
    operation = begun(made)
    planned(made, operation, audio=np.zeros((2, 48_000), np.float32), sample_rate=48_000)

    def convert(source, path, form):
        source.unlink()
        raise error

    monkeypatch.setattr(operations.sounds, "convert", convert)
    with pytest.raises(FileNotFoundError):
        made.operations.sound(operation, sounds.FORMATS["mp3"])
