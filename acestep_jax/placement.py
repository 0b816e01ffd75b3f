"""Where the networks of a pipeline are: all on the device, or on the host but for those in use.

    with placement.stage(networks) as placed:
        encode(placed["text_encoder"], ...)     # copied to the device when it is first asked for
    with placement.stage(networks) as placed:   # and dropped when the stage ends
        denoise(placed["transformer"], ...)

The programs and their arguments are the same, and so are the results, bit for bit. For one device, not for a mesh.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from acestep_jax.errors import InputError

logger = logging.getLogger(__name__)


class Placement:
    """Copies networks to `device` for a stage; with None they are there already, and nothing is copied."""

    def __init__(self, device: Any = None):
        self.device = device

    @property
    def offloads(self) -> bool:
        """Return whether networks are kept on the host."""
        return self.device is not None

    @contextlib.contextmanager
    def stage(self, networks: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Give the networks by name, on the device. What was copied is dropped at the end: wait for results before."""
        placed = _Placed(networks, self.device)
        try:
            yield placed
        finally:
            placed.drop()


class _Placed(Mapping[str, Any]):
    """Networks by name, copied when they are asked for."""

    def __init__(self, networks: Mapping[str, Any], device: Any):
        self._networks, self._device = networks, device
        self._placed: dict[str, Any] = {}
        self._copies: list[jax.Array] = []

    def __getitem__(self, name: str) -> Any:
        if name not in self._networks:
            raise InputError(f"the pipeline was loaded without {name}; load it with this network")
        if self._device is None:
            return self._networks[name]
        if name not in self._placed:
            self._placed[name] = jax.tree.map(self._copy, self._networks[name])
        return self._placed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._networks)

    def __len__(self) -> int:
        return len(self._networks)

    def _copy(self, array: jax.Array) -> jax.Array:
        if array.devices() == {self._device}:  # it would share its memory with the copy
            return array
        copy = jax.device_put(array, self._device)
        self._copies.append(copy)
        return copy

    def drop(self) -> None:
        """Free the memory of the copies."""
        for copy in self._copies:
            copy.delete()
        self._copies.clear()
        self._placed.clear()


def choose(needed: int, offload: bool | None, mesh: Mesh | None) -> Placement:
    """Return where the networks of a pipeline are to be.

    Args:
        needed: bytes of all weights and of what a song takes beside them, see `memory.needed_bytes`.
        offload: whether they are kept on the host; None: if the first device has less memory than that.
        mesh: what they lie on; then they are never kept on the host.

    Raises:
        InputError: if they should be kept on the host, but there is a mesh or JAX may not use the host.
    """
    if mesh is not None:
        if offload:
            raise InputError("offload: for one device only; on a mesh, split the weights with fsdp=N or tensor=N")
        return Placement()
    device = first_device()
    limit = memory_limit(device)
    if offload is None:
        offload = limit is not None and needed > limit
        if offload:
            logger.warning(
                "the networks and a song of ten minutes need %.1f GB, and %s gives JAX %.1f GB: the networks stay on "
                "the host, and are copied to the device in turn",
                needed / 1e9,
                device,
                (limit or 0) / 1e9,
            )
    if not offload:
        return Placement()
    try:
        jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX raises nothing narrower
        wanted = os.environ.get("JAX_PLATFORMS", "")
        raise InputError(
            f"JAX_PLATFORMS: the networks do not fit the device, and JAX may not keep them on the host, found "
            f"{wanted!r}; set it to {wanted + ',cpu'!r}"
        ) from None
    return Placement(device)


def first_device() -> Any:
    """Return the device of this process that a pipeline without a mesh runs on."""
    return jax.local_devices()[0]


def memory_limit(device: Any) -> int | None:
    """Return how many bytes of its memory JAX may take; None where that is not known, as on a CPU."""
    return (device.memory_stats() or {}).get("bytes_limit")
