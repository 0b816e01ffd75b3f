"""Which examples a run sees: crops, tasks, silence, splits, epochs, processes."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from acestep_jax import InputError, make_mesh
from acestep_jax.train import dataset
from acestep_jax.train import step as steps
from acestep_jax.train.config import TASKS
from acestep_jax.train.data_folder import read_records, text_key
from acestep_jax.train.dataset import Examples, split, training_batches, validation_batches
from tests.parity import normal
from tests.training import CHANNELS, RATE, settings, write_songs

TEXT2MUSIC, REPAINT = (TASKS.index(name) for name in ("text2music", "repaint"))
SILENCE = normal(250, CHANNELS, seed=9)
SECONDS = (12, 9, 15, 7, 11)


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "songs"
    index = write_songs(folder, tiny[1], SECONDS)
    records = list(read_records(folder / "songs-00000.array_record", range(len(SECONDS))))
    return folder, index, records


def make(data, songs=None, **changes):
    folder, index, _ = data
    config = settings("data", "checkpoint", "out", **{f"examples__{k}": v for k, v in changes.items()}).examples
    return Examples(folder, index, songs or index.songs, config, SILENCE)


def first(examples, count, seed=0, accumulation=2, rows=(0, 1)):
    return list(itertools.islice(training_batches(examples, seed, accumulation, list(rows)), count))


def test_batches_have_one_shape_and_consecutive_numbers(data):
    batches = first(make(data), 4)
    for i, batch in enumerate(batches):
        assert batch.mean.shape == batch.std.shape == (2, 2, 200, CHANNELS)
        assert batch.text.shape[2] == 32 and batch.lyric_ids.shape == (2, 2, 32)
        assert batch.numbers.ravel().tolist() == list(range(4 * i, 4 * i + 4))
        assert [leaf.dtype.name for leaf in batch[:3]] == ["float32", "float32", "int32"]


def test_crops_are_parts_of_songs_and_the_rest_is_silence(data):
    """Also that the text is that of the task and of the crop's duration, not of the whole song's."""
    _, index, records = data
    seen_tasks, seen_begins = set(), {}
    for batch in first(make(data), 40, accumulation=1):
        for row in range(2):
            example = jax.tree.map(lambda x: x[0, row], batch)  # noqa: B023
            n = int(example.lengths)
            (song,) = [i for i, r in enumerate(records) if len(r["lyric_ids"]) == example.lyric_lengths]
            assert n == min(200, index.songs[song].frames)
            begins = [
                b
                for b in range(index.songs[song].frames - n + 1)
                if np.array_equal(records[song]["mean"][b : b + n], example.mean[:n])
            ]
            assert len(begins) == 1
            np.testing.assert_array_equal(records[song]["std"][begins[0] : begins[0] + n], example.std[:n])
            np.testing.assert_array_equal(example.mean[n:], SILENCE[n:200])
            assert not example.std[n:].any()
            seen_begins.setdefault(song, set()).add(begins[0])
            seen_tasks.add(task := int(example.tasks))
            text = records[song][text_key(TASKS[task], min(8, SECONDS[song]))]
            np.testing.assert_array_equal(example.text[: example.text_lengths], text)
            begin, end = example.windows
            assert 0 <= begin < end <= n and (task == REPAINT or (begin, end) == (0, n))
    assert seen_tasks == {0, 1, 2}
    assert len(seen_begins[2]) > 5 and seen_begins[3] == {0}


def test_a_batch_has_one_length_and_all_lengths_occur(data):
    batches = first(make(data, crop_seconds=()), 30)
    frames = [batch.mean.shape[2] for batch in batches]
    assert set(frames) == {200, 250} and 8 < frames.count(200) < 22


def test_tasks_follow_their_weights(data):
    tasks = np.concatenate([batch.tasks.ravel() for batch in first(make(data, text2music=1.0, cover=3.0), 250)])
    share = np.bincount(tasks, minlength=3) / tasks.size  # weights 1, 0.2, 3
    assert np.abs(share - np.array([1, 0.2, 3]) / 4.2).max() < 0.06  # four standard deviations
    only = np.concatenate([batch.tasks.ravel() for batch in first(make(data, repaint=0.0, cover=0.0), 20)])
    assert (only == TEXT2MUSIC).all()


def test_every_epoch_has_every_song_as_often_as_it_repeats(data):
    folder, index, _ = data
    songs = [dataclasses.replace(song, repeat=1 + (i == 1)) for i, song in enumerate(index.songs)]
    batches = first(make(data, songs, crop_seconds=(8.0,)), 12, accumulation=1)
    lengths = np.concatenate([batch.lyric_lengths.ravel() for batch in batches])
    epochs = lengths[:24].reshape(4, 6)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted([20, 23, 23, 26, 29, 32])
    assert len({tuple(epoch) for epoch in epochs}) > 1


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_seed_decides_and_nothing_else(data):
    examples = make(data)
    one, again, other = first(examples, 3), first(make(data, workers=0), 3), first(examples, 3, seed=1)
    assert all(same(a, b) for a, b in zip(one, again, strict=True))
    assert not same(one[0], other[0])


def test_processes_read_their_rows_of_the_same_batches(data):
    examples = make(data, batch_size=4)
    whole = first(examples, 2, rows=range(4))
    for rows in ([0, 1], [2, 3], [1, 3]):
        for batch, part in zip(whole, first(examples, 2, rows=rows), strict=True):
            assert same(jax.tree.map(lambda x: x[:, rows], batch), part)  # noqa: B023


def test_a_resumed_stream_is_the_rest_of_the_stream(data):
    examples = make(data)
    expected = first(examples, 5)[3:]
    resumed = iter(training_batches(make(data), 0, 2, [0, 1], 3))
    assert all(same(batch, next(resumed)) for batch in expected)


def test_the_split_goes_by_the_audio(data):
    """Copies of a song stay on one side, and the sides do not depend on the other songs' order."""
    _, index, _ = data
    copies = tuple(dataclasses.replace(song, source=f"copy-{song.source}") for song in index.songs)
    index = dataclasses.replace(index, songs=(*copies, *reversed(index.songs)))
    training, held_out = split(index, 0.25)
    assert len(training) == 6 and len(held_out) == 4  # two of five songs, a quarter rounded up
    assert not {song.sha256 for song in training} & {song.sha256 for song in held_out}
    assert split(index, 0.0) == (list(index.songs), [])
    with pytest.raises(InputError, match="validation_fraction: 0.9 holds out all of 5 song"):
        split(index, 0.9)


def test_validation_shows_each_held_out_song_once_and_the_same(data):
    examples = make(data, crop_seconds=())
    batches = list(validation_batches(examples))
    assert [batch.lengths.tolist() for batch in batches] == [[250, 225], [250, 175], [250, 0]]
    assert all(same(a, b) for a, b in zip(batches, validation_batches(examples), strict=True))
    _, _, records = data
    np.testing.assert_array_equal(batches[0].mean[0], records[0]["mean"][25:275])  # the middle
    assert {int(task) for batch in batches for task in batch.tasks} == {TEXT2MUSIC}


def test_crops_that_were_not_prepared(data):
    with pytest.raises(InputError, match=r"crop_seconds: .* was prepared for \[8.0, 10.0\], found \[9.0\]; preproc"):
        make(data, crop_seconds=(8.0, 9.0))


@pytest.mark.parametrize("axes", [dict(data=2, fsdp=2, tensor=2), dict(tensor=8), dict(fsdp=8)])
def test_rows_are_placed_where_they_belong(data, axes):
    batch = first(make(data, batch_size=8), 1, rows=range(8))[0]
    mesh = make_mesh(**axes)
    placed = steps.place(batch, mesh, 1, steps.rows_of_process(mesh, 8), 8)
    assert same(placed, batch)
    rows = 8 // (axes.get("data", 1) * axes.get("fsdp", 1))
    assert placed.mean.sharding.shard_shape(placed.mean.shape)[1] == rows


def test_rate_of_the_data(data):
    assert make(data).rate == RATE and dataset.Records(data[0], data[1].songs)[2][0].frames == 375
