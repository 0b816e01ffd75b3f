"""Timestamps of lyrics: the path against a plain double loop, planted times, the transformer's heads against torch."""

import numpy as np
import pytest

from acestep_jax.errors import InputError
from acestep_jax.planner import timestamps
from acestep_jax.planner.timestamps import TimedText, Timestamps, lines_of, lyric_score, tag_mask, token_times, warp
from tests.parity import normal

pytestmark = pytest.mark.unit


def plain_warp(cost):
    """The definition, cell by cell."""
    count, length = cost.shape
    total = np.full((count + 1, length + 1), np.inf, np.float32)
    total[0, 0] = 0
    came = {}
    for i in range(1, count + 1):
        for j in range(1, length + 1):
            both, row, column = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
            if both < row and both < column:
                best, came[i, j] = both, (i - 1, j - 1)
            elif row < both and row < column:
                best, came[i, j] = row, (i - 1, j)
            else:
                best, came[i, j] = column, (i, j - 1)
            total[i, j] = np.float32(cost[i - 1, j - 1]) + best
    path, at = [], (count, length)
    while at != (0, 0):
        path.append((at[0] - 1, at[1] - 1))
        at = came[at]
    return np.array(path[::-1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (5, 23), (23, 5), (17, 40)])
@pytest.mark.parametrize("levels", [2, 3, None])
def test_path_is_that_of_the_definition(shape, levels):
    """Few levels make ties, which have a rule of their own."""
    cost = normal(*shape) if levels is None else np.random.default_rng(1).integers(0, levels, shape).astype(np.float32)
    path = warp(cost)
    np.testing.assert_array_equal(path, plain_warp(cost))
    steps = np.diff(path, axis=0)
    assert ((steps == 0) | (steps == 1)).all() and (steps.sum(1) > 0).all()
    assert path[0].tolist() == [0, 0] and path[-1].tolist() == [shape[0] - 1, shape[1] - 1]


def diagonal(count=12, frames=120, heads=3):
    """Attention of which token i is read in frames 10 i to 10 i + 9, in noise."""
    maps = np.full((heads, count, frames), 0.01, np.float32)
    maps += 0.002 * np.abs(normal(heads, count, frames))
    for i in range(count):
        maps[:, i, 10 * i : 10 * i + 10] += 0.8
    return maps


def test_planted_times_are_found():
    times = token_times(diagonal(), seconds=12.0)
    np.testing.assert_allclose(times[:, 0], np.arange(12), atol=0.1001)
    np.testing.assert_allclose(times[:, 1], np.arange(12) + 0.9, atol=0.1001)


def test_score_tells_what_is_sung_in_order():
    maps, sung = diagonal().mean(0), np.ones(12, bool)
    good = lyric_score(maps, sung)
    assert 0.8 < good <= 1
    assert lyric_score(maps[::-1], sung) < 0.2
    assert lyric_score(np.full((12, 120), 0.3), sung) == 0.0
    silent = maps.copy()
    silent[6:] = 0.0
    assert lyric_score(silent, sung) < good / 3
    # Tags need not be sung.
    tagged = maps.copy()
    tagged[0] = 0.0
    assert lyric_score(tagged, np.arange(12) > 0) > lyric_score(tagged, sung)


def test_score_is_the_formula():
    energy = np.abs(normal(6, 30)).astype(np.float64)
    sung = np.array([False, True, True, False, True, True])
    e = (energy - energy.min()) / (energy.max() - energy.min())
    rows = e[sung]
    coverage = np.mean([row.max() > 0.1 for row in rows])
    centres = [np.sum(np.arange(30)[row > 0.01] * row[row > 0.01]) / row[row > 0.01].sum() for row in rows]
    order = np.mean([b >= a - 9 for a, b in zip(centres, centres[1:], strict=False)])
    confidence = np.mean([e[i, j] for i, j in plain_warp(-(e**2))])
    assert lyric_score(energy, sung) == round(coverage**2 * order**2 * confidence, 4)


def test_lines():
    texts = ["[", "Verse", "]\n", "We", " sing", ".\n", "\n", " Oh"]
    times = np.stack([np.arange(8) * 10.12345, np.arange(8) * 10.12345 + 5], 1)
    found = lines_of(texts, times)
    assert found == [
        TimedText(0.0, 25.247, "[Verse]"),
        TimedText(30.37, 55.617, "We sing."),
        TimedText(70.864, 75.864, "Oh"),
    ]
    assert tag_mask(texts).tolist() == [True, True, True, False, False, False, False, False]
    assert Timestamps(tuple(found), 0.5, 0.5).lrc() == "[00:00.00][Verse]\n[00:30.37]We sing.\n[01:10.86]Oh\n"


def test_lrc_file(tmp_path):
    file = tmp_path / "song.lrc"
    made = Timestamps((TimedText(61.5, 62.0, "Ô mer"),), 0.5, 0.5)
    assert timestamps.write_lrc(file, made) == file
    assert file.read_text(encoding="utf-8") == "[01:01.50]Ô mer\n"
    with pytest.raises(InputError, match="song.lrc"):
        timestamps.write_lrc(file, made)
    timestamps.write_lrc(file, made, overwrite=True)


def test_lyrics_of_tags_alone_are_none():
    assert timestamps.has_lyrics("[Verse]\nWe sing")
    assert (
        not timestamps.has_lyrics("[Instrumental]")
        and not timestamps.has_lyrics("\n")
        and not timestamps.has_lyrics(None)
    )
