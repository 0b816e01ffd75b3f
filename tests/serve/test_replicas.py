"""Several replicas and one queue, with replicas in threads of this process and a pipeline that computes nothing."""

import threading
import time

import jax
import numpy as np
import pytest

from acestep_jax import Request, Sampling
from acestep_jax.errors import Cancelled, InputError
from acestep_jax.request import Planning
from acestep_jax.serve import replicas
from acestep_jax.serve.batch_message import BatchMessage, Outcome, decode_batch, encode_batch, outcome_of
from acestep_jax.serve.batcher import Program, Shape
from acestep_jax.serve.engine import EngineLost, ServerError, Work
from acestep_jax.serve.local import OUT_OF_MEMORY
from acestep_jax.serve.planner_task import PlannerTask
from acestep_jax.serve.replica import Replica
from acestep_jax.serve.replicas import LOST_TWICE, ReplicaEngine
from acestep_jax.serve.timings import Newest
from acestep_jax.song import Song
from tests.serve.fake import FakePipeline, RecordingListener, model, sound, wait_until, works

pytestmark = pytest.mark.unit


class Near:
    """A replica in a thread. `dead` ends it in the middle of whatever it does; `late` keeps it from being ready."""

    def __init__(self, pipe):
        self.pipe, self.dead, self.late, self.closed = pipe, False, False, False
        self.replica = Replica(lambda: ([model(pipe)], {"jazz": "/nowhere"}))
        self.ended = threading.Event()

    def alive(self):
        if self.dead:
            raise EngineLost("killed")

    def ready(self, seconds):
        self.alive()
        self.ended.wait(0.01 if self.late else 0)
        return not self.late

    def begin(self, message):
        self.alive()
        self.ended.clear()

        def make():
            self.outcome = self.replica.make(message)
            self.ended.set()

        threading.Thread(target=make, daemon=True).start()

    def look(self, seconds):
        self.alive()
        ended = self.ended.wait(0.01)
        self.alive()
        return self.outcome if ended else self.replica.progress()

    def halt(self):
        self.replica.halt()

    def close(self):
        self.closed = True


@pytest.fixture
def made(monkeypatch):
    """Return a function that returns an engine, whom it tells, and its replicas, in the order of their start."""
    monkeypatch.setattr(replicas, "START_PAUSE", 0.01)
    engines = []

    def make(count=2, new=None, delay=0.002, steps=50, **options):
        started, lock = [], threading.Lock()

        def start():
            with lock:
                started.append(new(len(started)) if new else Near(FakePipeline(delay, steps)))
                return started[-1]

        engine = ReplicaEngine([model(None)], start, count, adapters={"jazz": "/nowhere"}, **options)
        engines.append(engine)
        return engine, RecordingListener(), started

    yield make
    for engine in engines:
        engine.stop(0)


def plans(engine, *seeds, required=False, is_song=True):
    found = works(engine, *seeds)
    for work in found:
        work.planner_task, work.is_song = PlannerTask(required=required), is_song
        engine.check(work)
    return found


def batches(started):
    return [seeds for near in started for seeds, *_ in near.pipe.batches]


def test_idle_replicas_share_what_waits(made):
    """Eight songs and two replicas: four each, though one could take all of them."""
    engine, told, started = made(max_batch=8)
    engine.start(told)
    wait_until(lambda: engine.ready and engine._idle == 2)
    songs = works(engine, *range(8))
    engine.submit(songs)
    wait_until(lambda: len(told.reports) == 2)
    assert sorted(batches(started)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(len(near.pipe.batches) == 1 for near in started)
    for seed, work in enumerate(songs):
        assert np.array_equal(told.songs[work].audio, sound(seed, 480_000))


def test_sampling_and_adapters_arrive(made):
    engine, told, started = made(count=1)
    engine.submit(works(engine, 3, adapters=(("jazz", 0.5),), num_inference_steps=7))
    engine.start(told)
    wait_until(lambda: told.songs)
    ((seeds, sampling, adapters),) = started[0].pipe.batches
    assert (seeds, sampling, adapters) == ([3], Sampling(num_inference_steps=7), {"jazz": 0.5})


def test_steps_are_told_and_time_is_estimated(made):
    engine, told, _ = made(delay=0.01)
    seen = set()
    told.changed = lambda work: seen.add((work.stage, work.step > 0))
    engine.start(told)
    wait_until(lambda: engine.ready)
    for seed in range(4):  # twice for each replica: the first run of a program is not measured
        engine.submit(works(engine, seed))
        wait_until(lambda: len(told.songs) == seed + 1)  # noqa: B023  (called at once)
    assert ("denoising", True) in seen
    waiting = works(engine, *range(4, 12))
    engine.stop(0)  # so that they wait
    for dispatcher in engine.dispatchers:
        dispatcher.timings._seconds |= {Program(waiting[0].kind, waiting[0].shape, size): 10.0 for size in (1, 2, 4)}
    engine.submit(waiting)
    assert engine.remaining(waiting[:4]) == engine.remaining(waiting) == 10.0  # two batches of four, at once
    assert engine.ahead(waiting[3:]) == 3


def test_the_times_of_lyrics_do_not_count_as_steps(made):
    """While they are found the remaining time does not jump back, and what was learnt of a song is without them."""
    engine, told, started = made(count=1)
    engine.start(told)
    wait_until(lambda: started and engine.ready)
    stages, left = [], []

    def changed(work):
        stages.append(work.stage)
        left.append(engine.remaining([work]))

    told.changed = changed
    started[0].pipe.timestamps = lambda *_: time.sleep(0.2)
    for seed in range(2):  # of which the first compiles
        songs = works(engine, seed)
        songs[0].lrc = True
        engine.submit(songs)
        wait_until(lambda: len(told.reports) == seed + 1)  # noqa: B023  (called at once)
    assert stages[-1] == "aligning" and left[-1] == 0.0
    (seconds,) = engine.dispatchers[0].timings._seconds.values()
    assert seconds + 0.2 <= told.reports[1].seconds


def test_songs_of_a_lost_replica_are_made_once_more(made):
    engine, told, started = made(count=2, steps=400)
    engine.start(told)
    wait_until(lambda: engine.ready and engine._idle == 2)
    songs = works(engine, *range(4))
    engine.submit(songs)
    wait_until(lambda: all(work.step > 2 for work in songs))
    victim = next(near for near in started if near.replica._running[0].request.seed == 0)
    for near in started:
        near.pipe.steps = 20  # of batches to come
    victim.dead = True
    wait_until(lambda: songs[0].losses)
    wait_until(lambda: len(told.songs) == 4)
    assert [work.losses for work in songs] == [1, 1, 0, 0] and not told.errors and told.death is None
    assert victim.closed and len(started) == 3 and engine.ready
    for seed, work in enumerate(songs):
        assert np.array_equal(told.songs[work].audio, sound(seed, 480_000))


def test_songs_that_end_their_process_twice_fail(made):
    engine, told, started = made(count=1)

    def new(index):
        near = Near(FakePipeline())

        def failing(seeds):
            near.dead = 3 in seeds
            near.ended.wait(0.05)

        near.pipe.failing = failing
        return near

    engine, told, started = made(count=1, new=new)
    engine.start(told)
    bad, good = works(engine, 3), works(engine, 4, seconds=21)
    engine.submit(bad + good)
    wait_until(lambda: told.songs)
    assert told.errors == {bad[0]: LOST_TWICE} and list(told.songs) == good
    assert len(started) == 3


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("fatal", [0, 2])
def test_songs_of_a_batch_in_parts_wait_again_when_its_replica_is_given_up(made, memory, fatal):
    """Those that are made are not made again, and only those of the part that was lost count a loss."""

    def new(index):
        near = Near(FakePipeline())
        near.dead = index > 0

        def failing(seeds):
            if len(set(seeds)) == 4:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED") if memory else InputError("one is bad")
            if fatal in seeds:
                near.dead = True
                near.ended.wait(0.05)

        near.pipe.failing = failing
        return near

    engine, told, started = made(count=1, new=new)
    songs = works(engine, *range(4))
    engine.submit(songs)
    engine.start(told)
    wait_until(lambda: told.death is not None)
    size = 2 if memory else 1
    assert list(told.songs) == songs[:fatal] and not told.errors
    assert [work.losses for work in songs] == [int(fatal <= seed < fatal + size) for seed in range(4)]
    assert sorted(work.request.seed for work in engine._queue) == list(range(fatal, 4))
    assert all(work.stage == "queued" and work.step == 0 for work in songs[fatal:])
    assert len(started) == 1 + replicas.STARTS


def test_what_a_lane_knows_is_read_with_its_lock(made):
    engine, told, started = made(count=1)
    known = engine.dispatchers[0].timings

    class Locked(Newest):
        """Memory that may only be read as a whole while nobody adds to it."""

        def __iter__(self):
            assert known._lock.locked()
            return super().__iter__()

        def keys(self):
            assert known._lock.locked()
            return super().keys()

        def items(self):
            assert known._lock.locked()
            return super().items()

        def clear(self):
            assert known._lock.locked()
            super().clear()

    known.compiled, known.limits = Locked(), Locked()
    songs = works(engine, 0, 1)
    known.ran(Program(songs[0].kind, songs[0].shape, 1), 1.0, 8, 0.8)
    known.does_not_fit(Program(songs[0].kind, songs[0].shape, 2), 1)
    engine.submit(songs)
    assert engine.remaining(songs) is not None
    known.ends(songs, 1)
    engine.start(told)
    wait_until(lambda: len(told.songs) == 2)
    assert told.death is None


def test_plans_are_written_by_replicas_and_songs_made_of_them(made):
    engine, told, started = made(count=2)
    songs, descriptions = plans(engine, 0, 1), plans(engine, 2, is_song=False)
    engine.submit(songs + descriptions)
    engine.start(told)
    wait_until(lambda: len(told.songs) == 2 and len(told.plans) == 3)
    asked = [seeds for near in started for _, _, seeds in near.pipe.planner.asked]
    assert sorted(seed for seeds in asked for seed in set(seeds)) == [0, 1, 2]
    assert all(work.request.bpm == 70 and work.request.audio_codes for work in songs)
    assert set(told.songs) == set(songs)


def test_a_plan_that_fails_in_a_replica_is_left_out_or_fails(made):
    def new(index):
        near = Near(FakePipeline())

        def failing():
            raise InputError("lyrics: too long")

        near.pipe.planner.failing = failing
        return near

    engine, told, _ = made(count=1, new=new)
    (left_out,), (required,) = plans(engine, 0), plans(engine, 1, required=True)
    engine.submit([left_out, required])
    engine.start(told)
    wait_until(lambda: told.songs and told.errors)
    assert told.notes == {left_out: "thinking: made without the planner (lyrics: too long)"}
    assert told.errors == {required: "lyrics: too long"} and list(told.songs) == [left_out]


def test_cancelled_songs_stop_their_replica(made):
    engine, told, started = made(count=1, delay=0.01)
    engine.start(told)
    running, waiting = works(engine, 0, num_inference_steps=200), works(engine, 1, seconds=21, num_inference_steps=200)
    engine.submit(running + waiting)
    wait_until(lambda: running[0].step > 1)
    engine.cancel(waiting)
    assert told.cancelled == waiting
    engine.cancel(running)
    wait_until(lambda: set(told.cancelled) == {*running, *waiting})
    assert not told.songs and not batches(started)


def test_errors_of_a_replica_are_those_of_its_songs(made):
    def failing(seeds):
        if len(seeds) > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        if seeds == [1]:
            raise InputError("song 1: not finite")
        if seeds == [2]:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        if seeds == [3]:
            raise ZeroDivisionError

    def new(index):
        near = Near(FakePipeline())
        near.pipe.failing = failing
        return near

    engine, told, _ = made(count=1, new=new)
    songs = works(engine, 0, 1, 2, 3)
    engine.submit(songs)
    engine.start(told)
    wait_until(lambda: len(told.songs) + len(told.errors) == 4)
    assert list(told.songs) == songs[:1]
    assert told.errors[songs[1]] == "song 1: not finite" and told.errors[songs[2]] == OUT_OF_MEMORY
    assert told.errors[songs[3]].startswith("internal error")


def test_a_model_that_a_replica_cannot_load_is_no_error_of_the_request(made):
    def new(index):
        near = Near(FakePipeline())

        def load():
            raise OSError("no such folder")

        near.replica.models["small"].load = load
        return near

    engine, told, _ = made(count=1, new=new)
    songs = works(engine, 0)
    engine.submit(songs)
    engine.start(told)
    wait_until(lambda: told.errors)
    assert told.errors[songs[0]].startswith("model: small cannot be loaded") and not songs[0].is_refused


def test_songs_behind_their_plans_count_among_what_remains(made):
    """Two plans of one dispatcher, and then their songs; as in `test_engine`."""
    engine, _, _ = made(count=2)
    planned = plans(engine, 1, 2)
    (song,) = works(engine, 3)
    engine.dispatchers[0]._error = EngineLost("gone")  # the other dispatcher makes all of them
    engine.submit(planned)
    known = engine.dispatchers[1].timings
    program = Program(planned[0].kind, planned[0].shape, 2)
    known.ran(program, 9.0, 0, 0.0)
    known.ran(program, 2.0, 0, 0.0)  # the first run compiles
    engine._version += 1
    assert engine.remaining(planned) is None
    known.ran(Program(song.kind, song.shape, 1), 9.0, song.steps - 1, 3.0 * (song.steps - 1))
    engine._version += 1
    assert engine.remaining(planned) == pytest.approx(2.0 + 2 * 3.0 * song.steps)


def test_a_replica_that_does_not_start_is_given_up_and_the_last_one_ends_the_engine(made):
    def new(index):
        near = Near(FakePipeline())
        near.dead = index != 0
        return near

    engine, told, started = made(count=2, new=new)
    assert not engine.ready
    engine.start(told)
    wait_until(lambda: len(started) == 1 + replicas.STARTS and engine.ready)
    assert told.death is None
    engine.submit(works(engine, 0))
    wait_until(lambda: told.songs)
    started[0].dead = True
    engine.submit(works(engine, 1))
    wait_until(lambda: told.death is not None)
    assert isinstance(told.death, EngineLost) and not engine.ready


def test_warm_compiles_in_every_replica(made):
    engine, told, started = made(count=2, warm=[10.0])
    engine.start(told)
    wait_until(lambda: engine.ready)
    assert [[len(seeds) for seeds, *_ in near.pipe.batches] for near in started] == [[1, 4], [1, 4]]
    assert not told.songs


def test_stop_leaves_what_waits_and_ends_the_replicas(made):
    engine, told, started = made(count=2, delay=0.01)
    engine.start(told)
    wait_until(lambda: engine._idle == 2)
    songs = works(engine, 0, 1, 2, num_inference_steps=200)
    engine.submit(songs)
    wait_until(lambda: songs[0].step and songs[2].step)
    engine.stop(0)
    assert not told.songs and not told.errors and told.death is None and not engine.ready
    assert all(near.closed for near in started)


def test_stop_ends_those_that_have_not_started(made):
    def new(index):
        near = Near(FakePipeline())
        near.late = True
        return near

    engine, told, started = made(count=1, new=new)
    engine.start(told)
    wait_until(lambda: started)
    engine.stop(0)
    assert started[0].closed and told.death is None


def test_a_batch_survives_its_way(tmp_path):
    source = tmp_path / "upload"
    source.write_bytes(b"sound")
    request = Request("piano", task_type="repaint", src_audio=str(source), repainting_start=(1.0, 3.5), bpm=90, seed=7)
    sampling = Sampling(timesteps=(1.0, 0.3), guidance_scale=3.1)
    planner_task = PlannerTask(planning=Planning(lm_seed=5, lm_temperature=0.3), codes=False)
    work = Work(request, sampling, "small", (("jazz", 0.1), ("rock", 1.0)), planner_task=planner_task, lrc=True)
    about, files = encode_batch([work, work], Program("kind", Shape(1, 2, 3), 4))
    import json

    found, program, names = decode_batch(BatchMessage(json.loads(json.dumps(about)), files), tmp_path)
    assert program.size == 4 and len(found) == 2
    for i, other in enumerate(found):
        path = str(tmp_path / f"{i}-src_audio")
        assert names[path] == str(source) and (tmp_path / f"{i}-src_audio").read_bytes() == b"sound"
        assert other.request == Request(**{**vars(request), "src_audio": path})
        assert (other.sampling, other.adapters, other.model) == (sampling, work.adapters, "small")
        assert other.planner_task == planner_task and other.lrc


def test_how_a_batch_ends_is_told_and_raised_again():
    song = Song(None, np.zeros((1, 1), np.float32), 48_000, 1)
    assert outcome_of(lambda: [song], {}).result() == [song]

    def raising(error):
        def make():
            raise error

        return outcome_of(make, {"/tmp/0-src_audio": "/data/src_audio"})

    with pytest.raises(Cancelled):
        raising(Cancelled()).result()
    with pytest.raises(InputError, match="^/data/src_audio: too short$"):
        raising(InputError("/tmp/0-src_audio: too short")).result()
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        raising(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 5 GB")).result()
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        raising(ZeroDivisionError()).result()
    with pytest.raises(ServerError, match="^model: cannot be loaded$"):  # whose request is right
        raising(ServerError("model: cannot be loaded")).result()
    assert Outcome("done").result() == []
