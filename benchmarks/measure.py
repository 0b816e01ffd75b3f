"""Timing of several implementations in one run, with alternating calls, so that all see the same machine state."""

import argparse
import gc
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch


class Timing(NamedTuple):
    """Times in seconds: `cold` is the first call, with compilation; the others are for the calls after it."""

    cold: float
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} - {self.high:.4g})"


def alternate(sides: dict[str, Callable[[], object]], runs: int) -> dict[str, Timing]:
    """Time each side once, cold, then `runs` times in alternation. A call returns when its result is ready."""
    cold = {name: _seconds(call) for name, call in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, call in sides.items():
            times[name].append(_seconds(call))
    return {name: Timing(cold[name], statistics.median(t), min(t), max(t)) for name, t in times.items()}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Side(NamedTuple):
    """An implementation, ready to be called."""

    call: Callable[[], object]  # returns when the device is done
    result: Callable[[], np.ndarray]  # the computed values, float32


COLUMNS = ("audio", "side", "cold", "warm", "torch / ours", "TFLOP/s", "time / floor", "peak memory", "error")


def add_options(parser: argparse.ArgumentParser, seconds: list[float], runs: int) -> None:
    """Add the options of every benchmark, with the defaults of --seconds and --runs."""
    add = parser.add_argument
    add("--seconds", type=float, nargs="+", default=seconds, help=f"lengths of audio [{' '.join(map(str, seconds))}]")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of weights and products [float32]")
    add("--batch", type=int, default=1, help="number of items computed at once [1]")
    add(
        "--torch",
        nargs="*",
        choices=("eager", "compile"),
        default=["eager", "compile"],
        help="forms of PyTorch to compare with [both]",
    )
    add("--runs", type=int, default=runs, help=f"calls of each side after the first [{runs}]")


def add_compare_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compare`."""
    add = parser.add_argument
    add("--memory", action="store_true", help="also measure peak memory, each side in its own process")
    add("--trace", metavar="DIR", help="write a profile of one more call of ours")


def compare(make_sides: Callable[..., dict[str, Side]], arguments: tuple, flops: float, options) -> Iterator[tuple]:
    """Yield the cells of `COLUMNS`, without the first, for each side.

    The floor is `flops` at the rate that a large `x @ w` reaches in JAX in the same run. The error is the maximum
    difference from the first other side, relative to its largest value.

    Args:
        make_sides: returns the sides for `arguments`, the last of which lists their names, "JAX" first.
        arguments: the arguments of `make_sides`.
        flops: the operations of one call.
        options: command-line options with `runs`, `dtype`, `memory` and `trace`.
    """
    sides = make_sides(*arguments)
    calls = {name: side.call for name, side in sides.items()}
    timings = alternate(calls | {PRODUCT: _large_product(options.dtype)}, options.runs)
    errors = dict.fromkeys(sides, "")
    if len(sides) > 1:
        ours, theirs = (side.result() for side in list(sides.values())[:2])
        errors["JAX"] = f"{np.abs(ours - theirs).max() / np.abs(theirs).max():.1e}"
    if options.trace:
        with jax.profiler.trace(options.trace):
            calls["JAX"]()
    del sides, calls

    product = timings.pop(PRODUCT)
    rate = 2.0 * PRODUCT_SIZE**3 / product.median
    for name, timing in timings.items():
        memory = f"{peak_memory(make_sides, *arguments[:-1], [name]) / 1e6:.0f} MB" if options.memory else ""
        yield (
            name,
            f"{timing.cold:.1f}",
            timing,
            f"{timing.median / timings['JAX'].median:.2f}",
            f"{flops / timing.median / 1e12:.3f}",
            f"{timing.median / (flops / rate):.2f}",
            memory,
            errors[name],
        )
    yield PRODUCT, f"{product.cold:.1f}", product, "", f"{rate / 1e12:.3f}", "", "", ""


PRODUCT = "x @ w"
PRODUCT_SIZE = 4096 if jax.default_backend() == "cpu" else 8192


def _large_product(dtype: str) -> Callable[[], object]:
    x = jax.random.normal(jax.random.key(0), (PRODUCT_SIZE, PRODUCT_SIZE), dtype)
    product = jax.jit(lambda x: x @ x)
    return lambda: product(x).block_until_ready()


def torch_device() -> torch.device:
    """Return the device that JAX uses, as a torch device."""
    return torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")


def wait_for_torch() -> None:
    """Return when PyTorch's work on the device is done."""
    if torch_device().type == "cuda":
        torch.cuda.synchronize()


def jax_side(function: Callable[[], jax.Array]) -> Side:
    return Side(lambda: function().block_until_ready(), lambda: np.asarray(function(), np.float32))


def torch_side(function: Callable[[], torch.Tensor]) -> Side:
    """Return the side that calls `function` without gradients."""

    def call() -> torch.Tensor:
        with torch.inference_mode():
            result = function()
        wait_for_torch()
        return result

    return Side(call, lambda: call().float().cpu().numpy())


def peak_memory(make_sides: Callable[..., dict[str, Side]], *arguments) -> float:
    """Return the peak bytes of the second call of the single side that `arguments` name, in its own process.

    On the CPU, this is the resident memory added by the call; on a GPU, the allocator's peak including parameters.
    """
    # Without these, glibc keeps freed blocks, which would then count as used before the call.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(1 << 17)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (make_sides, arguments))


def _peak_memory(make_sides, arguments):
    ((name, side),) = make_sides(*arguments).items()
    side.call()
    if jax.default_backend() == "gpu":
        return (
            torch.cuda.max_memory_allocated() if name != "JAX" else jax.devices()[0].memory_stats()["peak_bytes_in_use"]
        )
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    side.call()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


def print_header() -> None:
    """Print the machine and the versions that the figures below were measured with."""
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "torch", "diffusers"))
    device = jax.devices()[0]
    name = f"{os.cpu_count()} cores, {_processor()}" if device.platform == "cpu" else device.device_kind
    print(f"{name}; Python {platform.python_version()}, {', '.join(versions)}\n")


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        lines = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return lines[0] if lines else platform.processor()


def print_table(columns: Iterable[str]) -> Callable[..., None]:
    """Print the head of a Markdown table; return the function that prints a row of it."""
    columns = list(columns)

    def row(*cells: object) -> None:
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)

    row(*columns)
    row(*["---"] * len(columns))
    return row
