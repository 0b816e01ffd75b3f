"""A model of the server that computes nothing: real requests, checks and buckets, and sound by the seed."""

import contextlib
import dataclasses
import time

import numpy as np

from acestep_jax import Request, Sampling
from acestep_jax.errors import Cancelled, InputError
from acestep_jax.inputs.latents import load_latents
from acestep_jax.io import checkpoint
from acestep_jax.planner.metadata import Metadata
from acestep_jax.planner.timestamps import TimedText, Timestamps
from acestep_jax.serve.engine import Work
from acestep_jax.serve.models import Model
from acestep_jax.song import Song


class FakePipeline:
    """The part of `AceStepPipeline` that the engine calls.

    Attributes:
        delay: seconds of a step.
        batches: (seeds, sampling, adapters) of every batch that ran.
        failing: called with the seeds of a batch; what it raises is the batch's error.
        planner: writes plans.
        unsung: the seed of a song whose lyrics cannot be timed.
    """

    configs = checkpoint.read_manifest(checkpoint.SMALL_MODEL).configs

    def __init__(self, delay=0.0, steps=50):
        self.delay, self.steps = delay, steps
        self.adapters = {}
        self.batches = []
        self.failing = lambda seeds: None
        self.planner = FakePlanner(delay)
        self.unsung = None

    def on_mesh(self):
        return contextlib.nullcontext()

    def free_if_needed(self):
        pass

    sample_rate = 48_000

    def song_to_codes(self, song):
        assert song.endswith("audio")
        return np.arange(50, dtype=np.int32)

    def song_to_latents(self, song):
        assert song.endswith("audio")
        return np.full((50, self.configs["vae"].decoder_input_channels), 0.5, np.float32)

    def latents_to_codes(self, latents):
        return np.arange(50, dtype=np.int32)

    def latents_to_song(self, latents):
        given = load_latents(latents, "latents", self.configs["vae"])
        return sound(round(float(given[0, 0])), len(given) * self.configs["vae"].hop_length)

    def unload_lora(self):
        self.adapters = {}

    def load_lora(self, folder, scale, *, name):
        self.adapters[name] = scale

    def set_adapters(self, scales):
        self.adapters = dict(scales)

    def timestamps(self, song, request, sampling=None):
        if self.unsung is not None and request.seed == self.unsung:
            raise InputError("song: not sung")
        lines = [TimedText(float(i), i + 1.0, text) for i, text in enumerate(request.lyrics.splitlines())]
        return Timestamps(tuple(lines), 0.5, 0.5, tuple(lines))

    def run(self, jobs, sampling, *, should_stop):
        seeds = [job.request.seed for job in jobs]
        self.failing(seeds)
        for _ in range(sampling.num_inference_steps or self.steps):
            if should_stop():
                raise Cancelled
            time.sleep(self.delay)
        self.batches.append((seeds, sampling, dict(self.adapters)))
        return [Song(sound(job.request.seed, job.samples), latents(job), 48_000, job.request.seed) for job in jobs]


class FakePlanner:
    """In place of `planner.writer.Planner`: writes the same words, and codes that tell the seed.

    Attributes:
        asked: (mode, captions, seeds) of every text that was written.
        failing: called before anything is written.
    """

    def __init__(self, delay=0.0, steps=20):
        self.delay, self.steps, self.asked, self.failing = delay, steps, [], lambda: None

    def write_metadata(self, known, *, mode, seeds, sampling, rewrite_caption=True, on_progress, should_stop):
        self.failing()
        self.asked.append((mode, [song.caption for song in known], list(seeds)))
        self.sampling = sampling
        self._work(on_progress, should_stop)
        return [self._words(song, mode, rewrite_caption) for song in known]

    def write_codes(self, known, metadata, *, seeds, sampling, attempts, on_progress, should_stop):
        self._work(on_progress, should_stop)
        return [np.full(int(5 * m.duration), seed % 7, np.int32) for m, seed in zip(metadata, seeds, strict=True)]

    def _words(self, song, mode, rewrite_caption):
        lyrics = song.lyrics
        if mode != "generate" and not song.instrumental:
            lyrics = "[Verse]\nwritten by the planner"
        return Metadata(
            caption=f"{mode} of {song.caption}" if rewrite_caption else song.caption,
            lyrics=lyrics,
            bpm=song.bpm or 70,
            keyscale=song.keyscale or "A minor",
            timesignature=song.timesignature or "3",
            duration=song.duration or 12.0,
            language=song.language or "en",
        )

    def _work(self, on_progress, should_stop):
        for step in range(self.steps):
            if should_stop():
                raise Cancelled
            time.sleep(self.delay)
            on_progress(step + 1, self.steps)


def sound(seed, samples):
    """Return the song of a seed, [2, samples], with sound in its first second alone, which is quick to draw."""
    made = np.zeros((2, samples), np.float32)
    made[:, :48_000] = np.random.default_rng(seed).uniform(-0.5, 0.5, (2, 48_000))
    return made


def latents(job):
    return np.full((job.frames, 4), job.request.seed, np.float32)


def model(pipe, name="small", planner=None):
    """Return the small model of the package, with another pipeline."""
    return Model(name, checkpoint.SMALL_MODEL, load=lambda: pipe, planner=planner)


def sung(pipe, name="sung"):
    """Return the small model as one whose heads that follow lyrics are known."""
    made = model(pipe, name)
    config = dataclasses.replace(made.configs["transformer"], lyric_alignment_layers_config=((0, (0,)),))
    made.configs = {**made.configs, "transformer": config}
    return made


@dataclasses.dataclass
class Waiting:
    """A song in the queue of `serve.batcher`."""

    name: str
    group: str = "g"
    shape: tuple = ()
    kind: str = "k"


class RecordingListener:
    """A listener of the engine that records events."""

    def __init__(self):
        self.plans, self.notes = {}, {}
        self.songs, self.errors, self.cancelled, self.reports, self.death = {}, {}, [], [], None

    def changed(self, work):
        pass

    def planned(self, work, plan):
        self.plans[work] = plan

    def noted(self, work, note):
        self.notes[work] = note

    def done(self, work, song):
        self.songs[work] = song

    def failed(self, work, message):
        self.errors[work] = message

    def stopped(self, work):
        self.cancelled.append(work)

    def reported(self, report):
        self.reports.append(report)

    def died(self, error):
        self.death = error


def wait_until(happened, seconds=10.0):
    """Wait until `happened()` is true; fail after some seconds."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def works(engine, *seeds, seconds=10.0, adapters=(), **sampling):
    """Songs with these seeds, checked by an engine."""
    found = []
    for seed in seeds:
        work = Work(Request("piano", audio_duration=seconds, seed=seed), Sampling(**sampling), "small", adapters)
        engine.check(work)
        found.append(work)
    return found
