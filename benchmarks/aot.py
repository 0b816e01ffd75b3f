"""Shared parts of ahead-of-time compilation for TPUs and GPUs: the options, and a table with one row per program."""

import argparse
import dataclasses
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Imported first, because it prepares the environment for JAX.
from benchmarks.targets import Target, devices_of, make_mesh, mesh_text, target_of  # isort: skip

import jax
from jax.sharding import Mesh

from acestep_jax.models.runtime import QUANTIZATIONS
from benchmarks.floor import PLANNER_SIZES, TRANSFORMER_SIZES
from benchmarks.programs import Program, programs

STAGES = ("denoise", "decode", "encode", "train", "plan")
HEAD = ("program", "audio", "batch", "device", "mesh")
MEMORY = ("arguments GB", "temporary GB", "output GB", "total GB", "fits")


def add_options(parser: argparse.ArgumentParser, stages: Sequence[str] = STAGES) -> None:
    """Add the options that select the programs."""
    add = parser.add_argument
    add("--stage", nargs="+", choices=stages, default=["denoise", "decode"], help="programs [denoise decode]")
    add(
        "--size",
        nargs="+",
        choices=TRANSFORMER_SIZES,
        default=list(TRANSFORMER_SIZES),
        help="sizes of the transformer [all]",
    )
    add("--planner", nargs="+", choices=PLANNER_SIZES, default=["0.6B"], help="sizes of the planner [0.6B]")
    add("--seconds", type=float, nargs="+", default=[240, 600], help="lengths of audio [240 600]")
    add("--batch", type=int, nargs="+", default=[1], help="batch sizes [1]")
    add("--mesh", help="mesh, such as tensor=2,sequence=4 [data or sequence, as the batch allows]")
    add("--method", nargs="+", choices=("lora", "full"), default=["lora"], help="training methods [lora]")
    add("--rank", type=int, default=64, help="rank of adapters [64]")
    add("--remat", choices=("none", "dots", "full"), default="none", help="rematerialisation in training [none]")
    add("--accumulation", type=int, default=1, help="number of parts of a training batch [1]")
    add("--layers", type=int, help="layers of the transformer [all]")
    add("--condition-tokens", type=int, default=512, help="number of tokens to attend to [512]")
    add("--quantization", choices=QUANTIZATIONS, help="8-bit weights of layers in denoising and the planner [none]")
    add("--xla", nargs="+", default=[], metavar="NAME=VALUE", help="further options of XLA's compiler")
    add("--hlo", type=Path, metavar="DIR", help="folder for the compiled programs")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The text and the memory of a compiled program, in bytes per chip."""

    text: str
    arguments: int
    temporary: int
    output: int  # without outputs that reuse the memory of an argument
    flops_counted: float  # the compiler's count: a loop's body counts once, and custom calls are left out
    seconds: float  # compile time

    @classmethod
    def of(cls, compiled: Any, seconds: float) -> "Compiled":
        """Return the figures of a program that took so long to compile."""
        memory = compiled.memory_analysis()
        output = memory.output_size_in_bytes - memory.alias_size_in_bytes
        sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes, output
        flops = (compiled.cost_analysis() or {}).get("flops", 0)
        return cls(compiled.as_text(), *sizes, flops, seconds)

    @property
    def total(self) -> int:
        return self.arguments + self.temporary + self.output

    @property
    def cells(self) -> list[str]:
        """Return the cells of `MEMORY`, without the last."""
        return [f"{size / 1e9:.2f}" for size in (self.arguments, self.temporary, self.output, self.total)]

    def write(self, folder: Path | None, row: Iterable[str]) -> None:
        """Write the text into a folder, if there is one, with the cells of a row as its name."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"[^\w.]+", "-", " ".join(row))
            (folder / f"{name}.txt").write_text(self.text, encoding="utf-8")


def compile_program(
    program: Program, mesh: Mesh, target: Target, options: dict[str, str | bool] | None = None
) -> Compiled:
    """Compile a program for devices that are not present, with further XLA options; raise jax.errors.JaxRuntimeError if
    that fails."""
    with jax.set_mesh(mesh):
        lowered = program.function.trace(*program.arguments, **program.static).lower(
            lowering_platforms=(target.platform,)
        )
        start = time.perf_counter()
        compiled: Any = lowered.compile(compiler_options=options)
        seconds = time.perf_counter() - start
    return Compiled.of(compiled, seconds)


def print_programs(options: argparse.Namespace, device_sets: Iterable[tuple[str, int]], columns, describe) -> None:
    """Print a table with a row for each program on each of the device sets, given as (name, count).

    Args:
        columns: columns to add to those that all tables have.
        describe: function from a program, its `Compiled`, its target and its mesh to these columns.
    """
    print_row((*HEAD, *MEMORY, *columns, "compile s"))
    print_row(["---"] * (len(HEAD) + len(MEMORY) + len(columns) + 1))
    for name, count in device_sets:
        target, devices = target_of(name), devices_of(name, count)
        for batch in options.batch:
            mesh = make_mesh(devices, options.mesh, batch)
            for seconds in options.seconds:
                for program in programs(options, mesh, seconds, batch, target.precision, target.usable):
                    label = f"{count} x {name}" if count > 1 else name
                    row = [program.name, f"{seconds:g} s", str(batch), label, mesh_text(mesh)]
                    print_row(row + _cells(program, mesh, target, row, options, columns, describe))


def _cells(program, mesh, target, row, options: argparse.Namespace, columns, describe) -> list[str]:
    try:
        compiled = compile_program(program, mesh, target, dict(map(xla_option, options.xla)))
    except jax.errors.JaxRuntimeError as error:
        if not (used := re.search(r"Used ([\d.]+)G of", str(error))):
            raise
        total = float(used[1]) * 2**30
        return ["", "", "", f"{total / 1e9:.2f}", "**no**", *[""] * (len(columns) + 1)]
    compiled.write(options.hlo, row)
    fits = "yes" if compiled.total <= target.usable else "**no**"
    return [
        *compiled.cells,
        fits,
        *describe(program, compiled, target, mesh),
        f"{compiled.seconds:.0f}",
    ]


def xla_option(text: str) -> tuple[str, str | bool]:
    name, _, value = text.partition("=")
    return name, {"true": True, "false": False}.get(value, value)


def print_row(cells: Iterable[object]) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
