"""Downloading files of the Hugging Face hub into its own cache: in parallel, resumed, and checked by their hashes.

The cache has huggingface_hub's documented layout, so it is shared with other programs. huggingface_hub's own download
starts a file from scratch in each process and compares only sizes; this one keeps partial files, `blobs/HASH.partial`,
and compares hashes. https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import Timeout
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (
    WeakFileLock,
    are_progress_bars_disabled,
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)
from tqdm import tqdm

from acestep_jax.errors import InputError
from acestep_jax.io.files import DISK_FULL, local_folder

logger = logging.getLogger(__name__)

LIBRARY = "acestep-jax"
WORKERS = 8  # files at once
CHUNK = 2**20  # bytes read at once from the disk
ATTEMPTS = 5  # consecutive attempts that received no bytes
PAUSE = 1.0  # seconds after the first such attempt, doubled after each further one


@dataclasses.dataclass(frozen=True)
class HubFile:
    """The hub's metadata of a file.

    size: bytes.
    digest: the SHA-256 of a large file, the hash that git gives a small one (SHA-1 of a header and its bytes).
    """

    size: int
    digest: str

    def hasher(self) -> Any:
        """Return a hashlib object that computes `digest` from the file's bytes."""
        return hashlib.sha256() if len(self.digest) == 64 else hashlib.sha1(b"blob %d\0" % self.size)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A commit of a repository.

    folder: folder of its files in the cache.
    files: its files by path.
    offline: reason why the hub could not be reached, or "". If so, `files` are the cached ones, with digests of "".
    """

    id: str
    commit: str
    folder: Path
    files: Mapping[str, HubFile]
    offline: str = ""

    def has(self, path: str) -> bool:
        """Return whether a file is completely downloaded."""
        try:
            return (self.folder / path).stat().st_size == self.files[path].size
        except OSError:  # also a link to a file that was deleted
            return False


class Unreachable(Exception):
    """The hub does not respond, or its responses keep breaking off."""


class _Stopped(Exception):
    """Another file failed, or the user interrupted."""


@dataclasses.dataclass(frozen=True)
class _Transfer:
    """The shared state of all files in one call.

    progress: called with the number of received bytes; negative for bytes that have to be discarded.
    stop: set once another file failed or the user interrupted.
    """

    cache: Path
    headers: Mapping[str, str]
    progress: Callable[[int], Any]
    stop: threading.Event


def cache_folder(cache_dir: str | Path | None) -> Path:
    """Return the folder of the cache: the given one, or the one set by HF_HUB_CACHE or HF_HOME."""
    return local_folder(cache_dir if cache_dir is not None else constants.HF_HUB_CACHE).absolute()


def repository_folder(cache: Path, id: str) -> Path:
    """Return the folder of a repository in the cache."""
    return cache / repo_folder_name(repo_id=id, repo_type="model")


@functools.cache
def transport_errors() -> tuple[type[Exception], ...]:
    """Return the connection errors of the HTTP library that huggingface_hub uses."""
    http = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    return (http.TransportError,)


def download(
    wanted: Sequence[tuple[Snapshot, Sequence[str]]],
    cache: Path,
    token: str | bool | None,
    errors: Callable[[Snapshot], contextlib.AbstractContextManager[None]],
) -> None:
    """Download the files that are not in the cache, with one progress bar over all of their bytes.

    Args:
        wanted: snapshots, each with the paths of the files that are needed.
        token: access token of the hub; None: the stored one, or HF_TOKEN.
        errors: context in which files of a snapshot are downloaded, which may turn errors into others that name it.

    Raises:
        InputError: if the disk is full, before or during the download, or a hash does not match.
        Unreachable: if the hub does not respond. Received bytes are kept.
        huggingface_hub.errors.HfHubHTTPError: if the hub rejects a request.
    """
    missing = [(snapshot, path) for snapshot, paths in wanted for path in paths if not snapshot.has(path)]
    if not missing:
        return
    _check_room(missing, cache)
    headers = build_hf_headers(token=token, library_name=LIBRARY)
    total = sum(snapshot.files[path].size for snapshot, path in missing)
    silent = True if are_progress_bars_disabled() else None  # None: where there is no terminal
    stop = threading.Event()
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="downloading", disable=silent) as bar,
        concurrent.futures.ThreadPoolExecutor(WORKERS) as pool,
        _disk_full_is_bad_input(cache),
    ):
        largest_first = sorted(missing, key=lambda item: -item[0].files[item[1]].size)
        transfer = _Transfer(cache, headers, bar.update, stop)

        def fetch(snapshot: Snapshot, path: str) -> None:
            with errors(snapshot):
                _fetch(snapshot, path, transfer)

        jobs = [pool.submit(fetch, *item) for item in largest_first]
        try:
            for job in concurrent.futures.as_completed(jobs):
                job.result()
        except BaseException:
            stop.set()
            for job in jobs:
                job.cancel()
            raise


def _check_room(missing: Sequence[tuple[Snapshot, str]], cache: Path) -> None:
    """Raise InputError if the disk has no room for the missing files."""
    blobs = {(snapshot.id, snapshot.files[path].digest): snapshot.files[path] for snapshot, path in missing}
    needed = 0
    for (id, _), file in blobs.items():
        blob = _blob(cache, id, file)
        if not _has_size(blob, file.size):
            needed += file.size - min(_size(_partial(blob)), file.size)
    existing = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    if needed > (free := shutil.disk_usage(existing).free):
        raise InputError(
            f"{cache}: {needed / 1e9:.2f} GB to download, but the disk has {free / 1e9:.2f} GB free; make room, or "
            "choose another place with cache_dir= or HF_HOME"
        )


@contextlib.contextmanager
def _disk_full_is_bad_input(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise InputError(
                f"{cache}: the disk is full; make room, or choose another place with cache_dir= or HF_HOME. "
                "What arrived is kept, the same call resumes"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(
                f"{error.filename}: cannot be written ({error.strerror}); choose another place with cache_dir= or "
                "HF_HOME"
            ) from error
        raise


def _fetch(snapshot: Snapshot, path: str, transfer: _Transfer) -> None:
    """Add one file to the snapshot. If several processes need the same file, one of them downloads it."""
    file = snapshot.files[path]
    blob = _blob(transfer.cache, snapshot.id, file)
    lock = transfer.cache / ".locks" / blob.parent.parent.name / f"{file.digest}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    blob.parent.mkdir(parents=True, exist_ok=True)
    while True:
        if transfer.stop.is_set():
            raise _Stopped
        try:
            with WeakFileLock(lock, timeout=1.0):
                if _has_size(blob, file.size):
                    transfer.progress(file.size)
                else:
                    _download_blob(snapshot, path, blob, transfer)
                _link(blob, snapshot.folder / path)
            return
        except Timeout:
            logger.info("%s of %s: another process downloads it; waiting", path, snapshot.id)


def _download_blob(snapshot: Snapshot, path: str, blob: Path, transfer: _Transfer) -> None:
    """Download a file, resuming an earlier attempt, and rename it to its final name once its hash is right."""
    file = snapshot.files[path]
    partial = _partial(blob)
    resumed = 0 < _size(partial)
    try:
        digest = _stream(snapshot, path, partial, transfer)
    finally:
        if not _size(partial) and file.size:
            partial.unlink(missing_ok=True)
    if digest != file.digest and resumed:  # the part from an earlier process may be wrong
        partial.unlink()
        transfer.progress(-file.size)
        digest = _stream(snapshot, path, partial, transfer)
    if digest != file.digest:
        partial.unlink()
        raise InputError(
            f"{path} of {snapshot.id}: the bytes that arrived have the hash {digest}, the hub promised {file.digest}; "
            "nothing of it was kept, try again, and if this stays, look for a proxy or mirror that changes files"
        )
    partial.replace(blob)


def _stream(snapshot: Snapshot, path: str, partial: Path, transfer: _Transfer) -> str:
    """Append to the file `partial` until it has its size, and return its hash.

    An interrupted connection is resumed where it broke off, and a failure counts only if no bytes were received.
    """
    file, progress, stop = snapshot.files[path], transfer.progress, transfer.stop
    url = hf_hub_url(snapshot.id, path, revision=snapshot.commit, endpoint=constants.ENDPOINT)
    if _size(partial) > file.size:
        partial.unlink()
    digest, failures = file.hasher(), 0
    with open(partial, "a+b") as output:
        output.seek(0)
        while chunk := output.read(CHUNK):
            digest.update(chunk)
        progress(done := output.tell())
        while done < file.size:
            before = done
            asked = {**transfer.headers, "Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
            try:
                with get_session().stream(
                    "GET", url, headers=asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
                ) as response:
                    if response.status_code in (408, 429) or response.status_code >= 500:
                        raise Unreachable(f"the hub answers {response.status_code}")
                    hf_raise_for_status(response)
                    if done and response.status_code != 206:  # the server sends the whole file again
                        progress(-done)
                        output.truncate(0)
                        digest, done = file.hasher(), 0
                    for chunk in response.iter_bytes():  # as they arrive: with a chunk size, some would be lost
                        if stop.is_set():
                            raise _Stopped
                        chunk = chunk[: file.size - done]
                        output.write(chunk)
                        digest.update(chunk)
                        done += len(chunk)
                        progress(len(chunk))
                if done == before:
                    raise Unreachable("the hub sends nothing")
            except (Unreachable, *transport_errors()) as error:
                failures = 0 if done > before else failures + 1
                logger.debug("%s of %s broke off at byte %d: %s", path, snapshot.id, done, error)
                if failures == ATTEMPTS:
                    raise Unreachable(f"{error or type(error).__name__}") from error
                if failures and stop.wait(PAUSE * 2 ** (failures - 1)):
                    raise _Stopped from None
    return digest.hexdigest()


def _link(blob: Path, pointer: Path) -> None:
    """Make the snapshot's file a link to the blob; where links are not supported, move the blob itself there."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:
        blob.replace(pointer)


def _blob(cache: Path, id: str, file: HubFile) -> Path:
    return repository_folder(cache, id) / "blobs" / file.digest


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.partial")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
