"""Where the networks of a pipeline are kept: on the device, or on the host except while they are used.

    with placement.stage(networks) as placed:
        encode(placed["text_encoder"], ...)     # copied to the device on first use
    with placement.stage(networks) as placed:   # and freed at the end of the stage
        denoise(placed["transformer"], ...)

On a CPU, networks are in mapped files of their checkpoint, see `io.mapped`, and a stage releases their pages.

The compiled programs are the same either way, and so are the results, bit for bit; but if a GPU keeps a second copy of
the transformer's layers, songs are equal only up to rounding. For one device, not for a mesh.
"""

import contextlib
import logging
import operator
import os
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import jax
from jax.sharding import Mesh

from acestep_jax.errors import InputError
from acestep_jax.io import mapped
from acestep_jax.models.kernels.unstacked import unstacking_pays
from acestep_jax.models.transformer import AceStepTransformer1DModel

logger = logging.getLogger(__name__)

R = TypeVar("R")


class Derived(Generic[R]):
    """Keeps a value computed from the arrays of a module for as long as the module has these arrays: a module can be
    changed in place, its arrays cannot. It does not keep the arrays themselves."""

    def __init__(self):
        self._value: R | None = None
        self._arrays: list[weakref.ref] = []

    def of(self, module: Any) -> R | None:
        """Return the value, or None if there is none for the module's arrays."""
        arrays, made_of = jax.tree.leaves(module), [kept() for kept in self._arrays]
        is_same = len(arrays) == len(made_of) and all(map(operator.is_, arrays, made_of))
        return self._value if is_same else None

    def keep(self, value: R, module: Any) -> R:
        """Keep and return a value that was computed from the module."""
        self._value, self._arrays = value, [weakref.ref(array) for array in jax.tree.leaves(module)]
        return value

    def forget(self) -> None:
        """Free the value."""
        self._value, self._arrays = None, []


class Placement:
    """Copies networks to `device` for the duration of a stage; None: they are already on the device.

    second_copy: bytes of a second copy of the transformer's layers for denoising, see `kernels.unstacked`; 0: there is
        none.
    """

    def __init__(self, device: Any = None, *, second_copy: int = 0):
        self.device, self.second_copy = device, second_copy
        self._unstacked: Derived[AceStepTransformer1DModel] = Derived()

    @property
    def offloads(self) -> bool:
        """Return whether networks are kept on the host."""
        return self.device is not None

    @contextlib.contextmanager
    def stage(self, networks: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Yield the networks by name, on the device. Copies are freed at the end, so wait for results before that."""
        placed = _Placed(networks, self.device)
        try:
            yield placed
        finally:
            placed.drop()
            mapped.release()

    def for_denoising(self, transformer: AceStepTransformer1DModel) -> AceStepTransformer1DModel:
        """Return a transformer in the form that denoising on this device uses."""
        if not self.second_copy:
            return transformer
        if (kept := self._unstacked.of(transformer)) is not None:
            return kept
        self.forget()  # free the memory before the next copy is made
        try:
            made = jax.block_until_ready(_unstack(transformer))
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.warning(
                "no memory for a second copy of the transformer's layers, %.1f GB: denoising copies the weights of "
                "each layer in every step instead, which takes longer",
                self.second_copy / 1e9,
            )
            self.second_copy = 0
            return transformer
        return self._unstacked.keep(made, transformer)

    def forget(self) -> None:
        """Free the second copy of the layers; the next song makes it again."""
        self._unstacked.forget()


_unstack = jax.jit(AceStepTransformer1DModel.unstacked)


class _Placed(Mapping[str, Any]):
    """Networks by name, copied on first use."""

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
        if array.devices() == {self._device}:  # a copy would share its memory
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


def choose(needed: int, offload: bool | None, mesh: Mesh | None, transformer_bytes: int = 0) -> Placement:
    """Return where to keep the networks of a pipeline.

    Args:
        needed: bytes of all weights and of generating a song, see `memory.needed_bytes`.
        offload: whether to keep them on the host; None: if the first device has less memory than `needed`.
        mesh: the device mesh that holds them; networks on a mesh are never kept on the host.
        transformer_bytes: size of the transformer's weights, which a GPU with enough memory keeps in two forms.

    Raises:
        InputError: if they should be kept on the host, but there is a mesh, or JAX may not use the host.
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
                "the networks and a song of ten minutes need %.1f GB, but JAX has only %.1f GB on %s: the networks "
                "stay on the host, and are copied to the device in turn",
                needed / 1e9,
                (limit or 0) / 1e9,
                device,
            )
    if not offload:
        pays = unstacking_pays(needed + transformer_bytes, limit)
        return Placement(second_copy=transformer_bytes if pays else 0)
    try:
        jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX raises nothing narrower
        wanted = os.environ.get("JAX_PLATFORMS", "")
        raise InputError(
            f"JAX_PLATFORMS: the networks do not fit on the device, and {wanted!r} does not let JAX keep them on the "
            f"host; set it to {wanted + ',cpu'!r}"
        ) from None
    return Placement(device)


def first_device() -> Any:
    """Return the device of this process that a pipeline without a mesh runs on."""
    return jax.local_devices()[0]


def memory_limit(device: Any) -> int | None:
    """Return the number of bytes that JAX may use on a device; None if it is not known, as on a CPU."""
    return (device.memory_stats() or {}).get("bytes_limit")


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that the device is out of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
