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

if os.environ["JAX_PLATFORMS"] == "cpu":
    # LLVM's optimisation takes more time than it saves on programs as small as these.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1"

import jax
import pytest

from tests.imports import missing_packages

# Most of the time goes into compiling, and many tests, and all worker processes, compile the same programs.
if "ACESTEP_TEST_CACHE" not in os.environ:
    os.environ["ACESTEP_TEST_CACHE"] = tempfile.mkdtemp(prefix="acestep-jax-tests-")
    atexit.register(shutil.rmtree, os.environ["ACESTEP_TEST_CACHE"], ignore_errors=True)
# Tracing makes millions of objects that live as long as the program; looking through them so often takes a tenth of it.
gc.set_threshold(50_000, 20, 50)
jax.config.update("jax_compilation_cache_dir", os.environ["ACESTEP_TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)


UNIT = "unit and not slow and not heavy"


def pytest_configure(config):
    """Leave slow and heavy tests out of `-m unit`, which replaces the `-m 'not slow'` of pyproject.toml."""
    if config.option.markexpr == "unit":
        config.option.markexpr = UNIT


def pytest_ignore_collect(collection_path, config):
    """Ignore, under `-m unit`, test files without a unit test, and those whose imports need a package that is not
    installed.

    `tests/test_layout.py` checks that the latter have no unit test, so none is lost. Otherwise every file is collected,
    and a failing import is an error.
    """
    if config.option.markexpr != UNIT or not collection_path.name.startswith("test_"):
        return None
    if collection_path.suffix == ".py" and "mark.unit" not in collection_path.read_text(encoding="utf-8"):
        return True
    return True if missing_packages(collection_path) else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep the tests of a file in one worker, whose fixtures and programs they share; idle workers take over others."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


class Memory:
    """What compiled programs take: without dropping them, a worker of the whole suite grows past 5 GB.

    A program that is dropped and wanted again is traced again and read from the cache on disk, or compiled again if it
    is small. So they are dropped after a file, whose tests share them, if much memory is in use, and within a file only
    if much more is.
    """

    AFTER_FILE, WITHIN_FILE = 5 * 2**28, 2**31  # bytes in use, above which programs are dropped
    GROWTH = 3 * 2**27  # bytes since they last were, without which there is little to drop
    kept = 0  # bytes that were still in use then

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
        cls.kept = cls.in_use()

    @classmethod
    def bound(cls, limit):
        """Release memory if more than `limit` is in use."""
        if cls.in_use() > max(limit, cls.kept + cls.GROWTH):
            cls.release()


@pytest.fixture(autouse=True, scope="module")
def bound_memory_of_files():
    """Drop compiled programs after a file that leaves much memory in use, once its fixtures are gone."""
    yield
    Memory.bound(Memory.AFTER_FILE)


@pytest.fixture(autouse=True)
def bound_memory():
    """Drop compiled programs after a test that leaves very much memory in use."""
    yield
    Memory.bound(Memory.WITHIN_FILE)


def pytest_collection_finish():
    """Take what all imports made, which stays, out of the garbage collector's sight."""
    gc.collect()
    gc.freeze()


SLIDING, FULL = ["sliding_attention"] * 4, ["full_attention"] * 4


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return (torch folder, native folder): a random PyTorch checkpoint of the turbo variant and its conversion.

    Its layers are all of one kind, and its autoencoder has two blocks: programs compile in half the time. What has
    layers of both kinds in turn, as published models do, is `standard`; `tests/models` has both kinds in each network,
    and `tests/test_golden.py` whole songs of them.
    """
    return _checkpoint(tmp_path_factory.mktemp("turbo"), "turbo", SLIDING)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Return the same for the base variant, which is guided; its transformer has full attention."""
    return _checkpoint(tmp_path_factory.mktemp("base"), "base", FULL)


@pytest.fixture(scope="session")
def standard(tmp_path_factory):
    """Return the same for the turbo variant, with the layers and blocks that published models have."""
    from acestep_jax.convert.random_checkpoint import write_random_checkpoint

    folder = tmp_path_factory.mktemp("standard")
    write_random_checkpoint(folder / "torch")
    return _converted(folder)


def _checkpoint(folder, variant, layer_types):
    from acestep_jax.convert.random_checkpoint import SIZES, random_pipeline

    quick = {
        "transformer": dict(layer_types=layer_types),
        "condition_encoder": dict(layer_types=SLIDING, num_timbre_encoder_hidden_layers=1),
        "audio_tokenizer": dict(layer_types=SLIDING),
        "audio_token_detokenizer": dict(layer_types=SLIDING),
        "text_encoder": {},
        "vae": dict(downsampling_ratios=[40, 48], channel_multiples=[1, 2]),
    }
    sizes = {name: SIZES["tiny"][name] | changes for name, changes in quick.items()}
    random_pipeline(sizes, variant=variant).save_pretrained(folder / "torch")
    return _converted(folder)


def _converted(folder):
    from acestep_jax.io.conversion import from_torch

    from_torch(folder / "torch", folder / "native")
    return folder / "torch", folder / "native"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a `tests.io.hub_server.HubServer`: the hub of this process and of those that get `hub.environment`.

    The cache is `hub.cache`, empty. Serve folders with `hub.add(id, folder)`.
    """
    from huggingface_hub import constants

    from tests.io.hub_server import serving

    with serving() as server:
        server.cache = tmp_path / "hub"
        server.environment = os.environ | {
            "HF_ENDPOINT": server.endpoint,
            "HF_HUB_CACHE": str(server.cache),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(server.cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("acestep_jax.io.download.PAUSE", 0.01)
        yield server
