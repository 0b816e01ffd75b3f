"""What the package promises before any network runs."""

import functools
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.unit, pytest.mark.heavy]

FRESH = """
import sys
sys.modules |= dict.fromkeys(("grain", "matplotlib", "tensorboardX", "array_record"))
import acestep_jax
import acestep_jax.cli
loaded = {name.split(".")[0] for name in sys.modules if sys.modules[name] is not None}
print(*loaded & {"torch", "diffusers", "transformers", "peft", "huggingface_hub", "convert", "train"})
print(*(name for name in acestep_jax.__all__ if hasattr(acestep_jax, name)))
import acestep_jax.cli.train
print("acestep_jax.cli.train" in sys.modules)
"""


@functools.cache
def imported():
    """Return what a process of its own prints that imports the library where the packages of training are missing."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_import_needs_no_torch():
    assert imported()[0] == ""


def test_public_names():
    assert {"AceStepPipeline", "AceStepTransformer1DModel", "TransformerConfig"} <= set(imported()[1].split())


def test_the_command_line_is_imported_without_the_packages_of_training():
    """`acestep-jax generate` must work without them. (flax needs optax.)"""
    assert imported()[2] == "True"
