"""A leader and followers in threads of this process, with channels over loopback and pipelines that compute nothing."""

import socket
import struct
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from acestep_jax import Request, Sampling
from acestep_jax.errors import InputError
from acestep_jax.serve import slices
from acestep_jax.serve.channel import Channel, LeaderSocket, connect
from acestep_jax.serve.engine import EngineLost, Work
from acestep_jax.serve.planner_task import PlannerTask
from acestep_jax.serve.slices import LeaderEngine
from tests.serve.fake import FakePipeline, RecordingListener, model, sound, wait_until, works
from tests.serve.test_http_native import wav

pytestmark = pytest.mark.unit


def channels(count=1):
    """Return the channels of a leader by index, and those of its followers."""
    listening = LeaderSocket("localhost")
    theirs = [connect("localhost", listening.port, listening.key, i + 1) for i in range(count)]
    return listening.accept(count), theirs


# A follower's thread that begins after its test has ended must not end the process of the tests.
slices.leave = lambda message=None: None


class Slice:
    """A leader and its followers; `left` is why processes have ended at once."""

    def __init__(self, pipe, followers, left, **options):
        mine, self.channels = channels(len(followers))
        self.pipes = [pipe, *followers]
        self.left, self.status = left, {}
        self.engine = LeaderEngine([model(pipe)], mine, adapters={"jazz": "/nowhere"}, **options)
        self.told = RecordingListener()
        self.threads = [threading.Thread(target=self.follow, args=(i,), daemon=True) for i in range(len(followers))]
        for thread in self.threads:
            thread.start()

    def follow(self, i):
        models = [model(self.pipes[i + 1])]
        self.status[i] = slices.follow(models, self.channels[i], adapters={"jazz": "/nowhere"})

    def submit(self, *seeds, **values):
        songs = works(self.engine, *seeds, **values)
        self.engine.submit(songs)
        return songs


@pytest.fixture
def made(monkeypatch):
    """Return a function that makes a slice of fake pipelines; all are stopped."""
    found, left = [], []

    monkeypatch.setattr(slices, "leave", left.append)
    monkeypatch.setattr(slices, "LATE_SECONDS", 0.3)

    def make(*pipes, started=True, **options):
        one = Slice(pipes[0], pipes[1:], left, **options)
        found.append(one)
        if started:
            one.engine.start(one.told)
        return one

    monkeypatch.setattr(slices, "LEAVE_SECONDS", 10_000.0)
    yield make
    for one in found:
        one.engine.stop(0)
        for channel in one.engine._channels.values():
            channel.close()
        if one.engine._thread.is_alive():
            one.engine._thread.join(5)
    # Not `join`, which raises for a thread that another thread is about to start.
    wait_until(lambda: not any(thread.name == "leader" for thread in threading.enumerate()))


def test_followers_make_the_batches_of_the_leader(made):
    pipes = [FakePipeline() for _ in range(3)]
    one = made(*pipes, started=False)
    songs = one.submit(0, 1, 2) + one.submit(7, adapters=(("jazz", 0.5),), num_inference_steps=3)
    one.engine.start(one.told)
    wait_until(lambda: len(one.told.songs) == 4)
    assert [seeds for seeds, *_ in pipes[0].batches] == [[0, 1], [2], [7]]
    wait_until(lambda: pipes[0].batches == pipes[1].batches == pipes[2].batches)
    assert np.array_equal(one.told.songs[songs[0]].audio, sound(0, 480_000))
    one.engine.stop(1)
    for thread in one.threads:
        thread.join(5)
    assert one.status == {0: 0, 1: 0} and one.left == [] and one.told.death is None


def test_all_stop_before_the_same_step(made):
    pipes = [FakePipeline(delay=0.01), FakePipeline()]
    one = made(*pipes)
    songs = one.submit(0, num_inference_steps=200)
    wait_until(lambda: songs[0].step > 2)
    one.engine.cancel(songs)
    wait_until(lambda: one.told.cancelled == songs)
    one.submit(1)
    wait_until(lambda: one.told.songs)
    assert [seeds for seeds, *_ in pipes[1].batches] == [[1]]


def test_followers_write_the_plans_of_the_leader(made):
    pipes = [FakePipeline(), FakePipeline()]
    one = made(*pipes, started=False)
    songs = works(one.engine, 4, 5)
    for work in songs:
        work.planner_task = PlannerTask()
        one.engine.check(work)
    one.engine.submit(songs)
    one.engine.start(one.told)
    wait_until(lambda: len(one.told.songs) == 2)
    assert pipes[0].planner.asked == pipes[1].planner.asked == [("generate", ["piano"] * 2, [4, 5])]
    wait_until(lambda: pipes[0].batches == pipes[1].batches)
    assert not one.engine.broken


def test_songs_that_fail_everywhere_fail_alone(made):
    def failing(seeds):
        if len(seeds) == 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        if 2 in seeds:
            raise InputError("song 2: not finite")

    pipes = [FakePipeline(), FakePipeline()]
    for pipe in pipes:
        pipe.failing = failing
    one = made(*pipes)
    songs = one.submit(0, 1, 2, 3)
    wait_until(lambda: len(one.told.songs) == 3 and one.told.errors)
    assert one.told.errors == {songs[2]: "song 2: not finite"} and not one.engine.broken


def repainting(one, path, seed=0, seconds=1.0):
    """Return a work with a sound file, which is written."""
    path.write_bytes(wav(seconds))
    request = Request("piano", task_type="repaint", src_audio=str(path), repainting_start=0.2, seed=seed)
    work = Work(request, Sampling(), "small")
    one.engine.check(work)
    return work


@pytest.mark.parametrize("planner_task", [None, PlannerTask("codes")])
def test_a_source_that_is_removed_while_the_model_loads_is_not_read_again(made, tmp_path, planner_task):
    """As the upload of a song is that was deleted: the followers, which have it, would wait for the leader."""
    pipes = [FakePipeline(), FakePipeline()]
    one = made(*pipes, started=False)
    work = repainting(one, tmp_path / "audio")
    request = work.request
    if planner_task is not None:
        work.planner_task, work.is_song = planner_task, False
        one.engine.check(work)
    heard = []
    for pipe in pipes:
        pipe.song_to_codes = lambda song: heard.append(Path(song).read_bytes()) or np.arange(5)
    small = one.engine.models["small"]
    small.load = lambda: (tmp_path / "audio").unlink() or pipes[0]
    one.engine.submit([work])
    one.engine.start(one.told)
    wait_until(lambda: one.told.songs or one.told.plans or one.told.errors)
    assert not one.told.errors and not (tmp_path / "audio").exists()
    assert work.request is request and not one.engine.broken
    if planner_task is None:
        wait_until(lambda: pipes[1].batches == pipes[0].batches)
        assert len(pipes[0].batches) == 1
    else:
        wait_until(lambda: len(heard) == 2)
        assert heard == [wav(1.0)] * 2


def test_what_is_wrong_with_a_source_is_told_by_its_own_name(made, tmp_path):
    one = made(FakePipeline(), FakePipeline(), started=False)
    work = repainting(one, tmp_path / "audio")
    (tmp_path / "audio").write_bytes(b"no sound")
    one.engine.submit([work])
    one.engine.start(one.told)
    wait_until(lambda: one.told.errors)
    assert str(tmp_path / "audio") in one.told.errors[work] and "0-src_audio" not in one.told.errors[work]
    assert not one.engine.broken


def test_what_fails_in_the_leader_only_is_its_own(made):
    """The follower, which waits for the first step, is told that the batch has ended."""
    pipes = [FakePipeline(), FakePipeline()]
    pipes[0].failing = lambda seeds: 1 / 0 if 0 in seeds else None
    one = made(*pipes)
    songs = one.submit(0)
    wait_until(lambda: one.told.errors)
    one.submit(1)
    wait_until(lambda: one.told.songs)
    time.sleep(0.4)  # longer than LATE_SECONDS
    assert list(one.told.errors) == songs and one.told.death is None


def test_what_fails_in_a_follower_only_breaks_the_slice(made):
    """Songs are neither failed nor finished: they are made after the restart."""
    pipes = [FakePipeline(), FakePipeline()]
    pipes[1].failing = lambda seeds: 1 / 0
    one = made(*pipes)
    one.submit(0)
    wait_until(lambda: one.told.death is not None)
    assert one.engine.broken and isinstance(one.told.death, EngineLost) and not one.engine.ready
    assert "process 1: Traceback" in str(one.told.death) and "ZeroDivisionError" in str(one.told.death)
    assert not one.told.songs and not one.told.errors


def test_a_batch_that_hangs_because_a_follower_has_failed_breaks_the_slice(made):
    """As it does where the leader waits for the follower on its device."""
    pipes = [FakePipeline(delay=0.1, steps=200), FakePipeline()]
    pipes[1].failing = lambda seeds: 1 / 0
    one = made(*pipes)
    one.submit(0, num_inference_steps=200)
    wait_until(lambda: one.told.death is not None, 5)
    assert "a batch that is still running here has failed in process 1" in str(one.told.death)


@pytest.mark.parametrize("running", [False, True])
def test_a_follower_that_has_gone_breaks_the_slice(made, running):
    pipes = [FakePipeline(delay=0.01), FakePipeline(), FakePipeline()]
    one = made(*pipes)
    if running:
        songs = one.submit(0, num_inference_steps=200)
        wait_until(lambda: songs[0].step > 2)
    one.channels[1].close()
    wait_until(lambda: one.told.death is not None)
    assert "process 2 is gone" in str(one.told.death) and one.engine.broken
    began = time.monotonic()
    one.engine.stop(30)  # without waiting for a thread that may hang on a device
    assert time.monotonic() - began < 1 and not one.told.errors and not one.told.songs


def test_a_slice_that_breaks_before_it_starts_tells_when_it_does(made):
    one = made(FakePipeline(), FakePipeline(), started=False)
    one.channels[0].close()
    wait_until(lambda: one.engine.broken)
    one.engine.start(one.told)
    assert isinstance(one.told.death, EngineLost)


def test_followers_leave_when_the_leader_has_gone(made):
    one = made(FakePipeline(), FakePipeline())
    for channel in one.engine._channels.values():
        channel.close()
    wait_until(lambda: any(message and "process 0 is gone" in message for message in one.left))


def test_only_those_who_know_the_key_are_followers():
    listening = LeaderSocket("localhost")
    port = listening.port
    strangers = [socket.create_connection(("localhost", listening.port)) for _ in range(3)]
    strangers[0].close()
    strangers[1].sendall(b"GET / HTTP/1.1\r\n\r\n")
    strangers[2].sendall(b"\0" * 8)
    wrong = connect("localhost", listening.port, "a guess", 1)
    right = connect("localhost", listening.port, listening.key, 1)
    found = listening.accept(1)
    found[1].send("batch", dict(text="é"), [b"", b"12"])
    assert right.receive() == ("batch", {"text": "é"}, [b"", b"12"])
    with pytest.raises(OSError):
        wrong.receive()
    with pytest.raises(InputError, match="process 0 cannot be reached at localhost:"):
        connect("localhost", port, listening.key, 2, seconds=1)


@pytest.mark.parametrize(
    "text",
    [
        '[["hello"], {}, [1000000000000]]',
        '["hello", {"key": "a", "index": 1}, [1000000000000]]',
        '["hello", {"key": "\\ud800", "index": Infinity}, []]',
        '["hello", [], []]',
        '{"hello": 1}',
        "[" * 4000,
    ],
)
def test_what_a_stranger_sends_is_not_believed(text):
    listening = LeaderSocket("localhost")
    with socket.create_connection(("localhost", listening.port)) as stranger:
        stranger.sendall(struct.pack(">Q", len(text)) + text.encode())
        right = connect("localhost", listening.port, listening.key, 1)
        assert list(listening.accept(1)) == [1]
        right.close()


def test_a_stranger_who_is_long_in_telling_is_not_heard_to_the_end(monkeypatch):
    """A byte now and then does not keep the others waiting."""
    monkeypatch.setattr("acestep_jax.serve.channel.HELLO_SECONDS", 0.3)
    listening = LeaderSocket("localhost")
    ended = threading.Event()
    with socket.create_connection(("localhost", listening.port)) as stranger:

        def tell():
            try:
                stranger.sendall(struct.pack(">Q", 1000))
                while not ended.wait(0.05):
                    stranger.sendall(b" ")
            except OSError:  # nobody listens any more
                pass

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        connect("localhost", listening.port, listening.key, 1)
        began = time.monotonic()
        assert list(listening.accept(1, 10)) == [1] and time.monotonic() - began < 3
        ended.set()
        thread.join()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="not on this system")
def test_a_machine_that_does_not_answer_is_lost_within_a_minute():
    """Also while something is on its way to it, when keep-alive is silent."""
    mine, theirs = channels()
    for one in (mine[1], theirs[0]):
        assert one._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
        assert one._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
        one.close()


def test_a_follower_that_does_not_come_is_named():
    listening = LeaderSocket("localhost")
    connect("localhost", listening.port, listening.key, 2)
    with pytest.raises(InputError, match="process 1 has not connected within 0.2 s"):
        listening.accept(2, 0.2)


def test_large_messages_arrive_whole():
    (mine,), (theirs,) = (list(found.values()) if isinstance(found, dict) else found for found in channels())
    assert isinstance(mine, Channel)
    blob = np.random.default_rng(0).bytes(5_000_000)
    thread = threading.Thread(target=mine.send, args=("batch", {}, [blob, b"x"]))
    thread.start()
    assert theirs.receive().blobs == [blob, b"x"]
    thread.join()


def test_processes_that_were_started_differently_are_named(monkeypatch):
    pipe = model(None)
    told = []

    def exchange(text):
        told.append(text)
        return [text, text.replace('"float32"', '"bfloat16"')]

    monkeypatch.setattr(slices, "exchange", exchange)
    monkeypatch.setattr(slices, "leader_host", lambda: "localhost")
    with pytest.raises(InputError, match="distributed: dtype of process 1 differs; start all of them the same way"):
        slices.accept_followers([pipe], {}, dtype="float32", mesh="data=2")
    assert '"key"' in told[0]


def test_a_slice_does_not_go_on_after_an_error_that_may_be_one_process_s_alone(made, monkeypatch):
    """As where the times of lyrics are found: without the error's process the others wait on their devices."""
    pipes = [FakePipeline(), FakePipeline()]
    for pipe in pipes:
        monkeypatch.setattr(pipe, "timestamps", lambda *_: 1 / 0)
    one = made(*pipes, started=False)
    songs = works(one.engine, 4)
    songs[0].lrc = True
    one.engine.submit(songs)
    one.engine.start(one.told)
    wait_until(lambda: one.told.errors)
    assert "ZeroDivisionError" in one.told.errors[songs[0]] and not one.told.songs
