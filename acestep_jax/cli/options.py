"""Options that several commands share."""

import math
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from acestep_jax.errors import InputError


def add_lora(parser: ArgumentParser, required: bool = False) -> None:
    """Add --lora and --lora-scale, which `lora_scales` reads."""
    # jsonargparse takes no type for an option that appends, so `lora_scales` turns the texts into numbers.
    parser.add_argument(
        "--lora",
        metavar="DIR",
        action="append",
        required=required,
        help="Folder or .safetensors file of an adapter, native or from PyTorch (repeatable; the changes of several "
        "adapters add up).",
    )
    parser.add_argument(
        "--lora-scale",
        metavar="S",
        action="append",
        help="Scale of the adapters: 0 has no effect, 1 is as trained. Give it once for all adapters, or once for each "
        "--lora in the same order. Default: 1.",
    )


def lora_scales(options: Namespace) -> tuple[list[str], list[float]]:
    """Return the folders of the adapters and the scale of each.

    Raises:
        InputError: if a scale is not a finite number, or there are neither one nor as many as adapters.
    """
    folders = [str(folder) for folder in options.lora or ()]
    scales = [_scale(value) for value in options.lora_scale or ()]
    if scales and not folders:
        raise InputError(f"--lora-scale: found {scales[0]:g} without an adapter; name its folder with --lora")
    if not scales:
        scales = [1.0]
    if len(scales) == 1:
        scales *= len(folders)
    if len(scales) != len(folders):
        raise InputError(
            f"--lora-scale: expected one for all adapters or one for each of the {len(folders)} --lora, found "
            f"{len(scales)}"
        )
    return folders, scales


def add_instrumental(parser: ArgumentParser, help: str) -> None:
    """Add --instrumental, which `is_instrumental` reads."""
    parser.add_argument("--instrumental", action="store_true", help=help)


def is_instrumental(options: Namespace, given: dict[str, Any]) -> bool:
    """Return whether a song without vocals is requested.

    Args:
        given: the fields that were given.

    Raises:
        InputError: if lyrics were given, too.
    """
    if options.instrumental and given.get("lyrics"):
        raise InputError(
            f"--instrumental, --lyrics: expected one of them, found both ({given['lyrics'][:40]!r}); leave one out"
        )
    return options.instrumental


def _scale(value: object) -> float:
    try:
        scale = float(str(value))
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise InputError(f"--lora-scale: expected a finite number such as 0.8, found {str(value)!r}")
    return scale
