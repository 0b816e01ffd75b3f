"""Where arrays live: one mesh with four axes, and one table from logical axis names to mesh axes.

Parameters carry logical names (`kernel: ("embed", "mlp")`), activations get them from `shard`. Nothing else in
the library knows the mesh; without one, every function here is a no-op.
"""

import functools
import logging
import math

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from acestep_jax.errors import InputError

logger = logging.getLogger(__name__)

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

# Logical axis -> mesh axes. Weights are split over `fsdp` along the residual width and over `tensor` along heads
# and mlp; activations over `data` and `fsdp` along the batch and over `sequence` along time.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": ("sequence",),
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "channels": (),
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1) -> Mesh:
    """A mesh over all devices.

    Args:
        data: copies of the model, each with a part of the batch.
        fsdp: parts of the weights, gathered layer by layer; also splits the batch.
        tensor: parts of heads and mlp.
        sequence: parts of the time axis; its number of tokens must divide, or it is replicated.

    Raises:
        InputError: if the product is not the number of devices.
    """
    shape = (data, fsdp, tensor, sequence)
    size = data * fsdp * tensor * sequence
    if size != jax.device_count():
        sizes = ", ".join(f"{axis}={n}" for axis, n in zip(MESH_AXES, shape, strict=True))
        raise InputError(f"mesh: {sizes} needs {size} devices, but {jax.device_count()} are present; use all of them")
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def partition_spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> P:
    """The mesh axes of an array with these logical names. An axis whose size they do not divide is split over the
    first of them that do, or replicated, with a warning."""
    spec = []
    for name, size in zip(names, shape, strict=True):
        wanted = tuple(axis for axis in (RULES[name] if name else ()) if mesh.shape.get(axis, 1) > 1)
        axes = wanted
        while size % math.prod(mesh.shape[axis] for axis in axes):
            axes = axes[:-1]
        if axes != wanted:
            done = f"split over {', '.join(axes)} alone" if axes else "replicated"
            log_once(f"{name} axis of {size} does not divide by the mesh's {', '.join(wanted)}: {done}")
        spec.append(axes or None)
    return P(*spec)


def platform() -> str:
    """Of the mesh in use, whose devices need not be there (ahead-of-time compilation), or else the default backend's:
    "cpu", "gpu" or "tpu"."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


@functools.cache
def log_once(message: str) -> None:
    """A warning, the first time that it is given."""
    logger.warning(message)


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains an activation to the mesh in use (`jax.set_mesh`), by the logical names of its axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names, x.shape, mesh))


def variable_sharding(variable: nnx.Variable, mesh: Mesh | None):
    """Where a parameter belongs: on `mesh` by its logical names, or whole on the first device."""
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    names = variable.get_metadata("out_sharding", None) or (None,) * len(variable.shape)
    return NamedSharding(mesh, partition_spec(tuple(names), variable.shape, mesh))
