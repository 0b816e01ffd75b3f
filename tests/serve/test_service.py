"""Submissions, the folder and its history, without HTTP and without a model."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import soundfile

from acestep_jax.errors import InputError
from acestep_jax.request import Request, Sampling
from acestep_jax.serve.engine import Work
from acestep_jax.serve.local import LocalEngine
from acestep_jax.serve.operations import Operation
from acestep_jax.serve.planner_task import PlannerTask
from acestep_jax.serve.service import Busy, Closing
from acestep_jax.serve.store import Store
from acestep_jax.serve.submission import Limits, Submission, variations
from tests.imports import ROOT
from tests.serve.fake import FakePipeline, model, sound, wait_until

pytestmark = pytest.mark.unit


def submit(service, *, count=1, client="127.0.0.1", **values):
    songs = variations(dict(prompt="piano", audio_duration=10.0) | values, count)
    return service.accept(Submission(songs=songs, api="native", client=client))


def ended(record):
    wait_until(lambda: record.final)
    return record.status


def test_a_song_is_kept_with_all_that_makes_it_again(service):
    made = service()
    record = submit(made, count=2, seed=7, num_inference_steps=3)
    assert ended(record) == "done" and [song.seed for song in record.songs] == [7, 8]
    folder = made.store.folder_of(record)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("0.flac", "0.latents", "1.flac", "1.latents", "request.json", "result.json"),
    ]
    audio, rate = soundfile.read(folder / "1.flac", dtype="float32")
    assert rate == 48_000 and np.abs(audio.T - sound(8, 480_000)).max() < 1e-6
    latents = np.frombuffer((folder / "1.latents").read_bytes(), "<f4").reshape(250, 4)
    assert (latents == 8).all()
    kept = json.loads((folder / "request.json").read_text())
    assert kept["songs"][0] == dict(
        request=dict(prompt="piano", audio_duration=10.0, seed=7), sampling=dict(num_inference_steps=3)
    )


def test_seeds_are_drawn_at_submission(service):
    made = service(started=False)
    seeds = [song.seed for record in (submit(made, count=2), submit(made)) for song in record.songs]
    assert seeds[1] == seeds[0] + 1 and len(set(seeds)) == 3
    record = submit(made, retake_variance=0.5)
    assert record.songs[0].request["retake_seed"] >= 0
    with pytest.raises(InputError, match="seed: expected a whole number from 0 to"):
        submit(made, seed=2**32 - 1, count=2)


def test_a_restart_keeps_history_and_makes_what_waited_with_its_seeds(service, tmp_path):
    first = service(FakePipeline(delay=0.01), max_batch=1)
    done, running, waiting = submit(first, seed=1), submit(first, seed=2), submit(first, count=2, seed=3)
    gone = submit(first, seed=9)
    first.cancel(gone)
    wait_until(lambda: done.final and running.status == "running")
    first.close(0)
    assert not running.final and not waiting.final
    first.store.close()
    again = service(FakePipeline())
    assert [record.id for record in again.records.values()] == [done.id, running.id, waiting.id, gone.id]
    found = [again.records[record.id] for record in (done, running, waiting, gone)]
    assert [ended(record) for record in found] == ["done", "done", "done", "cancelled"]
    seeds = sorted(seed for seeds, *_ in again.pipe.batches for seed in seeds)
    assert set(seeds) == {2, 3, 4}
    audio, _ = soundfile.read(again.store.song_path(found[2], 1), dtype="float32")
    assert np.abs(audio.T - sound(4, 480_000)).max() < 1e-6


def test_a_song_that_was_written_before_the_end_is_not_made_again(service):
    first = service(started=False)
    record = submit(first, count=2, seed=3)
    path = first.store.song_path(record, 0)
    soundfile.write(path, np.zeros((480_000, 2)), 48_000, subtype="PCM_24")
    first.store.close()
    again = service()
    assert ended(again.records[record.id]) == "done"
    assert [seeds for seeds, *_ in again.pipe.batches] == [[4]]
    assert [song.seconds for song in again.records[record.id].songs] == [10.0, 10.0]


SERVER = """
import sys, time
from tests.serve.fake import FakePipeline, model
from acestep_jax.serve.local import LocalEngine
from acestep_jax.serve.service import Service
from acestep_jax.serve.store import Store
from acestep_jax.serve.submission import Submission, variations
service = Service(Store(sys.argv[1]), LocalEngine([model(FakePipeline(delay=0.002))], max_batch=2))
service.start()
for i in range(20):
    record = service.accept(Submission(songs=variations(dict(prompt="piano", audio_duration=10.0), 1), api="native"))
    print(record.id, record.songs[0].seed, flush=True)
    time.sleep(0.02)
time.sleep(60)
"""


@pytest.mark.heavy
@pytest.mark.parametrize("accepted", [1, pytest.param(6, marks=pytest.mark.slow), 20])
def test_every_accepted_song_ends_once_after_kill_9(tmp_path, service, accepted):
    """Whatever the process was doing: what it told to be accepted is made, with the seeds that it told."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path / "data")],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    told = [process.stdout.readline().split() for _ in range(accepted)]
    process.send_signal(signal.SIGKILL)
    told += [line.split() for line in process.stdout.read().splitlines() if len(line.split()) == 2]
    process.wait()
    made = service(FakePipeline())
    assert {record_id for record_id, _ in told} <= made.records.keys()
    for record_id, seed in told:
        record = made.records[record_id]
        assert ended(record) == "done" and record.songs[0].seed == int(seed)
        audio, _ = soundfile.read(made.store.song_path(record, 0), dtype="float32")
        assert np.abs(audio.T - sound(int(seed), 480_000)).max() < 1e-6
    assert not list(made.store.incoming.iterdir())


RESUMING = """
import sys, time
from tests.serve.fake import FakePipeline, model
from acestep_jax.serve.local import LocalEngine
from acestep_jax.serve.service import Service
from acestep_jax.serve.store import Store
service = Service(Store(sys.argv[1]), LocalEngine([model(FakePipeline(delay=0.003))], max_batch=2))
service.start()
print("started", flush=True)
told = {record.id for record in list(service.records.values()) if record.final}
while True:
    for record in list(service.records.values()):
        if record.final and record.id not in told:
            told.add(record.id)
            print(record.id, flush=True)
    time.sleep(0.002)
"""


@pytest.mark.slow
def test_ten_kills_of_one_server(tmp_path, service):
    """Ten processes, each ended by kill -9 at another moment, share the work: every song ends once, as it is alone."""
    first = service(started=False)
    records = {(record := submit(first, seed=seed)).id: record.songs[0].seed for seed in range(40)}
    first.close(0)
    first.store.close()
    ends = []
    for i in range(10):
        command = [sys.executable, "-c", RESUMING, str(tmp_path / "data")]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "started\n"
        ends.append(process.stdout.readline().strip())
        time.sleep(0.017 * i)
        process.send_signal(signal.SIGKILL)
        ends += process.stdout.read().split()
        process.wait()
    assert len(ends) == len(set(ends)) and set(ends) <= records.keys()  # what has ended is not made again
    made = service(FakePipeline())
    for record_id, seed in records.items():
        assert ended(made.records[record_id]) == "done"
        audio, _ = soundfile.read(made.store.song_path(made.records[record_id], 0), dtype="float32")
        assert np.abs(audio.T - sound(seed, 480_000)).max() < 1e-6
    print(f"{len(ends)} songs ended in the ten processes, the others after them")


def test_one_server_owns_a_folder(service, tmp_path):
    service()
    with pytest.raises(OSError, match="another server uses this folder"):
        Store(tmp_path / "data")


def test_errors_after_a_restart_name_what_the_client_sent(service, monkeypatch):
    first = service(started=False)
    uploads = first.store.new_folder()
    soundfile.write(uploads / "src_audio", np.zeros((96_000, 2)), 48_000, format="WAV")
    songs = variations(dict(prompt="piano", task_type="cover"), 1)
    names = dict(src_audio="ctx_audio")
    asked = Submission(songs=songs, api="authors", uploads=uploads, files=["src_audio"], names=names)
    record = first.accept(asked)
    source = first.store.upload_path(record, "src_audio")
    first.store.close()

    def check(self, work):
        raise InputError(f"src_audio: {source} and {first.store.folder / 'cache'} are full")

    monkeypatch.setattr(LocalEngine, "check", check)
    again = service(started=False)
    again.start()
    error = again.records[record.id].error
    assert error == "ctx_audio: ctx_audio and the server's folder/cache are full"


def test_a_damaged_record_stops_nothing(service, tmp_path, caplog):
    first = service(started=False)
    bad, lost, good = submit(first), submit(first), submit(first, seed=5)
    (first.store.folder_of(bad) / "request.json").write_text("{")
    path = first.store.folder_of(lost) / "request.json"
    path.write_text(path.read_text().replace('"small"', '"gone"'))
    first.store.close()
    again = service()
    assert bad.id not in again.records and "skipped" in caplog.text
    assert ended(again.records[good.id]) == "done"
    assert again.records[lost.id].error == "model: the server was started without gone"


def test_a_queue_that_is_full(service):
    made = service(started=False, limits=Limits(queue=5, per_client=3))
    submit(made, count=3, client="10.0.0.1")
    with pytest.raises(Busy, match="3 songs of this address are already waiting") as found:
        submit(made, client="10.0.0.1")
    assert found.value.retry_after >= 1
    submit(made, count=2)
    with pytest.raises(Busy, match="queue is full"):
        submit(made, client="10.0.0.2")
    made.engine.start(made.listener)
    wait_until(lambda: made.waiting() == 0)
    assert ended(submit(made, client="10.0.0.1")) == "done"


def test_too_many_minutes_of_work(service):
    made = service(FakePipeline(delay=0.001), limits=Limits(queue_minutes=0.001), max_batch=1)
    for _ in range(2):
        assert ended(submit(made)) == "done"
    made.pipe.delay = 0.05
    with pytest.raises(Busy, match="minutes of work are waiting"):
        for _ in range(20):
            submit(made)


def test_cancel_and_delete(service):
    made = service(FakePipeline(delay=0.01), max_batch=1)
    running, waiting = submit(made, num_inference_steps=200), submit(made, count=2)
    wait_until(lambda: running.status == "running")
    assert made.position(waiting) == 1 and made.position(running) == 0
    for record in (waiting, running):
        made.cancel(record)
        assert record.status == "cancelled" and all(song.status == "cancelled" for song in record.songs)
    wait_until(lambda: made.waiting() == 0 and not made.engine._running)
    assert made.pipe.batches == []
    folder = made.store.folder_of(running)
    made.delete(running)
    assert not folder.exists() and running.id not in made.records and running.id in made.store.removed
    made.cancel(waiting)  # twice does nothing
    again = submit(made, num_inference_steps=1)
    made.delete(again)
    assert again.id not in made.records


def test_the_oldest_songs_go_when_the_folder_is_full(service):
    made = service()
    first = submit(made, seed=0)
    ended(first)
    made.limits = Limits(keep_bytes=int(2.5 * made.store.size(first)))
    records = [first] + [submit(made, seed=seed) for seed in (1, 2, 3)]
    for record in records:
        ended(record)
    wait_until(lambda: len(made.records) == 2)
    left = [record.id for record in records if record.id in made.records]
    assert records[-1].id in left and records[0].id not in left
    assert records[0].id in made.store.removed


def test_what_is_made_of_a_song_counts_too_and_so_do_records(service):
    made = service()
    first, second = submit(made, seed=0), submit(made, seed=1)
    assert ended(first) == ended(second) == "done"
    size = made.store.size(first)
    made.limits = Limits(keep_bytes=int(2.5 * size))
    assert made.sound(second, 0, "wav32").suffix == ".wav"
    assert first.id not in made.records and second.id in made.records
    made.limits = Limits(keep_records=1)
    third = submit(made, seed=2)
    ended(third)
    wait_until(lambda: list(made.records) == [third.id])


def test_what_ends_the_process_again_and_again_is_given_up(service):
    """As a song that the kernel ends the server for, because it needs too much memory."""
    first = service(started=False)
    record = submit(first, seed=1)
    first.store.close()
    for attempt in range(4):
        made = service(FakePipeline(delay=0.02))
        record = made.records[record.id]
        if attempt == 3:
            break
        wait_until(lambda: record.status == "running")  # noqa: B023  (called at once)
        made.dead = True  # it does not end in peace
        made.close(0)
        made.store.close()
    assert record.status == "failed" and "the server died 3 times while it made this" in record.error
    other = submit(made, seed=2)
    wait_until(lambda: other.status == "running")
    made.close(0)
    assert made.store.attempts(other) == 0


def test_a_record_whose_files_are_gone_stops_nothing(service, monkeypatch, tmp_path):
    first = service()
    record = submit(first)
    ended(record)
    first.close(0)
    first.store.close()
    again = service(started=False)
    monkeypatch.setattr(again.store, "folder_of", lambda record: tmp_path / "gone")
    again.start()
    assert again.records[record.id].status == "done"


def test_those_who_look_do_not_wait_for_the_disk(service, monkeypatch):
    made = service()
    begun, go = threading.Event(), threading.Event()
    finish = made.store.finish

    def slow(record):
        begun.set()
        assert go.wait(10)
        finish(record)

    monkeypatch.setattr(made.store, "finish", slow)
    record = submit(made)
    assert begun.wait(10)
    assert made.counts()["running"] == 1 and made.history(5) == [record] and made.progress(record)[1] == "decoding"
    assert not record.final
    go.set()
    assert ended(record) == "done"


def test_a_full_disk_fails_the_song_alone(service, monkeypatch):
    from acestep_jax.serve import making as module

    made = service()
    write = module.audio.write

    def full(path, *rest, **options):
        if "0.flac" in str(path) and full.on:
            raise OSError(28, "No space left on device", str(path))
        write(path, *rest, **options)

    full.on = True
    monkeypatch.setattr(module.audio, "write", full)
    record = submit(made)
    assert ended(record) == "failed" and "No space left" in record.error and str(made.store.folder) not in record.error
    full.on = False
    assert ended(submit(made)) == "done"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(audio_duration=5.0), "audio_duration: expected 10 to 600 s, found 5"),
        (dict(audio_duration=10**400), "audio_duration: expected at most 600 s, found a number of more than 30 digits"),
        (dict(bpm=10**400), "a value has the wrong type for its field|bpm"),
        (dict(num_inference_steps=10**9), "num_inference_steps: expected at most 200"),
        (dict(prompt="x" * 5000), "prompt: expected at most 4096 characters, found 5000"),
        (dict(lyrics="x" * 20000), "lyrics: expected at most 16384 characters"),
        (dict(prompt="\ud800"), "prompt: not text that can be written as UTF-8"),
        (dict(timesteps=[0.5] * 1000), "timesteps: expected at most 200 values"),
        (dict(task_type="karaoke"), "task_type: expected one of"),
        (dict(max_lyric_length=10**6), "max_lyric_length: unknown field"),
        (dict(latents=[[1.0]]), "latents: unknown field"),
        (dict(guidance_scale=float("nan")), "guidance_scale: expected"),
        (dict(shift=0), "shift: expected a number above 0"),
        (dict(seed=-1), "seed: expected a whole number"),
        (dict(prompt=None), "prompt: missing"),
    ],
)
def test_what_is_refused(service, values, message):
    made = service(started=False)
    with pytest.raises(InputError, match=message):
        submit(made, **values)
    assert made.records == {}


def test_when_the_server_is_stopping(service):
    made = service()
    made.closing = True
    with pytest.raises(Closing):
        submit(made)


def test_watchers_are_woken(service):
    made = service(FakePipeline(delay=0.002))
    woken = []
    record = submit(made)
    with made.watched(record, lambda: woken.append(record.version)):
        ended(record)
    assert len(woken) > 10 and woken == sorted(woken)
    assert made.kept._watchers == {}


def test_the_death_of_the_engine_is_known(service):
    made = service(started=False)
    made.on_report = lambda report: 1 / 0
    died = []
    made.on_death = lambda: died.append(time.monotonic())
    made.start()
    submit(made)
    wait_until(lambda: died)
    assert made.dead and not made.engine.ready


def test_an_engine_may_be_another(service):
    """What the service needs of an engine are the methods of the protocol."""
    from acestep_jax.serve.engine import Engine

    needed = {name for name in vars(Engine) if not name.startswith("_")}
    assert needed <= set(dir(LocalEngine([model(FakePipeline())])))


@pytest.mark.parametrize("limits", [Limits(queue=3), Limits(per_client=3)])
def test_simultaneous_plans_and_songs_do_not_exceed_the_queue(service, limits, monkeypatch):
    made = service(started=False, limits=limits)
    all_checked = threading.Barrier(12, timeout=60)  # seconds, only against hangs
    check = made.engine.check

    def checked(work):
        check(work)
        all_checked.wait()  # all have passed the first check for room

    monkeypatch.setattr(made.engine, "check", checked)
    outcomes = []

    def plan():
        planner_task = PlannerTask(required=True)
        work = Work(Request("piano", seed=0), Sampling(), "small", planner_task=planner_task, is_song=False)
        return made.submit(Operation([work], "192.0.2.1", made.store.new_folder()))

    def run(request):
        try:
            outcomes.append(request())
        except Exception as error:
            outcomes.append(error)

    asked = [plan] * 8 + [lambda: submit(made, client="192.0.2.1")] * 4
    threads = [threading.Thread(target=run, args=(one,)) for one in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(one, Busy) for one in outcomes) == 9 and len(outcomes) == 12, outcomes
    assert made.waiting() == 3
    accepted = sum(isinstance(one, Operation) for one in outcomes)
    assert len(list(made.store.incoming.iterdir())) == accepted  # the uploads of refused ones are removed


@pytest.mark.parametrize("damaged", ["", "ab" * 31, "no key", "\xff"])
def test_a_damaged_secret_is_replaced(tmp_path, caplog, damaged):
    store = Store(tmp_path)
    secret, path = store.secret(), tmp_path / "secret"
    assert len(secret) == 32 and store.secret() == secret and path.stat().st_mode & 0o777 == 0o600
    assert caplog.text == ""
    path.write_text(damaged, encoding="latin-1")
    replaced = store.secret()
    assert len(replaced) == 32 and replaced not in (secret, b"") and store.secret() == replaced
    assert path.stat().st_mode & 0o777 == 0o600 and "damaged; it is replaced" in caplog.text
    store.close()


def test_a_secret_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    store = Store(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            store.secret()
    assert not (tmp_path / "secret").exists() and len(store.secret()) == 32
    store.close()
