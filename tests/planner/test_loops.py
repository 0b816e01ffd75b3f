"""Audio codes that repeat themselves are found, and others are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acestep_jax.planner.loops import PERIODS, Loop, count_repeats, find_loop, is_loop

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


def test_loops_are_found_on_the_device_as_they_arise():
    """At the first code with which `find_loop` finds one."""
    songs = [codes(), planted(100, 50, 1), planted(100, 100, 5), planted(30, 51, 1), planted(0, 300, 3)]
    songs += [planted(400, 500, 8), planted(5, 101, 2), np.zeros(1200, np.int32)]
    tokens = jnp.asarray(np.stack(songs))

    def step(repeats, i):
        repeats = count_repeats(repeats, tokens, tokens[:, i], i)
        return repeats, is_loop(repeats)

    _, found = jax.lax.scan(step, jnp.zeros((len(songs), PERIODS), jnp.int32), jnp.arange(tokens.shape[1]))
    for song, flags in zip(songs, np.asarray(found).T, strict=True):
        if find_loop(song) is None:
            assert not flags.any()
        else:
            first = int(np.argmax(flags))
            assert flags[first] and find_loop(song[: first + 1]) is not None and find_loop(song[:first]) is None
