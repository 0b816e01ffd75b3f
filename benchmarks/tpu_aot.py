"""Ahead-of-time compilation for TPUs that are not present: `python -m benchmarks.tpu_aot`, with `jax[tpu]` installed.

It compiles the denoising loop (8 turbo steps) and the decoder in bfloat16, as the pipeline runs them, or a step of
training or of the planner, for real topologies through libtpu, and prints figures per chip. Nothing is run: times are
the compiler's estimates, not measurements.
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
All figures are per chip. output: outputs that do not reuse the memory of an argument. total: arguments + temporary +
output; the program fits if this is at most 16 GB (v5e), 32 (v6e) or 95 (v5p).
TFLOP needed: matrix products of the whole program (benchmarks/floor.py) divided by the number of chips; counted: the
compiler's own figure, which counts the body of a loop once and Pallas kernels not at all. Kernels, collectives: their
number in the program, and in brackets how often they run. scheduled: the scheduler's cycles of every instruction times
the iterations of the loops around it, at the chip's clock. kernels: Pallas kernels, by the FLOPs that they execute,
masked or not, at {hlo_tpu.KERNEL_RATE:.0%} of the peak, or by their bytes at the memory's bandwidth, whichever takes
longer.
exchanged: collectives, by the bytes that a device sends over one link in one direction, without overlap.
estimate: the sum of the three. of roofline: needed / peak, divided by the estimate. at best: with Pallas kernels at the
peak and free collectives, as in earlier figures.
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
    """Return the columns of the compiler's figures, and those derived from them."""
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
