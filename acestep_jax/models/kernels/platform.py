"""The platform that a program is compiled for."""

import functools
import re

import jax


def platform() -> str:
    """Return "cpu", "gpu" or "tpu": that of the mesh in use, whose devices need not be attached (ahead-of-time
    compilation), or else the default backend's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


@functools.cache
def compute_capability() -> float:
    """Return that of the attached NVIDIA GPU, such as 9.0; 0 for other devices."""
    text = str(getattr(jax.devices()[0], "compute_capability", ""))
    return float(text) if re.fullmatch(r"\d+\.\d+", text) else 0.0
