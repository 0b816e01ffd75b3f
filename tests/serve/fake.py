"""A model of the server that computes nothing: real requests, checks and buckets, and sound by the seed."""

import dataclasses
import time

import numpy as np

from acestep_jax.errors import Cancelled
from acestep_jax.io.checkpoint import SMALL_MODEL
from acestep_jax.serve.models import Model
from acestep_jax.song import Song


class FakePipeline:
    """The part of `AceStepPipeline` that the engine calls.

    Attributes:
        delay: seconds of a step.
        batches: (seeds, sampling, adapters) of every batch that ran.
        failing: called with the seeds of a batch; what it raises is the batch's error.
    """

    def __init__(self, delay=0.0, steps=50):
        self.delay, self.steps = delay, steps
        self.adapters = {}
        self.batches = []
        self.failing = lambda seeds: None

    def unload_lora(self):
        self.adapters = {}

    def load_lora(self, folder, scale, *, name):
        self.adapters[name] = scale

    def set_adapters(self, scales):
        self.adapters = dict(scales)

    def run(self, jobs, sampling, *, should_stop):
        seeds = [job.request.seed for job in jobs]
        self.failing(seeds)
        for _ in range(sampling.num_inference_steps or self.steps):
            if should_stop():
                raise Cancelled
            time.sleep(self.delay)
        self.batches.append((seeds, sampling, dict(self.adapters)))
        return [Song(sound(job.request.seed, job.samples), latents(job), 48_000, job.request.seed) for job in jobs]


def sound(seed, samples):
    """Return the song of a seed, [2, samples], with sound in its first second alone, which is quick to draw."""
    made = np.zeros((2, samples), np.float32)
    made[:, :48_000] = np.random.default_rng(seed).uniform(-0.5, 0.5, (2, 48_000))
    return made


def latents(job):
    return np.full((job.frames, 4), job.request.seed, np.float32)


def model(pipe, name="small"):
    """Return the small model of the package, with another pipeline."""
    return Model(name, SMALL_MODEL, load=lambda: pipe)


@dataclasses.dataclass
class Waiting:
    """A song in the queue of `serve.batcher`."""

    name: str
    group: str = "g"
    shape: tuple = ()
    kind: str = "k"


class Told:
    """A listener of the engine that remembers what it is told."""

    def __init__(self):
        self.songs, self.errors, self.cancelled, self.reports, self.death = {}, {}, [], [], None

    def changed(self, work):
        pass

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
