"""The planner of a model on the Hugging Face hub: its repository, and the files that are needed."""

from pathlib import Path

from acestep_jax.errors import InputError
from acestep_jax.io import manifest
from acestep_jax.io.download import Snapshot, cache_folder
from acestep_jax.io.hub import complete
from acestep_jax.io.hub_client import Hub, incomplete_without_network
from acestep_jax.io.locate import Located
from acestep_jax.io.original import REPOSITORY
from acestep_jax.io.planner_files import DEFAULT_SIZE, PREFIX, TOKENIZER_FILES, choose_planner, names_planner
from acestep_jax.io.repository import is_native, network_files
from acestep_jax.models.registry import PLANNER


def locate_planner(
    source: str,
    size: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Located:
    """Download the files of a planner that are not in the cache yet, and return their location.

    Args:
        source: the id of a planner's repository, or of a model's, which may contain one; if it does not, ACE-Step's
            planner is used. Or a name such as acestep-5Hz-lm-4B, or the name of a model, see `hub.locate`.
        size: which planner, such as 0.6B; None: 1.7B, or the only one of the repository.
        revision, token, cache_dir, local_files_only: see `hub.locate`; the revision is of `source`.

    Raises:
        InputError: if there is no such planner, access is denied, or it cannot be downloaded completely.
    """
    hub = Hub(cache_folder(cache_dir), token, local_files_only)
    named = names_planner(source)
    if named is not None and size is not None and not named.endswith(f"-{size}"):
        raise InputError(f"planner: {source} is not {size}; use one of the two")
    size = size or (named and named.removeprefix(f"ACE-Step/{PREFIX}"))
    id = named or complete(source, None, revision)[0]
    if size is not None and id == REPOSITORY and size != DEFAULT_SIZE:
        id, revision = f"ACE-Step/{PREFIX}{size}", None
    elif id == f"ACE-Step/{PREFIX}{DEFAULT_SIZE}":
        id, revision = REPOSITORY, None
    with hub.one_line_errors(id, revision), incomplete_without_network(snapshot := hub.snapshot(id, revision)):
        found = _find(snapshot, size)
    if found is None:
        return locate_planner(
            f"{PREFIX}{size or DEFAULT_SIZE}", token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
    folder, needed = found
    hub.fetch([(snapshot, needed)])
    hub.remember(snapshot, revision)
    name = folder or id.partition("/")[2]
    return Located(
        model=snapshot.folder / folder,
        key=f"{Path(name).name}-{snapshot.commit}",
        repositories={snapshot.id: snapshot.commit},
    )


def _find(snapshot: Snapshot, size: str | None) -> tuple[str, list[str]] | None:
    """Return the folder of the planner in a repository, "" if it is at the top, and the files to read; None if there is
    none.

    Raises:
        InputError: if there are several, or not the one of this size.
    """
    files = snapshot.files
    if is_native({path.removeprefix(f"{PLANNER}/"): file for path, file in files.items() if path.startswith(PLANNER)}):
        return PLANNER, [path for path in files if path.startswith(f"{PLANNER}/")]
    folders = {path.partition("/")[0] for path in files if path.count("/") == 1 and path.endswith("/config.json")}
    name = choose_planner(folders, size, snapshot.id)
    if name is None and snapshot.id.partition("/")[2].startswith(PREFIX):
        if is_native(files):
            return "", [path for path in files if path.startswith("weights/") or _is_small(path)]
        name = ""
    if name is None:
        return None
    prefix = f"{name}/" if name else ""
    tokenizer = [f"{prefix}{file}" for file in TOKENIZER_FILES if f"{prefix}{file}" in files]
    return name, sorted({*network_files(snapshot, prefix), *tokenizer})


def _is_small(path: str) -> bool:
    return "/" not in path and (path == manifest.CONFIG or path in TOKENIZER_FILES)
