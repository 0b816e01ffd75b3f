"""What an engine learns of its programs."""

import dataclasses

import pytest

from acestep_jax.serve.batcher import Program, Shape
from acestep_jax.serve.timings import MAX_ENTRIES, Timings

pytestmark = pytest.mark.unit


@dataclasses.dataclass
class Waiting:
    kind: str = "k"
    group: str = "g"
    shape: Shape = Shape(100, 1, 1)
    steps: int = 10


def program(kind="k", frames=100, size=1):
    return Program(kind, Shape(frames, 1, 1), size)


def test_the_first_run_of_a_program_is_no_measure_but_its_steps_are():
    known = Timings(4)
    assert known.estimate(program(), 10) is None
    known.ran(program(), 60.0, steps=0, stepping=0.0)
    assert known.estimate(program(), 10) is None and program() in known.compiled
    known.ran(program("other"), 60.0, steps=8, stepping=0.8)  # 0.1 s for a step of 100 frames
    assert known.estimate(program(), 10) == pytest.approx(1.0)
    assert known.estimate(program("new", frames=300, size=2), 20) == pytest.approx(12.0)
    known.ran(program(), 3.0, steps=8, stepping=0.8)
    assert known.estimate(program(), 10) == 3.0
    assert known.estimate(program(size=4), 10) == 12.0  # by the same kind before any other


def test_an_odd_song_does_not_hide_how_long_the_queue_is():
    known = Timings(1)
    known.ran(program(), 60.0, steps=8, stepping=0.8)
    songs = [Waiting(), Waiting("odd", "odd", Shape(200, 1, 1)), Waiting()]
    ends = known.ends(songs, 1)
    assert [ends[id(song)] for song in songs] == pytest.approx([1.0, 3.0, 4.0])


def test_the_plan_of_a_queue_is_made_once_for_each_version(monkeypatch):
    known, songs, calls = Timings(2), [Waiting(), Waiting()], []
    import acestep_jax.serve.timings as module

    batches = module.batches
    monkeypatch.setattr(module, "batches", lambda *args: calls.append(1) or batches(*args))
    for _ in range(5):
        assert set(known.ends(songs, 1).values()) == {None}
    known.ends(songs[:1], 2)
    known.ran(program(), 1.0, 8, 0.8)
    assert known.ends(songs[:1], 2)[id(songs[0])] == pytest.approx(1.0)
    assert len(calls) == 3


def test_what_is_remembered_is_bounded():
    known = Timings(2)
    for i in range(3 * MAX_ENTRIES):
        known.ran(program(f"k{i}"), 1.0, 8, 0.8)
        known.does_not_fit(program(f"k{i}"), 1)
    assert len(known.compiled) == len(known.limits) == MAX_ENTRIES
    assert program(f"k{3 * MAX_ENTRIES - 1}") in known.compiled and program("k0") not in known.compiled
