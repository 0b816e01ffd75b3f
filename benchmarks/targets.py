"""Accelerators to compile for, which need not be present: their data-sheet figures, and meshes of them.

Import this before jax: it sets environment variables that libtpu and the CUDA plugin read when they are loaded.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Otherwise libtpu queries the network for its TPU and allows only one process, and the CUDA plugin needs a driver.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from acestep_jax.distributed import MESH_AXES
from acestep_jax.models.kernels.platform import precision_for

CARD_FRACTION = 0.75  # fraction of a GPU's memory that JAX uses, without XLA_PYTHON_CLIENT_MEM_FRACTION


@dataclasses.dataclass(frozen=True)
class Target:
    """The figures of one chip, from its data sheet."""

    memory: float  # bytes
    peak: float  # FLOP/s of dense products, bfloat16, or float16 where there is no bfloat16
    bandwidth: float  # memory bandwidth, bytes/s
    link: float  # bytes/s to one neighbour, in one direction

    @property
    def capability(self) -> float:
        return 0.0

    @property
    def platform(self) -> str:
        """Return the platform name that JAX lowers for."""
        return "tpu"

    @property
    def usable(self) -> float:
        """Return the bytes of the memory that JAX uses."""
        return self.memory

    @property
    def precision(self) -> str:
        """Return the precision that the library chooses for it."""
        return precision_for("gpu" if self.platform == "cuda" else self.platform, self.capability)


@dataclasses.dataclass(frozen=True)
class Chip(Target):
    """A TPU. Its units reach the peak at the given clock."""

    clock: float  # Hz


@dataclasses.dataclass(frozen=True)
class Card(Target):
    """An NVIDIA GPU, with the figures that XLA's compiler needs."""

    compute_capability: float
    cores: int  # multiprocessors
    shared: int  # shared memory of each, bytes
    block: int  # maximum shared memory of a block, bytes
    threads: int  # per multiprocessor
    units: int  # float32 units per multiprocessor
    cache: int  # level 2, bytes
    clock: float  # GHz

    @property
    def capability(self) -> float:
        return self.compute_capability

    @property
    def platform(self) -> str:
        return "cuda"

    @property
    def usable(self) -> float:
        return self.memory * CARD_FRACTION


# Link bandwidth in one direction: for TPUs from "How to scale your model" (Google DeepMind), for GPUs NVLink or PCIe.
CHIPS = {
    "v5e": Chip(16e9, 197e12, 819e9, 45e9, 1.5e9),  # 4 units of 128 x 128
    "v5p": Chip(95e9, 459e12, 2765e9, 90e9, 1.75e9),  # 8 units of 128 x 128
    "v6e": Chip(32e9, 918e12, 1640e9, 90e9, 1.75e9),  # 4 units of 256 x 256
}
TOPOLOGIES = ("v5e:1x1", "v6e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v6e:2x2", "v6e:2x4", "v5p:2x2x1")
CARDS = {
    "t4": Card(15.8e9, 65e12, 320e9, 16e9, 7.5, 40, 65536, 65536, 1024, 64, 4 << 20, 1.59),
    "l4": Card(24e9, 121e12, 300e9, 32e9, 8.9, 58, 102400, 101376, 1536, 128, 48 << 20, 2.04),
    "a100": Card(40e9, 312e12, 1555e9, 300e9, 8.0, 108, 167936, 166912, 2048, 64, 40 << 20, 1.41),
    "h100": Card(80e9, 989e12, 3352e9, 450e9, 9.0, 132, 233472, 232448, 2048, 128, 50 << 20, 1.98),
    "b200": Card(180e9, 2250e12, 7700e9, 900e9, 10.0, 148, 233472, 232448, 2048, 128, 126 << 20, 1.97),
}
# An XLA GpuTargetConfig in protobuf's text form.
_CARD_TEXT = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: {units} block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {cache}
  clock_rate_ghz: {clock} device_memory_size: {memory} shared_memory_per_block_optin: {block}
  cuda_compute_capability {{ major: {major} minor: {minor} }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" name: "{name}" runtime_version: "{cuda}" driver_version: "{cuda}"
  compile_time_toolkit_version: "{cuda}" dnn_version: "9.10.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"
"""


def target_of(name: str) -> Target:
    """Return the figures of a card such as "h100", or of the chip in a topology such as "v5e:2x2"."""
    return CARDS[name] if name in CARDS else CHIPS[name.split(":")[0]]


def devices_of(name: str, count: int = 1) -> list:
    """Return the devices of a TPU topology such as "v5e:2x2", or `count` cards such as "h100"."""
    return card_devices(name, count) if name in CARDS else topology_devices(name)


def card_devices(name: str, count: int = 1) -> list:
    """Return `count` cards of one host; a CUDA plugin of either version must be installed."""
    card = CARDS[name]
    text = _CARD_TEXT.format(
        name=f"NVIDIA {name.upper()}", major=int(card.capability), minor=round(card.capability * 10) % 10,
        cores=card.cores, shared=card.shared, block=card.block, threads=card.threads, units=card.units,
        bandwidth=int(card.bandwidth), cache=card.cache, clock=card.clock, memory=int(card.memory),
        cuda=_cuda_version(),
    )  # fmt: skip
    with quiet():
        topology = topologies.get_topology_desc("", platform="cuda", target_config=text, topology=f"1x1x{count}")
    return list(topology.devices)


def _cuda_version() -> str:
    """Return the CUDA toolkit version of the installed plugin."""
    try:
        import jax_cuda13_plugin  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "12.8.0"
    return "13.0.0"


def topology_devices(name: str) -> list:
    """Return the devices of a topology such as "v5e:2x2"; for "v5e:1x1", which libtpu does not describe, the first chip
    of a larger one. Suppress libtpu's messages that there are no TPUs."""
    chip, _, size = name.partition(":")
    with quiet():
        if size == "1x1":
            return topology_devices(f"{chip}:2x2")[:1]
        return list(topologies.get_topology_desc(name, platform="tpu").devices)


def make_mesh(devices: list, text: str | None, batch: int) -> Mesh:
    """Return a mesh as `distributed.make_mesh` does, over devices that are not present.

    Without `text`, the batch is split if it is a multiple of the number of devices, else the time axis.
    """
    count = len(devices)
    if text:
        axes = {name: int(n) for name, n in (part.split("=") for part in text.split(","))}
    else:
        axes = dict(data=count) if batch % count == 0 else dict(sequence=count)
    shape = tuple(axes.pop(name, 1) for name in MESH_AXES)
    if axes or math.prod(shape) != count:
        raise SystemExit(f"--mesh: {text} is not a mesh of {', '.join(MESH_AXES)} over {count} chips")
    return jax.make_mesh(shape, MESH_AXES, devices=devices, axis_types=(AxisType.Auto,) * len(shape))


def mesh_text(mesh: Mesh) -> str:
    return ",".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1) or "one chip"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop everything that the process writes to standard error, including native libraries."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
