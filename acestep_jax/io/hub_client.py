"""The Hugging Face hub or, if it cannot be reached, the snapshots in its cache."""

import contextlib
import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from acestep_jax.errors import InputError
from acestep_jax.io.download import (
    LIBRARY,
    HubFile,
    Snapshot,
    Unreachable,
    download,
    repository_folder,
    transport_errors,
)
from acestep_jax.io.original import REPOSITORY, VARIANTS
from acestep_jax.io.repository import find_parts, network_files

MAIN = "main"


class Hub:
    """The hub or, without network, its cache."""

    def __init__(self, cache: Path, token: str | None, local_files_only: bool):
        self.cache, self.token, self.local_files_only = cache, token, local_files_only

    def snapshot(self, id: str, revision: str | None) -> Snapshot:
        """Return the hub's snapshot of a repository or, if the hub cannot be reached, the cached one."""
        if self.local_files_only:
            return self._cached(id, revision, Unreachable("local_files_only"))
        try:
            api = HfApi(endpoint=constants.ENDPOINT, token=self.token, library_name=LIBRARY)
            info = api.model_info(id, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except (OfflineModeIsEnabled, *transport_errors()) as error:
            return self._cached(id, revision, error)
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise
            return self._cached(id, revision, error)
        files = {
            file.rfilename: HubFile(file.size or 0, file.lfs.sha256 if file.lfs else file.blob_id or "")
            for file in info.siblings or ()
        }
        commit = info.sha or ""
        return Snapshot(id, commit, repository_folder(self.cache, id) / "snapshots" / commit, files)

    def _cached(self, id: str, revision: str | None, reason: Exception) -> Snapshot:
        """Return the cached snapshot; raise Unreachable if there is none."""
        found = cached_snapshot(self.cache, id, revision)
        if found is None or not is_complete(found):
            raise Unreachable(why(reason)) from reason
        return dataclasses.replace(found, offline=why(reason))

    def fetched(self, id: str, revision: str | None, needed: Callable[[Snapshot], Sequence[str]]) -> Snapshot:
        """Return the snapshot of a repository, after downloading its needed files."""
        with self.one_line_errors(id, revision), incomplete_without_network(snapshot := self.snapshot(id, revision)):
            self.fetch([(snapshot, needed(snapshot))])
        self.remember(snapshot, revision)
        return snapshot

    def fetch(self, wanted: Sequence[tuple[Snapshot, Sequence[str]]]) -> None:
        """Download needed files of one or several snapshots; an error names the repository that it is of."""
        download(wanted, self.cache, self.token, lambda snapshot: self.one_line_errors(snapshot.id, snapshot.commit))

    def remember(self, snapshot: Snapshot, revision: str | None) -> None:
        """Store the commit of a branch or tag, for use without network."""
        file = repository_folder(self.cache, snapshot.id) / "refs" / (revision or MAIN)
        if (revision or MAIN) == snapshot.commit or file.is_file() and file.read_text() == snapshot.commit:
            return
        with contextlib.suppress(OSError):  # the cache may be read-only
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(snapshot.commit)

    @contextlib.contextmanager
    def one_line_errors(self, id: str, revision: str | None) -> Iterator[None]:
        """Turn the errors of huggingface_hub into InputError."""
        hub = constants.ENDPOINT
        login = "give token=, set HF_TOKEN or run `hf auth login`"
        try:
            yield
        except HFValidationError as error:
            raise InputError(f"{id}: not the id of a repository ({error})") from None
        except GatedRepoError:
            raise InputError(f"{id}: a gated repository; accept its conditions at {hub}/{id}, then {login}") from None
        except RepositoryNotFoundError:
            near = difflib.get_close_matches(id, {*VARIANTS.values()} - {id}, 1, 0.8)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(
                f"{id}: no such repository at {hub}, or a private one; {hint}For a private one, {login}"
            ) from None
        except RevisionNotFoundError:
            raise InputError(
                f"revision: {id} has no {revision!r}; expected a branch, a tag or a commit, listed at "
                f"{hub}/{id}/commits/{MAIN}"
            ) from None
        except HfHubHTTPError as error:
            what = error.response.headers.get("X-Error-Message") or str(error).strip().splitlines()[0]
            raise InputError(f"{id}: {hub} refuses ({error.response.status_code}: {what}); {login}") from None
        except Unreachable as error:
            names = cached_models(self.cache)
            held = (
                f"the cache {self.cache} holds {', '.join(names)}"
                if names
                else f"the cache {self.cache} holds no model"
            )
            raise InputError(
                f"{id}: incomplete in the cache, and {hub} cannot be reached ({error}); {held}. What was downloaded is "
                "kept, the same call resumes"
            ) from None


@contextlib.contextmanager
def incomplete_without_network(snapshot: Snapshot) -> Iterator[None]:
    """Raise Unreachable instead of InputError if only the cache is known, because other files may exist on the hub."""
    try:
        yield
    except InputError as error:
        if snapshot.offline:
            raise Unreachable(snapshot.offline) from error
        raise


def why(error: Exception) -> str:
    """Return the first line of an error, or its name."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def cached_snapshot(cache: Path, id: str, revision: str | None) -> Snapshot | None:
    """Return the cached snapshot of a branch, tag or commit (None: main), or None if there is none."""
    folder = repository_folder(cache, id)
    with contextlib.suppress(OSError):
        revision = (folder / "refs" / (revision or MAIN)).read_text().strip()
    root = folder / "snapshots" / (revision or MAIN)
    if not root.is_dir():
        return None
    files = {
        path.relative_to(root).as_posix(): HubFile(path.stat().st_size, "")
        for path in sorted(root.rglob("*"))
        if path.is_file()  # not a link to a file that was deleted
    }
    return Snapshot(id, root.name, root, files)


def is_complete(snapshot: Snapshot) -> bool:
    """Return whether all shards named in indices exist."""
    for path in snapshot.files:
        if re.search(r"\.safetensors\.index(\.\w+)?\.json$", path):
            file = snapshot.folder / path
            try:
                parts = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, AttributeError, OSError):
                return False
            if not all((file.parent / part).is_file() for part in parts):
                return False
    return True


def cached_models(cache: Path) -> list[str]:
    """Return the ids of the models that are complete in the cache, including their files from other repositories."""

    def has(test: Callable[[], object]) -> bool:
        try:
            return bool(test())
        except InputError:
            return False

    def usable(snapshot: Snapshot) -> bool:
        parts = find_parts(snapshot, None)
        rest = cached_snapshot(cache, REPOSITORY, None) if parts.absent else None
        return not parts.absent or rest is not None and all(network_files(rest, f"{name}/") for name in parts.absent)

    found = []
    for folder in sorted(cache.glob("models--*--*")):
        id = folder.name.removeprefix("models--").replace("--", "/", 1)
        for ref in sorted((folder / "refs").rglob("*")):
            revision = ref.relative_to(folder / "refs").as_posix()
            snapshot = cached_snapshot(cache, id, revision) if ref.is_file() else None
            if snapshot and is_complete(snapshot) and has(lambda snapshot=snapshot: usable(snapshot)):
                found.append(id if revision == MAIN else f"{id} (revision {revision})")
    return found
