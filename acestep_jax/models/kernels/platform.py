"""The platform that a program is compiled for, and the precision that suits a device."""

import functools
import re
from typing import Any

import jax
from jax.sharding import Mesh

from acestep_jax.models.config import MIXED


def platform() -> str:
    """Return "cpu", "gpu" or "tpu": that of the mesh in use, whose devices need not be attached (ahead-of-time
    compilation), or else the default backend's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


@functools.cache
def compute_capability() -> float:
    """Return that of the attached NVIDIA GPU, such as 9.0; 0 for other devices."""
    return capability_of(jax.devices()[0])


def capability_of(device: Any) -> float:
    """Return the compute capability of an NVIDIA GPU, such as 9.0; 0 for other devices."""
    text = str(getattr(device, "compute_capability", ""))
    return float(text) if re.fullmatch(r"\d+\.\d+", text) else 0.0


def default_precision(mesh: Mesh | None = None) -> str:
    """Return the precision that suits the devices of a mesh, or else the first device, see `precision_for`."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return precision_for(device.platform, capability_of(device))


def precision_for(platform: str, capability: float) -> str:
    """Return one of `config.PRECISIONS`.

    bfloat16 on TPUs and on NVIDIA GPUs that have it, from compute capability 8.0 on (A100, L4, H100). Older ones (T4,
    V100) multiply fast in float16 only. float32 on CPUs, where XLA widens stacks of bfloat16 weights as it runs, and
    on devices that are not known here.
    """
    if platform == "tpu" or capability >= 8:
        return "bfloat16"
    return MIXED if capability > 0 else "float32"
