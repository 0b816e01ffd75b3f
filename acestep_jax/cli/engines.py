"""The options of `acestep-jax serve` for where songs are made: in this process, Ray actors, or a slice of hosts."""

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from acestep_jax.cli.parser import Parser
from acestep_jax.cli.runtime import add_distributed, start, use_compilation_cache
from acestep_jax.distributed import all_succeed, parse_mesh
from acestep_jax.errors import InputError
from acestep_jax.serve import slices
from acestep_jax.serve.local import LocalEngine

# Function from options and a mesh to the models and the adapters.
Offer = Callable[[Any, Any], tuple[list[Any], dict[str, str]]]


def add_engine(parser: Parser) -> None:
    """Add --distributed, --replicas and --replica-resources."""
    add_distributed(parser, "with a mesh over all their devices; process 0 answers HTTP")
    parser.add_argument(
        "--replicas",
        type=int,
        metavar="N",
        help="Number of Ray actors that generate the songs. Each has its own devices; --mesh is the mesh of these. The "
        "cluster is the one at RAY_ADDRESS, else the one running on this machine, else a new one. Needs pip install "
        "'acestep-jax[ray]'. Default: this process generates the songs.",
    )
    parser.add_argument(
        "--replica-resources",
        metavar="NAME=N,...",
        help="Resources of each of --replicas, such as GPU=1 or TPU=4. Default: CPU=1.",
    )


def check_engine(options: Any) -> None:
    """Raise InputError if the options contradict each other, or ray is needed and not installed."""
    if options.replicas is None:
        if options.replica_resources is not None:
            raise InputError("--replica-resources: without --replicas this process makes the songs")
        return
    if options.replicas < 1:
        raise InputError(f"--replicas: expected at least 1, found {options.replicas}")
    if options.distributed is not None:
        raise InputError("--replicas, --distributed: expected one of them, found both")
    if importlib.util.find_spec("ray") is None:
        raise InputError("--replicas: ray is not installed; run pip install 'acestep-jax[ray]'")
    _resources(options.replica_resources)


def start_devices(options: Any) -> None:
    """Set up JAX: as one of several processes, or without accelerators if replicas use these."""
    if options.replicas is None:
        start(options.distributed)
    else:
        jax.config.update("jax_platforms", "cpu")  # a replica on this machine may use the accelerator
        use_compilation_cache()


def open_models(options: Any, offer: Offer) -> tuple[list[Any], dict[str, str]]:
    """Return the models and the adapters for this process.

    Raises:
        InputError: if they cannot be found; also if another process fails.
    """
    with all_succeed():
        return offer(options, None if options.replicas is not None else parse_mesh(options.mesh))


def open_engine(options: Any, models: Sequence[Any], adapters: Mapping[str, str], offer: Offer, **settings: Any) -> Any:
    """Return the requested engine, in the process that answers HTTP; the others call `follow`.

    Args:
        offer: the function that returned models and adapters.
        settings: settings of the engine.

    Raises:
        InputError: if other processes or the cluster cannot be joined.
    """
    if options.replicas is not None:
        from acestep_jax.serve.ray_engine import RayEngine

        offered = functools.partial(_in_replica, _absolute(options), offer)
        resources = _resources(options.replica_resources)
        return RayEngine(models, offered, options.replicas, resources=resources, adapters=adapters, **settings)
    if jax.process_count() == 1:
        return LocalEngine(models, adapters=adapters, **settings)
    channels = slices.accept_followers(models, adapters, dtype=options.dtype, mesh=options.mesh)
    return slices.LeaderEngine(models, channels, adapters=adapters, **settings)


@contextlib.contextmanager
def ended(engine: Any) -> Iterator[None]:
    """Stop the engine at the end, so that its other processes always exit; leave a broken slice."""
    try:
        yield
    finally:
        engine.stop(0)
        if isinstance(engine, slices.LeaderEngine) and engine.broken:
            slices.leave()


def follow(options: Any, models: Sequence[Any], adapters: Mapping[str, str]) -> int:
    """Make the batches of process 0 until it exits; return the exit status.

    Raises:
        InputError: if process 0 cannot be joined.
    """
    with all_succeed():  # process 0 opens its folder
        pass
    channel = slices.connect_to_leader(models, adapters, dtype=options.dtype, mesh=options.mesh)
    return slices.follow(models, channel, adapters=adapters)


def _resources(text: str | None) -> dict[str, float]:
    """Return the resources of each replica."""
    found: dict[str, float] = {}
    for part in (text or "CPU=1").split(","):
        name, _, amount = part.partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            found[name] = 0.0
        if not name or not 0 < found[name] < math.inf:
            raise InputError(f"--replica-resources: expected NAME=N,... such as GPU=1, found {text!r}")
    return found


def _absolute(options: Any) -> Any:
    """Return the options with absolute paths, which are valid wherever a replica is started."""
    copy = options.clone()
    copy.checkpoint = [_path(text) for text in options.checkpoint or ()] or None
    copy.lora = [_path(text) for text in options.lora or ()] or None
    copy.planner = options.planner and _path(options.planner)
    return copy


def _path(text: str) -> str:
    name, equals, source = text.rpartition("=") if not Path(text).exists() else ("", "", text)
    return name + equals + (str(Path(source).absolute()) if Path(source).exists() else source)


def _in_replica(options: Any, offer: Offer) -> tuple[list[Any], dict[str, str]]:
    """Return the models and adapters of a replica, on its own devices."""
    start()
    return offer(options, parse_mesh(options.mesh))
