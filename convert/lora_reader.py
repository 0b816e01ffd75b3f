"""Reading LoRA and DoRA adapters of PyTorch, in the layouts of `convert.lora` and other trainers' variants of them."""

import functools
import json
import logging
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from acestep_jax.convert import original, rules
from acestep_jax.convert.torch_checkpoint import Tensor, read_header, read_json
from acestep_jax.errors import InputError
from acestep_jax.io import adapter, checkpoint
from acestep_jax.io.adapter import Adapter
from acestep_jax.models.config import LoRAConfig, TransformerConfig

logger = logging.getLogger(__name__)

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS, DIFFUSERS_KEY = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"

_PREFIX = re.compile(r"(?:base_model\.model\.)?(?:transformer\.|diffusion_model\.)?(?:decoder\.)?")
_PARTS = {
    "lora_A.weight": "a",
    "lora_down.weight": "a",
    "lora_B.weight": "b",
    "lora_up.weight": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "dora_scale": "magnitude",
    "alpha": "alpha",
}
# What a tensor of another name belongs to, by a part of its name.
_OTHER_KINDS = {
    ".lokr_": "a LoKr adapter",
    ".hada_": "a LoHa adapter",
    ".oft_": "an OFT adapter",
    ".lora_mid.": "a Tucker decomposition",
    ".lora_B.bias": "the bias of an adapter (lora_bias)",
    ".modules_to_save.": "a fully trained layer (modules_to_save)",
}
# Settings of PEFT that change what the tensors mean or add others. They are refused if they are set.
_OTHER_SETTINGS = (
    "alora_invocation_tokens arrow_config kasa_config layer_replication lora_bias modules_to_save monteclora_config "
    "target_parameters trainable_token_indices use_bdlora use_qalora velora_config"
).split()


class _Source(NamedTuple):
    """Hold a file of tensors and the arguments of LoraConfig that its trainer recorded, with the file they are in."""

    file: Path
    tensors: dict[str, Tensor]
    settings_file: Path | None
    settings: dict[str, Any] | None


class _Module(NamedTuple):
    """Hold the adapter of one torch module: A [r, in], B [out, r], magnitude [out], and the factor of B A."""

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    alpha: float
    scaling: float


def read_lora(source: Path, num_layers: int | None = None) -> Adapter:
    """Read an adapter; half precision becomes float32.

    Names may be those of the original model or of diffusers, with any of the prefixes of PEFT, diffusers and ComfyUI.
    Alpha is read from `adapter_config.json` or the header, else from `alpha` tensors; else alpha = r, with a warning.
    The result has one rank and one alpha: smaller factors are padded with zeros, and where the scaling of a layer
    differs, its quotient is multiplied into B. Layers of a stack that have no adapter get zeros.

    Args:
        source: a folder or a .safetensors file.
        num_layers: number of layers of the model; None: as many as the adapter names.

    Raises:
        InputError: if it is not an adapter of ACE-Step 1.5, of another kind than LoRA and DoRA, or damaged.
    """
    opened = _open(source)
    modules: dict[tuple[str, int | None], _Module] = {}
    for raw, parts in _group(opened).items():
        place = _place(raw, opened.file)
        if place in modules:
            raise InputError(f"{opened.file}: found {raw} twice, also under another name; expected it once")
        modules[place] = _read_module(raw, parts, opened)
    return _stack(modules, opened, num_layers)


@functools.lru_cache
def linear_layers() -> frozenset[str]:
    """Return the dotted paths of the linear layers of the transformer, which are the same for every size."""
    leaves = checkpoint.leaf_shapes("transformer", TransformerConfig())
    kernels = {n: len(leaf.shape) - rules.is_stacked(n) for n, leaf in leaves.items() if n.endswith(".kernel")}
    return frozenset(name.removesuffix(".kernel") for name, axes in kernels.items() if axes == 2)


def _open(source: Path) -> _Source:
    if source.is_dir():
        names = sorted(path.name for path in source.iterdir())
        if adapter.CONFIG in names:
            raise InputError(f"{source}: is an acestep-jax adapter already; use it with acestep-jax generate --lora")
        files = [name for name in names if name.endswith(".safetensors")]
        if PEFT_CONFIG in names:
            file = source / PEFT_WEIGHTS
            if PEFT_WEIGHTS not in names:
                raise InputError(
                    f"{source}: expected {PEFT_WEIGHTS} beside {PEFT_CONFIG}, found {_some(names)}; "
                    "save it again with safe_serialization=True"
                )
        elif DIFFUSERS_WEIGHTS in files or len(files) == 1:
            file = source / (DIFFUSERS_WEIGHTS if DIFFUSERS_WEIGHTS in files else files[0])
        else:
            raise InputError(
                f"{source}: expected {PEFT_CONFIG} and {PEFT_WEIGHTS} (PEFT), {DIFFUSERS_WEIGHTS} (diffusers) or one "
                f".safetensors file (ComfyUI), found {_some(names) or 'nothing'}"
            )
    elif source.suffix == ".safetensors" and source.is_file():
        file = source
    else:
        found = "found another kind of file" if source.exists() else "found nothing"
        raise InputError(f"{source}: expected the folder or the .safetensors file of a LoRA adapter, {found}")
    tensors = read_header(file, np.dtype("float32"))
    if file.name == PEFT_WEIGHTS:
        settings = file.with_name(PEFT_CONFIG)
        if not settings.is_file():
            raise InputError(
                f"{settings}: missing; it holds the adapter's rank and alpha, put it beside {PEFT_WEIGHTS}"
            )
        values = read_json(settings)
        if (kind := values.get("peft_type", "LORA")) != "LORA":
            raise InputError(f'{settings}: peft_type {kind!r}; expected "LORA", other kinds are not supported')
        return _Source(file, tensors, settings, _check_settings(values, settings))
    return _Source(file, tensors, file, _header_settings(file))


def _header_settings(file: Path) -> dict[str, Any] | None:
    """Return the settings that diffusers writes in the header of a file, as `transformer.KEY` or only KEY."""
    try:
        with safe_open(file, framework="np") as reader:
            text = (reader.metadata() or {}).get(DIFFUSERS_KEY)
        values = None if text is None else json.loads(text)
    except (SafetensorError, ValueError) as error:
        raise InputError(
            f"{file}: {DIFFUSERS_KEY} in the header is damaged ({error}); save the adapter again"
        ) from None
    if values is None:
        return None
    if not isinstance(values, dict):
        raise InputError(f"{file}: {DIFFUSERS_KEY} in the header: expected a JSON object, found {values!r}")
    return _check_settings({key.removeprefix("transformer."): value for key, value in values.items()}, file)


def _check_settings(values: dict[str, Any], file: Path) -> dict[str, Any]:
    if set_ := [key for key in _OTHER_SETTINGS if values.get(key)]:
        raise InputError(f"{file}: {set_[0]} is {values[set_[0]]!r}; only plain LoRA and DoRA are supported")
    if (bias := values.get("bias", "none")) != "none":
        raise InputError(f"{file}: bias is {bias!r}; expected 'none', trained biases are not supported")
    for key in ("r", "lora_alpha"):
        if not _is_number(values.get(key)):
            raise InputError(f"{file}: {key}: expected a number above 0, found {values.get(key)!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = values.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(_is_number, pattern.values())):
            raise InputError(f"{file}: {key}: expected numbers above 0 by module name, found {pattern!r}")
        for module in pattern:
            try:
                re.compile(module)
            except re.error as error:
                raise InputError(f"{file}: {key}: {module!r} is not a regular expression ({error})") from None
    return values


def _group(source: _Source) -> dict[str, dict[str, Tensor]]:
    """Return the tensors by module, as the file names it, and by which of `_PARTS` they are."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in source.tensors.items():
        match = re.fullmatch(rf"(.+)\.({'|'.join(map(re.escape, _PARTS))})", name)
        if match is None:
            kind = next((kind for part, kind in _OTHER_KINDS.items() if part in name), None)
            what = f"{name} belongs to {kind}" if kind else f"found {name}"
            raise InputError(
                f"{source.file}: {what}; expected lora_A and lora_B, or lora_down and lora_up, of linear layers only"
            )
        part = _PARTS[match[2]]
        if match[2] == "dora_scale" and (len(tensor.shape) != 2 or tensor.shape[1] != 1):
            raise InputError(
                f"{source.file}: {name} has shape {list(tensor.shape)}; expected [out, 1], the norm of each output"
            )
        if part in modules.setdefault(match[1], {}):
            raise InputError(f"{source.file}: found {name} twice, also under another name; expected it once")
        modules[match[1]][part] = tensor
    if not modules:
        raise InputError(f"{source.file}: holds no tensors; expected lora_A and lora_B of at least one linear layer")
    return modules


def _place(raw: str, file: Path) -> tuple[str, int | None]:
    """Return the dotted path of the linear layer that a module of a file is for, and its row in a stack."""
    name = _PREFIX.sub("", raw, count=1)
    try:
        leaf, row, _ = rules.to_jax("transformer", original.attention_name(f"{name}.weight"))
    except KeyError:
        leaf, row = "", None
    layer = leaf.removesuffix(".kernel")
    if layer not in linear_layers() or rules.is_stacked(leaf) != (row is not None):
        raise InputError(
            f"{file}: {raw} is not a linear layer of ACE-Step 1.5's transformer, such as layers.0.self_attn.q_proj; "
            "expected an adapter of its linear layers only"
        )
    return layer, row


def _read_module(raw: str, parts: dict[str, Tensor], source: _Source) -> _Module:
    for part, names in (("a", "lora_A (or lora_down)"), ("b", "lora_B (or lora_up)")):
        if part not in parts:
            raise InputError(f"{source.file}: {raw} has no {names}; expected both factors of each layer")
        if len(parts[part].shape) != 2:
            raise InputError(f"{source.file}: {names} of {raw} has shape {list(parts[part].shape)}, expected two axes")
    (rank, _), (outputs, columns) = parts["a"].shape, parts["b"].shape
    if rank != columns or not rank:
        raise InputError(f"{source.file}: the factors of {raw} have ranks {rank} and {columns}, expected one rank")
    magnitude = None
    if "magnitude" in parts:
        if math.prod(parts["magnitude"].shape) != outputs:
            found = list(parts["magnitude"].shape)
            raise InputError(f"{source.file}: the magnitude of {raw} has shape {found}, expected [{outputs}]")
        magnitude = parts["magnitude"].read().reshape(-1)
    alpha, scaling = _scaling(raw, rank, parts.get("alpha"), source)
    return _Module(parts["a"].read(), parts["b"].read(), magnitude, alpha, scaling)


def _scaling(raw: str, rank: int, tensor: Tensor | None, source: _Source) -> tuple[float, float]:
    """Return alpha and the factor of B A. Patterns are read as by PEFT: the first that matches the end of a name."""
    settings, noted = source.settings, None
    if tensor is not None:
        if math.prod(tensor.shape) != 1:
            raise InputError(f"{source.file}: {raw}.alpha has shape {list(tensor.shape)}, expected one number")
        # By its decimal digits: 0.1 in float32 was meant as 0.1.
        noted = float(str(tensor.read().reshape(())[()]))
        if not _is_number(noted):
            raise InputError(f"{source.file}: {raw}.alpha: expected a number above 0, found {noted}")
    if settings is None:
        alpha = float(rank) if noted is None else noted
        return alpha, alpha / rank

    def setting(key: str, pattern: str) -> Any:
        module = re.sub(r"^(base_model\.model|transformer)\.", "", raw)
        found = (v for k, v in (settings.get(pattern) or {}).items() if re.match(rf"(.*\.)?({k})$", module))
        return next(found, settings[key])

    alpha = setting("lora_alpha", "alpha_pattern")
    if (expected := setting("r", "rank_pattern")) != rank:
        raise InputError(f"{source.file}: {raw} has rank {rank}, but {source.settings_file} says {expected}")
    scaling = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    if noted is not None and not math.isclose(noted / rank, scaling, rel_tol=1e-5):
        raise InputError(f"{source.file}: {raw}.alpha is {noted}, but {source.settings_file} says {scaling * rank}")
    return alpha, scaling


def _stack(modules: dict[tuple[str, int | None], _Module], source: _Source, num_layers: int | None) -> Adapter:
    """Return all modules as one adapter, with one rank and one scaling."""
    if source.settings is None and all(module.alpha == len(module.a) for module in modules.values()):
        if not any(name.endswith(".alpha") for name in source.tensors):
            logger.warning(
                "%s: records no alpha; alpha = rank is assumed, as diffusers and ComfyUI do. If it was trained with "
                "another alpha, change its scale accordingly", source.file
            )  # fmt: skip
    dora = {module.magnitude is not None for module in modules.values()}
    if len(dora) > 1:
        raise InputError(
            f"{source.file}: some layers have a magnitude and others do not; expected LoRA or DoRA for all"
        )
    use_dora = dora.pop()
    if source.settings is not None and bool(source.settings.get("use_dora")) != use_dora:
        found = "has magnitudes" if use_dora else "has no magnitudes"
        raise InputError(f"{source.settings_file}: use_dora is {not use_dora}, but {source.file} {found}")
    rank = max(len(module.a) for module in modules.values())
    (alpha, scaling, usual), _ = Counter((m.alpha, m.scaling, len(m.a)) for m in modules.values()).most_common(1)[0]
    rslora = source.settings is not None and bool(source.settings.get("use_rslora"))
    if rslora or usual != rank:
        alpha = scaling * rank
    rows = {row for _, row in modules if row is not None}
    depth = max(rows, default=-1) + 1 if num_layers is None else num_layers
    if rows and max(rows) >= depth:
        raise InputError(f"{source.file}: adapts layer {max(rows)}, but the model has {depth}, numbered from 0")

    leaves: dict[str, np.ndarray] = {}
    for layer in dict.fromkeys(layer for layer, _ in modules):
        parts = {row: module for (name, row), module in modules.items() if name == layer}
        if shapes := {(m.a.shape[1], len(m.b)) for m in parts.values()} - {_shape(next(iter(parts.values())))}:
            raise InputError(f"{source.file}: {layer} has shapes [in, out] {sorted(shapes)} and others; expected one")
        if None not in parts and use_dora and (absent := sorted(set(range(depth)) - parts.keys())):
            raise InputError(
                f"{source.file}: a DoRA adapter without layer {_some(list(map(str, absent)))} of {layer}; expected all "
                f"{depth}, since the magnitude of a layer that is left out is that of the model"
            )
        inputs, outputs = _shape(next(iter(parts.values())))
        stack = () if None in parts else (depth,)
        a, b = np.zeros((*stack, inputs, rank), np.float32), np.zeros((*stack, rank, outputs), np.float32)
        magnitude = np.zeros((*stack, outputs), np.float32)
        for row, module in parts.items():
            at = ... if row is None else row
            r = len(module.a)
            a[at][:, :r] = module.a.T
            b[at][:r] = module.b.T * np.float32(module.scaling / scaling)
            if use_dora:
                magnitude[at] = module.magnitude
        leaves |= {f"{layer}.lora_a": a, f"{layer}.lora_b": b}
        if use_dora:
            leaves[f"{layer}.lora_magnitude"] = magnitude
    dropout = 0.0 if source.settings is None else source.settings.get("lora_dropout") or 0.0
    targets = tuple(dict.fromkeys(layer for layer, _ in modules))
    try:
        config = LoRAConfig(rank=rank, alpha=alpha, dropout=dropout, targets=targets, use_dora=use_dora)
    except (InputError, TypeError) as error:
        raise InputError(f"{source.settings_file}: {error}") from None
    return Adapter(config, leaves)


def _shape(module: _Module) -> tuple[int, int]:
    return module.a.shape[1], module.b.shape[0]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
