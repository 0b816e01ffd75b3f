"""Ahead-of-time compilation for TPUs that are not present: `python -m benchmarks.tpu_aot`, with `jax[tpu]` installed.

Compiles the denoising loop (8 turbo steps) and the decoder in bfloat16, as the pipeline runs them, a step of training
or of the planner, for real topologies through libtpu, and prints what one chip needs. Nothing runs: times are the
compiler's estimates, not measurements.
"""

import argparse
from importlib import metadata

from benchmarks import aot, hlo_tpu  # isort: skip

import jax
from jax.sharding import Mesh

from benchmarks.programs import STEPS, Program
from benchmarks.targets import TOPOLOGIES, Chip

COLUMNS = (
    "TFLOP needed",
    "TFLOP counted",
    "Pallas kernels",
    "collectives",
    "scheduled s",
    "kernels s",
    "exchanged s",
    "estimate s",
    "of roofline",
    "at best s",
    "of roofline at best",
)
NOTES = f"""
All figures are of one chip. output: what does not reuse the memory of an argument. total: arguments + temporary +
output; the program fits if that is within 16 GB (v5e), 32 (v6e) or 95 (v5p).
TFLOP needed: matrix products of the whole program (benchmarks/floor.py) over the number of chips; counted: the
compiler's own figure, in which the body of a loop counts once and Pallas kernels not at all. Kernels and collectives:
how many the program has, and in brackets how often they run. scheduled: the scheduler's cycles of every instruction
times the iterations of the loops around it, at the chip's clock. kernels: Pallas kernels, for the FLOPs that they
execute, masked or not, at {hlo_tpu.KERNEL_RATE:.0%} of the peak, or for their bytes at the memory's rate, whichever
takes longer.
exchanged: collectives, for the bytes that a device sends, over one link, in one direction, beside nothing else.
estimate: the sum of the three. of roofline: needed / peak over the estimate. at best: with Pallas kernels at the peak
and collectives for nothing, the basis of earlier figures.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_aot", description=__doc__.split("\n")[0])
    aot.add_options(parser)
    parser.add_argument(
        "--topology",
        nargs="+",
        default=["v5e:2x2", "v5e:2x4"],
        metavar="NAME",
        help=f"topologies, of {' '.join(TOPOLOGIES)}",
    )
    options = parser.parse_args()
    print(f"jax {jax.__version__}, libtpu {metadata.version('libtpu')}; {STEPS} steps, bfloat16\n")
    aot.print_programs(options, [(name, 1) for name in options.topology], COLUMNS, describe)
    print(NOTES)


def describe(program: Program, compiled: aot.Compiled, chip: Chip, mesh: Mesh) -> list[str]:
    """Return what is the compiler's, and what follows from it."""
    found = hlo_tpu.read(compiled.text, chip, mesh.size)
    needed = program.flops / mesh.size
    floor = max(needed / chip.peak, program.bytes / mesh.size / chip.bandwidth)
    return [
        f"{needed / 1e12:.2f}",
        f"{compiled.flops_counted / 1e12:.2f}",
        f"{found.kernel_counts[0]} ({found.kernel_counts[1]})",
        ", ".join(f"{kind} {n} ({runs})" for kind, (n, runs) in found.collectives.items()),
        *(f"{time:.4g}" for time in (found.scheduled, found.kernels, found.exchanged, found.estimate)),
        f"{floor / found.estimate:.0%}",
        f"{found.at_best:.4g}",
        f"{floor / found.at_best:.0%}",
    ]


if __name__ == "__main__":
    main()
