"""Arguments as in diffusers: generators and tensors of PyTorch, without importing PyTorch."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from acestep_jax.errors import InputError
from acestep_jax.request import FILES

SEEDS = 2**32


def from_torch(keywords: Mapping[str, Any], generator: Any) -> dict[str, Any]:
    """Convert PyTorch values in the keywords of `AceStepPipeline.__call__`.

    Audio [B, channels, samples] or latents [B, frames, C] become a list with one array for each prompt, or one array if
    B is 1.

    Args:
        generator: None, an object with `initial_seed()`, or a list with one for each prompt: the seed.

    Raises:
        InputError: if both a seed and a generator are given, the generator is not one, or its seed is out of range; or
            if a tensor is given for an argument that does not accept one.
    """
    values = {name: array_of(value) for name, value in keywords.items()}
    for name in FILES:
        if isinstance(audio := values.get(name), np.ndarray) and audio.ndim == 3:
            values[name] = audio[0] if len(audio) == 1 else list(audio)
    takes_arrays = {*FILES, "latents", "seed", "timesteps"}
    for name, value in values.items():
        if isinstance(value, np.ndarray) and keywords[name] is not value and name not in takes_arrays:
            raise InputError(f"{name}: found a tensor; give a number, text or a list of these")
    if generator is None:
        return values
    if values.get("seed") is not None:
        raise InputError("generator: seed is given as well; leave one of them out")
    several = isinstance(generator, list | tuple)
    seeds = [_seed_of(one) for one in (generator if several else [generator])]
    return {**values, "seed": seeds if several else seeds[0]}


def array_of(value: Any) -> Any:
    """Return a PyTorch tensor, on any device and of any floating-point dtype, as an array; other values unchanged.

    bfloat16, which NumPy lacks, becomes float32. A list of tensors becomes a list of arrays.
    """
    if isinstance(value, list | tuple):
        return type(value)(map(array_of, value)) if any(map(_is_tensor, value)) else value
    if not _is_tensor(value):
        return value
    value = value.detach().cpu()
    try:
        return value.numpy()
    except TypeError:  # bfloat16
        return value.float().numpy()


def _is_tensor(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("detach", "cpu", "numpy"))


def _seed_of(generator: Any) -> int:
    if not callable(getattr(generator, "initial_seed", None)):
        raise InputError(
            f"generator: expected a torch.Generator or a list of them, found {generator!r}; use seed=N for a number"
        )
    seed = int(generator.initial_seed())
    if not 0 <= seed < SEEDS:
        raise InputError(
            f"generator: its seed is {seed}, expected 0 to 2^32 - 1; set one with manual_seed(N), or use seed=N"
        )
    return seed
