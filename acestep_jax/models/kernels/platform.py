"""The platform that a program is compiled for, and the precision that suits a device."""

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from acestep_jax.models.runtime import MIXED

# Compute capability by the name of an NVIDIA GPU. For devices that are not attached, a mesh has only their names.
_CAPABILITIES = (
    ("B200|GB200", 10.0),
    ("H100|H200|GH200", 9.0),
    ("L4|L40|L40S|RTX 40[0-9]0", 8.9),
    ("A10|A10G|A40|RTX 30[0-9]0", 8.6),
    ("A100|A30", 8.0),
    ("T4|RTX 20[0-9]0", 7.5),
    ("V100", 7.0),
)


def platform() -> str:
    """Return "cpu", "gpu" or "tpu": the platform of the active mesh, whose devices need not be attached (ahead-of-time
    compilation), or else of the default backend."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


@functools.cache
def cpu_favours_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16 faster than float32, as far as that is known.

    Intel's AVX512-BF16 has one unit where float32 has two with half as many products each: the same rate, unless there
    is AMX. AMD's has twice the rate of float32. Without either, x86 has no such products. Unknown processors, such as
    any outside of Linux and x86, are assumed to be faster with bfloat16.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    return favours_bfloat16(text)


def favours_bfloat16(cpuinfo: str) -> bool:
    """Return the result of `cpu_favours_bfloat16` for the text of /proc/cpuinfo."""
    flags = set((re.findall(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE) or [""])[0].split())
    return not flags or "amx_bf16" in flags or "AuthenticAMD" in cpuinfo and "avx512_bf16" in flags


def compute_capability() -> float:
    """Return the compute capability, such as 9.0, of the NVIDIA GPUs in the active mesh, which need not be attached, or
    else of the default device; 0 for other devices."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is None:
        return capability_of(jax.devices()[0])
    return _capability_of_kind(device.device_kind) if device.platform == "gpu" else 0.0


def runs_triton() -> bool:
    """Return whether the current backend runs Pallas kernels with the Triton backend: an NVIDIA GPU of compute
    capability 8.0 or higher, and a JAX that has this backend, which jax 0.11.2 calls deprecated."""
    return platform() == "gpu" and compute_capability() >= 8 and _has_triton()


def triton_options(interpret: bool, *, num_warps: int, num_stages: int = 1) -> dict[str, Any]:
    """Return the arguments of `pallas_call` for a kernel with the Triton backend; interpret: run it step by step in
    JAX, on any backend."""
    if interpret:
        return dict(interpret=True)
    # The import takes time that only GPU users should pay.
    from jax.experimental.pallas import triton

    return dict(compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=num_stages))


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


@functools.cache
def _capability_of_kind(kind: str) -> float:
    """Return the compute capability of an attached device of this kind, or else by its name; 0 if unknown."""
    attached = [capability_of(device) for device in jax.devices() if device.device_kind == kind]
    known = [capability for pattern, capability in _CAPABILITIES if re.search(rf"\b(?:{pattern})\b", kind)]
    return (attached + known + [0.0])[0]


def capability_of(device: Any) -> float:
    """Return the compute capability of an NVIDIA GPU, such as 9.0; 0 for other devices."""
    text = str(getattr(device, "compute_capability", ""))
    return float(text) if re.fullmatch(r"\d+\.\d+", text) else 0.0


def default_precision(mesh: Mesh | None = None) -> str:
    """Return the precision for the devices of a mesh, or else for the first device, see `precision_for`."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return precision_for(device.platform, capability_of(device))


def precision_for(platform: str, capability: float) -> str:
    """Return one of `runtime.PRECISIONS`.

    bfloat16 on TPUs and on NVIDIA GPUs that support it, with compute capability 8.0 or higher (A100, L4, H100). Older
    GPUs (T4, V100) are fast only in float16 and use mixed_float16. float32 on CPUs, many of which multiply bfloat16 no
    faster, and on unknown devices.
    """
    if platform == "tpu" or capability >= 8:
        return "bfloat16"
    return MIXED if capability > 0 else "float32"
