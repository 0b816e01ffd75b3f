"""Models by name: the repositories of the Hugging Face hub that a name stands for, and the files that are needed.

ACE-Step publishes turbo, the autoencoder, the text encoder and a planner together, and each other transformer in its
own repository, which is used with the other networks of the first.
"""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from acestep_jax.errors import InputError, nearest
from acestep_jax.io.download import (
    LIBRARY,
    Snapshot,
    cache_folder,
    transport_errors,
)
from acestep_jax.io.hub_client import Hub, incomplete_without_network
from acestep_jax.io.locate import Located
from acestep_jax.io.original import MODEL_PREFIX, OWNER, REPOSITORY, TEXT_ENCODER, VAE, VARIANTS
from acestep_jax.io.repository import (
    find_adapter,
    find_file,
    find_parts,
    network_files,
)


def locate(
    source: str,
    variant: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Located:
    """Download the files of a model that are not in the cache yet, and return their location.

    Args:
        source: the id of a repository, OWNER/NAME/FILE.safetensors for one file of it, or one of the names of
            `VARIANTS`, with or without "acestep-v15-".
        variant: the transformer to use if a repository has several; for ACE-Step's own, one of `VARIANTS`.
        revision: branch, tag or commit of the transformer's repository; None: its main branch.
        token: access token of the hub; None: the one stored by `hf auth login`, or HF_TOKEN.
        cache_dir: folder of the cache; None: as set by HF_HUB_CACHE or HF_HOME.
        local_files_only: whether to use only cached files.

    Raises:
        InputError: if there is no such model, access is denied, or it cannot be downloaded completely.
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
        file: the file to use if the repository has several adapters; None: the whole first folder.
        revision, token, cache_dir, local_files_only: see `locate`.

    Raises:
        InputError: if there is no such adapter, access is denied, or it cannot be downloaded completely.
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
    """Download one file of a repository, unless it is in the cache, and return its path.

    Args:
        id: id of the repository, whose main branch is used.
        path: path of the file in it.
        token, cache_dir, local_files_only: see `locate`.

    Raises:
        InputError: if there is no such file, access is denied, or it cannot be downloaded.
    """

    def needed(snapshot: Snapshot) -> list[str]:
        if path not in snapshot.files:
            raise InputError(f"{id}: has no {path}")
        return [path]

    return Hub(cache_folder(cache_dir), token, local_files_only).fetched(id, None, needed).folder / path


def push_to_hub(
    id: str, save: Callable[[Path], None], *, token: str | None, private: bool | None, commit_message: str | None
) -> str:
    """Upload a model to the Hugging Face hub; return the URL of the commit.

    The repository is created if it does not exist. Existing files that are not part of the model are kept.

    Args:
        id: id of the repository, OWNER/NAME.
        save: function that writes the model to a new folder.
        token: access token with write permission; None: the one stored by `hf auth login`, or HF_TOKEN.
        private: whether a new repository is private; None: as in the owner's settings.
        commit_message: message of the commit; None: "Upload with acestep-jax".

    Raises:
        InputError: if the hub rejects the upload or cannot be reached, or `save` raises it.
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
    """Return the repository that a name stands for, and the variant and the file to use in it.

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
        return match[1], variant, match[2]  # the file's name may not tell the variant
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
