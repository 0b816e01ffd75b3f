"""The engine's thread, with a pipeline that computes nothing."""

import threading

import jax
import numpy as np
import pytest

from acestep_jax import Request, Sampling
from acestep_jax.errors import InputError
from acestep_jax.request import Planning
from acestep_jax.serve.batcher import Program
from acestep_jax.serve.engine import Work
from acestep_jax.serve.local import OUT_OF_MEMORY, LocalEngine
from acestep_jax.serve.planner_task import PlannerTask
from tests.serve.fake import FakePipeline, RecordingListener, model, sound, wait_until, works

pytestmark = pytest.mark.unit


@pytest.fixture
def made():
    """Return a function that starts an engine; all of them are stopped."""
    engines = []

    def make(pipe, **options):
        told = RecordingListener()
        engine = LocalEngine([model(pipe)], **options)
        engines.append(engine)
        return engine, told

    yield make
    for engine in engines:
        engine.stop(0)


def test_songs_of_a_queue_are_batched_and_each_gets_its_own(made):
    pipe = FakePipeline()
    engine, told = made(pipe)
    songs = works(engine, *range(5))
    engine.submit(songs)
    engine.start(told)
    wait_until(lambda: len(told.reports) == 2)
    assert [seeds for seeds, *_ in pipe.batches] == [[0, 1, 2, 3], [4]]
    for seed, work in enumerate(songs):
        assert np.array_equal(told.songs[work].audio, sound(seed, 480_000))
    assert [report.first for report in told.reports] == [True, True]


def test_a_batch_is_filled_up_where_its_program_is_compiled(made):
    pipe = FakePipeline()
    engine, told = made(pipe)
    engine.start(told)
    engine.submit(works(engine, 0, 1, 2, 3))
    wait_until(lambda: told.reports)
    engine.submit(works(engine, 4, 5, 6))
    wait_until(lambda: len(told.reports) == 2)
    assert pipe.batches[1][0] == [4, 5, 6, 6] and len(told.songs) == 7
    assert not told.reports[1].first


def test_songs_of_other_sampling_or_adapters_are_not_mixed(made):
    pipe = FakePipeline()
    engine, told = made(pipe, adapters={"jazz": "/nowhere", "folk": "/nowhere"})
    both = (("folk", 0.5), ("jazz", 1.0))
    songs = [
        *works(engine, 0),
        *works(engine, 1, num_inference_steps=3),
        *works(engine, 2, adapters=(("jazz", 0.8),)),
        *works(engine, 3, adapters=both),
        *works(engine, 4),
    ]
    engine.submit(songs)
    engine.start(told)
    wait_until(lambda: len(told.songs) == 5)
    assert [(seeds, adapters) for seeds, _, adapters in pipe.batches] == [
        ([0, 4], {}),
        ([1], {}),
        ([2], {"jazz": 0.8}),
        ([3], {"folk": 0.5, "jazz": 1.0}),
    ]


def test_what_cannot_be_made_is_refused_before_it_waits(made):
    engine, _ = made(FakePipeline())
    with pytest.raises(InputError, match="src_audio: the task cover needs a source"):
        engine.check(Work(Request("piano", task_type="cover"), Sampling(), "small"))
    with pytest.raises(InputError, match="cover_noise_strength: the task text2music does not take it"):
        engine.check(Work(Request("piano"), Sampling(cover_noise_strength=0.5), "small"))
    with pytest.raises(InputError, match="unknown adapter 'jazz'"):
        engine.check(Work(Request("piano"), Sampling(), "small", (("jazz", 1.0),)))


def test_cancelled_songs_leave_the_queue_and_stop_a_batch_that_nobody_wants(made):
    pipe = FakePipeline(delay=0.02, steps=50)
    engine, told = made(pipe)
    first, second, third = [
        works(engine, seed, num_inference_steps=200, seconds=s) for seed, s in enumerate((10, 21, 41))
    ]
    engine.start(told)
    engine.submit(first + second + third)
    wait_until(lambda: first[0].step > 2)
    assert engine.ahead(third) == 1 and engine.ahead(second) == 0
    engine.cancel(second)
    engine.cancel(first)
    wait_until(lambda: set(told.cancelled) == {*first, *second})
    wait_until(lambda: third[0].step > 0)
    assert pipe.batches == [] and not told.songs
    engine.cancel(third)
    wait_until(lambda: third[0] in told.cancelled)


def test_a_batch_goes_on_for_those_who_still_want_it(made):
    pipe = FakePipeline(delay=0.01, steps=20)
    engine, told = made(pipe)
    songs = works(engine, 0, 1)
    engine.submit(songs)
    engine.start(told)
    wait_until(lambda: songs[0].step > 1)
    engine.cancel(songs[:1])
    wait_until(lambda: told.songs)
    assert list(told.songs) == songs[1:] and told.cancelled == songs[:1]


def test_out_of_memory_halves_the_batch_and_is_remembered(made):
    pipe = FakePipeline()
    tried = []

    def failing(seeds):
        tried.append(len(seeds))
        if len(seeds) > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    pipe.failing = failing
    engine, told = made(pipe)
    engine.submit(works(engine, 0, 1, 2, 3))
    engine.start(told)
    wait_until(lambda: len(told.songs) == 4)
    assert tried == [4, 2, 1, 1, 2, 1, 1]
    engine.submit(works(engine, 4, 5))
    wait_until(lambda: len(told.songs) == 6)
    assert tried[7:] == [1, 1] and not told.errors


def test_out_of_memory_with_one_song_fails_it_with_advice(made):
    pipe = FakePipeline()

    def failing(seeds):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    pipe.failing = failing
    engine, told = made(pipe)
    songs = works(engine, 0)
    engine.submit(songs)
    engine.start(told)
    wait_until(lambda: told.errors)
    assert told.errors == {songs[0]: OUT_OF_MEMORY} and told.death is None


def test_one_bad_song_does_not_stop_the_others(made):
    pipe = FakePipeline()

    def failing(seeds):
        if 2 in seeds:
            raise InputError("song 2: not\nfinite") if len(seeds) == 1 else ZeroDivisionError

    pipe.failing = failing
    engine, told = made(pipe)
    songs = works(engine, 0, 1, 2, 3)
    engine.submit(songs)
    engine.start(told)
    wait_until(lambda: len(told.songs) == 3 and told.errors)
    assert told.errors == {songs[2]: "song 2: not finite"}


def test_a_bug_is_told_without_its_traceback(made):
    pipe = FakePipeline()
    pipe.failing = lambda seeds: 1 / 0
    engine, told = made(pipe)
    engine.submit(works(engine, 0))
    engine.start(told)
    wait_until(lambda: told.errors)
    assert list(told.errors.values()) == ["internal error (ZeroDivisionError); the server's log has the details"]


def test_remaining_time_is_unknown_until_it_was_measured_and_then_near(made):
    pipe = FakePipeline(delay=0.01)
    engine, told = made(pipe)
    engine.start(told)
    for seed in range(2):  # the first run of a program tells nothing: it compiles
        songs = works(engine, seed)
        assert engine.remaining(songs) is not None or seed == 0
        engine.submit(songs)
        wait_until(lambda: len(told.songs) == len(pipe.batches) == 1 + seed)  # noqa: B023  (called at once)
    waiting = works(engine, 5) + works(engine, 6, seconds=21)
    engine.submit(waiting)
    wait_until(lambda: waiting[0].step > 4)
    first, all_of_them = engine.remaining(waiting[:1]), engine.remaining(waiting)
    assert 0.1 < first < 0.6 and 0.7 < all_of_them - first < 2  # three times as long as the 0.5 s of 10 s of sound


def test_songs_behind_their_plans_count_among_what_remains(made):
    """By the seconds of a step, so they are unknown until any song was made."""
    pipe = FakePipeline()
    engine, _ = made(pipe)
    planned = works(engine, 1, 2)
    for work in planned:
        work.planner_task = PlannerTask(planning=Planning(lm_seed=work.request.seed))
        engine.check(work)
    engine.submit(planned)
    plans = Program(planned[0].kind, planned[0].shape, 2)
    engine.timings.ran(plans, 9.0, 0, 0.0)
    engine.timings.ran(plans, 2.0, 0, 0.0)  # the first run compiles
    assert engine.remaining(planned) is None
    (song,) = works(engine, 3)
    engine.timings.ran(Program(song.kind, song.shape, 1), 9.0, song.steps - 1, 3.0 * (song.steps - 1))
    assert engine.remaining(planned) == pytest.approx(2.0 + 2 * 3.0 * song.steps)
    planned[1].is_song = False  # only its plan is wanted
    assert engine.remaining(planned) == pytest.approx(2.0 + 3.0 * song.steps)


def test_warm_compiles_before_ready(made):
    pipe = FakePipeline(delay=0.005)
    engine, told = made(pipe, warm=[10.0], max_batch=4)
    assert not engine.ready
    engine.start(told)
    wait_until(lambda: engine.ready)
    assert [len(seeds) for seeds, *_ in pipe.batches] == [1, 4] and not told.songs
    assert {program.size for program in engine.timings.known()[0]} == {1, 4}


def test_stop_gives_the_batch_its_grace_and_leaves_the_rest(made):
    pipe = FakePipeline(delay=0.01, steps=20)
    engine, told = made(pipe, max_batch=1)
    songs = works(engine, 0, 1)
    engine.submit(songs)
    engine.start(told)
    wait_until(lambda: songs[0].step > 1)
    engine.stop(5)
    assert list(told.songs) == songs[:1] and not engine.ready and told.death is None
    engine, told = made(FakePipeline(delay=0.01, steps=500), max_batch=1)
    songs = works(engine, 0, num_inference_steps=200)
    engine.submit(songs)
    engine.start(told)
    wait_until(lambda: songs[0].step > 1)
    engine.stop(0)
    assert not told.songs and not told.cancelled and not told.errors


def test_the_end_of_the_thread_is_told(made):
    engine, told = made(FakePipeline())

    def reported(report):
        raise RuntimeError("a bug of the engine")

    told.reported = reported
    engine.submit(works(engine, 0))
    engine.start(told)
    wait_until(lambda: told.death is not None)
    assert not engine.ready and not any(t.name == "engine" and t.is_alive() for t in threading.enumerate())
