"""Adherence of the music to its prompt: `python -m benchmarks.prompt_adherence`.

For a model trained on songs from `examples.synthetic_music`: generate songs for held-out requests, and evaluate their
tempo, key and drums with `benchmarks.music_analysis`. The second figure of each check compares the same audio with the
requests of all the other songs: a model that ignores its prompt would reach that figure.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from acestep_jax import AceStepPipeline, InputError
from acestep_jax.io import checkpoint
from acestep_jax.request import MAX_DURATION, MIN_DURATION
from benchmarks.music_analysis import Heard, listen
from benchmarks.reconstruction import through_autoencoder
from benchmarks.spectrograms import draw
from examples.synthetic_music.caption import Request, few_words, request
from examples.synthetic_music.compose import compose, draft
from examples.synthetic_music.synth import SAMPLE_RATE, render
from examples.synthetic_music.theory import parse_key

PICTURES = 6
FIRST_SEED = 1_000_000  # training songs have lower seeds

Check = Callable[[Heard, Request], bool]
CHECKS: dict[str, Check] = {
    "tempo within 4 %, or its double or half": lambda heard, asked: heard.has_tempo(asked.bpm),
    "key: its seven notes carry 70 %": lambda heard, asked: heard.has_key(parse_key(asked.keyscale).pitch_classes),
    "key: the best of the twelve scales": lambda heard, asked: heard.has_best_key(
        parse_key(asked.keyscale).pitch_classes
    ),
    "drums or none": lambda heard, asked: heard.has_drums == asked.has_drums,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prompt_adherence", description=__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--checkpoint", metavar="DIR", default=checkpoint.SMALL_MODEL, help="checkpoint to evaluate [the small model]"
    )
    source.add_argument("--composer", action="store_true", help="evaluate the composer's own songs, the upper limit")
    parser.add_argument("--vae", metavar="DIR", help="with --composer: pass its songs through the autoencoder of DIR")
    parser.add_argument(
        "--few-words", action="store_true", help="request songs as in 'lofi piano, 80 bpm, C minor', without fields"
    )
    parser.add_argument("--prompts", metavar="N", type=int, default=50, help="number of songs [50]")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each song [10]")
    parser.add_argument("--pictures", metavar="FILE", help="PNG to write with the spectrograms of the first six songs")
    options = parser.parse_args(arguments)
    try:
        if options.vae and not options.composer:
            raise InputError(
                "--vae: is only for the songs of --composer; a model's own pass through its autoencoder already"
            )
        if options.few_words and options.composer:
            raise InputError("--few-words: is only for a model; the composer does not read prompts")
        if options.prompts < 2:
            raise InputError(f"--prompts: expected 2 or more, found {options.prompts}")
        if not MIN_DURATION <= options.seconds <= MAX_DURATION:
            raise InputError(f"--seconds: expected {MIN_DURATION:g} to {MAX_DURATION:g}, found {options.seconds:g}")
        seeds = range(FIRST_SEED, FIRST_SEED + options.prompts)
        requests = [request(seed) for seed in seeds]
        if options.few_words:
            requests = [
                dataclasses.replace(asked, caption=few_words(draft(seed), np.random.default_rng(seed), told=True))
                for seed, asked in zip(seeds, requests, strict=True)
            ]
        if options.composer:
            songs = (render(compose(seed, options.seconds), options.seconds) for seed in seeds)
            if options.vae:
                process = through_autoencoder(checkpoint.load(options.vae, names=["vae"])["vae"])
                songs = map(process, songs)
            songs = ((song, SAMPLE_RATE) for song in songs)
        else:
            songs = generate(
                AceStepPipeline.from_checkpoint(options.checkpoint), requests, options.seconds, not options.few_words
            )
        heard, first = [], []
        for (audio, rate), asked in zip(songs, requests, strict=True):
            heard.append(listen(audio, rate))
            print(line(heard[-1], asked), flush=True)
            if options.pictures and len(first) < PICTURES:
                first.append(audio)
        if options.pictures:
            titles = [f"{asked.caption} [{asked.bpm} bpm, {asked.keyscale}]" for asked in requests[:PICTURES]]
            draw(options.pictures, first, titles, rate)
    except (InputError, OSError) as error:
        print(f"prompt_adherence: {error}", file=sys.stderr)
        return 2
    print("\n| | right | against the other songs' requests |\n|---|---|---|")
    for name, check in CHECKS.items():
        right, chance = score(check, heard, requests)
        print(f"| {name} | {right:.0%} | {chance:.0%} |")
    for name, present in (("with", True), ("without", False)):
        some = [h.has_drums == present for h, asked in zip(heard, requests, strict=True) if asked.has_drums == present]
        print(f"| of {len(some)} songs {name} drums | {np.mean(some) if some else np.nan:.0%} | |")
    return 0


def generate(
    pipe: AceStepPipeline, requests: Sequence[Request], seconds: float, fields: bool = True
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield a song for each request, [channels, samples], and its sample rate in Hz; seeds count from 0.

    Without `fields`, the request has only the caption.
    """
    for seed, asked in enumerate(requests):
        facts = dict(bpm=asked.bpm, keyscale=asked.keyscale, timesignature=asked.timesignature) if fields else {}
        song = pipe(
            asked.caption,
            lyrics="[Instrumental]",
            audio_duration=seconds,
            seed=seed,
            **facts,
        )
        yield song.audios[0], song.sample_rate


def score(check: Check, heard: Sequence[Heard], requests: Sequence[Request]) -> tuple[float, float]:
    """Return the pass rate of songs with their own requests and with those of other songs; needs at least two songs."""
    passed = np.array([[check(song, asked) for asked in requests] for song in heard], float)  # [songs, requests]
    count = len(passed)
    return float(passed.trace() / count), float((passed.sum() - passed.trace()) / (count * (count - 1)))


def line(heard: Heard, asked: Request) -> str:
    """Return a line with a song's request and its analysis."""
    in_key = heard.in_key_fraction(parse_key(asked.keyscale).pitch_classes)
    failed = [name.partition(" ")[0].strip(":") for name, check in CHECKS.items() if not check(heard, asked)]
    return (
        f"{asked.bpm:4} bpm: {heard.tempo:5.1f}   {asked.keyscale:8}: {in_key:.2f}   "
        f"{'drums' if asked.has_drums else 'none':5}: {heard.percussive:.2f}   "
        f"{asked.caption[:60]:60} {'not ' + ', '.join(failed) if failed else ''}"
    )


if __name__ == "__main__":
    sys.exit(main())
