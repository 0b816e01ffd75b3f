"""Where the files of a model are: on this machine, or, by the id of a repository, on the Hugging Face hub."""

from pathlib import Path
from typing import Any

from acestep_jax.errors import InputError
from acestep_jax.io import hub


def locate(source: str, variant: str | None = None, *, revision: str | None = None, **options: Any) -> hub.Located:
    """Return where a model is, after downloading what is missing if `source` is the id of a repository.

    Args:
        source: a folder, a file, or what `hub.locate` takes: the id of a repository, or the name of a model.
        variant, revision, options: see `hub.locate`; what they say of a repository does not matter to a folder, but a
            revision of it is an error.

    Raises:
        InputError: if it is nowhere.
    """
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise InputError(
                f"revision: {revision!r} is of a repository of the hub, but {source} is here; leave it out"
            )
        return hub.Located(path)
    if path.is_absolute() or source.startswith((".", "~")) or not source.strip():
        raise InputError(
            f"{source}: no such folder; expected a PyTorch checkpoint, a native one, or the id of a hub repository "
            "such as ACE-Step/Ace-Step1.5"
        )
    return hub.locate(source, variant, revision=revision, **options)
