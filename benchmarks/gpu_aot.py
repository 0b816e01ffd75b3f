"""Ahead-of-time compilation for NVIDIA GPUs that are not present: `python -m benchmarks.gpu_aot`.

It needs `jax[cuda13]` or `jax[cuda12]`, but neither a card nor a driver. It compiles the programs as the pipeline and
training run them, in the precision that the library chooses for the card, and prints memory and kernels per card.
Nothing is run: XLA estimates no times for GPUs, and chooses tiles without autotuning.
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
All figures are per card. total: arguments + temporary + output; the program fits if this is at most the part of the
card's memory that JAX uses. TFLOP needed: matrix products (benchmarks/floor.py); in kernels: the products, convolutions
and attention kernels in the program, with loops multiplied out. kernels: launches by the program, by kind. A period of
layers is one iteration of the loop over layers: a layer with a window and one without; if memory allows, denoising has
unstacked layers instead of this loop. copied: bytes read and written by kernels that only move values. A step is one of
the {STEPS} of denoising, of training or of the planner, or any other program.
floor: the FLOPs needed at peak rate, or reading the weights once per step at the memory's bandwidth, whichever takes
longer. bound: the sum over kernels of their FLOPs at peak rate or their bytes at the memory's bandwidth, whichever
takes longer: the time of the program if every kernel reached the data sheet's figures. It does not estimate the actual
time. of floor: floor / bound, at best 100%.
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
    """Return the columns that follow from the program's text."""
    found = hlo_gpu.read(compiled.text, card, mesh.size, program.layer_trips)
    floor, layer = floor_seconds(program, card, mesh.size), found.layer
    return [
        f"{program.flops / mesh.size / 1e12:.2f}",
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


def floor_seconds(program: Program, card: Card, count: int = 1) -> float:
    """Return the floor on each of `count` cards, s."""
    return max(program.flops / card.peak, program.bytes / card.bandwidth) / count


if __name__ == "__main__":
    main()
