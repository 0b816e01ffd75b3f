"""Where the files of a model are: on this machine, or, by the id of a repository, on the Hugging Face hub."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acestep_jax.errors import InputError
from acestep_jax.io.files import on_this_machine


@dataclasses.dataclass(frozen=True)
class Located:
    """Where a model is: in the cache of the hub, or elsewhere on this machine.

    model: a native checkpoint, a folder in diffusers' layout, the folder of an original transformer, or a file.
    vae, text_encoder: folders of an original checkpoint that are not in `model`; None: beside it, or in it.
    key: names this content and no other, fit for a file's name: the model's name and the commits of all repositories;
        None: not of the hub, and the files may change.
    repositories: the commit by repository; commit: that of the one with `model`, None: not of the hub.
    """

    model: Path
    vae: Path | None = None
    text_encoder: Path | None = None
    key: str | None = None
    repositories: Mapping[str, str] = dataclasses.field(default_factory=dict)
    commit: str | None = None

    @property
    def is_of_one_variant(self) -> bool:
        """Return whether the variant has been chosen: of the hub's folders, but not of a file, which does not tell."""
        return self.key is not None and not self.model.is_file()


def locate(source: str, variant: str | None = None, *, revision: str | None = None, **options: Any) -> Located:
    """Return where a model is, after downloading what is missing if `source` is the id of a repository.

    Args:
        source: a folder, a file, or what `hub.locate` takes: the id of a repository, or the name of a model.
        variant, revision, options: see `hub.locate`; what they say of a repository does not matter to a folder, but a
            revision of it is an error.

    Raises:
        InputError: if it is nowhere.
    """
    path = on_this_machine(source).expanduser()
    if path.exists():
        if revision is not None:
            raise InputError(
                f"revision: {revision!r} is of a repository of the hub, but {source} is here; leave it out"
            )
        return Located(path)
    if path.is_absolute() or source.startswith((".", "~")) or not source.strip():
        raise InputError(
            f"{source}: no such folder; expected a PyTorch checkpoint, a native one, or the id of a hub repository "
            "such as ACE-Step/Ace-Step1.5"
        )
    from acestep_jax.io import hub  # whose client takes a fifth of a second to import

    return hub.locate(source, variant, revision=revision, **options)
