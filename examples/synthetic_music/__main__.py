"""`python -m examples.synthetic_music OUT_DIR`: songs, and beside each what `python -m train preprocess` reads."""

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path

from acestep_jax import audio
from acestep_jax.errors import InputError
from acestep_jax.request import MAX_DURATION
from examples.synthetic_music.caption import request
from examples.synthetic_music.compose import compose
from examples.synthetic_music.styles import STYLES
from examples.synthetic_music.synth import SAMPLE_RATE, render

SETTINGS = ".synthetic_music"  # what the songs of a folder have in common


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, 2 after an error message, or 130 if it was interrupted."""
    parser = argparse.ArgumentParser(prog="python -m examples.synthetic_music", description="Makes songs to train on.")
    add = parser.add_argument
    add("out_dir", metavar="OUT_DIR", help="a new folder, or one of this program's: what is missing there is made")
    add("--songs", metavar="N", type=int, default=100, help="[100]")
    add("--seconds", type=float, default=30.0, help="of each [30]")
    add("--seed", type=int, default=0, help="of the first; the others follow [0]")
    add("--style", choices=tuple(STYLES), metavar="NAME", help=f"{', '.join(STYLES)} [all]")
    add("--workers", metavar="N", type=int, default=2, help="processes [2]")
    options = parser.parse_args(arguments)
    try:
        for done in write_songs(**vars(options)):
            if done % 100 == 0 or done == options.songs:
                print(f"{options.out_dir}: {done} of {options.songs} songs", flush=True)
    except (InputError, OSError) as error:
        print(f"synthetic_music: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("synthetic_music: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def write_songs(
    out_dir: str | Path, songs: int, seconds: float, seed: int = 0, style: str | None = None, workers: int = 1
) -> Iterator[int]:
    """Writes `00000.flac` with `00000.txt` and so on, song i of seed + i; yields how many are there so far.

    Songs that are there already are kept: a folder grows, and a run that was stopped goes on.

    Raises:
        InputError: if a number is out of range, or the folder holds something else, or songs of other settings.
    """
    for name, value, lowest, highest in (
        ("songs", songs, 1, 100_000),
        ("seconds", seconds, 1, MAX_DURATION),
        ("seed", seed, 0, 2**62),
        ("workers", workers, 1, 1024),
    ):
        if not lowest <= value <= highest:
            raise InputError(f"--{name}: expected {lowest:g} to {highest:g}, found {value:g}")
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({"seconds": seconds, "seed": seed, "style": style})
    note = folder / SETTINGS
    if not note.exists():
        if any(folder.iterdir()):
            raise InputError(f"{folder}: is not empty, and what is in it was not made here; name a new folder")
        note.write_text(settings, encoding="utf-8")
    elif (found := note.read_text(encoding="utf-8")) != settings:
        raise InputError(f"{folder}: holds songs of {found}, not {settings}; use those settings, or name a new folder")
    missing = [i for i in range(songs) if not (folder / f"{i:05}.flac").exists()]
    jobs = [(folder / f"{i:05}.flac", seed + i, seconds, style) for i in missing]
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


def _write(job: tuple[Path, int, float, str | None]) -> None:
    """The text first: where there is audio, the song is whole."""
    path, seed, seconds, style = job
    asked = request(seed, style)
    path.with_suffix(".txt").write_text(
        f"caption: {asked.caption}\nbpm: {asked.bpm}\nkeyscale: {asked.keyscale}\n"
        f"timesignature: {asked.timesignature}\nlyrics: [Instrumental]\n",
        encoding="utf-8",
    )
    audio.write(path, render(compose(seed, seconds, style), seconds), SAMPLE_RATE, overwrite=True)


if __name__ == "__main__":
    sys.exit(main())
