"""Files of this machine and of Google Cloud Storage, written atomically.

A path that begins with gs:// is an `etils.epath` path, as in Orbax, with the methods of pathlib that make sense there:
there is no working directory, there are no links or empty folders, and an object appears when all of it is written.
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
TEMPORARY = ".acestep-"  # prefix of temporary files


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

    # Cached listings would hide files that other processes have written, also from epath.
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
    """Return the path of PyTorch files; raise InputError if it is in Cloud Storage, where only native files may be."""
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
    """Raise InputError if the parent folder of a path does not exist; in Cloud Storage it need not exist."""
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
    """Raise InputError if `path` exists, or its parent folder does not exist or is not writable."""
    if path.exists():
        raise InputError(f"{path}: already exists; remove it or choose another name")
    check_parent(path)
    check_writable(path)


def read_text(path: Path) -> str:
    """Read UTF-8 text, with or without a byte order mark; raise UnicodeDecodeError if it is something else."""
    return path.read_bytes().decode("utf-8-sig")


def size_and_time(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and its modification time in nanoseconds; in Cloud Storage, to whole seconds."""
    stat: Any = path.stat()
    return (stat.length, stat.mtime * 10**9) if is_remote(path) else (stat.st_size, stat.st_mtime_ns)


def files_below(folder: Path) -> list[str]:
    """Return the files in a folder and its subfolders as sorted relative paths with "/" as separator."""
    if is_remote(folder):
        root = str(folder).removeprefix(REMOTE).rstrip("/") + "/"
        return sorted(str(name).lstrip("/").removeprefix(root) for name in _file_system().find(root))
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def remove_tree(folder: Path) -> None:
    """Delete a folder with its contents, if it exists."""
    if is_remote(folder):
        found: Any = folder
        found.rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def local_copy(path: Path) -> Path:
    """Return the file itself or, if it is in Cloud Storage, a copy on the disk, for libraries that need one. There is
    one copy of each file, until this process ends."""
    return _copy(str(path), *size_and_time(path)) if is_remote(path) else path


def local_files(folder: Path, suffixes: tuple[str, ...]) -> Path:
    """Return the folder itself or, if it is in Cloud Storage, a folder on the disk with copies of its files that have
    one of these suffixes; it exists until this process ends."""
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
def publish_file(path: str | Path, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary file on the disk, which only its owner can read; on success it becomes `path`, on failure it is
    removed.

    Args:
        mode: permissions of the file; Cloud Storage has none.

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
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        if str(error.filename) == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def publish_folder(path: str | Path, size: int = 0) -> Iterator[Path]:
    """Yield a temporary folder next to `path`, which is renamed to it on success and removed on failure; in Cloud
    Storage, yield the folder itself.

    Args:
        size: bytes that will be written, if known.

    Raises:
        InputError: if `path` exists, its parent folder does not, or the disk has no room.
    """
    path = as_path(path)
    check_new(path)
    if is_remote(path):
        # Nothing is renamed; files that are read first, such as `config.json`, are written last.
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
    """Delete a folder repeatedly until it is gone, because pending writes may create it again after a failure."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.2)
        if not folder.exists():
            return


def is_disk_full(error: BaseException) -> bool:
    """Return whether a write failed because the disk is full; TensorStore says so only in its message."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    return number in DISK_FULL


def check_writable(path: str | Path) -> None:
    """Raise InputError unless a file or folder of that name can be created; try it with a temporary one next to it.

    This is called before anything slow begins, because a failure to write would lose the result. It does nothing in
    Cloud Storage, where writing may be allowed and deleting not.
    """
    path = as_path(path)
    if is_remote(path):
        return
    try:
        os.lstat(path)  # raises for names that are too long or invalid
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
    """Create an empty file next to `path` with its suffix; raise OSError naming `path`."""
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
