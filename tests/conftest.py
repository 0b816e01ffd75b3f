"""Settings and fixtures of the whole suite, which runs on eight CPU devices so that sharded programs are sharded here.

`pytest -m unit` needs no PyTorch: see `pytest_ignore_collect`.
"""

import atexit
import ctypes
import gc
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

from tests.imports import missing_packages

# Most of the time goes into compiling, and many tests, and all worker processes, compile the same programs.
if "ACESTEP_TEST_CACHE" not in os.environ:
    os.environ["ACESTEP_TEST_CACHE"] = tempfile.mkdtemp(prefix="acestep-jax-tests-")
    atexit.register(shutil.rmtree, os.environ["ACESTEP_TEST_CACHE"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["ACESTEP_TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)


def pytest_ignore_collect(collection_path, config):
    """Ignore, under `-m unit`, test files whose imports need a package that is not installed.

    `tests/test_layout.py` holds that such a file has no unit test, so none is lost. Everywhere else, and wherever
    the packages are installed, every file is collected and a failing import is an error.
    """
    if config.option.markexpr == "unit" and collection_path.suffix == ".py" and missing_packages(collection_path):
        return True
    return None


class Memory:
    """What compiled programs take: without dropping them, a worker of the whole suite grows past 5 GB.

    A program that is dropped and wanted again is read from the cache on disk.
    """

    GROWTH = 2**30  # bytes, after which the programs of earlier tests are dropped within a file
    before = None  # bytes in use when they were last dropped

    @staticmethod
    def in_use():
        """Return the resident memory of this process in bytes, or 0 where the system does not tell."""
        try:
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0

    @classmethod
    def release(cls):
        """Drop all compiled programs and return what was freed to the system."""
        jax.clear_caches()
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # of glibc
            libc.malloc_trim(0)
        cls.before = cls.in_use()


@pytest.fixture(scope="module", autouse=True)
def release_memory():
    """Drop the compiled programs of a test file when it ends."""
    yield
    Memory.release()


@pytest.fixture(autouse=True)
def bound_memory():
    """Drop compiled programs between the tests of a file where memory has grown by 1 GB since they last were."""
    if Memory.before is None:
        Memory.before = Memory.in_use()
    yield
    if Memory.in_use() > Memory.before + Memory.GROWTH:
        Memory.release()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return (torch folder, native folder): a random PyTorch checkpoint of the turbo variant and its conversion."""
    return _checkpoint(tmp_path_factory.mktemp("turbo"), "turbo")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Return the same for the base variant, which is guided."""
    return _checkpoint(tmp_path_factory.mktemp("base"), "base")


def _checkpoint(folder, variant):
    from acestep_jax.convert.from_torch import from_torch
    from acestep_jax.convert.random_checkpoint import write_random_checkpoint

    write_random_checkpoint(folder / "torch", variant=variant)
    from_torch(folder / "torch", folder / "native")
    return folder / "torch", folder / "native"
