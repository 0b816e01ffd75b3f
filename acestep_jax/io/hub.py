"""Models by name: which repositories of the Hugging Face hub a name stands for, and which of their files are needed.

ACE-Step publishes turbo, the autoencoder, the text encoder and a planner together, and each other transformer alone in
a repository of its own, which takes the rest from the first. Names: `acestep/model_downloader.py` of
https://github.com/ace-step/ACE-Step-1.5 (`MAIN_MODEL_REPO`, `SUBMODEL_REGISTRY`).
"""

import contextlib
import dataclasses
import difflib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from acestep_jax.errors import InputError, nearest
from acestep_jax.io.download import (
    LIBRARY,
    HubFile,
    Snapshot,
    Unreachable,
    cache_folder,
    download,
    repository_folder,
    transport_errors,
)
from acestep_jax.io.locate import Located
from acestep_jax.io.original import MODEL_PREFIX, REPOSITORY, TEXT_ENCODER, VAE
from acestep_jax.io.repository import (
    find_adapter,
    find_file,
    find_parts,
    network_files,
)

OWNER = "ACE-Step/"
VARIANTS = MappingProxyType(
    {"turbo": REPOSITORY}
    | {
        name: f"{OWNER}{MODEL_PREFIX}{name}"
        for name in "base sft turbo-shift1 turbo-shift3 turbo-continuous xl-base xl-sft xl-turbo".split()
    }
)

MAIN = "main"


def locate(
    source: str,
    variant: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Located:
    """Download what is needed of a model, unless it is in the cache, and return where it is.

    Args:
        source: the id of a repository, OWNER/NAME/FILE.safetensors for one file of it, or one of the names of
            `VARIANTS`, with or without "acestep-v15-".
        variant: the transformer to use where a repository holds several; of ACE-Step's own one of `VARIANTS`.
        revision: branch, tag or commit of the repository that holds the transformer; None: its main branch.
        token: of the hub; None: the one that `hf auth login` stored, or HF_TOKEN.
        cache_dir: None: where HF_HUB_CACHE or HF_HOME say.
        local_files_only: whether to use only what is in the cache.

    Raises:
        InputError: if there is no such model, it may not be read, or it cannot be downloaded whole.
    """
    hub = Hub(cache_folder(cache_dir), token, local_files_only)
    id, variant, file = complete(source, variant, revision)
    with hub.one_line_errors(id, revision), incomplete_without_network(snapshot := hub.snapshot(id, revision)):
        found = find_file(snapshot, file) if file else find_parts(snapshot, variant)
        wanted = [(snapshot, found.needed)]
    rest = None
    if absent := found.absent:
        with hub.one_line_errors(REPOSITORY, None), incomplete_without_network(rest := hub.snapshot(REPOSITORY, None)):
            needed = [path for folder in absent for path in network_files(rest, f"{folder}/")]
            wanted.append((rest, needed))
    with hub.one_line_errors(id, revision):
        hub.fetch(wanted)
    for fetched, wish in ((snapshot, revision), *([(rest, None)] if rest else [])):
        hub.remember(fetched, wish)
    folders = {
        name: None if found.whole else (rest or snapshot if name in absent else snapshot).folder / name
        for name in (VAE, TEXT_ENCODER)
    }
    repositories = {used.id: used.commit for used, _ in wanted}
    name = Path(found.model).name or id.partition("/")[2]
    return Located(
        model=snapshot.folder / found.model,
        commit=snapshot.commit,
        vae=folders[VAE],
        text_encoder=folders[TEXT_ENCODER],
        key="-".join([name, *repositories.values()]),
        repositories=repositories,
    )


def locate_adapter(
    source: str,
    file: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Download a LoRA adapter from the hub, unless it is in the cache, and return its file or folder.

    Args:
        source: the id of a repository, or OWNER/NAME/FILE.safetensors.
        file: the file to use where the repository holds several adapters; None: the whole first folder.
        revision, token, cache_dir, local_files_only: see `locate`.

    Raises:
        InputError: if there is no such adapter, it may not be read, or it cannot be downloaded whole.
    """
    hub = Hub(cache_folder(cache_dir), token, local_files_only)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+\.safetensors))?", source)
    if match is None:
        raise InputError(f"{source}: no such folder or file, and no id of a repository, which is OWNER/NAME")
    id, file = match[1], file or match[2]
    snapshot = hub.fetched(id, revision, lambda snapshot: find_adapter(snapshot, file))
    return snapshot.folder / file if file else snapshot.folder


def locate_file(
    id: str, path: str, *, token: str | None = None, cache_dir: str | Path | None = None, local_files_only: bool = False
) -> Path:
    """Download one file of a repository, unless it is in the cache, and return where it is.

    Args:
        id: of the repository, whose main branch is taken.
        path: of the file in it.
        token, cache_dir, local_files_only: see `locate`.

    Raises:
        InputError: if there is no such file, it may not be read, or it cannot be downloaded.
    """

    def needed(snapshot: Snapshot) -> list[str]:
        if path not in snapshot.files:
            raise InputError(f"{id}: has no {path}")
        return [path]

    return Hub(cache_folder(cache_dir), token, local_files_only).fetched(id, None, needed).folder / path


def push_to_hub(
    id: str, save: Callable[[Path], None], *, token: str | None, private: bool | None, commit_message: str | None
) -> str:
    """Upload a model to the Hugging Face hub; return the address of the commit.

    The repository is created if it does not exist. Files that are there and not in the model stay.

    Args:
        id: of the repository, OWNER/NAME.
        save: writes the model, given a folder to create.
        token: with the right to write; None: the one that `hf auth login` stored, or HF_TOKEN.
        private: of a new repository; None: as the owner's settings say.
        commit_message: None: "Upload with acestep-jax".

    Raises:
        InputError: if the hub refuses or cannot be reached, and what `save` raises.
    """
    hub = constants.ENDPOINT
    api = HfApi(endpoint=hub, token=token, library_name=LIBRARY)
    try:
        api.create_repo(id, private=private, exist_ok=True)  # before anything slow begins
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            save(folder)
            message = commit_message or "Upload with acestep-jax"
            return str(api.upload_folder(repo_id=id, folder_path=folder, commit_message=message).commit_url)
    except HFValidationError as error:
        raise InputError(f"repo_id: {id!r} is not the id of a repository ({error})") from None
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        what = str(error).strip().splitlines()[0]
        raise InputError(
            f"{id}: {hub} refuses the upload ({what}); give token= with the right to write, set HF_TOKEN or run "
            "`hf auth login`"
        ) from None
    except (OfflineModeIsEnabled, *transport_errors()) as error:
        raise InputError(f"{id}: {hub} cannot be reached ({error}); nothing was uploaded, try again") from None


def complete(source: str, variant: str | None, revision: str | None) -> tuple[str, str | None, str | None]:
    """Return the repository, the variant to look for in it, and the file in it, that a name stands for.

    Raises:
        InputError: if the name or the variant is unknown, or they contradict each other.
    """
    if variant is not None:
        variant = variant.removeprefix(MODEL_PREFIX)
    if "/" not in source:
        named = source.removeprefix(MODEL_PREFIX)
        if named in VARIANTS:
            if variant not in (None, named):
                raise InputError(f"variant: {source} is not {variant}; use one of the two")
            id, variant = REPOSITORY, named
        elif source.lower() == REPOSITORY.removeprefix(OWNER).lower():
            id = REPOSITORY
        else:
            raise InputError(
                f"{source}: no such folder, and no model of this name; {nearest(named, VARIANTS)}, or the id of a "
                f"repository on the hub such as {REPOSITORY}"
            )
    elif not (match := re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+\.safetensors))?", source)):
        raise InputError(f"{source}: no such folder or file, and no id of a repository, which is OWNER/NAME")
    elif match[2]:
        return match[1], variant, match[2]  # whose name may not say the variant
    else:
        id = REPOSITORY if source.lower() == REPOSITORY.lower() else source
    if variant is None or id not in VARIANTS.values():
        return id, variant, None
    if variant not in VARIANTS:
        raise InputError(f"variant: {variant!r} is unknown; {nearest(variant, VARIANTS)}")
    other = VARIANTS[variant]
    if id == REPOSITORY == other:
        return id, variant, None
    if id == REPOSITORY:
        if revision is not None and "/" in source:
            raise InputError(
                f"revision: {variant} is in a repository of its own; name that one: {other!r} in place of {source!r}"
            )
    elif id != other:
        raise InputError(f"variant: {source} is not {variant}; use {other!r} as the source")
    return other, None, None


class Hub:
    """The hub or, without network, what is in its cache."""

    def __init__(self, cache: Path, token: str | None, local_files_only: bool):
        self.cache, self.token, self.local_files_only = cache, token, local_files_only

    def snapshot(self, id: str, revision: str | None) -> Snapshot:
        """Return what the hub has of a repository; if it cannot be reached, what the cache has."""
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
        """Return the snapshot that the cache has; raise Unreachable if it has none."""
        found = cached_snapshot(self.cache, id, revision)
        if found is None or not is_complete(found):
            raise Unreachable(why(reason)) from reason
        return dataclasses.replace(found, offline=why(reason))

    def fetched(self, id: str, revision: str | None, needed: Callable[[Snapshot], Sequence[str]]) -> Snapshot:
        """Return the snapshot of a repository, after downloading the files that are needed of it."""
        with self.one_line_errors(id, revision), incomplete_without_network(snapshot := self.snapshot(id, revision)):
            self.fetch([(snapshot, needed(snapshot))])
        self.remember(snapshot, revision)
        return snapshot

    def fetch(self, wanted: Sequence[tuple[Snapshot, Sequence[str]]]) -> None:
        download(wanted, self.cache, self.token)

    def remember(self, snapshot: Snapshot, revision: str | None) -> None:
        """Note the commit of a branch or tag, for when there is no network."""
        file = repository_folder(self.cache, snapshot.id) / "refs" / (revision or MAIN)
        if (revision or MAIN) == snapshot.commit or file.is_file() and file.read_text() == snapshot.commit:
            return
        with contextlib.suppress(OSError):  # of a cache that is only to be read
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
                f"{id}: not whole in the cache, and {hub} cannot be reached ({error}); {held}. What was downloaded is "
                "kept, the same call resumes"
            ) from None


@contextlib.contextmanager
def incomplete_without_network(snapshot: Snapshot) -> Iterator[None]:
    """Raise Unreachable for InputError where only the cache is known: files that are not in it may well exist."""
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
    """Return the snapshot of a branch, tag or commit (None: of main) that the cache has, or None."""
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
    """Return whether all parts that indices of weights name are there."""
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
    """Return the ids of the models that are whole in the cache, with what they take from other repositories."""

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
