"""Reads PyTorch adapters: LoRA, DoRA, LoKr and LoHa from PEFT, diffusers, ComfyUI, LyCORIS and ACE-Step's trainer.

This needs only NumPy and safetensors. See `adapter_names` for the names and `adapter_settings` for rank and alpha.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from acestep_jax.errors import InputError
from acestep_jax.io.adapter_names import NAMES, find_layer, is_stacked, other_kind, parse, some
from acestep_jax.io.adapter_settings import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    Settings,
    is_number,
    read_header_settings,
    read_lokr_settings,
    read_peft_settings,
)
from acestep_jax.models.config import LoRAConfig

logger = logging.getLogger(__name__)

DIFFUSERS_WEIGHTS, LOKR_WEIGHTS = "pytorch_lora_weights.safetensors", "lokr_weights.safetensors"
TRAINER_FOLDER = "adapter"  # next to the state file of ACE-Step's own trainer
_DTYPES = ("F32", "F16", "BF16", "F64")


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]  # float32


class _Source(NamedTuple):
    """A file of tensors, and the settings that its trainer recorded."""

    file: Path
    tensors: dict[str, _Tensor]
    settings: Settings | None


class _Module(NamedTuple):
    """The adapter of one torch module: `parts` as in `io.adapter.Adapter`, float32, and their factor."""

    kind: str
    parts: dict[str, np.ndarray]
    rank: int
    alpha: float
    scaling: float


def read_lora(source: Path, num_layers: int | None = None) -> tuple[LoRAConfig, dict[str, np.ndarray]]:
    """Read an adapter; half precision becomes float32.

    Alpha is read from `adapter_config.json` or the header, else from `alpha` tensors; else alpha = r, with a warning.
    The result has one rank and one alpha: smaller factors are padded with zeros, and where the scaling of a layer
    differs, its quotient is multiplied into a factor. Layers of a stack that have no adapter get zeros.

    Args:
        source: a folder or a .safetensors file.
        num_layers: number of layers of the model; None: as many as the adapter names.

    Returns:
        The config and the parameters of an `io.adapter.Adapter`.

    Raises:
        InputError: if it is not an adapter of ACE-Step 1.5, of another kind, or damaged.
    """
    opened = _open(source)
    modules: dict[tuple[str, int | None], _Module] = {}
    for raw, (kind, parts) in _group(opened).items():
        place = find_layer(raw)
        if place is None:
            raise InputError(
                f"{opened.file}: {raw} is not a linear layer of ACE-Step 1.5's transformer, such as "
                "layers.0.self_attn.q_proj; expected an adapter of its linear layers only"
            )
        if place in modules:
            raise InputError(f"{opened.file}: found {raw} twice, also under another name; expected it once")
        modules[place] = _READERS[kind](raw, parts, opened)
    return _stack(modules, opened, num_layers)


def _open(source: Path) -> _Source:
    if source.is_dir():
        names = sorted(path.name for path in source.iterdir())
        files = [name for name in names if name.endswith(".safetensors")]
        if PEFT_CONFIG in names:
            if PEFT_WEIGHTS not in names:
                raise InputError(
                    f"{source}: expected {PEFT_WEIGHTS} next to {PEFT_CONFIG}, found {some(names)}; "
                    "save it again with safe_serialization=True"
                )
            file = source / PEFT_WEIGHTS
        elif known := [name for name in (DIFFUSERS_WEIGHTS, LOKR_WEIGHTS) if name in files]:
            file = source / known[0]
        elif len(files) == 1:
            file = source / files[0]
        elif not files and (source / TRAINER_FOLDER).is_dir():
            return _open(source / TRAINER_FOLDER)
        else:
            raise InputError(
                f"{source}: expected {PEFT_CONFIG} and {PEFT_WEIGHTS} (PEFT), {DIFFUSERS_WEIGHTS} (diffusers), "
                f"{LOKR_WEIGHTS} or {TRAINER_FOLDER}/ (ACE-Step's trainer) or one .safetensors file (ComfyUI), found "
                f"{some(names) or 'nothing'}"
            )
    elif source.suffix == ".safetensors" and source.is_file():
        file = source
    else:
        found = "found another kind of file" if source.exists() else "found nothing"
        raise InputError(f"{source}: expected the folder or the .safetensors file of a LoRA adapter, {found}")
    tensors = _read_header(file)
    if file.name == PEFT_WEIGHTS:
        return _Source(file, tensors, read_peft_settings(file.with_name(PEFT_CONFIG)))
    return _Source(file, tensors, read_header_settings(file))


def _read_header(file: Path) -> dict[str, _Tensor]:
    """Return the tensors of a file; no file stays open between two of them."""

    def read(name: str) -> np.ndarray:
        with safe_open(file, framework="np") as reader:
            return reader.get_tensor(name).astype(np.float32)

    tensors = {}
    try:
        with safe_open(file, framework="np") as reader:
            for name in reader.keys():
                entry = reader.get_slice(name)
                if entry.get_dtype() not in _DTYPES:
                    raise InputError(f"{file}: {name} is {entry.get_dtype()}; expected one of {', '.join(_DTYPES)}")
                tensors[name] = _Tensor(tuple(entry.get_shape()), lambda name=name: read(name))
    except SafetensorError as error:
        raise InputError(f"{file}: damaged or truncated ({error}); download it again") from None
    return tensors


def _group(source: _Source) -> dict[str, tuple[str, dict[str, _Tensor]]]:
    """Return kind and tensors by module, as the file names it, and by part. Names determine the kind of each."""
    modules: dict[str, dict[str, _Tensor]] = {}
    kinds: dict[str, set[str]] = {}
    adapters: dict[str | None, str] = {}
    for tensor_name, tensor in source.tensors.items():
        name = parse(tensor_name)
        if name is None:
            kind = other_kind(tensor_name)
            what = f"{tensor_name} belongs to {kind}" if kind else f"found {tensor_name}"
            raise InputError(
                f"{source.file}: {what}; expected a LoRA, DoRA, LoKr or LoHa adapter, such as lora_A and lora_B or "
                "lora_down and lora_up, of linear layers only"
            )
        if name.part != "alpha":
            adapters.setdefault(name.adapter, tensor_name)
        if name.part in modules.setdefault(name.module, {}) and len(adapters) < 2:
            raise InputError(f"{source.file}: found {tensor_name} twice, also under another name; expected it once")
        modules[name.module][name.part] = tensor
        kinds.setdefault(name.module, set()).add(name.kind)
    if not modules:
        raise InputError(f"{source.file}: holds no tensors; expected lora_A and lora_B of at least one linear layer")
    named = [name for name in adapters if name is not None]
    if len(named) > 1:
        raise InputError(f"{source.file}: holds several adapters, {some(named)}; expected one, save each by itself")
    found = {}
    for module, parts in modules.items():
        own = sorted(kinds[module] - {"any"})
        if len(own) > 1:
            raise InputError(f"{source.file}: {module} is {' and '.join(NAMES[k] for k in own)}; expected one of them")
        if own and own != ["lora"] and "magnitude" in parts:
            raise InputError(
                f"{source.file}: {module} is a {NAMES[own[0]]} adapter with weight decomposition (dora_scale, DoRA), "
                "which is not supported; merge it into the model with LyCORIS and convert the model"
            )
        found[module] = own[0] if own else "lora", parts
    return found


def _need(raw: str, parts: dict[str, _Tensor], wanted: dict[str, str], source: _Source) -> None:
    """Check that matrices exist. `wanted`: name of each part for messages."""
    for part, name in wanted.items():
        if part not in parts:
            raise InputError(f"{source.file}: {raw} has no {name}; expected all factors of each layer")
        if len(parts[part].shape) != 2:
            raise InputError(f"{source.file}: {name} of {raw} has shape {list(parts[part].shape)}, expected two axes")


def _read_lora(raw: str, parts: dict[str, _Tensor], source: _Source) -> _Module:
    _need(raw, parts, {"a": "lora_A (or lora_down)", "b": "lora_B (or lora_up)"}, source)
    (rank, _), (outputs, columns) = parts["a"].shape, parts["b"].shape
    if rank != columns or not rank:
        raise InputError(f"{source.file}: the factors of {raw} have ranks {rank} and {columns}, expected one rank")
    found = {"lora_a": parts["a"].read().T, "lora_b": parts["b"].read().T}
    if "magnitude" in parts:
        shape = parts["magnitude"].shape
        if len(shape) == 2 and shape[1] != 1:
            raise InputError(
                f"{source.file}: {raw}.dora_scale has shape {list(shape)}; expected [out, 1], the norm of each output"
            )
        if math.prod(shape) != outputs:
            raise InputError(f"{source.file}: the magnitude of {raw} has shape {list(shape)}, expected [{outputs}]")
        found["lora_magnitude"] = parts["magnitude"].read().reshape(-1)
    return _Module("lora", found, rank, *_scaling(raw, rank, parts.get("alpha"), source))


def _read_loha(raw: str, parts: dict[str, _Tensor], source: _Source) -> _Module:
    names = ("w1_a", "w1_b", "w2_a", "w2_b")
    _need(raw, parts, {name: f"hada_{name}" for name in names}, source)
    shapes = [parts[name].shape for name in names]
    rank = shapes[0][1]
    if not rank or shapes[0] != shapes[2] or shapes[1] != shapes[3] or shapes[1][0] != rank:
        raise InputError(
            f"{source.file}: the factors of {raw} have shapes {', '.join(str(list(shape)) for shape in shapes)}; "
            "expected [out, r], [r, in], [out, r] and [r, in]"
        )
    w1_a, w1_b, w2_a, w2_b = (parts[name].read() for name in names)
    found = {"loha_a1": w1_b.T, "loha_b1": w1_a.T, "loha_a2": w2_b.T, "loha_b2": w2_a.T}
    return _Module("loha", found, rank, *_scaling(raw, rank, parts.get("alpha"), source))


def _read_lokr(raw: str, parts: dict[str, _Tensor], source: _Source) -> _Module:
    found, rank = {}, None
    for name in ("w1", "w2"):
        if name in parts:
            _need(raw, parts, {name: f"lokr_{name}"}, source)
            matrix = parts[name].read()
        else:
            low = [f"{name}_a", f"{name}_b"]
            _need(raw, parts, {part: f"lokr_{part} (or lokr_{name})" for part in low}, source)
            (_, rank), (rows, _) = (parts[part].shape for part in low)
            if rank != rows or not rank:
                raise InputError(f"{source.file}: lokr_{name} of {raw} has ranks {rank} and {rows}, expected one rank")
            a, b = (parts[part].read().astype(np.float64) for part in low)
            matrix = (a @ b).astype(np.float32)
        found[f"lokr_{name}"] = matrix.T
    return _Module("lokr", found, rank or 1, *_scaling(raw, rank, parts.get("alpha"), source))


_READERS = {"lora": _read_lora, "lokr": _read_lokr, "loha": _read_loha}


def _scaling(raw: str, rank: int | None, tensor: _Tensor | None, source: _Source) -> tuple[float, float]:
    """Return alpha and the factor of the product. rank: None for a LoKr adapter without low-rank factors."""
    settings, noted = source.settings, None
    if tensor is not None:
        if math.prod(tensor.shape) != 1:
            raise InputError(f"{source.file}: {raw}.alpha has shape {list(tensor.shape)}, expected one number")
        # By its decimal digits: 0.1 in float32 was meant as 0.1.
        noted = float(str(tensor.read().reshape(())[()]))
        if not is_number(noted):
            raise InputError(f"{source.file}: {raw}.alpha: expected a number above 0, found {noted}")
    if settings is None:
        if rank is None:  # LyCORIS sets alpha to its linear_dim then, or with rs_lora to sqrt(linear_dim) times that
            dim = read_lokr_settings(source.file).get("linear_dim")
            scaling = noted / dim if noted is not None and is_number(dim) else 1.0
            return scaling, scaling
        alpha = float(rank) if noted is None else noted
        return alpha, alpha / rank
    expected, alpha = settings.of(raw)
    if rank is None:
        return alpha / expected, alpha / expected
    if expected != rank:
        raise InputError(f"{source.file}: {raw} has rank {rank}, but {settings.file} says {expected}")
    scaling = alpha / (math.sqrt(rank) if settings.use_rslora else rank)
    if noted is not None and not math.isclose(noted / rank, scaling, rel_tol=1e-5):
        raise InputError(f"{source.file}: {raw}.alpha is {noted}, but {settings.file} says {scaling * rank}")
    return alpha, scaling


def _stack(
    modules: dict[tuple[str, int | None], _Module], source: _Source, num_layers: int | None
) -> tuple[LoRAConfig, dict[str, np.ndarray]]:
    """Return all modules as one adapter, with one rank and one scaling."""
    settings = source.settings
    _warn_without_alpha(modules, source)
    use_dora = _check_dora(modules, source)
    rank = max(module.rank for module in modules.values())
    (alpha, scaling, usual), _ = Counter((m.alpha, m.scaling, m.rank) for m in modules.values()).most_common(1)[0]
    if (settings is not None and settings.use_rslora) or usual != rank:
        alpha = scaling * rank
    rows = {row for _, row in modules if row is not None}
    depth = max(rows, default=-1) + 1 if num_layers is None else num_layers
    if rows and max(rows) >= depth:
        raise InputError(f"{source.file}: adapts layer {max(rows)}, but the model has {depth}, numbered from 0")

    leaves: dict[str, np.ndarray] = {}
    for layer in dict.fromkeys(layer for layer, _ in modules):
        found = {row: module for (name, row), module in modules.items() if name == layer}
        first = next(iter(found.values()))
        shapes = {name: _padded(value.shape, name, rank) for name, value in first.parts.items()}
        for module in found.values():
            if {name: _padded(value.shape, name, rank) for name, value in module.parts.items()} != shapes:
                sizes = [{name: list(value.shape) for name, value in m.parts.items()} for m in (first, module)]
                raise InputError(f"{source.file}: {layer} has shapes {sizes[0]} and {sizes[1]}; expected one")
        if is_stacked(layer) and use_dora and (absent := sorted(set(range(depth)) - found.keys())):
            raise InputError(
                f"{source.file}: a DoRA adapter without layer {some(map(str, absent))} of {layer}; expected all "
                f"{depth}, since the magnitude of a layer that is left out is that of the model"
            )
        stack = (depth,) if is_stacked(layer) else ()
        for name, shape in shapes.items():
            leaf = leaves[f"{layer}.{name}"] = np.zeros((*stack, *shape), np.float32)
            for row, module in found.items():
                value = module.parts[name]
                if name in ("lora_b", "lokr_w2", "loha_b1"):
                    value = value * np.float32(module.scaling / scaling)
                leaf[... if row is None else row][tuple(map(slice, value.shape))] = value
    try:
        config = LoRAConfig(
            rank=rank,
            alpha=alpha,
            dropout=0.0 if settings is None else settings.dropout,
            targets=tuple(dict.fromkeys(layer for layer, _ in modules)),
            use_dora=use_dora,
        )
    except (InputError, TypeError) as error:
        raise InputError(f"{source.file if settings is None else settings.file}: {error}") from None
    return config, leaves


def _padded(shape: tuple[int, ...], part: str, rank: int) -> tuple[int, ...]:
    """Return the shape of a part with its rank, if it has one, made equal for all layers."""
    if part in ("lora_a", "loha_a1", "loha_a2"):
        return shape[0], rank
    return (rank, shape[1]) if part in ("lora_b", "loha_b1", "loha_b2") else shape


def _warn_without_alpha(modules: dict[Any, _Module], source: _Source) -> None:
    noted = source.settings is not None or any(name.endswith(".alpha") for name in source.tensors)
    if not noted and any(module.kind != "lokr" or module.rank > 1 for module in modules.values()):
        logger.warning(
            "%s: records no alpha; alpha = rank is assumed, as diffusers and ComfyUI do. If it was trained with "
            "another alpha, change its scale accordingly",
            source.file,
        )


def _check_dora(modules: dict[Any, _Module], source: _Source) -> bool:
    """Return whether the adapter is DoRA; raise InputError if only some layers are, or the settings say otherwise."""
    dora = {"lora_magnitude" in module.parts for module in modules.values()}
    if len(dora) > 1:
        raise InputError(
            f"{source.file}: some layers have a magnitude and others do not; expected LoRA or DoRA for all"
        )
    use_dora = dora.pop()
    if source.settings is not None and source.settings.use_dora != use_dora:
        found = "has magnitudes" if use_dora else "has no magnitudes"
        raise InputError(f"{source.settings.file}: use_dora is {not use_dora}, but {source.file} {found}")
    return use_dora
