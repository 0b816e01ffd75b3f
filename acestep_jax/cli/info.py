"""`acestep-jax info`: versions, this machine and JAX's devices, which models fit, and the contents of a checkpoint."""

import importlib.metadata
import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from acestep_jax import memory, placement
from acestep_jax.cli import machine
from acestep_jax.cli.parser import Parser
from acestep_jax.cli.runtime import add_checkpoint, check_backend, model_folder
from acestep_jax.io import cache, checkpoint
from acestep_jax.io.files import as_path
from acestep_jax.models.kernels.platform import capability_of, default_precision

REASONS = {
    "bfloat16": "fast here, with the range of float32",
    "mixed_float16": "fast products in float16, the rest in float32: this GPU has no bfloat16",
    "float32": "exact; bfloat16 takes half the memory",
}


def add(commands: Any) -> None:
    """Add the command."""
    parser = Parser(
        description="Print versions, the devices of this machine and those that JAX uses, which models fit in memory, "
        "and the networks of a checkpoint."
    )
    add_checkpoint(parser)
    parser.add_argument("--cache", action="store_true", help="List the converted checkpoints in the cache instead.")
    parser.add_argument("--clear", action="store_true", help="Delete the converted checkpoints of --cache.")
    commands.add_subcommand(
        "info", parser, help="Print versions, devices, which models fit, and a checkpoint's networks."
    )


def run(options: Any) -> None:
    """Print everything, or list or clear the cache; warnings do not change the exit status.

    Raises:
        InputError: if JAX_PLATFORMS names a backend that is not installed, or there is no checkpoint.
    """
    if options.cache or options.clear:
        show_cache(clear=options.clear)
        return
    found = machine.probe()
    show(versions())
    show(described(found))
    devices = check_backend()
    show(device_lines(devices))
    if problem := machine.advice(found, jax.default_backend(), machine.installed()):
        print(f"\nWARNING: {problem}\n")
    show(fitting(devices[0], found))
    show(contents(as_path(model_folder(options))))


def show(lines: Iterator[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    for name, value in lines:
        print(f"{name:<24} {value}")


def versions() -> Iterator[tuple[str, str]]:
    """Yield the versions of Python and of the relevant packages, including JAX's plugins."""
    yield "python", platform.python_version()
    packages = ("acestep-jax", "jax", "jaxlib", "flax", "orbax-checkpoint")
    yield from ((name, importlib.metadata.version(name)) for name in packages)
    yield from machine.installed().items()


def described(found: machine.Machine) -> Iterator[tuple[str, str]]:
    """Yield the hardware of the machine, whether JAX sees it or not."""
    if found.nvidia:
        cuda = f", CUDA up to {found.cuda}" if found.cuda else ""
        yield "NVIDIA driver", f"{found.driver}{cuda}" if found.driver else "none"
    if found.memory and found.free:
        yield "host memory", f"{gigabytes(found.memory)}, {gigabytes(found.free)} free"


def device_lines(devices: list[Any]) -> Iterator[tuple[str, str]]:
    """Yield the devices of JAX with their kind and memory."""
    for device in devices:
        parts = [str(device.device_kind)]
        if capability := capability_of(device):
            parts.append(f"compute capability {capability}")
        if (limit := placement.memory_limit(device)) is not None:
            used = device.memory_stats().get("bytes_in_use", 0)
            parts.append(f"JAX may take {gigabytes(limit)}, {gigabytes(limit - used)} of them free")
        yield f"device {device}", ", ".join(parts)
    precision = default_precision()
    yield "dtype by default", f"{precision} ({REASONS[precision]})"


def fitting(device: Any, found: machine.Machine) -> Iterator[tuple[str, str]]:
    """Yield, for each published model, the memory that its songs need, and whether the first device has it."""
    precision = default_precision()
    limit = placement.memory_limit(device)
    limit = found.free if limit is None else limit
    for size in memory.SIZES:
        configs = memory.configs_of(size)
        for kind in (None, "int8"):
            weights = sum(memory.weight_bytes(configs, precision, kind).values())
            whole = [memory.needed_bytes(configs, precision, device.platform, s, kind) for s in memory.SECONDS]
            turns = [memory.needed_in_turn(configs, precision, device.platform, s, kind) for s in memory.SECONDS]
            songs = " / ".join(f"{s:g}" for s in memory.SECONDS)
            needs = " / ".join(f"{size / 1e9:.1f}" for size in whole)
            verdict = "" if limit is None else f": {fits(whole, turns, limit, in_turn=device.platform != 'cpu')}"
            name = f"{size} turbo" if kind is None else f"{size} turbo, {kind}"
            yield name, f"{gigabytes(weights)} of weights; {songs} s need {needs} GB{verdict}"


def fits(whole: list[int], turns: list[int], limit: int, *, in_turn: bool) -> str:
    """Return in words which of the lengths `memory.SECONDS` fit `limit` bytes.

    Args:
        whole, turns: bytes for a song of each length with all networks on the device, and with one network at a time.
        in_turn: whether there is a device that networks could be copied to.
    """
    # A pipeline is loaded for any song, so either all of its networks stay on the device or they take turns.
    if whole[-1] <= limit:
        return "fits"
    longest = max((s for s, size in zip(memory.SECONDS, turns, strict=True) if size <= limit), default=None)
    if not in_turn or longest is None:
        return f"does not fit {gigabytes(limit)}"
    upto = "" if longest == memory.LONGEST else f", up to {longest:g} s"
    return f"fits in turn, with the networks on the host{upto}"


def contents(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the networks of a checkpoint with their sizes and dtypes."""
    yield "checkpoint", str(path)
    manifest = checkpoint.read_manifest(path)
    stored = checkpoint.network_leaves(path, manifest)
    transformer: Any = manifest.configs["transformer"]
    yield "variant", transformer.variant
    for name, leaves in stored.items():
        sizes = [math.prod(leaf.shape) for leaf in leaves.values()]
        dtypes = sorted({str(leaf.dtype) for leaf in leaves.values()})
        yield name, f"{sum(sizes):>13,} parameters, {', '.join(dtypes)}"


def gigabytes(size: int) -> str:
    """Return a number of bytes as text in GB."""
    return f"{size / 1e9:.1f} GB"


def show_cache(*, clear: bool) -> None:
    """Print the converted checkpoints of the cache with their sizes, and delete them if `clear`."""
    folder = cache.cache_folder()
    found = cache.clear(folder) if clear else cache.entries(folder)
    for entry in found:
        words = filter(None, (entry.source, entry.variant, entry.dtype or "dtypes as stored"))
        state = "" if entry.complete else ", incomplete"
        print(f"{entry.size / 1e9:8.2f} GB  {entry.path.name}  ({', '.join(words)}{state})")
    total = sum(entry.size for entry in found)
    what = "deleted" if clear else "in the cache"
    print(f"{total / 1e9:8.2f} GB  {what}, {len(found)} converted checkpoint{'s' * (len(found) != 1)}: {folder}")
