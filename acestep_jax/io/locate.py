"""Locates the files of a model: on this machine or, by the id of a repository, on the Hugging Face hub."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acestep_jax.errors import InputError
from acestep_jax.io.files import on_this_machine


@dataclasses.dataclass(frozen=True)
class Located:
    """The location of a model: in the cache of the hub, or elsewhere on this machine.

    model: a native checkpoint, a folder in diffusers' layout, the folder of an original transformer, or a file.
    vae, text_encoder: folders of an original checkpoint that are not in `model`; None: next to it, or in it.
    key: unique name of these contents, usable as a file name: the model's name and the commits of all repositories;
        None: not from the hub, so the files may change.
    repositories: the commit of each repository; commit: the commit of the one with `model`, None: not from the hub.
    """

    model: Path
    vae: Path | None = None
    text_encoder: Path | None = None
    key: str | None = None
    repositories: Mapping[str, str] = dataclasses.field(default_factory=dict)
    commit: str | None = None

    @property
    def is_of_one_variant(self) -> bool:
        """Return whether the variant is known: for folders from the hub, but not for a file, which does not tell."""
        return self.key is not None and not self.model.is_file()


def locate(source: str, variant: str | None = None, *, revision: str | None = None, **options: Any) -> Located:
    """Return the location of a model, after downloading missing files if `source` is the id of a repository.

    Args:
        source: a folder, a file, or a source for `hub.locate`: the id of a repository, or the name of a model.
        variant, revision, options: see `hub.locate`; options of the hub are ignored for a folder, but a revision is an
            error.

    Raises:
        InputError: if it cannot be found.
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
    from acestep_jax.io import hub  # importing the client takes a fifth of a second

    return hub.locate(source, variant, revision=revision, **options)
