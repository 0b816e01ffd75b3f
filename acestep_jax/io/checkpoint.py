"""The native checkpoint: a folder with `config.json`, `tokenizer.json` and the weights as an Orbax tree.

Parameters are named by network and module path, `transformer.layers.self_attn.to_q.kernel`; each is stored whole
and read back straight onto its device or its part of a mesh. A quantised weight is stored as its values, under the
name of the weight, and its scales beside it, `transformer.layers.self_attn.to_q.scale`.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
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
from orbax.checkpoint import v1 as ocp
from tokenizers import Tokenizer

from acestep_jax.distributed import variable_sharding
from acestep_jax.errors import InputError
from acestep_jax.io import mapped
from acestep_jax.io.files import (
    DISK_FULL,
    absolute,
    as_path,
    check_parent,
    check_writable,
    is_remote,
    local_copy,
    publish_file,
    remove_tree,
)
from acestep_jax.io.manifest import (
    CONFIG,
    Manifest,
    check_sampling,
    check_unquantized,
    default_dtype,
    manifest_values,
    read_manifest,
)
from acestep_jax.models.config import DEFAULT_RUNTIME, NetworkConfig, Runtime, check_dtype, check_precision
from acestep_jax.models.quantization import NETWORKS, parts, quantize, quantize_array
from acestep_jax.models.registry import FAMILY

TOKENIZER, WEIGHTS = "tokenizer.json", "weights"

SMALL_MODEL = Path(__file__).parents[1] / "small_model"  # the checkpoint that comes with the package

BATCH_BYTES = 256 * 2**20  # written at once by `save`

# Orbax names every file it touches, and logs what it also raises.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


def abstract(name: str, config: NetworkConfig, runtime: Runtime = DEFAULT_RUNTIME) -> nnx.Module:
    """Return the network called `name` with shapes and dtypes in place of arrays; nothing is allocated.

    Of the networks that `models.quantization` does not name, `runtime.quantization` changes nothing.
    """
    network, _ = FAMILY.every[name]
    kind = runtime.quantization if name in NETWORKS else None
    # A module of its own for each caller, who may change it.
    made = _traced(network, config, runtime, kind, NETWORKS.get(name), jax.sharding.get_abstract_mesh())
    return jax.tree.map(lambda leaf: leaf, made)


@functools.lru_cache(maxsize=64)
def _traced(
    network: Any, config: NetworkConfig, runtime: Runtime, kind: Any, activations: Any, mesh: Any
) -> nnx.Module:
    """Trace the construction of a network once for each mesh in use: of all networks of a model it takes a second."""

    def make() -> nnx.Module:
        made = network(config, runtime=runtime, rngs=nnx.Rngs(0))
        return made if kind is None else quantize(made, kind, activations=activations)

    return jax.eval_shape(make)


def leaves(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Return the parameters and buffers of a module by dotted path, in order."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): variable for path, variable in flat}


@functools.lru_cache
def leaf_shapes(
    name: str, config: NetworkConfig, quantization: str | None = None
) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype (float32, of 8 bits what is quantised) of every leaf of the network called `name`, by
    dotted path, in order."""
    found = leaves(abstract(name, config, Runtime(quantization=quantization)))
    return MappingProxyType({leaf: jax.ShapeDtypeStruct(v.shape, v.dtype) for leaf, v in found.items()})


def assemble(module: nnx.Module, arrays: dict[str, jax.Array]) -> nnx.Module:
    """Return the abstract `module` with `arrays` (by dotted path) as its leaves; all of them, no others."""
    graphdef, state = nnx.split(module)
    flat = nnx.to_flat_state(state)
    names = {".".join(map(str, path)) for path, _ in flat}
    if names != arrays.keys():
        raise KeyError(f"leaves differ: {sorted(names ^ arrays.keys())}")
    filled = [(path, variable.replace(arrays[".".join(map(str, path))])) for path, variable in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


@contextlib.contextmanager
def publish(path: str | Path, size: int = 0) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which takes that name if all went well and is removed otherwise; in
    Cloud Storage, the folder itself.

    Args:
        size: bytes that will be written, as far as they are known.

    Raises:
        InputError: if `path` exists, the folder it should be in does not, or the disk has no room.
    """
    path = as_path(path)
    check_new(path)
    if is_remote(path):
        # There is nothing to rename; what is read first, such as `config.json`, is written last.
        try:
            yield path
        except BaseException:
            remove_tree(path)
            raise
        return
    parent = path.absolute().parent
    if size > (free := shutil.disk_usage(parent).free):
        raise InputError(f"{path}: {size / 1e9:.2f} GB to write, but the disk has {free / 1e9:.2f} GB free; make room")
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=parent))
    with _first_error_only():
        try:
            yield temporary
            temporary.chmod(0o755)
            temporary.rename(path)
        except BaseException as error:
            _remove(temporary)
            if is_disk_full(error):
                message = f"{path}: the disk is full, nothing was kept; make room or choose another place"
                raise InputError(message) from error
            raise


def check_new(path: Path) -> None:
    """Raise InputError if `path` exists, or the folder it should be in does not or cannot be written to."""
    if path.exists():
        raise InputError(f"{path}: already exists; remove it or choose another name")
    check_parent(path)
    check_writable(path)


def _remove(folder: Path) -> None:
    """Delete a folder until it stays away: after a failure, writes under way may create it again."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.2)
        if not folder.exists():
            return


@contextlib.contextmanager
def _first_error_only() -> Iterator[None]:
    """Silence what follows the first error: Orbax closes its event loop, of which other reads and writes complain."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda found: None if "Event loop is closed" in str(found.exc_value) else hook(found)
    try:
        yield
    except BaseException:
        time.sleep(0.5)
        raise
    finally:
        sys.unraisablehook = hook


def is_disk_full(error: BaseException) -> bool:
    """Return whether a write failed for want of space; TensorStore tells so only in its message."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    return number in DISK_FULL


def save(
    path: str | Path,
    configs: dict[str, NetworkConfig],
    arrays: Iterable[tuple[str, np.ndarray | jax.Array]],
    tokenizer: str | None,
    tokenizer_config: dict[str, Any],
    extra_files: dict[str, Any] | None = None,
    *,
    sampling: Mapping[str, Any] | None = None,
    dtypes: Mapping[str, str] | None = None,
    quantization: Mapping[str, str] | None = None,
    size: int | None = None,
    compress: bool = False,
) -> None:
    """Write a checkpoint atomically, some arrays at a time: not all of them need be in memory.

    Args:
        configs: by the names of the networks of `FAMILY`.
        arrays: pairs of dotted name (network first) and value, every leaf once.
        tokenizer: the text of `tokenizer.json`; None: there is none, beside single networks.
        tokenizer_config: see `Manifest`.
        extra_files: name to a function that writes the file of that name, given its path.
        sampling, dtypes, quantization: see `Manifest`; None: nothing of the kind.
        size: bytes of all arrays, for which the disk must have room; None: those of float32.
        compress: trained weights hardly get smaller, and it takes time and memory, but the latents of silence do.

    Raises:
        InputError: see `publish` and `check_sampling`; nothing is left behind. Also in one of several processes, for
            Orbax waits for all of them.
    """
    if jax.process_count() > 1:
        raise InputError(
            f"{path}: several processes write no checkpoint; convert the model before, in one process, with "
            "`acestep-jax convert from-torch`"
        )
    manifest = Manifest(configs, tokenizer_config, dict(sampling or {}), dict(dtypes or {}), dict(quantization or {}))
    check_sampling(manifest.sampling, "sampling")
    shapes = {f"{n}.{leaf}": s for n, found in described_leaves(manifest).items() for leaf, s in found.items()}
    size = size or sum(byte_size(shape) for shape in shapes.values())
    with publish(path, size) as folder:
        wanted = set(shapes)
        weights = absolute(folder / WEIGHTS)
        context = ocp.Context()
        context.array.saving.use_compression = compress
        for batch in batches(arrays):
            wanted -= batch.keys()
            with context:
                ocp.partial.save(weights, nest(batch))  # pyright: ignore[reportArgumentType]
            batch.clear()  # before the next one is read
        if wanted:
            raise KeyError(f"no value for {sorted(wanted)}")
        ocp.partial.finalize(weights)  # pyright: ignore[reportArgumentType]
        if tokenizer is not None:
            (folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")
        for name, write in (extra_files or {}).items():
            write(folder / name)
        (folder / CONFIG).write_text(json.dumps(manifest_values(manifest), indent=2) + "\n", encoding="utf-8")


def save_changed(source: str | Path, destination: str | Path, name: str, arrays: Mapping[str, Any]) -> None:
    """Write a copy of the checkpoint `source` with other values of leaves of the network `name`.

    Args:
        arrays: by dotted path within the network; cast to what `source` stores. Leaves that are not there stay.

    Raises:
        InputError: see `publish`, `read_manifest` and `load_leaves`.
    """
    source = as_path(source)
    manifest = read_manifest(source)
    check_unquantized(source, manifest, "what is written has")
    stored = network_leaves(source, manifest)

    def values() -> Iterator[tuple[str, np.ndarray]]:
        for network, shapes in stored.items():
            for group in batches(shapes.items()):
                changed = {k: arrays[k] for k in group if network == name and k in arrays}
                kept = read_leaves(source, network, {k: v for k, v in group.items() if k not in changed})
                for leaf, shape in group.items():
                    value = changed[leaf] if leaf in changed else kept[leaf]
                    yield f"{network}.{leaf}", np.asarray(value).astype(shape.dtype)

    save(
        destination,
        manifest.configs,
        values(),
        (source / TOKENIZER).read_text(encoding="utf-8"),
        manifest.tokenizer_config,
        other_files(source),
        sampling=manifest.sampling,
        dtypes=manifest.dtypes,
        size=sum(byte_size(shape) for shapes in stored.values() for shape in shapes.values()),
    )


def other_files(source: Path) -> dict[str, Any]:
    """Return what `save` writes as `extra_files` to copy those of another checkpoint."""
    extra = [file for file in source.iterdir() if file.is_file() and file.name not in (CONFIG, TOKENIZER)]
    return {file.name: functools.partial(copy_file, file) for file in extra}


def byte_size(array: Any) -> int:
    """Return the bytes of an array, or of what has the shape and the dtype of one."""
    return math.prod(array.shape) * array.dtype.itemsize


def copy_file(file: Path, target: Path) -> None:
    """Copy a file of a checkpoint, from and to the disk or Cloud Storage."""
    with publish_file(target) as temporary:
        shutil.copyfile(local_copy(file), temporary)


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
        dtype: of weights and computation, one of `config.PRECISIONS`; None: each array as stored, and `default_dtype`.
        param_dtype: only of the weights; None: as `dtype` says.
        quantization: of the weights of layers, one of `config.QUANTIZATIONS`, see `models.quantization`; None: as they
            are stored. Weights that are not yet quantised are, a few at a time; `dtype` is of all others.
        remat, attention: see `Runtime`.
        mesh: from `distributed.make_mesh`; None: all on the first device.
        names: which networks; None: all that the checkpoint has.
        on_host: whether they go into the host's memory, for `placement`, instead of onto devices.

    Raises:
        InputError: if the checkpoint is absent, incomplete or of other shapes than its config, or quantised to another
            kind.
    """
    path = as_path(path)
    if dtype is not None:
        check_precision(dtype)
    if param_dtype is not None:
        check_dtype(param_dtype, "param_dtype")
    manifest = read_manifest(path, None if names is None else ())  # those named are looked for below
    names = list(manifest.configs if names is None else names)
    if absent := [name for name in names if name not in manifest.configs]:
        raise InputError(f"{path}: has no {', '.join(absent)}, only {', '.join(manifest.configs)}")
    stored = network_leaves(path, manifest)
    networks = {}
    for name in names:
        kind = quantization_of(path, manifest, name, quantization)
        runtime = Runtime.of(
            dtype or default_dtype(manifest, name, stored[name]), remat=remat, attention=attention, quantization=kind
        )
        if param_dtype is not None:
            runtime = dataclasses.replace(runtime, param_dtype=param_dtype)
        stored_as = runtime.param_dtype if dtype or param_dtype else None  # None: each leaf as it is
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
    """Return what the network `name` is to be quantised to, if it is at all; raise InputError if it is already, and to
    another kind."""
    found = manifest.quantization.get(name)
    if wanted is None or name not in NETWORKS:
        return found
    if found not in (None, wanted):
        raise InputError(
            f"{path}: its {name} is quantised to {found}, and cannot be to {wanted}; leave the dtype out, or take the "
            "checkpoint that it was made from"
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
    # The file may ask for both; here lengths are the caller's choice.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def stored_leaves(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of every stored array by dotted name; raise InputError if the weights are unreadable."""
    weights = absolute(path / WEIGHTS)
    with _first_error_only():
        try:
            tree = ocp.metadata(weights).metadata  # pyright: ignore[reportArgumentType]
        except Exception as error:  # Orbax raises many kinds, depending on what is broken
            raise InputError(f"{weights}: missing or damaged ({error}); convert the checkpoint again") from None
        if not isinstance(tree, dict):
            raise InputError(f"{weights}: damaged; convert the checkpoint again")
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flatten(tree)}


def network_leaves(path: Path, manifest: Manifest) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Return `stored_leaves` by network and dotted path, in the order of its leaves.

    Raises:
        InputError: if the weights are unreadable or not those that the configs describe.
    """
    stored = stored_leaves(path)
    result = described_leaves(manifest)
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


def described_leaves(manifest: Manifest) -> dict[str, Mapping[str, jax.ShapeDtypeStruct]]:
    """Return `leaf_shapes` of the networks that a manifest describes."""
    kinds = manifest.quantization
    return {name: leaf_shapes(name, config, kinds.get(name)) for name, config in manifest.configs.items()}


def load_leaves(path: Path, name: str, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Load some arrays of the network `name`, by dotted path, as the shapes, dtypes and shardings of `targets` say.

    Raises:
        InputError: if the stored bytes are damaged.
    """
    if not targets:  # Orbax takes no empty tree
        return {}
    named = {f"{name}.{leaf}": target for leaf, target in targets.items()}
    weights = absolute(path / WEIGHTS)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    if all(target.sharding is not None and target.sharding.is_fully_addressable for target in targets.values()):
        # Of several processes, this one alone may load.
        process, options = jax.process_index(), context.multiprocessing
        options.active_processes, options.primary_host = {process}, process
        options.barrier_sync_key_prefix = str(process)
    try:
        if mapped.is_mapped(weights, targets.values()):
            loaded = nest(dict(mapped.read(weights, named)))
        else:
            with context, _first_error_only():
                loaded = ocp.load(weights, nest(named))  # pyright: ignore[reportArgumentType]
    except Exception as error:
        cause = error.__cause__ or error
        if not isinstance(cause, ValueError):  # all that TensorStore raises
            raise
        raise InputError(f"{weights}: damaged ({cause}); convert the checkpoint again") from None
    return {leaf.removeprefix(f"{name}."): value for leaf, value in flatten(loaded)}


def read_leaves(path: Path, name: str, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """Load some arrays into the host's memory, as they are stored; see `load_leaves`."""
    host = host_sharding()
    targets = {leaf: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=host) for leaf, shape in shapes.items()}
    return {leaf: np.asarray(value) for leaf, value in load_leaves(path, name, targets).items()}


def host_sharding() -> jax.sharding.SingleDeviceSharding:
    """Return the sharding of the host's memory, or of the accelerator if `JAX_PLATFORMS` names nothing else."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX raises nothing narrower
        device = jax.local_devices()[0]
    return jax.sharding.SingleDeviceSharding(device)


def batches(arrays: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    """Group arrays or their shapes until they reach `BATCH_BYTES`, for every call of Orbax has a cost of its own."""
    batch, size = {}, 0
    for name, value in arrays:
        batch[name] = value
        size += byte_size(value)
        del value
        if size >= BATCH_BYTES:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Return a tree of what has dotted names: the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a tree of dictionaries with their dotted names."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
