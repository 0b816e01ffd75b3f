"""The cache of converted checkpoints: official weights are converted once, and every later start reads the result.

An entry is a native checkpoint with a file `source.json`: its source, and its files with their sizes, which reveal a
partly deleted entry. Entries appear atomically; a lock of the operating system, released when its process ends, lets
one process convert while others wait.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from acestep_jax.errors import InputError
from acestep_jax.io.files import local_folder, user_cache
from acestep_jax.io.manifest import CONFIG

logger = logging.getLogger(__name__)

SOURCE = "source.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A converted checkpoint in the cache: its folder, its source, its size in bytes, and whether it is complete."""

    path: Path
    source: str
    variant: str | None
    dtype: str | None
    size: int
    complete: bool


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the folder of the cache: `cache_dir`, or acestep-jax/models in the user's cache folder."""
    if cache_dir is not None:
        return local_folder(cache_dir)
    return user_cache() / "models"


def obtain(
    folder: Path,
    name: str,
    about: dict[str, Any],
    convert: Callable[[Path, dict[str, Callable[[Path], None]]], None],
) -> Path:
    """Return the entry called `name`; make it if it does not exist or is incomplete.

    Args:
        folder: folder of the cache, created if necessary.
        about: description of the source for `source.json`, ready for JSON.
        convert: writes the native checkpoint, given the folder to create and `extra_files` of `checkpoint_writer.save`.

    Raises:
        InputError: if the cache cannot be written, or `convert` raises it; nothing is left behind.
    """
    path = folder / name
    if _is_complete(path):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: the cache cannot be created ({error}); choose another cache_dir") from None
    with _lock(folder / f".{name}.lock"):
        if _is_complete(path):  # made by the process that held the lock
            return path
        if path.exists():
            logger.warning("%s: incomplete, so it is made again from %s", path, about["source"])
            shutil.rmtree(path)
        for left in folder.glob(f".{name}-*"):  # left by a killed process
            shutil.rmtree(left, ignore_errors=True)
        logger.info("%s: converted to %s, once", about["source"], path)
        convert(path, {SOURCE: functools.partial(_write_source, about=about)})
    return path


def entries(folder: Path) -> list[Entry]:
    """Return the entries of a cache, by name."""
    found = []
    for file in sorted(folder.glob(f"*/{SOURCE}")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            values = json.loads(file.read_text(encoding="utf-8"))
            path = file.parent
            size = sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
            found.append(
                Entry(path, values["source"], values.get("variant"), values.get("dtype"), size, _is_complete(path))
            )
    return found


def clear(folder: Path) -> list[Entry]:
    """Delete all entries of a cache, and the leftovers of killed processes; return the entries.

    Nothing else in the folder is touched, such as downloads.
    """
    found = entries(folder)
    for entry in found:
        with _lock(folder / f".{entry.path.name}.lock"):
            shutil.rmtree(entry.path)
    for lock in folder.glob(".*.lock"):
        name = lock.name.removesuffix(".lock")
        with _lock(lock):
            for left in folder.glob(f"{name}-*"):
                shutil.rmtree(left, ignore_errors=True)
            if (folder / name[1:] / CONFIG).exists():  # made meanwhile by the process that held the lock
                continue
            shutil.rmtree(folder / name[1:], ignore_errors=True)
    return found


def _is_complete(path: Path) -> bool:
    """Return whether an entry has all its files with the right sizes."""
    try:
        files = json.loads((path / SOURCE).read_text(encoding="utf-8"))["files"]
        return (path / CONFIG).is_file() and all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _write_source(file: Path, about: dict[str, Any]) -> None:
    """Write `source.json`, which lists all other files except `config.json`."""
    folder = file.parent
    files = {str(part.relative_to(folder)): part.stat().st_size for part in sorted(folder.rglob("*")) if part.is_file()}
    file.write_text(json.dumps(about | {"files": files}, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Hold the lock of a file; if another process has it, log that and wait."""
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("%s: another process is converting the same model; waiting for it", file.parent)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise InputError(f"{file}: cannot be locked ({error}); choose another cache_dir, on a local disk") from None
    try:
        yield
    finally:
        lock.release()
