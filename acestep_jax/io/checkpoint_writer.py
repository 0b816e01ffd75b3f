"""Writes native checkpoints, which `io.checkpoint` describes and reads.

A checkpoint is written atomically, a few arrays at a time, so that they need not all be in memory.
"""

import functools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from acestep_jax.errors import InputError
from acestep_jax.io.checkpoint import (
    SEPARATE_BYTES,
    TOKENIZER,
    WEIGHTS,
    batches,
    byte_size,
    described_leaves,
    first_error_only,
    nest,
    network_leaves,
    read_leaves,
)
from acestep_jax.io.files import absolute, as_path, local_copy, publish_file, publish_folder
from acestep_jax.io.manifest import (
    CONFIG,
    Manifest,
    check_sampling,
    check_unquantized,
    manifest_values,
    read_manifest,
)
from acestep_jax.models.config import NetworkConfig


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
    """Write a checkpoint.

    Args:
        configs: architectures by the network names of `FAMILY`.
        arrays: pairs of dotted name (network first) and value, every leaf once.
        tokenizer: the text of `tokenizer.json`; None: there is none, as for single networks.
        tokenizer_config: see `Manifest`.
        extra_files: name to a function that writes the file of that name, given its path.
        sampling, dtypes, quantization: see `Manifest`; None: empty.
        size: bytes of all arrays, for which the disk must have room; None: their size in float32.
        compress: whether to compress; trained weights hardly get smaller, and it takes time and memory, but the latents
            of silence do get smaller.

    Raises:
        InputError: see `publish_folder` and `check_sampling`; nothing is left behind. Also if there are several
            processes, because Orbax would wait for all of them.
    """
    from orbax.checkpoint import v1 as ocp  # takes half a second to import, and songs do not need it

    if jax.process_count() > 1:
        raise InputError(
            f"{path}: several processes cannot write a checkpoint; convert the model first, in one process, with "
            "`acestep-jax convert from-torch`"
        )
    manifest = Manifest(configs, tokenizer_config, dict(sampling or {}), dict(dtypes or {}), dict(quantization or {}))
    check_sampling(manifest.sampling, "sampling")
    shapes = {f"{n}.{leaf}": s for n, found in described_leaves(manifest).items() for leaf, s in found.items()}
    size = size or sum(byte_size(shape) for shape in shapes.values())
    with first_error_only(), publish_folder(path, size) as folder:
        wanted = set(shapes)
        weights = absolute(folder / WEIGHTS)
        context = ocp.Context()
        context.array.saving.use_compression = compress
        for batch in batches(arrays, SEPARATE_BYTES):
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
    """Write a copy of the checkpoint `source` with new values for parameters of the network `name`.

    Args:
        arrays: new values by dotted path within the network, cast to the stored dtypes. Other parameters are kept.

    Raises:
        InputError: see `publish_folder`, `read_manifest` and `load_leaves`.
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
    """Return `extra_files` for `save` that copy the extra files of a checkpoint."""
    extra = [file for file in source.iterdir() if file.is_file() and file.name not in (CONFIG, TOKENIZER)]
    return {file.name: functools.partial(copy_file, file) for file in extra}


def copy_file(file: Path, target: Path) -> None:
    """Copy a file of a checkpoint, on the disk or in Cloud Storage."""
    with publish_file(target) as temporary:
        shutil.copyfile(local_copy(file), temporary)
