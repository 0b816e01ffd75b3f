"""Write songs to files, with the texts that `acestep-jax train preprocess` reads.

This is a module of its own because spawned processes cannot import what is defined in `__main__`.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from acestep_jax.errors import InputError
from acestep_jax.io import audio
from acestep_jax.request import MAX_DURATION
from examples.synthetic_music.caption import few_words, request
from examples.synthetic_music.compose import compose, draft
from examples.synthetic_music.styles import Style
from examples.synthetic_music.synth import SAMPLE_RATE, render

SETTINGS = ".synthetic_music"  # the settings that the songs of a folder share


def write_songs(
    out_dir: str | Path,
    songs: int,
    seconds: float,
    seed: int = 0,
    style: str | Style | None = None,
    untold: float = 0.0,
    brief: float = 0.0,
    workers: int = 1,
) -> Iterator[int]:
    """Write `00000.flac` with `00000.txt` and so on, song i with seed + i; yield the number of songs so far.

    Existing songs are kept, so that a folder can be extended and an interrupted run resumes.

    Args:
        style: the name of one of `STYLES`, or a style of your own; None: all of them.
        untold: fraction of the songs whose text omits tempo, key and time signature, as users often do.
        brief: fraction of the songs whose text is a few words, with or without tempo and key.

    Raises:
        InputError: if a number is out of range, or the folder holds other files or songs of other settings.
    """
    for name, value, lowest, highest in (
        ("songs", songs, 1, 100_000),
        ("seconds", seconds, 1, MAX_DURATION),
        ("seed", seed, 0, 2**62),
        ("untold", untold, 0, 1),
        ("brief", brief, 0, 1),
        ("workers", workers, 1, 1024),
    ):
        if not lowest <= value <= highest:
            raise InputError(f"--{name}: expected {lowest:g} to {highest:g}, found {value:g}")
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    known = dataclasses.asdict(style) if isinstance(style, Style) else style
    settings = json.dumps({"seconds": seconds, "seed": seed, "style": known, "untold": untold, "brief": brief})
    note = folder / SETTINGS
    if not note.exists():
        if any(folder.iterdir()):
            raise InputError(f"{folder}: is not empty and holds files of other origin; choose a new folder")
        note.write_text(settings, encoding="utf-8")
    elif (found := note.read_text(encoding="utf-8")) != settings:
        raise InputError(
            f"{folder}: holds songs of {found}, not {settings}; use those settings, or choose a new folder"
        )
    missing = [i for i in range(songs) if not (folder / f"{i:05}.flac").exists()]
    jobs = [(folder / f"{i:05}.flac", seed + i, seconds, style, untold, brief) for i in missing]
    done = songs - len(jobs)
    if workers == 1 or not jobs:
        yield done
        for job in jobs:
            _write(job)
            yield (done := done + 1)
        return
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(_write, jobs, chunksize=4):
            yield (done := done + 1)


def _write(job: tuple[Path, int, float, str | Style | None, float, float]) -> None:
    """Write the text before the audio: a song whose audio exists is complete."""
    path, seed, seconds, style, untold, brief = job
    asked, rng = request(seed, style), np.random.default_rng([seed, 4])
    words = asked.caption
    facts = f"bpm: {asked.bpm}\nkeyscale: {asked.keyscale}\ntimesignature: {asked.timesignature}\n"
    if rng.random() < untold:
        facts = ""
    if rng.random() < brief:
        words, facts = few_words(draft(seed, style), rng), ""
    text = f"caption: {words}\n{facts}lyrics: [Instrumental]\n"
    path.with_suffix(".txt").write_text(text, encoding="utf-8")
    audio.write(path, render(compose(seed, seconds, style), seconds), SAMPLE_RATE, overwrite=True)
