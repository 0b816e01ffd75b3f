"""Ahead-of-time compilation for TPUs that are not present: `python -m benchmarks.tpu_aot`, with `jax[tpu]` installed.

Compiles the denoising loop (8 turbo steps) and the decoder in bfloat16, as the pipeline runs them, or a step of
training, for real topologies through libtpu, and prints what one chip needs. Nothing runs: times are the compiler's
estimates, not measurements.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

# Before jax is imported. libtpu would otherwise query the network for its TPU, and allow only one process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from acestep_jax.distributed import MESH_AXES
from benchmarks import hlo
from benchmarks.floor import TRANSFORMER_SIZES
from benchmarks.tpu_programs import STEPS, Program, programs


@dataclasses.dataclass(frozen=True)
class Chip:
    """Hold a chip's figures, memory and peak from Google's data sheets; at the clock, the units reach the peak."""

    memory: float  # bytes
    peak: float  # bfloat16 FLOP/s
    clock: float  # Hz


CHIPS = {
    "v5e": Chip(16e9, 197e12, 1.5e9),  # 4 units of 128 x 128
    "v5p": Chip(95e9, 459e12, 1.75e9),  # 8 units of 128 x 128
    "v6e": Chip(32e9, 918e12, 1.75e9),  # 4 units of 256 x 256
}
TOPOLOGIES = ("v5e:1x1", "v6e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v6e:2x2", "v6e:2x4", "v5p:2x2x1")

COLUMNS = (
    "program",
    "audio",
    "batch",
    "chips",
    "mesh",
    "arguments GB",
    "temporary GB",
    "output GB",
    "total GB",
    "fits",
    "TFLOP needed",
    "TFLOP counted",
    "Pallas kernels",
    "collectives",
    "estimate s",
    "of roofline",
    "compile s",
)
NOTES = """
All figures are of one chip. output: what does not reuse the memory of an argument. total: arguments + temporary +
output; the program fits if that is within 16 GB (v5e), 32 (v6e) or 95 (v5p).
TFLOP needed: matrix products of the whole program (benchmarks/floor.py) over the number of chips; counted: the
compiler's own figure, in which the body of a loop counts once and Pallas kernels not at all. Kernels and collectives:
how many the program has, and in brackets how often they run. estimate: the scheduler's cycles of every instruction
times the iterations of the loops around it, at the chip's clock, plus Pallas kernels as if they reached the peak;
collectives are not included. of roofline: needed / peak over the estimate, so at best that.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_aot", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--stage",
        nargs="+",
        choices=("denoise", "decode", "train"),
        default=["denoise", "decode"],
        help="programs [denoise decode]",
    )
    add(
        "--size",
        nargs="+",
        choices=TRANSFORMER_SIZES,
        default=list(TRANSFORMER_SIZES),
        help="sizes of the transformer [all]",
    )
    add(
        "--topology",
        nargs="+",
        default=["v5e:2x2", "v5e:2x4"],
        metavar="NAME",
        help=f"topologies, of {' '.join(TOPOLOGIES)}",
    )
    add("--seconds", type=float, nargs="+", default=[240, 600], help="lengths of audio [240 600]")
    add("--batch", type=int, nargs="+", default=[1], help="batch sizes [1]")
    add("--mesh", help="mesh, such as tensor=2,sequence=4 [data, or tensor and sequence, as the batch allows]")
    add("--method", nargs="+", choices=("lora", "full"), default=["lora"], help="methods of training [lora]")
    add("--rank", type=int, default=64, help="rank of adapters [64]")
    add("--remat", choices=("none", "dots", "full"), default="none", help="rematerialisation in training [none]")
    add("--accumulation", type=int, default=1, help="number of parts of a training batch [1]")
    add("--layers", type=int, help="layers of the transformer [all]")
    add("--condition-tokens", type=int, default=512, help="number of tokens to attend to [512]")
    add("--hlo", type=Path, metavar="DIR", help="folder for the compiled programs")
    options = parser.parse_args()

    print(f"jax {jax.__version__}, libtpu {metadata.version('libtpu')}; {STEPS} steps, bfloat16\n")
    print_row(COLUMNS)
    print_row(["---"] * len(COLUMNS))
    for topology in options.topology:
        devices = topology_devices(topology)
        chip = CHIPS[topology.split(":")[0]]
        for batch in options.batch:
            mesh = make_mesh(devices, options.mesh, batch)
            for seconds in options.seconds:
                for program in programs(options, mesh, seconds, batch):
                    row = [program.name, f"{seconds:g} s", str(batch), topology, mesh_text(mesh)]
                    with jax.set_mesh(mesh):
                        print_row(row + describe(program, mesh.size, chip, options.hlo, row))
    print(NOTES)


def describe(program: Program, chips: int, chip: Chip, folder: Path | None, row: list[str]) -> list[str]:
    """Compile a program; return the rest of its row in the table."""
    needed = program.flops / chips
    lowered = program.function.lower(*program.arguments, **program.static)
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not (used := re.search(r"Used ([\d.]+)G of", str(error))):
            raise
        total = float(used[1]) * 2**30
        return ["", "", "", f"{total / 1e9:.2f}", "**no**", f"{needed / 1e12:.2f}", *[""] * 6]
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^\w.]+", "-", " ".join(row))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    found = hlo.read(text)
    memory = compiled.memory_analysis()
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = memory.argument_size_in_bytes, memory.temp_size_in_bytes, output
    estimate = found.cycles / chip.clock + found.pallas_flops / chip.peak
    return [
        *(f"{size / 1e9:.2f}" for size in (*parts, sum(parts))),
        "yes" if sum(parts) <= chip.memory else "**no**",
        f"{needed / 1e12:.2f}",
        f"{compiled.cost_analysis().get('flops', 0) / 1e12:.2f}",
        f"{found.kernels[0]} ({found.kernels[1]})",
        ", ".join(f"{kind} {n} ({runs})" for kind, (n, runs) in found.collectives.items()),
        f"{estimate:.3f}",
        f"{needed / chip.peak / estimate:.0%}",
        f"{seconds:.0f}",
    ]


def topology_devices(name: str) -> list:
    """Return the devices of a topology such as "v5e:2x2"; of "v5e:1x1", which libtpu does not describe, the first chip
    of a larger one. libtpu's messages that there are none are not shown."""
    chip, _, size = name.partition(":")
    with quiet():
        if size == "1x1":
            return topology_devices(f"{chip}:2x2")[:1]
        return list(topologies.get_topology_desc(name, platform="tpu").devices)


def make_mesh(devices: list, text: str | None, batch: int) -> Mesh:
    """Return a mesh as `distributed.make_mesh` does, over devices that are not present.

    Without `text`, the batch is split if it is a multiple of the devices, else heads and time.
    """
    count = len(devices)
    if text:
        axes = {name: int(n) for name, n in (part.split("=") for part in text.split(","))}
    else:
        axes = dict(data=count) if batch % count == 0 else dict(tensor=2, sequence=count // 2)
    shape = tuple(axes.pop(name, 1) for name in MESH_AXES)
    if axes or math.prod(shape) != count:
        raise SystemExit(f"--mesh: {text} is not a mesh of {', '.join(MESH_AXES)} over {count} chips")
    return jax.make_mesh(shape, MESH_AXES, devices=devices, axis_types=(AxisType.Auto,) * len(shape))


def mesh_text(mesh: Mesh) -> str:
    return ",".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1) or "one chip"


def print_row(cells: Iterable[object]) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what the process writes to standard error, also from libraries outside Python."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


if __name__ == "__main__":
    main()
