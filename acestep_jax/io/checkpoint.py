"""The native checkpoint: a folder with `config.json`, `tokenizer.json` and the weights as an Orbax tree.

Parameters are named by network and module path, `transformer.layers.self_attn.to_q.kernel`; each is stored whole
and read directly onto its device or its part of a mesh. A quantised weight is stored as its values, under the name of
the weight, and its scales, `transformer.layers.self_attn.to_q.scale`.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tokenizers import Tokenizer

from acestep_jax.distributed import variable_sharding
from acestep_jax.errors import InputError
from acestep_jax.io import mapped
from acestep_jax.io.files import (
    absolute,
    as_path,
    local_copy,
)
from acestep_jax.io.manifest import (
    Manifest,
    default_dtype,
    read_manifest,
)
from acestep_jax.models.config import NetworkConfig
from acestep_jax.models.layers import shapes_only
from acestep_jax.models.quantization import NETWORKS, parts, quantize, quantize_array
from acestep_jax.models.registry import FAMILY
from acestep_jax.models.runtime import DEFAULT_RUNTIME, DTYPES, Runtime, check_dtype, check_precision

TOKENIZER, WEIGHTS = "tokenizer.json", "weights"

SMALL_MODEL = Path(__file__).parents[1] / "small_model"  # the checkpoint that comes with the package

BATCH_BYTES = 256 * 2**20  # bytes that `save` writes at once
SEPARATE_BYTES = 2**25  # arrays of this size or more get a file of their own, which aligns them, see `io.mapped`

# Orbax logs every file that it touches, and errors that it also raises.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


def abstract(name: str, config: NetworkConfig, runtime: Runtime = DEFAULT_RUNTIME) -> nnx.Module:
    """Return the network called `name` with shapes and dtypes instead of arrays, without allocating memory.

    `runtime.quantization` has no effect on networks that `models.quantization` does not name.
    """
    network, _ = FAMILY.every[name]
    kind = runtime.quantization if name in NETWORKS else None
    # Each caller gets its own module, because callers may change it.
    made = _traced(network, config, runtime, kind, NETWORKS.get(name), jax.sharding.get_abstract_mesh())
    return jax.tree.map(lambda leaf: leaf, made)


@functools.lru_cache(maxsize=64)
def _traced(
    network: Any, config: NetworkConfig, runtime: Runtime, kind: Any, activations: Any, mesh: Any
) -> nnx.Module:
    """Trace the construction of a network once for each mesh, because that takes a while."""

    def make() -> nnx.Module:
        rngs = nnx.Rngs(0)
        rngs.default = _OneKey(0, tag="default")  # pyright: ignore[reportAttributeAccessIssue]
        with shapes_only():
            made = network(config, runtime=runtime, rngs=rngs)
        return made if kind is None else quantize(made, kind, activations=activations)

    return jax.eval_shape(make)


class _OneKey(nnx.RngStream):
    """Random keys for values that are never drawn: tracing the derivation of a new key for each parameter is slow."""

    def __call__(self) -> jax.Array:
        return self.key[...]


def leaves(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Return the parameters and buffers of a module by dotted path, in order."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): variable for path, variable in flat}


@functools.lru_cache
def leaf_shapes(
    name: str, config: NetworkConfig, quantization: str | None = None, precision: str = "float32"
) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Return the shape and dtype of every parameter of the network called `name`, by dotted path, in order: float32, or
    8 bits for quantised weights.

    Args:
        precision: precision of the runtime that the network is traced with. It does not change the result; one that
            is used for loading too saves a second trace.
    """
    found = leaves(abstract(name, config, Runtime.of(precision, quantization=quantization)))
    wide = {leaf: jnp.float32 if v.dtype in map(jnp.dtype, DTYPES) else v.dtype for leaf, v in found.items()}
    return MappingProxyType({leaf: jax.ShapeDtypeStruct(v.shape, wide[leaf]) for leaf, v in found.items()})


def assemble(module: nnx.Module, arrays: dict[str, jax.Array]) -> nnx.Module:
    """Return the abstract `module` with `arrays`, by dotted path, as parameters; raise KeyError unless names match."""
    graphdef, state = nnx.split(module)
    flat = nnx.to_flat_state(state)
    names = {".".join(map(str, path)) for path, _ in flat}
    if names != arrays.keys():
        raise KeyError(f"leaves differ: {sorted(names ^ arrays.keys())}")
    filled = [(path, variable.replace(arrays[".".join(map(str, path))])) for path, variable in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


@contextlib.contextmanager
def first_error_only() -> Iterator[None]:
    """Silence the errors that follow the first one, when Orbax closes its event loop during other reads and writes."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda found: None if "Event loop is closed" in str(found.exc_value) else hook(found)
    try:
        yield
    except BaseException:
        time.sleep(0.5)
        raise
    finally:
        sys.unraisablehook = hook


def byte_size(array: Any) -> int:
    """Return the size in bytes of an array, or of an object with a shape and a dtype."""
    return math.prod(array.shape) * array.dtype.itemsize


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    quantization: str | None = None,
    remat: str = "none",
    attention: str = "auto",
    mesh: Mesh | None = None,
    names: Iterable[str] | None = None,
    on_host: bool = False,
) -> dict[str, nnx.Module]:
    """Load networks, each array straight onto its device or its part of `mesh`.

    Args:
        path: the folder of a checkpoint.
        dtype: dtype of weights and computation, one of `runtime.PRECISIONS`; None: weights as stored, `default_dtype`
            for the computation.
        param_dtype: dtype of only the weights; None: as `dtype`.
        quantization: quantisation of the layers' weights, one of `runtime.QUANTIZATIONS`, see `models.quantization`;
            None: as stored. Weights that are not quantised yet are quantised a few at a time; `dtype` applies to all
            others.
        remat, attention: see `Runtime`.
        mesh: from `distributed.make_mesh`; None: all on the first device.
        names: names of the networks to load; None: all networks of the checkpoint.
        on_host: whether to load them into the host's memory, for `placement`, instead of onto devices.

    Raises:
        InputError: if the checkpoint is missing, incomplete, inconsistent with its config, or quantised differently.
    """
    path = as_path(path)
    if dtype is not None:
        check_precision(dtype)
    if param_dtype is not None:
        check_dtype(param_dtype, "param_dtype")
    manifest = read_manifest(path, None if names is None else ())  # named networks are checked below
    names = list(manifest.configs if names is None else names)
    if absent := [name for name in names if name not in manifest.configs]:
        raise InputError(f"{path}: has no {', '.join(absent)}, only {', '.join(manifest.configs)}")
    stored = network_leaves(path, manifest, dtype or manifest.dtypes.get("transformer", "float32"))
    networks = {}
    for name in names:
        kind = quantization_of(path, manifest, name, quantization)
        runtime = Runtime.of(
            dtype or default_dtype(manifest, name, stored[name]), remat=remat, attention=attention, quantization=kind
        )
        if param_dtype is not None:
            runtime = dataclasses.replace(runtime, param_dtype=param_dtype)
        stored_as = runtime.param_dtype if dtype or param_dtype else None  # None: each array as stored
        module = abstract(name, manifest.configs[name], runtime)
        quantized = parts(module)
        scales = {part.scale for part in quantized.values()}
        wanted, later = {}, {}
        for leaf, variable in leaves(module).items():
            sharding = host_sharding() if on_host else variable_sharding(variable, mesh)
            is_part = leaf in quantized or leaf in scales
            if is_part and name not in manifest.quantization:
                later[leaf] = sharding
                continue
            found = stored[name][leaf]
            cast = found.dtype if stored_as is None or is_part else jnp.dtype(stored_as)
            wanted[leaf] = jax.ShapeDtypeStruct(found.shape, cast, sharding=sharding)
        arrays = load_leaves(path, name, wanted)
        for group in batches((leaf, stored[name][leaf]) for leaf in later if leaf in quantized):
            targets = {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=later[n]) for n, s in group.items()}
            for leaf, weight in load_leaves(path, name, targets).items():
                scale, axis = quantized[leaf]
                make = jax.jit(quantize_array, static_argnums=(1, 2), out_shardings=(later[leaf], later[scale]))
                arrays[leaf], arrays[scale] = make(weight, kind, axis)
        networks[name] = assemble(module, arrays)
    return networks


def quantization_of(path: Path, manifest: Manifest, name: str, wanted: str | None) -> str | None:
    """Return the quantisation of the network `name` after loading, None for none; raise InputError if it is stored with
    a different one."""
    found = manifest.quantization.get(name)
    if wanted is None or name not in NETWORKS:
        return found
    if found not in (None, wanted):
        raise InputError(
            f"{path}: its {name} is quantised to {found} and cannot be quantised to {wanted}; leave the dtype out, or "
            "use the checkpoint that it was made from"
        )
    return wanted


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint; raise InputError if it cannot be read."""
    file = as_path(path) / TOKENIZER
    if not file.is_file():
        raise InputError(f"{file}: missing; convert the checkpoint again")
    try:
        tokenizer = Tokenizer.from_file(str(local_copy(file)))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{file}: not a tokenizer ({error})") from None
    # The file may enable both, but here the caller chooses the lengths.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def stored_leaves(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of every stored array by dotted name; raise InputError if the weights are unreadable."""
    weights = absolute(path / WEIGHTS)
    if (found := mapped.stored(weights)) is not None:
        return found
    from orbax.checkpoint import v1 as ocp  # takes half a second to import, and songs do not need it

    with first_error_only():
        try:
            tree = ocp.metadata(weights).metadata  # pyright: ignore[reportArgumentType]
        except Exception as error:  # Orbax raises many types, depending on the damage
            raise InputError(f"{weights}: missing or damaged ({error}); convert the checkpoint again") from None
        if not isinstance(tree, dict):
            raise InputError(f"{weights}: damaged; convert the checkpoint again")
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flatten(tree)}


def network_leaves(
    path: Path, manifest: Manifest, precision: str = "float32"
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Return `stored_leaves` by network and dotted path, in the order of the network's parameters.

    Args:
        precision: see `leaf_shapes`.

    Raises:
        InputError: if the weights are unreadable, or do not match the configs.
    """
    stored = stored_leaves(path)
    result = described_leaves(manifest, precision)
    wanted = {f"{name}.{leaf}": shape for name, shapes in result.items() for leaf, shape in shapes.items()}
    for name in sorted(wanted.keys() | stored.keys()):
        if name not in stored:
            problem = "is missing"
        elif name not in wanted:
            problem = "belongs to no network of the config"
        elif stored[name].shape != wanted[name].shape:
            problem = f"has shape {stored[name].shape}, expected {wanted[name].shape}"
        elif stored[name].dtype != wanted[name].dtype and 1 in (s[name].dtype.itemsize for s in (stored, wanted)):
            problem = f"is {stored[name].dtype}, expected {wanted[name].dtype}"
        else:
            continue
        raise InputError(f"{path / WEIGHTS}: {name} {problem}; convert the checkpoint again")
    return {name: {leaf: stored[f"{name}.{leaf}"] for leaf in shapes} for name, shapes in result.items()}


def described_leaves(manifest: Manifest, precision: str = "float32") -> dict[str, Mapping[str, jax.ShapeDtypeStruct]]:
    """Return `leaf_shapes` of the networks that a manifest describes."""
    kinds = manifest.quantization
    return {name: leaf_shapes(name, config, kinds.get(name), precision) for name, config in manifest.configs.items()}


def load_leaves(path: Path, name: str, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Load some arrays of the network `name`, by dotted path, with the shapes, dtypes and shardings of `targets`.

    Raises:
        InputError: if the stored bytes are damaged.
    """
    if not targets:  # Orbax takes no empty tree
        return {}
    named = {f"{name}.{leaf}": target for leaf, target in targets.items()}
    weights = absolute(path / WEIGHTS)
    read = mapped.read if mapped.is_mapped(weights, targets.values()) else _read_by_orbax
    try:
        loaded = dict(read(weights, named))
    except Exception as error:
        cause = error.__cause__ or error
        if not isinstance(cause, ValueError):  # all that TensorStore raises
            raise
        raise InputError(f"{weights}: damaged ({cause}); convert the checkpoint again") from None
    return {leaf.removeprefix(f"{name}."): value for leaf, value in loaded.items()}


def _read_by_orbax(weights: Path, targets: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, jax.Array]]:
    """Do what `mapped.read` does, in any place and onto any devices."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.pytree.loading.partial_load = True
    if all(target.sharding is not None and target.sharding.is_fully_addressable for target in targets.values()):
        # Other processes need not take part in loading.
        process, options = jax.process_index(), context.multiprocessing
        options.active_processes, options.primary_host = {process}, process
        options.barrier_sync_key_prefix = str(process)
    with context, first_error_only():
        loaded = ocp.load(weights, nest(dict(targets)))  # pyright: ignore[reportArgumentType]
    return flatten(loaded)


def read_leaves(path: Path, name: str, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """Load some arrays into the host's memory without changes; see `load_leaves`."""
    host = host_sharding()
    targets = {leaf: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=host) for leaf, shape in shapes.items()}
    return {leaf: np.asarray(value) for leaf, value in load_leaves(path, name, targets).items()}


def host_sharding() -> jax.sharding.SingleDeviceSharding:
    """Return a sharding in the host's memory, or on the accelerator if `JAX_PLATFORMS` excludes the CPU."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX raises nothing narrower
        device = jax.local_devices()[0]
    return jax.sharding.SingleDeviceSharding(device)


def batches(arrays: Iterable[tuple[str, Any]], separate_from: float = math.inf) -> Iterator[dict[str, Any]]:
    """Group arrays, or their shapes, into batches of `BATCH_BYTES`, because every call of Orbax has a fixed cost.

    Args:
        separate_from: size in bytes from which an array is a batch by itself.
    """
    batch, size = {}, 0
    for name, value in arrays:
        own = byte_size(value)
        if own >= separate_from:
            single = {name: value}
            del value
            yield single
            continue
        batch[name] = value
        size += own
        del value
        if size >= BATCH_BYTES:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Return nested dictionaries for dotted names: the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dictionaries with their dotted names."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
