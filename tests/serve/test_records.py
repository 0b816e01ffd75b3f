"""What is kept of records: favourites, and what is removed to make room."""

import threading
import time

import pytest

from acestep_jax.serve import sounds
from acestep_jax.serve.submission import Limits
from tests.serve.fake import wait_until
from tests.serve.test_service import ended, submit

pytestmark = pytest.mark.unit


def disk_is_full(*args):
    raise OSError(28, "No space left on device")


def test_favourites_come_on_top_of_what_is_kept(service, caplog):
    """Else the newest songs would go, as soon as the next one ends, or at a restart."""
    made = service()
    starred = [submit(made, seed=seed) for seed in (0, 1)]
    for record in starred:
        ended(record)
        made.kept.set_favourite(record, 0, True)
    size = made.store.size(starred[0])
    made.limits = Limits(keep_bytes=int(1.5 * size), keep_records=1)  # less than the favourites take
    new = [submit(made, seed=seed) for seed in (2, 3)]
    assert [ended(record) for record in new] == ["done", "done"]
    wait_until(lambda: new[0].id not in made.records)
    assert list(made.records) == [starred[0].id, starred[1].id, new[1].id]
    assert caplog.text.count("2 records with favourites take") == 1
    made.close(0)
    made.store.close()
    again = service(limits=made.limits)
    assert again.records.keys() == {starred[0].id, starred[1].id, new[1].id}


def test_a_song_that_becomes_a_favourite_stays(service, monkeypatch):
    made = service()
    record = submit(made, seed=0)
    ended(record)
    made.limits = Limits(keep_records=0)
    begun, go = threading.Event(), threading.Event()
    keep = made.store.keep_favourite

    def slow(*args):
        begun.set()
        assert go.wait(10)
        keep(*args)

    monkeypatch.setattr(made.store, "keep_favourite", slow)
    marking = threading.Thread(target=made.kept.set_favourite, args=(record, 0, True))
    marking.start()
    assert begun.wait(10)
    trimming = threading.Thread(target=made._trim)
    trimming.start()
    trimming.join(0.2)
    go.set()
    trimming.join(10)
    marking.join(10)
    assert record.id in made.records and made.store.song_path(record, 0, ".favourite").exists()


def test_a_favourite_that_cannot_be_written_is_none(service, monkeypatch):
    made = service()
    record = submit(made, seed=0)
    ended(record)

    monkeypatch.setattr(made.store, "keep_favourite", disk_is_full)
    before = record.version
    with pytest.raises(OSError, match="No space left"):
        made.kept.set_favourite(record, 0, True)
    assert not record.songs[0].favourite and record.version == before


def test_simultaneous_requests_for_a_format_convert_once(service, monkeypatch):
    made = service()
    record = submit(made, seed=0)
    ended(record)
    count, convert, both = [], sounds.convert, threading.Barrier(2)

    def slow(*args):
        count.append(args)
        time.sleep(0.2)
        convert(*args)

    def ask():
        both.wait(10)
        found.append(made.sound(record, 0, "wav"))

    monkeypatch.setattr(sounds, "convert", slow)
    found, threads = [], [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == [made.store.song_path(record, 0, ".wav")] * 2 and len(count) == 1
    assert not made.kept._converting


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_song_that_is_deleted_while_it_is_converted_is_gone(service, monkeypatch, moment):
    made = service()
    record = submit(made, seed=0)
    ended(record)
    convert = sounds.convert

    def deleting(*args):
        if moment == "after":
            convert(*args)
        made.delete(record)
        if moment == "before":
            convert(*args)

    monkeypatch.setattr(sounds, "convert", deleting)
    assert made.sound(record, 0, "wav") is None


def test_a_conversion_that_fails_otherwise_is_an_error(service, monkeypatch):
    made = service()
    record = submit(made, seed=0)
    ended(record)

    monkeypatch.setattr(sounds, "convert", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        made.sound(record, 0, "wav")
