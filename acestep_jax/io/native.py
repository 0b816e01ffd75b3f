"""From any name of a model to a folder in the native format, which `AceStepPipeline.from_pretrained` loads."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from acestep_jax.distributed import run_in_subprocess
from acestep_jax.errors import InputError
from acestep_jax.io import cache, conversion, original
from acestep_jax.io.companions import fetch_companion
from acestep_jax.io.files import as_path, is_remote
from acestep_jax.io.locate import Located, locate
from acestep_jax.io.manifest import CONFIG, FORMAT, FORMAT_VERSION, read_manifest
from acestep_jax.io.pretrained import TorchCheckpoint
from acestep_jax.models.runtime import check_stored

CONVERSION_VERSION = 1  # increase this when the same files convert to other arrays


@dataclasses.dataclass(frozen=True)
class Native:
    """A native checkpoint: its folder, and the commit of the repository that it comes from; None: not from the hub."""

    folder: Path
    commit: str | None = None


def native_folder(source: str | Path, variant: str | None = None, **options: Any) -> Path:
    """Return the folder of a native checkpoint, see `find_native`."""
    return find_native(source, variant, **options).folder


def find_native(
    source: str | Path,
    variant: str | None = None,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Native:
    """Return a native checkpoint: `source` itself, or its conversion, which is made once and kept.

    If several processes share a cache, one converts and the others wait for it.

    Args:
        source: a native checkpoint; a PyTorch checkpoint in a folder or file, see `open_checkpoint`; or the id of a
            repository on the Hugging Face hub with either of them.
        variant: which model, such as turbo or xl-base, if the source has several.
        dtype: dtype to convert weights to, one of `runtime.DTYPES` or `runtime.QUANTIZATIONS`; None: unchanged.
        revision, token, local_files_only: see `hub.locate`.
        cache_dir: for downloads and conversions; None: the hub's own cache, and `cache.cache_folder`.

    Raises:
        InputError: if the model cannot be found, downloaded, read or converted.
    """
    if dtype is not None:
        check_stored(dtype)
    if is_remote(source):
        path = as_path(source)
        if not is_native(path):
            raise InputError(
                f"{source}: no checkpoint of acestep-jax here; convert on this machine and copy the result there"
            )
        _check_variant(path, variant)
        return Native(path)
    options: dict[str, Any] = dict(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    place = locate(str(source), variant, revision=revision, **options)
    if is_native(place.model):
        _check_variant(place.model, variant if place.key is None else None)
        return Native(place.model, place.commit)
    opened = None
    fetch = functools.partial(fetch_companion, **options)
    open_source = functools.partial(conversion.open_located, place, variant, dtype=dtype, fetch=fetch)
    key = place.key
    if key is None:
        opened = open_source()
        key = key_of_files(opened.files)
    about = {
        "source": str(source if place.key is not None else place.model.resolve()),
        "variant": variant,
        "key": key,
        "dtype": dtype,
    }
    if place.is_of_one_variant:
        variant = None
    return Native(converted(place, open_source, about, variant, opened=opened, cache_dir=cache_dir), place.commit)


def converted(
    place: Located,
    open_source: Callable[[], TorchCheckpoint],
    about: dict[str, Any],
    variant: str | None = None,
    *,
    opened: TorchCheckpoint | None,
    cache_dir: str | Path | None,
) -> Path:
    """Return the folder of a conversion, which one of all processes makes once, and which is kept.

    Args:
        place: location of the PyTorch checkpoint.
        open_source: function that opens it, possibly in another process.
        about: description for `source.json`, with the keys "key" and "dtype".
        variant: which of its models is converted; None: the only one.
        opened: the checkpoint, if this process has opened it already.
        cache_dir: see `find_native`.
    """
    key, dtype = about["key"], about["dtype"]
    identity = json.dumps([key, place.model.name, variant, dtype, FORMAT_VERSION, CONVERSION_VERSION])
    model = place.model.stem if place.model.is_file() else place.model.name
    if place.key is not None:
        model = re.sub(r"(-[0-9a-f]{40})+$", "", place.key)
    name = re.sub(r"[^\w.-]+", "-", "-".join(word for word in (model, variant, dtype) if word))

    def convert(folder: Path, extra: dict[str, Any]) -> None:
        if jax.process_count() > 1:  # Orbax writes with all processes, or in one that is not part of the cluster
            run_in_subprocess(_convert, open_source, folder, extra)
        else:
            conversion.convert(opened or open_source(), folder, extra)

    name = f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    return cache.obtain(cache.cache_folder(cache_dir), name, about, convert)


def _convert(open_source: Callable[[], TorchCheckpoint], folder: Path, extra: dict[str, Any]) -> None:
    conversion.convert(open_source(), folder, extra)


def is_native(path: Path) -> bool:
    """Return whether a folder is a checkpoint of this library, of any version, judging only by its `config.json`."""
    try:
        values = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("format") == FORMAT


def _check_variant(path: Path, variant: str | None) -> None:
    """Raise InputError if a native checkpoint has another variant than the requested one."""
    if variant is None:
        return
    configs = read_manifest(path, ()).configs
    holds = original.model_folder(configs).removeprefix(original.MODEL_PREFIX) if "transformer" in configs else "none"
    if not original.is_variant(holds, variant):
        raise InputError(
            f"variant: {path} holds the variant {holds}, not {variant}; leave variant out, or give the id of a "
            "repository such as ACE-Step/Ace-Step1.5"
        )


def key_of_files(files: Iterable[Path]) -> str:
    """Return a key that changes when one of the files is replaced: a hash of their names, sizes and times."""
    found = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"files:{hashlib.sha256(json.dumps(found).encode()).hexdigest()}"
