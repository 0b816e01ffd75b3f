"""The programs of `benchmarks.gpu_aot`, run on the attached NVIDIA GPU: `python -m benchmarks.gpu`.

Weights are random. With `--kernels`, the kernels that take longest are listed for each program.
"""

import argparse
import os
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cuda")

from benchmarks import aot, gpu_aot, hlo_gpu  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.placement import memory_limit
from benchmarks.programs import Program, programs
from benchmarks.targets import CARDS, Card, make_mesh

COLUMNS = ("ms", "lowest - highest", "floor ms", "of floor", "bound ms", "kernels", "GPU busy ms", "compile s")
NOTES = """
ms: median of a pass, with the lowest and the highest; a pass is what `gpu_aot` counts: all steps of denoising, one step
of the planner or of training, or any other program. floor and bound: see `gpu_aot`; the bound is that of the program
as it was compiled here. GPU busy: the sum over kernels of their times in one more pass, with a profiler.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    aot.add_options(parser)
    parser.add_argument("--runs", type=int, default=5, help="passes after the first [5]")
    parser.add_argument("--kernels", type=int, default=0, help="kernels to list for each program [0]")
    options = parser.parse_args()
    device = jax.devices()[0]
    if options.mesh:
        parser.error("--mesh: expected none, the programs run on one GPU")
    names = (name for name in CARDS if re.search(rf"\b{name}\b", device.device_kind, re.IGNORECASE))
    card = CARDS.get(next(names, ""))
    if card is None:
        raise SystemExit(f"benchmarks.gpu: expected one of {', '.join(CARDS)}, found {device.device_kind}")
    print(f"{device.device_kind}, jax {jax.__version__}\n")
    aot.print_row(("program", "audio", "batch", *aot.MEMORY[:4], *COLUMNS))
    aot.print_row(["---"] * (7 + len(COLUMNS)))
    lists = []
    for batch in options.batch:
        mesh = make_mesh([device], None, batch)
        for seconds in options.seconds:
            for program in programs(options, mesh, seconds, batch, card.precision, memory_limit(device)):
                row = program.name, f"{seconds:g} s", str(batch)
                cells, kernels = measure(program, card, options, row)
                aot.print_row((*row, *cells))
                lists.append((f"{row[0]}, {row[1]}, batch {row[2]}", kernels))
    print(NOTES)
    for name, kernels in lists if options.kernels else []:
        print(f"\n{name}\n")
        aot.print_row(("ms", "of all", "launches", "kernel"))
        aot.print_row(["---"] * 4)
        whole = sum(ms for ms, _ in kernels.values())
        for kernel, (ms, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[: options.kernels]:
            aot.print_row((f"{ms:.3f}", f"{ms / whole:.1%}", count, kernel))


def measure(
    program: Program, card: Card, options: argparse.Namespace, row: tuple[str, str, str]
) -> tuple[list[str], dict[str, tuple[float, float]]]:
    """Return the cells after the first ones of a row, and ms and launches of each kernel in a pass."""
    arguments = random_arguments(program)
    lowered = program.function.trace(*arguments, **program.static).lower()
    start = time.perf_counter()
    executable: Any = lowered.compile(compiler_options=dict(map(aot.xla_option, options.xla)))
    compiled = aot.Compiled.of(executable, time.perf_counter() - start)
    compiled.write(options.hlo, row)
    call = _repeatable(arguments, executable)
    times = [call() / program.passes * 1e3 for _ in range(options.runs)]
    kernels = profile(call, program.passes)
    found = hlo_gpu.read(compiled.text, card, 1, program.layer_trips)
    floor, median = gpu_aot.floor_seconds(program, card) * 1e3, statistics.median(times)
    cells = [
        *compiled.cells,
        f"{median:.4g}",
        f"{min(times):.4g} - {max(times):.4g}",
        f"{floor:.4g}",
        f"{floor / median:.0%}",
        f"{found.bound * 1e3:.4g}",
        f"{sum(found.kernels.values())}",
        f"{sum(ms for ms, _ in kernels.values()):.4g}",
        f"{compiled.seconds:.0f}",
    ]
    return cells, kernels


def random_arguments(program: Program) -> tuple:
    """Return arrays for the arguments of a program: random weights and activations, and `program.values`."""
    count = 0

    def make(path, leaf):
        nonlocal count
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        count += 1
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), leaf.shape)
        name = jax.tree_util.keystr(path)
        value = next((value for end, value in program.values.items() if name.endswith(end)), 0)
        if jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype == bool:
            return jnp.asarray(np.broadcast_to(np.asarray(value, leaf.dtype), leaf.shape))
        return _normal(jax.random.key(count), leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(make, program.arguments)


@jax.jit(static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Return ones for vectors, else values that a product with them keeps at their size."""
    if len(shape) < 2:
        return jnp.ones(shape, dtype)
    return (jax.random.normal(key, shape, jnp.float32) * shape[-2] ** -0.5).astype(dtype)


def _repeatable(arguments: tuple, executable: Any) -> Callable[[], float]:
    """Return a function that runs the program and returns its seconds; run it once. Arguments that the program consumes
    are copied before each run."""
    copies = jax.tree.map(jnp.copy, arguments)
    jax.block_until_ready(executable(*copies))
    consumed = [any(x.is_deleted() for x in jax.tree.leaves(copy) if isinstance(x, jax.Array)) for copy in copies]
    del copies

    def call() -> float:
        given = [jax.tree.map(jnp.copy, x) if gone else x for x, gone in zip(arguments, consumed, strict=True)]
        jax.block_until_ready(given)
        start = time.perf_counter()
        jax.block_until_ready(executable(*given))
        return time.perf_counter() - start

    return call


def profile(call: Callable[[], float], passes: int) -> dict[str, tuple[float, float]]:
    """Return ms and launches of each kernel in one pass of `call`, by name."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        files = list(Path(folder).rglob("*.xplane.pb"))
        if not files:
            return {}
        data = jax.profiler.ProfileData.from_file(str(files[0]))
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                times[event.name] += event.duration_ns / 1e6 / passes
                counts[event.name] += 1
    return {name: (ms, round(counts[name] / passes, 1)) for name, ms in times.items()}


if __name__ == "__main__":
    main()
