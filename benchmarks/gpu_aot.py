"""Ahead-of-time compilation for NVIDIA GPUs that are not present: `python -m benchmarks.gpu_aot`.

Needs `jax[cuda13]` or `jax[cuda12]`, but neither a card nor a driver. Compiles the programs as the pipeline and
training run them, in the precision that the library chooses for the card, and prints what one card needs and which
kernels run. Nothing runs: XLA estimates no times for GPUs, and chooses tiles without trying them.
"""

import argparse

from benchmarks import aot, hlo_gpu  # isort: skip

import jax
from jax.sharding import Mesh

from benchmarks.programs import STEPS, Program
from benchmarks.targets import CARDS, Card

COLUMNS = (
    "TFLOP needed",
    "TFLOP in kernels",
    "kernels",
    "kernels a step",
    "kernels of a period of layers",
    "copied GB a step",
    "traffic GB a step",
    "floor s",
    "bound s",
    "of floor",
)
NOTES = f"""
All figures are of one card. total: arguments + temporary + output; the program fits if that is within what JAX takes of
the card's memory. TFLOP needed: matrix products (benchmarks/floor.py); in kernels: of the products, convolutions and
attention kernels in the program, with loops multiplied out. kernels: launches of the program, by kind. A period of
layers is one pass of the loop over layers: a layer with a window and one without; where memory allows, denoising has no
such loop, but unstacked layers. copied: read and written by kernels
that only move values. A step is one of the {STEPS} of denoising, of training or of the planner, or any other program.
floor: FLOPs needed at the peak, or weights read once a step at the memory's rate, whichever takes longer.
bound: the sum over kernels of their FLOPs at the peak or their bytes at the memory's rate, whichever takes longer:
what the program would take if every kernel reached the data sheet. It is no estimate of the time. of floor: floor over
bound, at best 100%.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_aot", description=__doc__.split("\n")[0])
    aot.add_options(parser)
    parser.add_argument("--card", nargs="+", choices=CARDS, default=["h100"], help="cards [h100]")
    parser.add_argument("--count", type=int, default=1, help="number of cards of one host [1]")
    options = parser.parse_args()
    print(f"jax {jax.__version__}\n")
    aot.print_programs(options, [(name, options.count) for name in options.card], COLUMNS, describe)
    print(NOTES)


def describe(program: Program, compiled: aot.Compiled, card: Card, mesh: Mesh) -> list[str]:
    """Return what the program's text shows."""
    found = hlo_gpu.read(compiled.text, card, mesh.size, program.layer_trips)
    needed = program.flops / mesh.size
    floor = max(needed / card.peak, program.bytes / mesh.size / card.bandwidth)
    layer = found.layer
    return [
        f"{needed / 1e12:.2f}",
        f"{found.flops / 1e12:.2f}",
        f"{sum(found.kernels.values())}: {hlo_gpu.text_of(found.kernels)}",
        f"{sum(found.kernels.values()) / program.steps:.0f}",
        "" if layer is None else f"{sum(layer.values())}: {hlo_gpu.text_of(layer)}",
        f"{found.copied / program.steps / 1e9:.2f}",
        f"{found.traffic / program.steps / 1e9:.2f}",
        f"{floor:.4g}",
        f"{found.bound:.4g}",
        f"{floor / found.bound:.0%}",
    ]


if __name__ == "__main__":
    main()
