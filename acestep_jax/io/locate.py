"""Where the files of a model are: on this machine, or, by the id of a repository, on the Hugging Face hub."""

from pathlib import Path
from typing import NamedTuple

from acestep_jax.errors import InputError


class Place(NamedTuple):
    """The folder or file of a model, and what is not beside it.

    vae, text_encoder: their folders; None: beside the model, or in it.
    key: names the exact content on the hub; None: files of this machine, which may change.
    """

    model: Path
    vae: Path | None = None
    text_encoder: Path | None = None
    key: str | None = None


def locate(
    source: str,
    variant: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Place:
    """Return where a model is, after downloading what is missing if `source` is the id of a repository.

    Args:
        source: a folder, a file, or what `hub.locate` takes: the id of a repository, or the name of a model.
        variant, revision, token, cache_dir, local_files_only: see `hub.locate`; what they say of a repository does not
            matter to a folder, but a revision of it is an error.

    Raises:
        InputError: if it is nowhere.
    """
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise InputError(
                f"revision: {revision!r} is of a repository of the hub, but {source} is here; leave it out"
            )
        return Place(path)
    if path.is_absolute() or source.startswith((".", "~")) or not source.strip():
        raise InputError(
            f"{source}: no such folder; expected a PyTorch checkpoint, a native one, or the id of a hub repository "
            "such as ACE-Step/Ace-Step1.5"
        )
    from acestep_jax.io import hub

    found = hub.locate(
        source, variant, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    return Place(found.model, found.vae, found.text_encoder, found.key)
