"""What every engine gives: the times of lyrics, those of one process; latents and sound that are made of each other."""

import dataclasses
import threading

import numpy as np
import pytest

from acestep_jax import AceStepPipeline, Request, Sampling
from acestep_jax.io.checkpoint import SMALL_MODEL
from acestep_jax.serve import slices
from acestep_jax.serve.engine import Work
from acestep_jax.serve.local import LocalEngine
from acestep_jax.serve.models import Model
from acestep_jax.serve.planner_task import PlannerTask
from acestep_jax.serve.replica import Replica
from acestep_jax.serve.replicas import ReplicaEngine
from acestep_jax.serve.slices import LeaderEngine
from tests.serve.fake import FakePipeline, RecordingListener, model, sound, wait_until
from tests.serve.test_http_native import wav
from tests.serve.test_replicas import Near
from tests.serve.test_slices import channels

HEADS = ((0, (0, 1)),)
LYRICS = "[Verse]\nthe rain comes down\nla la la"


@pytest.fixture(scope="module")
def offered():
    """Return a function that returns the small model as one whose heads that follow lyrics are known; its weights are
    loaded once, and each has a pipeline of its own, as each process has."""
    first = AceStepPipeline.from_pretrained()

    def make():
        pipe = AceStepPipeline.__new__(AceStepPipeline)
        pipe.__dict__.update(first.__dict__)
        transformer = first.transformer
        transformer.config = dataclasses.replace(transformer.config, lyric_alignment_layers_config=HEADS)
        made = Model("small", SMALL_MODEL, load=lambda: pipe)
        made.configs = {**made.configs, "transformer": transformer.config}
        return made

    return make


def songs_of(engine):
    """Return the two songs of an engine, one of which is told with its times."""
    told, works = RecordingListener(), []
    for seed in range(2):
        work = Work(Request("piano", LYRICS, audio_duration=10.0, seed=seed), Sampling(num_inference_steps=2), "small")
        work.lrc = seed == 1
        engine.check(work)
        works.append(work)
    engine.submit(works)
    engine.start(told)
    wait_until(lambda: len(told.songs) == 2 or told.errors or told.death, 120)
    assert not told.errors and not told.death and not told.notes
    return [told.songs[work] for work in works]


@pytest.mark.slow
def test_times_are_those_of_one_process(offered, monkeypatch):
    local = LocalEngine([offered()])
    plain, timed = songs_of(local)
    local.stop(0)
    assert plain.timestamps is None and timed.timestamps is not None
    assert [line.text for line in timed.timestamps.lines] == LYRICS.splitlines()
    assert [word.text for word in timed.timestamps.words] == "the rain comes down la la la".split()
    assert 0 <= timed.timestamps.words[0].start <= timed.timestamps.words[-1].end <= 10.0

    class Far(Near):
        def __init__(self):
            super().__init__(None)
            self.replica = Replica(lambda: ([offered()], {}))

    replicas = ReplicaEngine([offered()], Far, 1)
    mine, theirs = channels()
    monkeypatch.setattr(slices, "leave", lambda message=None: None)
    leader = LeaderEngine([offered()], mine)
    follower = threading.Thread(target=slices.follow, args=([offered()], theirs[0]), daemon=True)
    follower.start()
    for engine in (replicas, leader):
        plain, other = songs_of(engine)
        engine.stop(1)
        assert plain.timestamps is None and other.timestamps == timed.timestamps
    follower.join(10)
    assert not follower.is_alive()


@pytest.mark.parametrize("kind", ["local", "replicas", "slice"])
def test_latents_and_sound_of_each_other(kind, monkeypatch, tmp_path):
    latents = np.full((50, 64), 3.0, np.float32)
    (tmp_path / "a.latents").write_bytes(latents.tobytes())
    (tmp_path / "audio").write_bytes(wav(1.0))
    monkeypatch.setattr(slices, "leave", lambda message=None: None)
    if kind == "replicas":
        engine = ReplicaEngine([model(None)], lambda: Near(FakePipeline()), 1)
    elif kind == "slice":
        mine, theirs = channels()
        engine = LeaderEngine([model(FakePipeline())], mine)
        follower = threading.Thread(target=slices.follow, args=([model(FakePipeline())], theirs[0]), daemon=True)
        follower.start()
    else:
        engine = LocalEngine([model(FakePipeline())])
    told, works = RecordingListener(), []
    for mode, source in (
        ("encode", dict(src_audio=str(tmp_path / "audio"))),
        ("decode", dict(src_latents=str(tmp_path / "a.latents"))),
    ):
        work = Work(Request("", seed=0, **source), Sampling(), "small", planner_task=PlannerTask(mode), is_song=False)
        engine.check(work)
        works.append(work)
    engine.start(told)
    engine.submit(works)
    wait_until(lambda: len(told.plans) == 2 or told.errors or told.death)
    engine.stop(1)
    assert not told.errors and not told.death
    encoded, decoded = (work.analysis for work in works)
    assert encoded.audio is None and np.unique(encoded.latents).tolist() == [0.5]
    assert (
        decoded.latents is None and np.array_equal(decoded.audio, sound(3, 50 * 1920)) and decoded.sample_rate == 48_000
    )
