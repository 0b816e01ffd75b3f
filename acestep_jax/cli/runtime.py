"""What commands share: options of the checkpoint and the devices, and the set-up of JAX."""

import os
from pathlib import Path
from typing import Any

import jax
from jsonargparse import ArgumentParser

from acestep_jax.cli.parser import Parser
from acestep_jax.distributed import MESH_AXES, join_processes
from acestep_jax.errors import InputError
from acestep_jax.io.checkpoint import SMALL_MODEL
from acestep_jax.models.config import DTYPES


def add_checkpoint(parser: Parser) -> None:
    """Add --checkpoint."""
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        default=str(SMALL_MODEL),
        help="Native checkpoint, a folder. Default: the small model of this package.",
    )


def add_dtype(parser: Parser) -> None:
    """Add --dtype."""
    parser.add_argument(
        "--dtype", metavar="DTYPE", help=f"Dtype of weights and computation: {', '.join(DTYPES)}. Default: as stored."
    )


def add_devices(parser: Parser) -> None:
    """Add --mesh and --distributed."""
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help=f"Number of devices along each of the axes {', '.join(MESH_AXES)}. Default: one device.",
    )
    add_distributed(parser)


def add_distributed(parser: ArgumentParser) -> None:
    """Add --distributed."""
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="",
        metavar="HOST:PORT,COUNT,INDEX",
        help="Run as one of several processes, with a mesh over the devices of all: the address of process 0, the "
        "number of processes and the index of this one. Without a value JAX finds out (TPU pods, SLURM, Open MPI).",
    )


def start(distributed: str | None = None) -> None:
    """Join the other processes, check that the backend can be used, and keep compiled programs on disk.

    Raises:
        InputError: if JAX_PLATFORMS names a backend that is not installed, or there is no cluster.
    """
    if distributed is not None:
        join_processes(distributed)
    check_backend()
    use_compilation_cache()


def check_backend() -> list[Any]:
    """Return the devices.

    Raises:
        InputError: if JAX_PLATFORMS names a backend that is not installed.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX raises nothing narrower
        wanted = os.environ.get("JAX_PLATFORMS", "")
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"JAX_PLATFORMS: {wanted!r} cannot be used ({reason[:200]}); install 'acestep-jax[cuda]' or "
            "'acestep-jax[tpu]', or unset it"
        ) from None


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that they are compiled once for all runs: where JAX_COMPILATION_CACHE_DIR
    says, else in the user's cache folder."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "acestep-jax"))
