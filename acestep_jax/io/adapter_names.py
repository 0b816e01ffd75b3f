"""The names of adapter tensors in PyTorch files, as trainers and applications write them.

There are 18 linear layers, most of which exist once in each transformer layer. Each has a name in diffusers and one in
ACE-Step's own code, with dots or, flattened, with underscores, after any of the prefixes below.
"""

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

from acestep_jax.io import checkpoint
from acestep_jax.models.config import TransformerConfig

# The last part of a tensor's name: the kind of adapter, and which of its parts, as `adapter_reader` calls them.
PARTS = {
    "lora_A": ("lora", "a"),
    "lora_down": ("lora", "a"),
    "lora.down": ("lora", "a"),
    "lora_linear_layer.down": ("lora", "a"),
    "lora_B": ("lora", "b"),
    "lora_up": ("lora", "b"),
    "lora.up": ("lora", "b"),
    "lora_linear_layer.up": ("lora", "b"),
    "lora_magnitude_vector": ("any", "magnitude"),
    "dora_scale": ("any", "magnitude"),
    "alpha": ("any", "alpha"),
    **{f"lokr_{part}": ("lokr", part) for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    **{f"hada_{part}": ("loha", part) for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
}
# Other kinds of adapters, by their tensor names.
OTHER_KINDS = {
    r"\.lokr_t[12]\b|\.hada_t[12]\b|\.lora_mid\b": "a Tucker decomposition, which is of convolutions",
    r"\.oft_|\.boft_": "an OFT adapter",
    r"\.ia3_|\.on_input\b": "an IA3 adapter",
    r"\.vera_": "a VeRA adapter",
    r"\.(diff|diff_b|set_weight)$": "a difference of whole weights",
    r"\.lora_B\.(.+\.)?bias$": "the bias of an adapter (lora_bias)",
    r"\.modules_to_save\.": "a fully trained layer (modules_to_save)",
    r"\.lora_embedding_": "an adapter of an embedding",
    r"\.scalar$": "a scalar of LyCORIS (use_scalar), which it multiplies into the weights when it saves them",
}
NAMES = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa"}
# An adapter's name may stand between a part and `weight`, as in PEFT's own state: `lora_A.default.weight`.
_TENSOR = re.compile(rf"(.+)\.({'|'.join(map(re.escape, PARTS))})(?:\.(?!(?:weight|bias)$)([^.]+))?(?:\.weight)?")
# Prefixes of PEFT, diffusers, ComfyUI, kohya's and LyCORIS' trainers, torch.compile and data-parallel wrappers.
_PREFIX = "(?:(?:base_model|model|transformer|diffusion_model|decoder|unet|dit|lora|lycoris|module)_)*"
_ORIGINAL = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "o_proj"}


class Name(NamedTuple):
    """The meaning of a tensor's name: its module, as the file names it, its kind and part, and its adapter."""

    module: str
    kind: str
    part: str
    adapter: str | None


def parse(tensor: str) -> Name | None:
    """Parse the name of a tensor; return None if it does not belong to an adapter of a kind in `NAMES`."""
    match = _TENSOR.fullmatch(tensor)
    return None if match is None else Name(match[1], *PARTS[match[2]], match[3])


def other_kind(tensor: str) -> str | None:
    """Return the kind of adapter that a tensor unknown to `parse` belongs to, if its name says so."""
    return next((kind for pattern, kind in OTHER_KINDS.items() if re.search(pattern, tensor)), None)


@functools.lru_cache
def linear_layers() -> frozenset[str]:
    """Return the dotted paths of the linear layers of the transformer, which are the same for every size."""
    leaves = checkpoint.leaf_shapes("transformer", TransformerConfig())
    kernels = {name: len(leaf.shape) - is_stacked(name) for name, leaf in leaves.items() if name.endswith(".kernel")}
    return frozenset(name.removesuffix(".kernel") for name, axes in kernels.items() if axes == 2)


def is_stacked(layer: str) -> bool:
    """Return whether one of our paths stands for a linear layer in each transformer layer."""
    return layer.startswith("layers.")


def find_layer(module: str) -> tuple[str, int | None] | None:
    """Return the path of the linear layer for a module, and its row in a stack; None if there is none."""
    flat = re.sub(r"_orig_mod[._]", "", module).replace(".", "_")
    match = _modules().fullmatch(flat)
    if match is None:
        return None
    layer = _spellings()[match["layer"]]
    row = match["row"]
    return (layer, None if row is None else int(row)) if is_stacked(layer) == (row is not None) else None


@functools.lru_cache
def _spellings() -> dict[str, str]:
    """Return the layer of each flattened name, without `layers_N_` in front of it."""
    found = {}
    for layer in linear_layers():
        *parents, last = layer.removeprefix("layers.").split(".")
        names = {last, _ORIGINAL.get(last, last), *(("to_out.0",) if last == "to_out" else ())}
        found |= {"_".join([*parents, name]).replace(".", "_"): layer for name in names}
    return found


@functools.lru_cache
def _modules() -> re.Pattern[str]:
    return re.compile(rf"{_PREFIX}(?:layers_(?P<row>\d+)_)?(?P<layer>{'|'.join(_spellings())})")


def some(names: Iterable[str], most: int = 5) -> str:
    """Return the first names of a list as text, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
