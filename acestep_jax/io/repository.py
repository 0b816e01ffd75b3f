"""The files of a repository that are used: its layout, its transformer's folder, one set of weights for each network.

Layouts: native; diffusers, complete; original, the folder of a transformer and, in some repositories, the folders of
the autoencoder and the text encoder next to or in it.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from acestep_jax.errors import InputError, nearest
from acestep_jax.io import manifest
from acestep_jax.io.companions import SILENCE
from acestep_jax.io.download import HubFile, Snapshot
from acestep_jax.io.original import MODEL_PREFIX, TEXT_ENCODER, VAE
from acestep_jax.io.pretrained import INDEX, WEIGHT_FILES
from acestep_jax.models.registry import FAMILY


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a snapshot that are used.

    model: folder or file of the model; "": the snapshot itself.
    whole: whether autoencoder and text encoder are in `model`.
    needed: the paths to download.
    absent: VAE, TEXT_ENCODER or both, if neither the snapshot nor the model has them.
    """

    model: str
    whole: bool
    needed: list[str]
    absent: list[str]


def find_file(snapshot: Snapshot, file: str) -> Parts:
    """Return the parts for a model in one file; raise InputError if it does not exist."""
    if file not in snapshot.files:
        raise InputError(f"{snapshot.id}: has no {file}; {nearest(file, _weights(snapshot.files))}")
    return Parts(file, True, [file], [])


def find_parts(snapshot: Snapshot, variant: str | None) -> Parts:
    """Return the needed parts of a repository in any of the layouts: native, diffusers, original.

    Raises:
        InputError: if it has no model, not the variant, or several models and none called turbo.
    """
    files = snapshot.files
    if INDEX in files or is_native(files):
        if variant is not None:
            raise InputError(f"variant: {snapshot.id} holds one model only; leave the argument out")
        if INDEX not in files:
            return Parts("", True, [path for path in files if _is_native(path)], [])
        folders = [name for name in FAMILY.networks if name not in FAMILY.optional or f"{name}/config.json" in files]
        needed = [INDEX] + [path for name in folders for path in network_files(snapshot, f"{name}/")]
        return Parts("", True, needed + network_files(snapshot, "tokenizer/", weights=False), [])
    folders = [path.removesuffix(SILENCE) for path in files if re.fullmatch(rf"([^/]+/)?{SILENCE}", path)]
    model = _choose(snapshot, sorted(folders), variant)
    absent = [name for name in (VAE, TEXT_ENCODER) if f"{name}/config.json" not in files]
    needed = network_files(snapshot, model)
    for name in (VAE, TEXT_ENCODER):
        needed += network_files(snapshot, f"{name}/") if name not in absent else []
    return Parts(model.rstrip("/"), False, needed, absent)


def find_adapter(snapshot: Snapshot, file: str | None) -> list[str]:
    """Return the files of an adapter: all of the first folder, or one file with the settings next to it.

    Raises:
        InputError: if there are none.
    """
    if file is None:
        needed = [path for path in snapshot.files if "/" not in path and path.endswith((".json", ".safetensors"))]
        if _weights(needed):
            return needed
        weights = _weights(snapshot.files)
        hint = f"; name one of {', '.join(weights)}" if weights else ", and no other .safetensors file"
        raise InputError(f"{snapshot.id}: holds no .safetensors file in its first folder{hint}")
    if file not in snapshot.files:
        raise InputError(f"{snapshot.id}: has no {file}; {nearest(file, _weights(snapshot.files))}")
    beside = file.rpartition("/")[0]
    return [file, *[path for path in snapshot.files if path.endswith(".json") and path.rpartition("/")[0] == beside]]


def is_native(files: Mapping[str, HubFile]) -> bool:
    """Return whether these are the files of a native checkpoint, by their names."""
    return manifest.CONFIG in files and any(path.startswith("weights/") for path in files)


def _choose(snapshot: Snapshot, folders: Sequence[str], variant: str | None) -> str:
    """Return the folder, "" or one that ends in a slash, of the transformer."""
    if not folders:
        weights = _weights(snapshot.files)
        if not weights:
            found = ", ".join(sorted(snapshot.files)[:5]) or "nothing"
            raise InputError(f"{snapshot.id}: holds no weights that can be read here; found {found}")
        raise InputError(
            f"{snapshot.id}: expected {INDEX}, a native checkpoint, or config.json next to {SILENCE}; for a "
            f"single file, name it: {snapshot.id}/{weights[0]}"
        )
    names = {folder.rstrip("/").removeprefix(MODEL_PREFIX): folder for folder in folders}
    if variant is not None:
        if variant not in names:
            raise InputError(f"variant: {snapshot.id} has no {variant!r}; {nearest(variant, list(names))}")
        return names[variant]
    if len(names) == 1 or "" in names:
        return names.get("", folders[0])
    if "turbo" in names:  # the default of the authors' application
        return names["turbo"]
    raise InputError(f"variant: {snapshot.id} holds several models; choose one of {', '.join(names)}")


def network_files(snapshot: Snapshot, folder: str, *, weights: bool = True) -> list[str]:
    """Return the files of a network that are read: settings, tokenizer, and one set of weights.

    Args:
        folder: "", or one that ends in a slash.

    Raises:
        InputError: if there are no weights, or no config.
    """
    names = [path.removeprefix(folder) for path in snapshot.files if path.startswith(folder)]
    names = [name for name in names if "/" not in name]
    where = f"{snapshot.id}/{folder}".rstrip("/")
    found = [name for name in names if name in ("config.json", "tokenizer.json", "tokenizer_config.json", SILENCE)]
    if weights:
        if "config.json" not in names:
            raise InputError(f"{where}: has no config.json; expected a network of ACE-Step 1.5")
        found += _one_set(names)
        if not any(name.endswith(".safetensors") for name in found):
            raise InputError(
                f"{where}: holds no weights; expected {' or '.join(f'{stem}.safetensors' for stem in WEIGHT_FILES)}, "
                f"or an index and its parts, found {', '.join(sorted(names))}"
            )
    return [f"{folder}{name}" for name in found]


def _one_set(names: Sequence[str]) -> list[str]:
    """Return the files of one set of weights in a folder, preferring one without a variant such as fp16."""
    for middle in ("", r"\.[A-Za-z0-9]+"):
        for stem in WEIGHT_FILES:
            index = [n for n in names if re.fullmatch(rf"{stem}\.safetensors\.index{middle}\.json", n)]
            parts = [
                n for n in names if re.fullmatch(rf"{stem}(?:{middle}-\d+-of-\d+|-\d+-of-\d+{middle})\.safetensors", n)
            ]
            if index and parts:
                return [index[0], *parts]
            if single := [n for n in names if re.fullmatch(rf"{stem}{middle}\.safetensors", n)]:
                return single[:1]
    return []


def _weights(files: Iterable[str]) -> list[str]:
    return sorted(path for path in files if path.endswith(".safetensors"))


def _is_native(path: str) -> bool:
    """Return whether a file belongs to a native checkpoint: one of the weights, or next to config.json."""
    return path.startswith("weights/") or "/" not in path and path.endswith((".json", ".safetensors"))
