"""Which songs are made together next."""

import pytest

from acestep_jax.serve.batcher import Program, Shape, batches, next_batch
from tests.serve.fake import Waiting

pytestmark = pytest.mark.unit

SHORT, LONG, HUGE = Shape(256, 64, 256), Shape(512, 64, 256), Shape(2048, 64, 256)


def queue(*places):
    return [Waiting(str(i), group, shape) for i, (group, shape) in enumerate(places)]


def names(songs):
    return "".join(song.name for song in songs)


def test_the_group_of_the_oldest_goes_first_in_order_of_arrival():
    songs = queue(("a", SHORT), ("b", SHORT), ("a", SHORT), ("b", SHORT))
    found = [(names(part), program.size) for part, program in batches(songs, (), 4)]
    assert found == [("02", 2), ("13", 2)]


@pytest.mark.parametrize(
    ("count", "compiled", "sizes"),
    [
        (1, (), [1]),
        (3, (), [2, 1]),
        (3, (4,), [4]),
        (3, (1, 2), [2, 1]),
        (7, (), [4, 4]),  # four is compiled by then
        (2, (4,), [2]),  # half of four would be copies
        (9, (4,), [4, 4, 1]),
    ],
)
def test_sizes_are_powers_of_two_and_what_is_compiled_is_preferred(count, compiled, sizes):
    songs = queue(*[("a", SHORT)] * count)
    known = {Program("k", SHORT, size) for size in compiled}
    assert [program.size for _, program in batches(songs, known, 4)] == sizes


def test_shorter_songs_take_free_places_without_lengthening_the_batch():
    songs = queue(("a", LONG), ("a", SHORT), ("a", HUGE), ("a", LONG))
    (first, program), *rest = batches(songs, (), 4)
    assert names(first) == "03" and program == Program("k", LONG, 2)  # a third place would be a batch of four
    songs = queue(("a", LONG), ("a", SHORT), ("a", HUGE), ("a", LONG), ("a", SHORT))
    (first, program), *rest = batches(songs, (), 4)
    assert names(first) == "0314" and program == Program("k", LONG, 4)
    assert [names(part) for part, _ in rest] == ["2"]
    alone = queue(("a", HUGE), ("a", SHORT))  # an eighth of its length: seven eighths would be wasted
    assert [names(part) for part, _ in batches(alone, (), 4)] == ["0", "1"]


def test_what_memory_allows():
    songs = queue(*[("a", LONG)] * 4)
    chosen, program = next_batch(songs, (), 4, {("k", LONG): 2})
    assert names(chosen) == "01" and program.size == 2
    chosen, program = next_batch(songs, (), 3)
    assert program.size == 2
