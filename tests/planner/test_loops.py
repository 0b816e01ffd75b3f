"""Audio codes that repeat themselves are found, and others are not."""

import numpy as np
import pytest

from acestep_jax.planner.loops import Loop, find_loop

pytestmark = pytest.mark.unit


def codes(count=1200):
    return np.random.default_rng(0).integers(0, 64000, count).astype(np.int32)


def planted(start, length, period):
    song = codes()
    song[start : start + length] = np.tile(codes(period), length)[:length]
    return song


@pytest.mark.parametrize(
    "song",
    [codes(), codes(1), codes(0), codes(7), planted(100, 50, 1), planted(100, 100, 5), planted(100, 300, 9)],
)
def test_songs_without_a_loop(song):
    assert find_loop(song) is None


@pytest.mark.parametrize(
    "start, length, period", [(100, 51, 1), (0, 800, 1), (100, 101, 2), (700, 500, 8), (0, 1200, 3)]
)
def test_planted_loops(start, length, period):
    found = find_loop(planted(start, length, period))
    assert found is not None and found[:3] == (start, length, period)


def test_what_is_said():
    assert str(Loop(10, 736, 1, 12)) == "one code repeated for 147.2 s from 2 s on (12 distinct codes in the song)"
    assert str(Loop(0, 200, 4, 90)).startswith("4 codes repeated for 40 s")
