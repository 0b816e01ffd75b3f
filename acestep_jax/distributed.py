"""Devices and hosts: one mesh with four axes, one table from logical axis names to mesh axes, several processes.

Parameters carry logical axis names (`kernel: ("embed", "mlp")`), and `shard` gives them to activations. No other code
depends on the mesh; without a mesh, `shard` does nothing.
"""

import contextlib
import functools
import itertools
import logging
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax._src import distributed as service
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from acestep_jax.errors import InputError, Preempted

logger = logging.getLogger(__name__)

R = TypeVar("R")

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
    """Return a mesh over all devices.

    Args:
        data: number of copies of the model, each with a part of the batch; full fine-tuning splits weights and moments
            over it as well.
        fsdp: number of parts of the weights, gathered layer by layer; also splits the batch.
        tensor: number of parts of heads and mlp.
        sequence: number of parts of the time axis; tokens are replicated if it does not divide their number.

    Raises:
        InputError: if the product is not the number of devices.
    """
    shape = (data, fsdp, tensor, sequence)
    size = data * fsdp * tensor * sequence
    if size != jax.device_count():
        sizes = ", ".join(f"{axis}={n}" for axis, n in zip(MESH_AXES, shape, strict=True))
        raise InputError(f"mesh: {sizes} needs {size} devices, but {jax.device_count()} are present; use all of them")
    return _mesh(shape)


def local_mesh() -> Mesh | None:
    """Return a mesh over the devices of this process only, with a copy of the model on each; None if there is one."""
    count = jax.local_device_count()
    return _mesh((count, 1, 1, 1), jax.local_devices()) if count > 1 else None


def _mesh(shape: tuple[int, ...], devices: Sequence[Any] | None = None) -> Mesh:
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def spans_processes(mesh: Mesh | None) -> bool:
    """Return whether a mesh has devices of other processes, so that all of them must run the same programs."""
    return mesh is not None and mesh.is_multi_process


def partition_spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> P:
    """Return the mesh axes of an array, given its logical axis names.

    If the mesh axes do not divide the size of an axis, it is split over only the first of them, or replicated, with a
    warning.
    """
    spec = []
    for name, size in zip(names, shape, strict=True):
        wanted = tuple(axis for axis in (RULES[name] if name else ()) if mesh.shape.get(axis, 1) > 1)
        axes = wanted
        while size % math.prod(mesh.shape[axis] for axis in axes):
            axes = axes[:-1]
        if axes != wanted:
            done = f"split over {', '.join(axes)} only" if axes else "replicated"
            log_once(f"{name} axis of {size} does not divide by the mesh's {', '.join(wanted)}: {done}")
        spec.append(axes or None)
    return P(*spec)


@functools.cache
def log_once(message: str) -> None:
    """Log a warning once per process."""
    logger.warning(message)


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain an activation's sharding on the current mesh (`jax.set_mesh`), by the logical names of its axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names, x.shape, mesh))


def batch_shards(size: int) -> int:
    """Return into how many parts the current mesh splits a batch of this size."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    axes = partition_spec(("batch",), (size,), mesh)[0] or ()
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))  # "data": only one


def variable_sharding(variable: nnx.Variable, mesh: Mesh | None):
    """Return the sharding of a parameter: on `mesh` by its logical names, or on this process's first device."""
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    names = variable.get_metadata("out_sharding", None) or (None,) * len(variable.shape)
    return NamedSharding(mesh, partition_spec(tuple(names), variable.shape, mesh))


def state_sharding(sharding: Any, shape: tuple[int, ...]) -> Any:
    """Return the sharding of a trained weight and its moments, given the sharding that the network reads it with.

    What is split over `fsdp` is split over `data` as well; if its size does not divide, it stays replicated, with a
    warning. A step then gathers the parts of a weight over `data`.
    """
    if not isinstance(sharding, NamedSharding) or sharding.mesh.shape["data"] == 1:
        return sharding
    parts = sharding.mesh.shape["fsdp"] * sharding.mesh.shape["data"]
    spec: list[Any] = list(sharding.spec)
    for i, (axes, size) in enumerate(zip(sharding.spec, shape, strict=True)):
        if axes not in ("fsdp", ("fsdp",)):
            continue
        if size % parts == 0:
            spec[i] = ("fsdp", "data")
        else:
            kept = "its weights and their moments are split over fsdp only"
            log_once(f"an axis of {size} does not divide by fsdp times data, {parts}: {kept}")
    return NamedSharding(sharding.mesh, P(*spec))


def parse_mesh(text: str | None) -> Mesh | None:
    """Return a mesh from text such as "data=2,tensor=4"; None from None.

    Raises:
        InputError: if the text is something else, does not fit the devices, or is missing in one of several processes.
    """
    if text is None:
        if jax.process_count() > 1:
            raise InputError(f"mesh: required with several processes; together they have {jax.device_count()} devices")
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or not size.isdecimal() or int(size) < 1 or axis in sizes:
            raise InputError(
                f"mesh: expected AXIS=N,... with axes {', '.join(MESH_AXES)} and N of at least 1, found {text!r}"
            )
        sizes[axis] = int(size)
    return make_mesh(**sizes)


def join_processes(text: str) -> None:
    """Connect to the other processes.

    Args:
        text: "HOST:PORT,COUNT,INDEX", or "" if JAX detects the cluster itself (TPU pods, SLURM, Open MPI).

    Raises:
        InputError: if the text is something else, or JAX finds no cluster.
    """
    if not text:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise InputError(f"distributed: JAX finds no cluster ({error}); give HOST:PORT,COUNT,INDEX") from None
        return
    address, *numbers = text.split(",")
    if ":" not in address or len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
        raise InputError(f"distributed: expected HOST:PORT,COUNT,INDEX, found {text!r}")
    count, index = map(int, numbers)
    if index >= count:
        raise InputError(f"distributed: INDEX must be less than COUNT, found {text!r}")
    jax.distributed.initialize(address, count, index)


def on_host(x: jax.Array) -> np.ndarray:
    """Return the whole array on the host, even if it is spread over several processes."""
    return np.asarray(x) if x.is_fully_addressable else np.asarray(multihost_utils.process_allgather(x, tiled=True))


_SUBPROCESS = """
import os, pickle, sys
answer = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # output of libraries must not mix with the answer
function, arguments = pickle.load(sys.stdin.buffer)
try:
    result = True, function(*arguments)
except Exception as error:
    result = False, error
with answer:
    pickle.dump(result, answer)
"""


def run_in_subprocess(function: Callable[..., R], *arguments: Any) -> R:
    """Call a function in a separate process, which is not part of the cluster and computes on the CPU; return its
    result. This is for libraries that wait for all processes of a cluster, in work that only one of them does.

    Args:
        function, arguments: must be picklable, as must the result and the errors of the function.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", _SUBPROCESS],
        input=pickle.dumps((function, arguments)),
        stdout=subprocess.PIPE,
        env=environment,
        check=True,
    )
    succeeded, result = pickle.loads(done.stdout)
    if not succeeded:
        raise result
    return result


# Processes with different parts of the work communicate through JAX's key-value store, which has no public API. A
# collective operation on the devices would also work, but it blocks them while others are still busy, and fails if that
# takes long.

POLL_SECONDS = 5
_number = itertools.count()  # index of exchanges; all processes make the same ones in the same order


def exchange(text: str) -> list[str]:
    """Return the texts that all processes passed to this function, in their order; wait for all of them."""
    if jax.process_count() == 1:
        return [text]
    client: Any = service.global_state.client
    prefix = f"acestep-jax/exchange/{next(_number)}"
    client.key_value_set(f"{prefix}/{jax.process_index()}", text)
    found = []
    for process in range(jax.process_count()):
        while len(found) == process:
            try:
                found.append(client.blocking_key_value_get(f"{prefix}/{process}", POLL_SECONDS * 1000))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
    return found


def leader_host() -> str:
    """Return the host by which the other processes reach process 0."""
    address: Any = service.global_state.coordinator_address
    return str(address).rpartition(":")[0].strip("[]")


@contextlib.contextmanager
def all_succeed() -> Iterator[None]:
    """Wait, at the end, for the other processes; if one has raised an error, all raise one.

    Raises:
        Preempted, InputError, OSError: this process's own error; otherwise, the error for another process.
    """
    failure: Exception | None = None
    try:
        yield
    except (Preempted, InputError, OSError) as error:
        failure = error
    ends = exchange("" if failure is None else type(failure).__name__)
    if failure is not None:
        raise failure
    if Preempted.__name__ in ends:
        raise Preempted
    for process, end in enumerate(ends):
        if end:
            raise InputError(f"distributed: process {process} of {len(ends)} has failed; see its own message")


def announce(name: str) -> None:
    """Announce an event to the other processes."""
    if jax.process_count() > 1:
        client: Any = service.global_state.client
        client.key_value_set(name, "", allow_overwrite=True)


def is_announced(name: str) -> bool:
    """Return whether a process has called `announce`."""
    if jax.process_count() == 1:
        return False
    client: Any = service.global_state.client
    try:
        client.key_value_try_get(name)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return False
    return True
