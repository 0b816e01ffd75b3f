"""Files of this machine and of Google Cloud Storage, written atomically.

A path that begins with gs:// is one of `etils.epath`, as in Orbax, with the methods of pathlib that mean something
there: it has no working directory, no links and no empty folders, and an object appears when all of it is written.
"""

import atexit
import contextlib
import errno
import functools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from acestep_jax.errors import InputError

REMOTE = "gs://"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEMPORARY = ".acestep-"  # how names of temporary files begin


def is_remote(path: str | Path) -> bool:
    """Return whether a path is one of Cloud Storage."""
    return str(path).startswith(REMOTE)


def as_path(path: str | Path) -> Path:
    """Return a path of this machine or, if it begins with gs://, of Cloud Storage.

    Raises:
        InputError: if it begins with another scheme, or gcsfs is not installed.
    """
    if not is_remote(path):
        scheme, found, _ = str(path).partition("://")
        if found and scheme.isalnum():
            raise InputError(f"{path}: expected a path of this machine or one that begins with {REMOTE}")
        return Path(path)
    _file_system()
    from etils import epath

    found: Any = epath.Path(str(path))
    return found


@functools.cache
def _file_system() -> Any:
    import fsspec
    from fsspec.config import conf

    # Listings that are kept would hide what other processes have written, from epath as well.
    conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    try:
        return fsspec.filesystem("gcs")
    except ImportError:
        raise InputError(f"{REMOTE}... needs gcsfs; run pip install 'acestep-jax[gcs]'") from None


def user_cache() -> Path:
    """Return the folder of this library in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "acestep-jax"


def local_folder(cache_dir: str | Path) -> Path:
    """Return the folder of a cache; raise InputError if it is in Cloud Storage, where files cannot be locked."""
    if is_remote(cache_dir):
        raise InputError(f"cache_dir: expected a folder of this machine, found {cache_dir}")
    return Path(cache_dir).expanduser()


def on_this_machine(path: str | Path) -> Path:
    """Return the path of files of PyTorch; raise InputError if it is in Cloud Storage, where only ours may lie."""
    path = as_path(path)
    if is_remote(path):
        raise InputError(
            f"{path}: files of PyTorch are read and written on this machine only; copy them with "
            "`gcloud storage cp -r`, or keep a native checkpoint there"
        )
    return path


def absolute(path: Path) -> Path:
    """Return a path that does not depend on the working directory."""
    return path if is_remote(path) else path.absolute()


def identity(path: str | Path) -> str:
    """Return a name that two paths share if they are the same file."""
    return str(path) if is_remote(path) else str(Path(path).resolve())


def check_parent(path: Path) -> None:
    """Raise InputError if the folder that a path should be in does not exist; those of Cloud Storage need not."""
    if not is_remote(path) and not path.absolute().parent.is_dir():
        raise InputError(f"{path}: the folder {path.absolute().parent} does not exist; create it first")


def check_output(path: str | Path, *, overwrite: bool = False) -> Path:
    """Return the path, if a file can be written there.

    Raises:
        InputError: if the folder does not exist or cannot be written to, or the file exists and may not be overwritten.
    """
    path = as_path(path)
    check_parent(path)
    check_writable(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; choose another name")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: already exists; remove it, choose another name, or allow it to be overwritten")
    return path


def check_new(path: Path) -> None:
    """Raise InputError if `path` exists, or the folder it should be in does not or cannot be written to."""
    if path.exists():
        raise InputError(f"{path}: already exists; remove it or choose another name")
    check_parent(path)
    check_writable(path)


def read_text(path: Path) -> str:
    """Read UTF-8 text, with or without a byte order mark; raise UnicodeDecodeError if it is something else."""
    return path.read_bytes().decode("utf-8-sig")


def size_and_time(path: Path) -> tuple[int, int]:
    """Return the size of a file in bytes and its time of change in nanoseconds; in Cloud Storage, in whole seconds."""
    stat: Any = path.stat()
    return (stat.length, stat.mtime * 10**9) if is_remote(path) else (stat.st_size, stat.st_mtime_ns)


def files_below(folder: Path) -> list[str]:
    """Return the files in a folder and its subfolders as relative paths with "/" between their parts, sorted."""
    if is_remote(folder):
        root = str(folder).removeprefix(REMOTE).rstrip("/") + "/"
        return sorted(str(name).lstrip("/").removeprefix(root) for name in _file_system().find(root))
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def remove_tree(folder: Path) -> None:
    """Delete a folder and all in it, if it is there."""
    if is_remote(folder):
        found: Any = folder
        found.rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def local_copy(path: Path) -> Path:
    """Return the file itself or, if it is in Cloud Storage, a copy on the disk, for libraries that read no other. There
    is one of each, until this process ends."""
    return _copy(str(path), *size_and_time(path)) if is_remote(path) else path


def local_files(folder: Path, suffixes: tuple[str, ...]) -> Path:
    """Return the folder itself or, if it is in Cloud Storage, one on the disk with copies of its files that have one of
    these suffixes; it stays until this process ends."""
    if not is_remote(folder):
        return folder
    copies = Path(tempfile.mkdtemp(dir=_copies())) / folder.name
    for name in files_below(folder):
        if name.endswith(suffixes):
            (copies / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("rb") as source, (copies / name).open("wb") as target:
                shutil.copyfileobj(source, target)
    copies.mkdir(parents=True, exist_ok=True)
    return copies


@functools.cache
def _copy(name: str, size: int, time: int) -> Path:
    copy = Path(tempfile.mkdtemp(dir=_copies())) / name.rpartition("/")[2]
    with as_path(name).open("rb") as source, copy.open("wb") as target:
        shutil.copyfileobj(source, target)
    return copy


@functools.cache
def _copies() -> str:
    folder = tempfile.mkdtemp(prefix="acestep-jax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def publish_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file on the disk; on success it becomes `path`, on failure it is removed.

    Raises:
        OSError: naming `path`, not the temporary file.
    """
    path = as_path(path)
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            upload(temporary, path)
        return
    temporary = _temporary(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if str(error.filename) == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def publish_folder(path: str | Path, size: int = 0) -> Iterator[Path]:
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


def _remove(folder: Path) -> None:
    """Delete a folder until it stays away: after a failure, writes under way may create it again."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.2)
        if not folder.exists():
            return


def is_disk_full(error: BaseException) -> bool:
    """Return whether a write failed for want of space; TensorStore tells so only in its message."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    return number in DISK_FULL


def check_writable(path: str | Path) -> None:
    """Raise InputError unless a file or folder of that name can be created, by creating and removing one beside it.

    It is asked before anything slow begins: what is found out only when a result is written costs the result. Cloud
    Storage is not asked, where to write may be allowed and to delete not.
    """
    path = as_path(path)
    if is_remote(path):
        return
    try:
        os.lstat(path)  # a name that is too long, or no text, is an error here
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r}: cannot be the name of a file ({_reason(error)}); choose another") from None
    try:
        _temporary(path).unlink()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written, {path.absolute().parent} takes no new file ({_reason(error)}); choose another "
            "place, or change its permissions"
        ) from None


def _temporary(path: Path) -> Path:
    """Create an empty file beside `path` with its suffix; raise OSError naming `path`."""
    try:
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.suffix, dir=path.absolute().parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.close(handle)
    return Path(name)


def _reason(error: Exception) -> str:
    return str(error.strerror if isinstance(error, OSError) else error)


def upload(file: Path, path: Path) -> None:
    """Copy a file of this machine to Cloud Storage."""
    with file.open("rb") as source, path.open("wb") as target:
        shutil.copyfileobj(source, target)
