"""`acestep-jax info`: versions, devices, and what a checkpoint holds."""

import importlib.metadata
import math
from pathlib import Path
from typing import Any

from acestep_jax.cli.parser import Parser
from acestep_jax.cli.runtime import add_checkpoint, check_backend
from acestep_jax.io import checkpoint


def add(commands: Any) -> None:
    """Add the command."""
    parser = Parser(description="Print versions, devices, and the networks of a checkpoint.")
    add_checkpoint(parser)
    commands.add_subcommand("info", parser, help="Print versions, devices, and what a checkpoint holds.")


def run(options: Any) -> None:
    """Print versions, devices and the networks of a checkpoint."""
    devices = check_backend()
    for package in ("acestep-jax", "jax", "flax", "orbax-checkpoint"):
        print(f"{package:<24} {importlib.metadata.version(package)}")
    print(f"{'devices':<24} {', '.join(map(str, devices))}")
    path = Path(options.checkpoint)
    print(f"{'checkpoint':<24} {path}")
    manifest = checkpoint.read_manifest(path)
    stored = checkpoint.network_leaves(path, manifest)
    transformer: Any = manifest.configs["transformer"]
    print(f"{'variant':<24} {transformer.variant}")
    for name, leaves in stored.items():
        sizes = [math.prod(leaf.shape) for leaf in leaves.values()]
        dtypes = sorted({str(leaf.dtype) for leaf in leaves.values()})
        print(f"{name:<24} {sum(sizes):>13,} parameters, {', '.join(dtypes)}")
