"""Actors of a Ray cluster on this machine, with the small model: `pytest -m slow tests/serve/test_ray.py`."""

import functools
import os
import signal
import time

import numpy as np
import pytest

from acestep_jax import Request, Sampling, cli
from acestep_jax.cli import engines, serve
from acestep_jax.io.checkpoint import SMALL_MODEL
from acestep_jax.serve.engine import EngineLost, Work
from acestep_jax.serve.local import LocalEngine
from acestep_jax.serve.models import Model
from tests.processes import cache, ends, free_port, start
from tests.serve.fake import RecordingListener, wait_until

ray = pytest.importorskip("ray", reason="needs pip install 'acestep-jax[ray]'")

pytestmark = pytest.mark.slow  # a cluster and two actors with a model: a minute

STEPS = 4


def models():
    return [Model("small", SMALL_MODEL)]


def offered(*options):
    """Return what the command has its actors call: they import it, so it cannot be of this file."""
    return functools.partial(engines._in_replica, cli.parser().parse_args(["serve", *options]).serve, serve._offer)


@pytest.fixture(scope="module")
def cluster():
    """Start a cluster of two CPUs; the actors find compiled programs in the cache of all tests."""
    os.environ.update(cache() | {"JAX_NUM_CPU_DEVICES": "1", "JAX_DEFAULT_MATMUL_PRECISION": "highest"})
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def engine(cluster):
    """Return a function that starts an engine of actors; all are stopped."""
    from acestep_jax.serve.ray_engine import RayEngine

    made = []

    def make(*given, replicas=2, **options):
        one = RayEngine(models(), offered(*given), replicas, **options)
        made.append(one)
        told = RecordingListener()
        one.start(told)
        return one, told

    yield make
    for one in made:
        one.stop(0)


def works(engine, count, steps=STEPS):
    found = []
    for i in range(count):
        work = Work(
            Request(f"song {i}", audio_duration=10.0 + 0.2 * (i % 2), seed=i),
            Sampling(num_inference_steps=steps),
            "small",
        )
        engine.check(work)
        found.append(work)
    return found


@pytest.fixture(scope="module")
def local():
    """Return the songs of one process, by steps and seed."""
    made = {}

    def make(count, steps=STEPS):
        if (count, steps) not in made:
            engine, told = LocalEngine(models(), max_batch=2 if steps > STEPS else 4), RecordingListener()
            songs = works(engine, count, steps)
            engine.submit(songs)
            engine.start(told)
            wait_until(lambda: len(told.songs) + len(told.errors) == count, 300)
            engine.stop(0)
            made[count, steps] = [told.songs[work] for work in songs]
        return made[count, steps]

    return make


def worst(told, songs, expected):
    return max(
        float(np.abs(getattr(told.songs[work], name) - getattr(song, name)).max())
        for work, song in zip(songs, expected, strict=True)
        for name in ("audio", "latents")
    )


def test_eight_songs_of_two_actors_are_those_of_one_process(engine, local):
    one, told = engine()
    wait_until(lambda: one.ready, 120)
    songs = works(one, 8)
    began = time.monotonic()
    one.submit(songs)
    wait_until(lambda: len(told.songs) == 8 or told.errors, 300)
    print(f"\neight songs by two actors: {time.monotonic() - began:.1f} s, compilation and loading included")
    assert all(dispatcher.timings.known()[0] for dispatcher in one.dispatchers)  # both worked
    assert all(work.step > 0 for work in songs)  # and told how far they were
    difference = worst(told, songs, local(8))
    print(f"largest difference {difference:.1e}")
    assert difference < 1e-5


def test_songs_of_an_actor_that_is_killed_are_made_once_more(engine, local):
    one, told = engine(max_batch=2)
    wait_until(lambda: one.ready and one._idle == 2, 120)
    songs = works(one, 4, steps=30)
    one.submit(songs)
    wait_until(
        lambda: any(dispatcher._running and dispatcher._running[0].step > 2 for dispatcher in one.dispatchers), 300
    )
    dispatcher = next(
        dispatcher for dispatcher in one.dispatchers if dispatcher._running and dispatcher._running[0].step > 2
    )
    lost, pid = list(dispatcher._running), dispatcher._remote.pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(told.songs) == 4 or told.errors, 300)
    assert [work.losses for work in songs] == [int(work in lost) for work in songs] and lost
    assert not told.errors and told.death is None
    assert worst(told, songs, local(4, 30)) < 1e-5
    wait_until(lambda: one.ready and dispatcher._remote.pid not in (None, pid), 120)


def test_cancelled_songs_end_between_steps(engine):
    one, told = engine(replicas=1, max_batch=1)
    songs = works(one, 1, steps=200)
    one.submit(songs)
    wait_until(lambda: songs[0].step > 2, 300)
    one.cancel(songs)
    wait_until(lambda: told.cancelled == songs, 10)
    again = works(one, 1)
    one.submit(again)
    wait_until(lambda: told.songs, 300)
    assert list(told.songs) == again


def test_actors_that_cannot_open_the_model_end_the_engine(engine, monkeypatch):
    from acestep_jax.serve import replicas

    monkeypatch.setattr(replicas, "START_PAUSE", 0.1)
    one, told = engine("--model", "/nowhere", replicas=1)
    wait_until(lambda: told.death is not None, 120)
    assert isinstance(told.death, EngineLost) and "InputError: /nowhere" in str(told.death), str(told.death)


def test_the_command_serves_with_replicas(tmp_path):
    import httpx

    port = free_port()
    server = start("serve", "--replicas", 2, "--port", port, "--data", tmp_path / "songs")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:

        def ready():
            assert server.poll() is None, ends([server])
            try:
                return client.get("/ready").status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_until(ready, 180)
            song = dict(prompt="piano", audio_duration=10, seed=1, num_inference_steps=STEPS, variations=2)
            record = client.post("/v1/songs", json=song).json()["id"]
            wait_until(lambda: client.get(f"/v1/songs/{record}").json()["status"] in ("done", "failed"), 300)
            assert client.get(f"/v1/songs/{record}").json()["status"] == "done"
        finally:
            server.send_signal(signal.SIGTERM)
            ((status, _, errors),) = ends([server], 60)
    assert status == 0, errors
