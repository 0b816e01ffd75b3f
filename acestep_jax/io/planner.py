"""From any name of a model to its planner: found next to it or on the hub, converted once, and loaded.

A native checkpoint of a planner is like any other, with one network and the published files of the tokenizer. It is a
separate folder; inside the folder of a model's native checkpoint, it is called `planner`, and is found by the model's
name.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint
from acestep_jax.io.files import as_path, is_remote
from acestep_jax.io.locate import Located
from acestep_jax.io.manifest import pick_dtype, read_manifest
from acestep_jax.io.native import converted, is_native, key_of_files
from acestep_jax.io.planner_files import PREFIX, WHERE, choose_planner, is_planner, open_planner
from acestep_jax.models.qwen3 import Qwen3ForCausalLM
from acestep_jax.models.registry import PLANNER
from acestep_jax.models.runtime import check_stored, split_dtype


class LoadedPlanner(NamedTuple):
    """A planner and the folder with the files of its tokenizer, `vocab.json` and `merges.txt` or `tokenizer.json`."""

    network: Qwen3ForCausalLM
    folder: Path


def load_planner(
    source: str | Path,
    size: str | None = None,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    attention: str = "auto",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> LoadedPlanner:
    """Load the planner of a model.

    Args:
        source: a model, as for `AceStepPipeline.from_pretrained`, whose planner is loaded; or a planner: a PyTorch or
            native folder, or the id of a repository such as ACE-Step/acestep-5Hz-lm-0.6B.
        size: which planner, such as 0.6B or 4B, if there are several; None: 1.7B if there is one.
        dtype: dtype of weights and computation, one of `runtime.PRECISIONS`; None: the best for the device. "int8" and
            "fp8" apply to the weights of layers, see `models.quantization`; the rest is the best for the device.
        mesh: from `distributed.make_mesh`; None: all on the first device.
        attention: see `Runtime`.
        revision, token, cache_dir, local_files_only: see `native_folder`.

    Raises:
        InputError: if there is no planner, with the places that have one, or it cannot be read.
    """
    dtype, quantization = split_dtype(dtype)
    folder = planner_folder(
        source,
        size,
        dtype=quantization,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    dtype = dtype or pick_dtype(read_manifest(folder, ()), mesh)
    loaded = checkpoint.load(
        folder, dtype=dtype, quantization=quantization, mesh=mesh, attention=attention, names=[PLANNER]
    )
    network = loaded[PLANNER]
    assert isinstance(network, Qwen3ForCausalLM)
    return LoadedPlanner(network.split() if mesh is None else network, folder)


def planner_folder(
    source: str | Path,
    size: str | None = None,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder of a planner's native checkpoint, which is converted once and kept; see `load_planner`.

    Args:
        dtype: dtype to convert weights to, one of `runtime.DTYPES` or `runtime.QUANTIZATIONS`; None: unchanged.
    """
    if dtype is not None:
        check_stored(dtype)
    place = _locate(
        source, size, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    folder = place.model
    if is_native(folder):
        if PLANNER not in read_manifest(folder, ()).configs:
            raise InputError(f"{folder}: a checkpoint without a planner; {WHERE}")
        return folder
    open_source = functools.partial(open_planner, folder, dtype)
    opened = open_source()
    key = place.key or key_of_files(opened.files)
    about = {"source": str(source if place.key else folder.resolve()), "variant": None, "key": key, "dtype": dtype}
    return converted(place, open_source, about, opened=opened, cache_dir=cache_dir)


def _locate(source: str | Path, size: str | None, *, revision: str | None, **options: Any) -> Located:
    """Return the location of a model's planner, on this machine or, by id, on the hub.

    Raises:
        InputError: if there is none, with the places that have one.
    """
    path = as_path(source) if is_remote(source) else Path(source).expanduser()
    if is_remote(source) or path.exists():
        if revision is not None:
            raise InputError(
                f"revision: {revision!r} is of a repository of the hub, but {source} is here; leave it out"
            )
        return Located(find_local_planner(path, size))
    text = str(source)
    if path.is_absolute() or text.startswith((".", "~")) or not text.strip():
        raise InputError(
            f"{source}: no such folder; expected a model, a planner, or the id of a hub repository; {WHERE}"
        )
    from acestep_jax.io.hub_planner import locate_planner  # importing the client takes a fifth of a second

    return locate_planner(text, size, revision=revision, **options)


def find_local_planner(path: Path, size: str | None) -> Path:
    """Return the folder of the planner that `path` is, contains, or is next to.

    Raises:
        InputError: if there is none, or there are several.
    """
    if path.is_file():
        path = path.parent
    if is_native(path):
        if PLANNER in read_manifest(path, ()).configs:
            return path
    elif is_planner(path):
        return path
    if is_native(path / PLANNER) or is_planner(path / PLANNER):
        return path / PLANNER
    if not is_remote(path):
        for place in (path, path.absolute().parent):
            folders = [folder.name for folder in place.glob(f"{PREFIX}*") if (folder / "config.json").is_file()]
            if (name := choose_planner(folders, size, str(place))) is not None:
                return place / name
    raise InputError(
        f"{path}: no planner here, as {PLANNER}/ or {PREFIX}* in it or beside it; {WHERE}; put its folder there, or "
        "name it"
    )
