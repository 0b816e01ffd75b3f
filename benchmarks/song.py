"""A song from the start of the process to the file, as a user makes it: `python -m benchmarks.song --model DIR`.

`acestep-jax generate` runs in a process of its own, `--runs` times; the first compiles what is not kept yet. A row for
each tells of every stage its seconds, those of all cores together (which other work on the machine changes less), and
the highest resident memory, in which pages of mapped files count.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

STAGES = ("imports", "checks", "loading", "encoding", "denoising", "decoding", "writing")
CHILD = "child"  # the first argument of the processes that are measured


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.song", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="native checkpoint, such as `acestep-jax convert from-torch` writes")
    add("--dtype", default="bfloat16", help="dtype of weights and computation [bfloat16]")
    add("--seconds", type=float, default=30.0, help="length of the song [30]")
    add("--steps", type=int, default=8, help="sampling steps [8]")
    add("--lyrics", default="", help="lyrics of the song [none]")
    add("--runs", type=int, default=3, help="processes, one after the other [3]")
    options = parser.parse_args()
    print("| total | " + " | ".join(STAGES) + " | peak |\n" + "| --- " * (len(STAGES) + 2) + "|")
    for _ in range(options.runs):
        stages = run(options)
        cells = (f"{seconds:.1f} s ({cores:.1f}), {peak / 2**30:.1f} GiB" for seconds, cores, peak in stages)
        seconds, cores, peaks = zip(*stages, strict=True)
        print(
            f"| {sum(seconds):.1f} s ({sum(cores):.1f}) | {' | '.join(cells)} | {max(peaks) / 2**30:.1f} GiB |",
            flush=True,
        )


def run(options: argparse.Namespace) -> list[tuple[float, float, int]]:
    """Make a song in a process of its own; return for each stage its seconds, those of all cores, and the highest
    memory in it, bytes."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "marks.json"
        song = ["a calm piano with soft strings", "--lyrics", options.lyrics, "--model", options.model]
        song += ["--dtype", options.dtype, "--duration", str(options.seconds), "--steps", str(options.steps)]
        song += ["--seed", "0", "--out", f"{folder}/song.wav"]
        before = time.time()
        command = [sys.executable, "-m", "benchmarks.song", CHILD, str(log), "generate", *song]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        marks = json.loads(log.read_text())
        marks["writing"][0] = time.time()  # with the end of the process
    ends = [[before, 0.0, 0], *(marks[stage] for stage in STAGES)]
    return [(end[0] - start[0], end[1] - start[1], end[2]) for start, end in zip(ends, ends[1:], strict=False)]


def child(log: Path, words: Sequence[str]) -> int:
    """Run a command of acestep-jax in this process, and write when its stages ended."""
    marks: dict[str, tuple[float, float, int]] = {}

    def mark(stage: str) -> None:
        with open("/proc/self/status") as file:
            peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
        marks[stage] = time.time(), time.process_time(), peak
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the next stage counts from here

    from acestep_jax.cli import generate
    from acestep_jax.cli import main as command
    from acestep_jax.pipeline import AceStepPipeline
    from acestep_jax.song import Song

    mark("imports")

    def watch(owner, name: str, *, before: str | None = None, after: str | None = None) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def watched(*args, **keywords):
            if before:
                mark(before)
            result = original(*args, **keywords)
            if after:
                mark(after)
            return result

        setattr(owner, name, watched)

    watch(generate, "load", before="checks", after="loading")
    watch(AceStepPipeline, "_denoise", before="encoding", after="denoising")
    watch(Song, "save", before="decoding", after="writing")
    status = command(list(words))
    log.write_text(json.dumps(marks))
    return status


if __name__ == "__main__":
    sys.exit(child(Path(sys.argv[2]), sys.argv[3:]) if sys.argv[1:2] == [CHILD] else main())
