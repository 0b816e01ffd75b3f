"""Shared parts of commands: options for the checkpoint and the devices, and the set-up of JAX."""

import logging
import os
from typing import Any

import jax
from jsonargparse import ArgumentParser

from acestep_jax.cli import machine
from acestep_jax.cli.parser import Parser
from acestep_jax.distributed import MESH_AXES, all_succeed, join_processes
from acestep_jax.errors import InputError
from acestep_jax.io.checkpoint import SMALL_MODEL
from acestep_jax.io.files import user_cache
from acestep_jax.io.native import native_folder
from acestep_jax.loaded import converted_dtype
from acestep_jax.models.runtime import PRECISIONS, QUANTIZATIONS

logger = logging.getLogger(__name__)


def add_checkpoint(parser: Parser) -> None:
    """Add --model, which is also spelled --checkpoint, and --variant; see `model_folder`."""
    parser.add_argument(
        "--model",
        "--checkpoint",
        dest="checkpoint",
        metavar="MODEL",
        default=str(SMALL_MODEL),
        help="Model: the id of a repository on the Hugging Face hub, such as ACE-Step/Ace-Step1.5; the name of one "
        "of ACE-Step's models, such as turbo, base or xl-turbo; a PyTorch checkpoint, which is a folder or a file of "
        "ComfyUI; or a native checkpoint. Downloads and conversions are kept. Default: the small model of this "
        "package.",
    )
    add_variant(parser)


def add_variant(parser: ArgumentParser) -> None:
    """Add --variant."""
    parser.add_argument(
        "--variant", metavar="NAME", help="Which model to use if there are several: turbo, base, sft, xl-turbo, ..."
    )


def add_planner(parser: ArgumentParser) -> None:
    """Add --planner."""
    parser.add_argument(
        "--planner",
        metavar="MODEL",
        help="Planner: a folder, or the id of a repository such as ACE-Step/acestep-5Hz-lm-0.6B. Default: the "
        "model's own.",
    )


def model_folder(options: Any) -> str:
    """Return the folder of the native checkpoint that the options name, after downloading and converting it if
    necessary.

    Raises:
        InputError: see `native_folder`; also if this fails in another process.
    """
    dtype = converted_dtype(options.get("dtype"))
    with all_succeed():
        return str(native_folder(options.checkpoint, options.variant, dtype=dtype))


def add_dtype(parser: Parser) -> None:
    """Add --dtype."""
    parser.add_argument(
        "--dtype",
        metavar="DTYPE",
        help=f"Dtype of weights and computation: {', '.join(PRECISIONS)}; or {' or '.join(QUANTIZATIONS)}, which "
        "quantises the weights of layers, in half the memory of bfloat16. Default: the checkpoint's own, or else the "
        "best for the device.",
    )


def add_devices(parser: Parser) -> None:
    """Add --mesh and --distributed."""
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help=f"Number of devices along each of the axes {', '.join(MESH_AXES)}. Default: one device.",
    )
    add_distributed(parser, "with a mesh over all devices or, for --batch without --mesh, each with its own songs")


def add_distributed(parser: ArgumentParser, work: str) -> None:
    """Add --distributed. `work`: how the processes divide the work, for the help text."""
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="",
        metavar="HOST:PORT,COUNT,INDEX",
        help=f"Run as one of several processes, {work}. The value is the address of process 0, the number of "
        "processes and the index of this one; without a value JAX detects them (TPU pods, SLURM, Open MPI).",
    )


def start(distributed: str | None = None) -> None:
    """Join the other processes, check that the backend works, warn if JAX misses an accelerator of this machine, and
    cache compiled programs on disk.

    Raises:
        InputError: if JAX_PLATFORMS names a backend that is not installed, or there is no cluster.
    """
    if distributed is not None:
        join_processes(distributed)
    check_backend()
    if problem := machine.advice(machine.probe(), jax.default_backend(), machine.installed()):
        logger.warning("%s", problem)
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
            f"JAX_PLATFORMS: {wanted!r} cannot be used ({reason[:200]}); pip install 'acestep-jax[cuda12]', "
            "'acestep-jax[cuda13]' or 'acestep-jax[tpu]', or unset it; `acestep-jax info` says what is in this machine"
        ) from None


def use_compilation_cache() -> None:
    """Cache compiled programs on disk, so that they are compiled once for all runs: in JAX_COMPILATION_CACHE_DIR, or
    else in the user's cache folder."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(user_cache()))
