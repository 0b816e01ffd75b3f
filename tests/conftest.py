"""The suite runs on eight devices, so that everything that is sharded is sharded here too."""

import atexit
import os
import shutil
import tempfile
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network

# LLVM's optimisation takes more time than it saves on programs as small as these.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1"

import jax
import pytest

# Most of the time goes into compiling, and many tests, and all worker processes, compile the same programs.
if "ACESTEP_TEST_CACHE" not in os.environ:
    os.environ["ACESTEP_TEST_CACHE"] = tempfile.mkdtemp(prefix="acestep-jax-tests-")
    atexit.register(shutil.rmtree, os.environ["ACESTEP_TEST_CACHE"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["ACESTEP_TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random PyTorch checkpoint of the turbo variant and its conversion: (torch folder, native folder)."""
    return _checkpoint(tmp_path_factory.mktemp("turbo"), "turbo")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """The same for the base variant, which is guided."""
    return _checkpoint(tmp_path_factory.mktemp("base"), "base")


def _checkpoint(folder, variant):
    from acestep_jax.convert.from_torch import from_torch
    from acestep_jax.convert.random_checkpoint import write_random_checkpoint

    write_random_checkpoint(folder / "torch", variant=variant)
    from_torch(folder / "torch", folder / "native")
    return folder / "torch", folder / "native"
