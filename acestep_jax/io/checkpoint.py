"""The native checkpoint: a folder with `config.json`, `tokenizer.json` and the weights as an Orbax tree.

Parameters are named by network and module path, `transformer.layers.self_attn.to_q.kernel`; each is stored whole
and read back straight onto its device or its part of a mesh.
"""

import contextlib
import dataclasses
import errno
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
from acestep_jax.models.audio_tokenizer import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer
from acestep_jax.models.autoencoder import AutoencoderOobleck
from acestep_jax.models.condition_encoder import AceStepConditionEncoder
from acestep_jax.models.config import (
    AudioTokenDetokenizerConfig,
    AudioTokenizerConfig,
    AutoencoderConfig,
    ConditionEncoderConfig,
    NetworkConfig,
    TextEncoderConfig,
    TransformerConfig,
    check_dtype,
)
from acestep_jax.models.qwen3 import Qwen3Model
from acestep_jax.models.transformer import AceStepTransformer1DModel

# Every network of a checkpoint: its module and its config, under the names of diffusers' folders.
NETWORKS: dict[str, tuple[type[nnx.Module], type[NetworkConfig]]] = {
    "transformer": (AceStepTransformer1DModel, TransformerConfig),
    "condition_encoder": (AceStepConditionEncoder, ConditionEncoderConfig),
    "text_encoder": (Qwen3Model, TextEncoderConfig),
    "vae": (AutoencoderOobleck, AutoencoderConfig),
    "audio_tokenizer": (AceStepAudioTokenizer, AudioTokenizerConfig),
    "audio_token_detokenizer": (AceStepAudioTokenDetokenizer, AudioTokenDetokenizerConfig),
}
OPTIONAL_NETWORKS = ("audio_tokenizer", "audio_token_detokenizer")

FORMAT, FORMAT_VERSION = "acestep-jax", 1
CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "weights"

SMALL_MODEL = Path(__file__).parents[1] / "small_model"  # the checkpoint that comes with the package

BATCH_BYTES = 256 * 2**20  # written at once by `save`

# Orbax names every file it touches, and logs what it also raises.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `config.json` says."""

    configs: dict[str, NetworkConfig]
    tokenizer_config: dict[str, Any]  # of the PyTorch tokenizer folder, kept for the way back


def abstract(name: str, config: NetworkConfig) -> nnx.Module:
    """The network called `name` with shapes and dtypes in place of arrays; nothing is allocated."""
    network, _ = NETWORKS[name]
    return jax.eval_shape(lambda: network(config, rngs=nnx.Rngs(0)))


def leaves(module: nnx.Module) -> dict[str, nnx.Variable]:
    """The parameters and buffers of a module by dotted path, in order."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): variable for path, variable in flat}


@functools.lru_cache
def leaf_shapes(name: str, config: NetworkConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every leaf of the network called `name`, by dotted path, in order."""
    found = leaves(abstract(name, config))
    return MappingProxyType({leaf: jax.ShapeDtypeStruct(v.shape, v.dtype) for leaf, v in found.items()})


def assemble(module: nnx.Module, arrays: dict[str, jax.Array]) -> nnx.Module:
    """The abstract `module` with `arrays` (by dotted path) as its leaves; all of them, no others."""
    graphdef, state = nnx.split(module)
    flat = nnx.to_flat_state(state)
    names = {".".join(map(str, path)) for path, _ in flat}
    if names != arrays.keys():
        raise KeyError(f"leaves differ: {sorted(names ^ arrays.keys())}")
    filled = [(path, variable.replace(arrays[".".join(map(str, path))])) for path, variable in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


@contextlib.contextmanager
def publish(path: str | Path, size: int = 0) -> Iterator[Path]:
    """Gives a temporary folder beside `path`, which takes that name if all went well and is removed otherwise.

    Args:
        size: bytes that will be written, as far as they are known.

    Raises:
        InputError: if `path` exists, the folder it should be in does not, or the disk has no room.
    """
    path = Path(path)
    check_new(path)
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
    """Raises InputError if `path` exists or the folder it should be in does not."""
    if path.exists():
        raise InputError(f"{path}: already exists; remove it or choose another name")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: the folder {path.absolute().parent} does not exist; create it first")


def _remove(folder: Path) -> None:
    """Deletes a folder until it stays away: after a failure, writes under way go on and make it anew."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.2)
        if not folder.exists():
            return


@contextlib.contextmanager
def _first_error_only() -> Iterator[None]:
    """When a read or write fails, Orbax closes its event loop; those under way complain of that, for half a second."""
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
    """Whether a write failed for want of space; TensorStore tells so in its message alone."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save(
    path: str | Path,
    configs: dict[str, NetworkConfig],
    arrays: Iterable[tuple[str, np.ndarray | jax.Array]],
    tokenizer: str | None,
    tokenizer_config: dict[str, Any],
    extra_files: dict[str, Any] | None = None,
    *,
    compress: bool = False,
) -> None:
    """Writes a checkpoint, whole or not at all, some arrays at a time: not all of them need be in memory.

    Args:
        configs: by the names of `NETWORKS`.
        arrays: pairs of dotted name (network first) and value, every leaf once.
        tokenizer: the text of `tokenizer.json`; None: there is none, beside single networks.
        tokenizer_config: see `Manifest`.
        extra_files: name to a function that writes the file of that name, given its path.
        compress: trained weights hardly get smaller, and it takes time and memory, but the latents of silence do.

    Raises:
        InputError: see `publish`; nothing is left behind.
    """
    shapes = {
        f"{name}.{leaf}": shape for name, config in configs.items() for leaf, shape in leaf_shapes(name, config).items()
    }
    size = sum(math.prod(shape.shape) * shape.dtype.itemsize for shape in shapes.values())
    with publish(path, size) as folder:
        wanted = set(shapes)
        weights = (folder / WEIGHTS).absolute()
        context = ocp.Context()
        context.array.saving.use_compression = compress
        for batch in batches(arrays):
            wanted -= batch.keys()
            with context:
                ocp.partial.save(weights, nest(batch))
            batch.clear()  # before the next one is read
        if wanted:
            raise KeyError(f"no value for {sorted(wanted)}")
        ocp.partial.finalize(weights)
        if tokenizer is not None:
            (folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")
        for name, write in (extra_files or {}).items():
            write(folder / name)
        values = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **{name: dataclasses.asdict(config) for name, config in configs.items()},
            "tokenizer_config": tokenizer_config,
        }
        (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def save_changed(source: str | Path, destination: str | Path, name: str, arrays: Mapping[str, Any]) -> None:
    """Writes a copy of the checkpoint `source` with other values of leaves of the network `name`.

    Args:
        arrays: by dotted path within the network; cast to what `source` stores. Leaves that are not there stay.

    Raises:
        InputError: see `publish`, `read_manifest` and `load_leaves`.
    """
    source = Path(source)
    manifest = read_manifest(source)
    stored = network_leaves(source, manifest)

    def values() -> Iterator[tuple[str, np.ndarray]]:
        for network, shapes in stored.items():
            for group in batches(shapes.items()):
                changed = {k: arrays[k] for k in group if network == name and k in arrays}
                kept = read_leaves(source, network, {k: v for k, v in group.items() if k not in changed})
                for leaf, shape in group.items():
                    value = changed[leaf] if leaf in changed else kept[leaf]
                    yield f"{network}.{leaf}", np.asarray(value).astype(shape.dtype)

    extra = [file for file in source.iterdir() if file.is_file() and file.name not in (CONFIG, TOKENIZER)]
    save(
        destination,
        manifest.configs,
        values(),
        (source / TOKENIZER).read_text(encoding="utf-8"),
        manifest.tokenizer_config,
        {file.name: functools.partial(shutil.copyfile, file) for file in extra},
    )


def read_manifest(path: str | Path, required: Iterable[str] | None = None) -> Manifest:
    """Reads `config.json`.

    Args:
        required: networks that must be there; None: all but the optional ones.

    Raises:
        InputError: if `path` holds no checkpoint of this library, or lacks one of them.
    """
    required = NETWORKS.keys() - set(OPTIONAL_NETWORKS) if required is None else set(required)
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; expected an acestep-jax checkpoint")
    convert = f"if this is a PyTorch checkpoint, convert it: python -m convert from-torch {path} DST"
    try:
        values = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no {CONFIG} here, so this is no acestep-jax checkpoint; {convert}") from None
    except ValueError as error:
        raise InputError(f"{path / CONFIG}: not valid JSON ({error})") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise InputError(f"{path / CONFIG}: not of an acestep-jax checkpoint; {convert}")
    if (version := values.pop("format_version", None)) != FORMAT_VERSION:
        raise InputError(
            f"{path / CONFIG}: format_version {version}, but this version of acestep-jax reads {FORMAT_VERSION}; "
            "update the package or convert the checkpoint again"
        )
    tokenizer_config = values.pop("tokenizer_config", {})
    if unknown := sorted(values.keys() - NETWORKS.keys()):
        raise InputError(f"{path / CONFIG}: unknown network(s) {', '.join(unknown)}")
    if missing := sorted(required - set(OPTIONAL_NETWORKS) - values.keys()):
        raise InputError(f"{path / CONFIG}: the network(s) {', '.join(missing)} are missing")
    configs = {}
    for name, (_, config) in NETWORKS.items():
        if name in values:
            if not isinstance(values[name], dict):
                raise InputError(f"{path / CONFIG}: {name}: expected a JSON object, found {values[name]!r}")
            known = {field.name for field in dataclasses.fields(config)}
            if unknown := sorted(values[name].keys() - known):
                raise InputError(f"{path / CONFIG}: {name}: unknown key(s) {', '.join(unknown)}")
            configs[name] = config(**values[name])
    return Manifest(configs, tokenizer_config)


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    remat: str = "none",
    mesh: Mesh | None = None,
    names: Iterable[str] | None = None,
) -> dict[str, nnx.Module]:
    """Loads networks, each array straight onto its device or its part of `mesh`.

    Args:
        path: the folder of a checkpoint.
        dtype: of weights and computation, one of `config.DTYPES`; None: as stored.
        param_dtype: of the weights alone; None: as `dtype` says.
        remat: see `NetworkConfig.remat`.
        mesh: from `sharding.make_mesh`; None: all on the first device.
        names: which networks; None: all that the checkpoint has.

    Raises:
        InputError: if the checkpoint is absent, incomplete or of other shapes than its config.
    """
    path = Path(path)
    for argument, value in (("dtype", dtype), ("param_dtype", param_dtype)):
        if value is not None:
            check_dtype(value, argument)
    manifest = read_manifest(path, None if names is None else ())  # those named are looked for below
    names = list(manifest.configs if names is None else names)
    if absent := [name for name in names if name not in manifest.configs]:
        raise InputError(f"{path}: has no {', '.join(absent)}, only {', '.join(manifest.configs)}")
    stored = network_leaves(path, manifest)
    networks = {}
    for name in names:
        config = manifest.configs[name]
        stored_as = param_dtype or dtype  # None: each leaf as it is
        config = dataclasses.replace(
            config, dtype=dtype or config.dtype, param_dtype=stored_as or config.param_dtype, remat=remat
        )
        module = abstract(name, config)
        targets = {}
        for leaf, variable in leaves(module).items():
            found = stored[name][leaf]
            kind = found.dtype if stored_as is None else jnp.dtype(stored_as)
            targets[leaf] = jax.ShapeDtypeStruct(found.shape, kind, sharding=variable_sharding(variable, mesh))
        networks[name] = assemble(module, load_leaves(path, name, targets))
    return networks


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint; raises InputError if it cannot be read."""
    file = Path(path) / TOKENIZER
    if not file.is_file():
        raise InputError(f"{file}: missing; convert the checkpoint again")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{file}: not a tokenizer ({error})") from None
    # The file may ask for both; here lengths are the caller's choice.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def stored_leaves(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every stored array by dotted name; raises InputError if the weights are unreadable."""
    weights = (path / WEIGHTS).absolute()
    with _first_error_only():
        try:
            tree = ocp.metadata(weights).metadata
        except Exception as error:  # Orbax raises many kinds, depending on what is broken
            raise InputError(f"{weights}: missing or damaged ({error}); convert the checkpoint again") from None
        if not isinstance(tree, dict):
            raise InputError(f"{weights}: damaged; convert the checkpoint again")
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flatten(tree)}


def network_leaves(path: Path, manifest: Manifest) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """`stored_leaves` by network and dotted path, in the order of its leaves.

    Raises:
        InputError: if the weights are unreadable or not those that the configs describe.
    """
    stored = stored_leaves(path)
    result = {name: leaf_shapes(name, config) for name, config in manifest.configs.items()}
    wanted = {f"{name}.{leaf}": shape for name, shapes in result.items() for leaf, shape in shapes.items()}
    for name in sorted(wanted.keys() | stored.keys()):
        if name not in stored:
            problem = "is missing"
        elif name not in wanted:
            problem = "belongs to no network of the config"
        elif stored[name].shape != wanted[name].shape:
            problem = f"has shape {stored[name].shape}, expected {wanted[name].shape}"
        else:
            continue
        raise InputError(f"{path / WEIGHTS}: {name} {problem}; convert the checkpoint again")
    return {name: {leaf: stored[f"{name}.{leaf}"] for leaf in shapes} for name, shapes in result.items()}


def load_leaves(path: Path, name: str, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Some arrays of the network `name`, by dotted path, as the shapes, dtypes and shardings of `targets` say.

    Raises:
        InputError: if the stored bytes are damaged.
    """
    if not targets:  # Orbax takes no empty tree
        return {}
    tree = nest({f"{name}.{leaf}": target for leaf, target in targets.items()})
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context, _first_error_only():
            loaded = ocp.load((path / WEIGHTS).absolute(), tree)
    except Exception as error:
        cause = error.__cause__ or error
        if not isinstance(cause, ValueError):  # all that TensorStore raises
            raise
        raise InputError(f"{path / WEIGHTS}: damaged ({cause}); convert the checkpoint again") from None
    return {leaf.removeprefix(f"{name}."): value for leaf, value in flatten(loaded)}


def read_leaves(path: Path, name: str, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """`load_leaves` to the host's memory, as they are stored."""
    host = host_sharding()
    targets = {leaf: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=host) for leaf, shape in shapes.items()}
    return {leaf: np.asarray(value) for leaf, value in load_leaves(path, name, targets).items()}


def host_sharding() -> jax.sharding.SingleDeviceSharding:
    """Of the host's memory; where `JAX_PLATFORMS` names an accelerator alone, of its first device."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX raises nothing narrower
        device = jax.local_devices()[0]
    return jax.sharding.SingleDeviceSharding(device)


def batches(arrays: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    """Groups arrays or their shapes until they reach `BATCH_BYTES`, for every call of Orbax has a cost of its own."""
    batch, size = {}, 0
    for name, value in arrays:
        batch[name] = value
        size += math.prod(value.shape) * value.dtype.itemsize
        del value
        if size >= BATCH_BYTES:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
