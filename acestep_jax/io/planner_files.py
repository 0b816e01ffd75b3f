"""The PyTorch checkpoint of a planner: a folder of transformers with the 5 Hz language model and its tokenizer.

Published folders are called `acestep-5Hz-lm-0.6B`, -1.7B and -4B and are next to the folder of a diffusion model. Their
tensors have the names of Qwen3Model; others have the names of Qwen3ForCausalLM.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from acestep_jax.errors import InputError, nearest
from acestep_jax.io.original import MOST_TOKENS, attention_name
from acestep_jax.io.pretrained import TorchCheckpoint, cast_to, file_tensors, read_json
from acestep_jax.io.safetensors_reader import Tensor
from acestep_jax.models.config import PlannerConfig
from acestep_jax.models.registry import PLANNER
from acestep_jax.models.runtime import QUANTIZATIONS

PREFIX = "acestep-5Hz-lm-"
DEFAULT_SIZE = "1.7B"  # the one that the authors' application uses, in the main repository
SIZES = ("0.6B", "1.7B", "4B")
VOCABULARY = ("vocab.json", "merges.txt")
TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (
    *VOCABULARY,
    TOKENIZER,
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
WHERE = (
    f"the repository ACE-Step/Ace-Step1.5 holds {PREFIX}{DEFAULT_SIZE}, ACE-Step/{PREFIX}0.6B and ACE-Step/{PREFIX}4B "
    "the other sizes"
)
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def is_planner(folder: Path) -> bool:
    """Return whether a folder is the PyTorch checkpoint of a planner, judging by its `config.json` and its name."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(values, dict) or values.get("model_type") != "qwen3":
        return False
    tokens = values.get("vocab_size")
    known = isinstance(tokens, int) and tokens > MOST_TOKENS or "first_code" in values
    return known or folder.name.startswith(PREFIX)


def choose_planner(names: Iterable[str], size: str | None, source: str) -> str | None:
    """Return the name of the planner to use among several folder names; None if there is none.

    Args:
        size: one of `SIZES`, or another suffix of "acestep-5Hz-lm-"; None: 1.7B, or the only one.
        source: location of the folders, for messages.

    Raises:
        InputError: if none of them has the size, or there are several and none is the default.
    """
    found = {name.removeprefix(PREFIX): name for name in sorted(names) if name.startswith(PREFIX)}
    if not found:
        return None
    if size is not None:
        if size not in found:
            raise InputError(f"planner: {source} has no {PREFIX}{size}; {nearest(size, list(found))}; {WHERE}")
        return found[size]
    if len(found) > 1 and DEFAULT_SIZE not in found:
        raise InputError(f"planner: {source} holds several planners; choose one of {', '.join(found)}")
    return found.get(DEFAULT_SIZE, next(iter(found.values())))


def planner_names(tensors: Mapping[str, Tensor], source: str = PLANNER) -> dict[str, Tensor]:
    """Return the tensors of a planner under diffusers' names, without a head that equals the embedding.

    Raises:
        InputError: if a tensor exists under both of its names, or the head is another matrix.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (short := name.removeprefix("model.")) in plain:
            raise InputError(f"{source}: {short} is there with and without the prefix model.; keep one of them")
        plain[short] = tensor
    head, embedding = plain.pop(_HEAD, None), plain.get(_EMBEDDING)
    if head is not None and embedding is not None:
        same = head.shape == embedding.shape and np.array_equal(_bits(head.read()), _bits(embedding.read()))
        if not same:
            raise InputError(
                f"{source}: {_HEAD} differs from {_EMBEDDING}; expected a planner that reads its logits from the "
                "embedding, as all published ones do"
            )
    return {attention_name(name): tensor for name, tensor in plain.items()}


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.dtype.itemsize}")


def open_planner(folder: Path, dtype: str | None) -> TorchCheckpoint:
    """Open the folder of a planner; read its config and the headers of its weight files.

    Args:
        dtype: see `open_checkpoint`.

    Raises:
        InputError: if it is not a planner, or a part of it is missing, damaged or unknown.
    """
    file = folder / "config.json"
    config = PlannerConfig.from_hf(read_json(file), str(file))
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder}: no weights; expected model.safetensors, or its index and shards")
    tensors = planner_names(file_tensors(folder, cast_to(dtype)), str(folder))
    tokenizer = tokenizer_files(folder)
    files = {tensor.file for tensor in tensors.values() if tensor.file} | {file, *tokenizer}
    return TorchCheckpoint(
        configs={PLANNER: config},
        tensors={PLANNER: tensors},
        weight_norm={},
        tokenizer=None,
        tokenizer_config={},
        files=tuple(sorted(files)),
        extra_files={path.name: path for path in tokenizer},
        quantization=dtype if dtype in QUANTIZATIONS else None,
    )


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a planner's tokenizer; raise InputError if they are incomplete."""
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    names = {file.name for file in found}
    if TOKENIZER not in names and not set(VOCABULARY) <= names:
        raise InputError(
            f"{folder}: no tokenizer; expected {' and '.join(VOCABULARY)}, or {TOKENIZER}, as in the repository "
            f"ACE-Step/{PREFIX}0.6B"
        )
    return found


def names_planner(source: str) -> str | None:
    """Return the id of a planner's hub repository, given that id or the name of its folder; None if the name is not a
    planner's. The 1.7B has no separate repository, see `WHERE`."""
    match = re.fullmatch(rf"(ACE-Step/)?{PREFIX}(\d[\w.]*)", source)
    return None if match is None else f"ACE-Step/{PREFIX}{match[2]}"
