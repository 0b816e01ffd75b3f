"""The hardware of this machine, whether JAX sees it or not: accelerators, drivers, memory, and advice if one is missed.

Nothing here starts JAX's backend. The functions read files below a root folder and take the output of commands, so that
tests can describe any machine to them.
"""

import dataclasses
import importlib.metadata
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# The oldest drivers that JAX's plugins support on Linux, and the lowest compute capability that CUDA 13 supports:
# https://docs.jax.dev/en/latest/installation.html
DRIVER_OF_CUDA_12, DRIVER_OF_CUDA_13, CAPABILITY_OF_CUDA_13 = 525, 580, 7.5
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")

_NVIDIA, _GOOGLE = "0x10de", "0x1ae0"
_DISPLAY = "0x03"  # the PCI class of GPUs; others of the vendor are their sound and USB
_TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")  # v2 to v7 among Google's devices
_TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "COLAB_TPU_ADDR")


@dataclasses.dataclass(frozen=True)
class Machine:
    """The hardware of a machine.

    nvidia, tpu: whether there is such an accelerator.
    driver: version of NVIDIA's driver, such as "550.54.15"; None: none is loaded.
    cuda: newest CUDA version that the driver supports, according to `nvidia-smi`.
    capabilities: compute capability of each GPU, according to `nvidia-smi`.
    memory, free: total and free memory of the host, bytes; None if unknown.
    """

    nvidia: bool = False
    tpu: bool = False
    driver: str | None = None
    cuda: str | None = None
    capabilities: tuple[float, ...] = ()
    memory: int | None = None
    free: int | None = None


def run(*command: str) -> str:
    """Return what a command prints; "" if it is absent, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def probe(
    root: Path = Path("/"), environment: Mapping[str, str] = os.environ, command: Callable[..., str] = run
) -> Machine:
    """Inspect files below `root`, environment variables and, if there is a GPU, `nvidia-smi`."""
    folders = _list(root, "sys/bus/pci/devices/*")
    devices = [(_read(folder / "vendor"), _read(folder / "device"), _read(folder / "class")) for folder in folders]
    driver = re.search(r"Kernel Module\D*?(?:for \S+\s+)?([\d.]+)", _read(root / "proc/driver/nvidia/version"))
    card = any(vendor == _NVIDIA and kind.startswith(_DISPLAY) for vendor, _, kind in devices)
    nvidia = card or bool(driver or _list(root, "dev/nvidia[0-9]*"))
    # Windows' subsystem for Linux has one device for GPUs of all vendors.
    text = command("nvidia-smi") if nvidia or _list(root, "dev/dxg") else ""
    found = re.search(r"Driver Version:\s*([\d.]+)", text)
    cuda = re.search(r"CUDA Version:\s*([\d.]+)", text)
    asked = command("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader") if found else ""
    memory = {name: int(size) * 1024 for name, size in re.findall(r"(\w+):\s+(\d+) kB", _read(root / "proc/meminfo"))}
    return Machine(
        nvidia=nvidia or found is not None,
        tpu=bool(
            _list(root, "dev/accel[0-9]*")
            or any(vendor == _GOOGLE and device in _TPUS for vendor, device, _ in devices)
            or any(environment.get(name) for name in _TPU_VARIABLES)
        ),
        driver=found[1] if found else driver[1] if driver else None,
        cuda=cuda[1] if cuda else None,
        capabilities=tuple(map(float, re.findall(r"^\d+\.\d+$", asked, re.MULTILINE))),
        memory=memory.get("MemTotal"),
        free=memory.get("MemAvailable"),
    )


def installed(names: Sequence[str] = PLUGINS) -> dict[str, str]:
    """Return the versions of these packages, if they are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cuda_extra(machine: Machine) -> str:
    """Return the extra for the machine's GPUs: "cuda13" if driver and cards support it, else "cuda12"."""
    supported = all(capability >= CAPABILITY_OF_CUDA_13 for capability in machine.capabilities)
    return "cuda13" if _major(machine.driver) >= DRIVER_OF_CUDA_13 and supported else "cuda12"


def advice(
    machine: Machine, platform: str, packages: Mapping[str, str], environment: Mapping[str, str] = os.environ
) -> str | None:
    """Return what to do if JAX computes on the CPU of a machine with an accelerator; None if it does not.

    Args:
        platform: platform of JAX's default backend.
        packages: result of `installed`.
    """
    if platform != "cpu" or not (machine.nvidia or machine.tpu):
        return None
    kind = "a TPU" if machine.tpu else "an NVIDIA GPU"
    problem = f"this machine has {kind}, but JAX computes on the CPU"
    if chosen := environment.get("JAX_PLATFORMS"):
        return f"{problem}, as JAX_PLATFORMS is {chosen!r}; if that is not meant, run: unset JAX_PLATFORMS"
    if machine.tpu:
        if "libtpu" not in packages:
            return f"{problem}; run: pip install 'acestep-jax[tpu]'"
        why = "python -c 'import jax; jax.devices(\"tpu\")'"
        return f"{problem}; another process may hold the TPU; to see why, run: {why}"
    if machine.driver is None:
        return (
            f"{problem}, as no NVIDIA driver is loaded; install one of version {DRIVER_OF_CUDA_12} or newer, or start "
            "the container with: docker run --gpus all"
        )
    if _major(machine.driver) < DRIVER_OF_CUDA_12:
        return f"{problem}, as the NVIDIA driver {machine.driver} is too old; update it to {DRIVER_OF_CUDA_12} or newer"
    extra = cuda_extra(machine)
    if extra == "cuda12" and "jax-cuda13-plugin" in packages and "jax-cuda12-plugin" not in packages:
        return (
            f"{problem}, as CUDA 13 needs a driver of version {DRIVER_OF_CUDA_13} or newer and compute capability "
            f"{CAPABILITY_OF_CUDA_13}, found driver {machine.driver}; run: pip uninstall -y jax-cuda13-plugin "
            "jax-cuda13-pjrt && pip install 'acestep-jax[cuda12]'"
        )
    if not any(name.startswith("jax-cuda") for name in packages):
        return f"{problem}; run: pip install 'acestep-jax[{extra}]'"
    why = "; to see why, run: python -c 'import jax; jax.devices(\"cuda\")'"
    if environment.get("LD_LIBRARY_PATH"):
        return f"{problem}; LD_LIBRARY_PATH may hide the plugin's libraries, so try: unset LD_LIBRARY_PATH{why}"
    return problem + why


def _major(version: str | None) -> int:
    return int(version.partition(".")[0]) if version else 0


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _list(root: Path, pattern: str) -> list[Path]:
    try:
        return list(root.glob(pattern))
    except OSError:
        return []
