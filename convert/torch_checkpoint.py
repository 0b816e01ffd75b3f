"""Finding and reading the tensors of a PyTorch checkpoint, in either of its layouts, under one set of names.

Layouts: "diffusers", a folder with `model_index.json` and a folder for each network; "original", the folder of a
diffusion model as ACE-Step publishes it, with the autoencoder and the text encoder in folders beside it.
No tensor is read before its `read` is called, and no file stays open, or mapped into memory, between two tensors.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from acestep_jax.convert import original
from acestep_jax.convert.original import attention_name
from acestep_jax.errors import InputError
from acestep_jax.io.checkpoint import load_tokenizer
from acestep_jax.models.config import NetworkConfig
from acestep_jax.models.registry import FAMILY

INDEX = "model_index.json"
WEIGHT_FILES = ("diffusion_pytorch_model", "model")
_DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}


class Tensor(NamedTuple):
    """Hold a tensor's shape and dtype, and the function that reads it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class TorchCheckpoint:
    """Hold a checkpoint as `tensors[network][name]`, with diffusers' names.

    `weight_norm` are the factors that the weights of `vae` are folded from.
    """

    configs: dict[str, NetworkConfig]
    tensors: dict[str, dict[str, Tensor]]
    weight_norm: dict[str, Tensor]
    tokenizer: str
    tokenizer_config: dict[str, Any]


def open_checkpoint(
    source: str | Path,
    *,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    dtype: str | None = None,
) -> TorchCheckpoint:
    """Open a checkpoint of either layout; read configs and the headers of the weight files, but no weights.

    Args:
        source: a diffusers folder, an original folder, or the id of a repository on the Hugging Face hub.
        vae, text_encoder: folders of an original checkpoint that are not beside `source`.
        dtype: dtype that every tensor is cast to as it is read; None keeps its own.

    Raises:
        InputError: if `source` is not a checkpoint, or a part of it is missing, damaged or unknown.
    """
    path = _locate(str(source))
    kind = None if dtype is None else np.dtype(getattr(ml_dtypes, dtype, dtype))
    if (path / INDEX).is_file():
        if vae is not None or text_encoder is not None:
            raise InputError(
                f"{path}: holds its own vae and text encoder; --vae and --text-encoder are only for the original layout"
            )
        folders = {name: path / name for name in FAMILY.networks}
        for name in FAMILY.networks:
            if not folders[name].is_dir():
                if name not in FAMILY.optional:
                    raise InputError(f"{path}: the folder {name}/ is missing; expected a complete diffusers checkpoint")
                del folders[name]
        configs = {
            name: FAMILY.networks[name][1].from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
            for name, folder in folders.items()
        }
        tensors = {name: _network_tensors(folder, name, kind) for name, folder in folders.items()}
        tokenizer = path / "tokenizer"
    else:
        model, vae_folder, text_folder = original.find_folders(path, vae, text_encoder)
        configs = original.split_config(read_json(model / "config.json"), str(model / "config.json"))
        for name, folder in (("vae", vae_folder), ("text_encoder", text_folder)):
            configs[name] = FAMILY.networks[name][1].from_hf(
                read_json(folder / "config.json"), str(folder / "config.json")
            )
        tensors = original.split_names(_file_tensors(model, kind), str(model))
        tensors["condition_encoder"]["silence_latent"] = _silence_latent(model / "silence_latent.pt", kind)
        tensors["vae"] = _network_tensors(vae_folder, "vae", kind)
        tensors["text_encoder"] = _network_tensors(text_folder, "text_encoder", kind)
        tokenizer = text_folder

    if not (tokenizer / "tokenizer.json").is_file():
        raise InputError(
            f"{tokenizer}: no tokenizer.json; write one with "
            f"transformers.AutoTokenizer.from_pretrained({str(tokenizer)!r}).save_pretrained({str(tokenizer)!r})"
        )
    load_tokenizer(tokenizer)
    settings = tokenizer / "tokenizer_config.json"
    weight_norm = {n: t for n, t in tensors["vae"].items() if n.endswith((".weight_g", ".weight_v"))}
    tensors["vae"] = fold_weight_norm(tensors["vae"], kind)
    return TorchCheckpoint(
        configs=configs,
        tensors=tensors,
        weight_norm=weight_norm,
        tokenizer=(tokenizer / "tokenizer.json").read_text(encoding="utf-8"),
        tokenizer_config=read_json(settings) if settings.is_file() else {},
    )


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; raise InputError if the file is missing or holds something else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: missing; the checkpoint is incomplete") from None
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


def fold(g: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Compute the weight v * g / |v| of weight norm, the norm over all axes but the first, in float32."""
    v = v.astype(np.float32)
    return v * (g.astype(np.float32) / weight_norm(v))


def weight_norm(v: np.ndarray) -> np.ndarray:
    """Compute |v| over all axes but the first; float32, rounded once."""
    squares = np.square(v.astype(np.float64))
    return np.sqrt(squares.sum(axis=tuple(range(1, v.ndim)), keepdims=True)).astype(np.float32)


def _locate(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise InputError(f"{source}: no such folder; expected a PyTorch checkpoint or the id of a hub repository")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*silence_latent.pt"]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=["acestep-5Hz-lm*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"{source}: neither a folder here nor a repository that the hub serves ({error})") from None


def _network_tensors(folder: Path, network: str, dtype: np.dtype | None) -> dict[str, Tensor]:
    tensors = _file_tensors(folder, dtype)
    if network != "text_encoder":
        return tensors
    # A causal language model prefixes the encoder and may add its head.
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    return {attention_name(name): tensor for name, tensor in tensors.items()}


def _file_tensors(folder: Path, dtype: np.dtype | None) -> dict[str, Tensor]:
    """Return all tensors of a folder, from one safetensors file or from the shards that an index names."""
    for stem in WEIGHT_FILES:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            shards: dict[str, set[str]] = {}
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise InputError(f"{index}: no weight_map from tensors to files; download it again")
            for name, file in weight_map.items():
                shards.setdefault(file, set()).add(name)
            tensors = {}
            for file, names in sorted(shards.items()):
                found = read_header(folder / file, dtype)
                if missing := sorted(names - found.keys()):
                    raise InputError(f"{folder / file}: {index.name} promises {_some(missing)}, which is not in it")
                tensors |= found
            return tensors
        if (folder / f"{stem}.safetensors").is_file():
            return read_header(folder / f"{stem}.safetensors", dtype)
    names = " or ".join(f"{stem}.safetensors" for stem in WEIGHT_FILES)
    raise InputError(f"{folder}: no weights; expected {names}, or its index and shards")


def read_header(file: Path, dtype: np.dtype | None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, which are cast to `dtype` when read (None: not cast).

    Raises:
        InputError: if the file is missing or damaged, or holds tensors that are not floating-point.
    """
    if not file.is_file():
        raise InputError(f"{file}: missing; the checkpoint is incomplete, download the file")
    tensors = {}
    try:
        with safe_open(file, framework="np") as reader:
            for name in reader.keys():
                entry = reader.get_slice(name)
                if (found := entry.get_dtype()) not in _DTYPES:
                    raise InputError(f"{file}: {name} is {found}; expected one of {', '.join(_DTYPES)}")
                tensors[name] = Tensor(
                    tuple(entry.get_shape()), dtype or _DTYPES[found], lambda name=name: _read(file, name, dtype)
                )
    except SafetensorError as error:
        raise InputError(f"{file}: damaged or truncated ({error}); download it again") from None
    return tensors


def _read(file: Path, name: str, dtype: np.dtype | None) -> np.ndarray:
    with safe_open(file, framework="np") as reader:
        value = reader.get_tensor(name)
    return value if dtype is None else value.astype(dtype, copy=False)


def _silence_latent(file: Path, dtype: np.dtype | None) -> Tensor:
    """Return the latents of silence: float32 [1, 64, 15000] in a torch file, read as [1, 15000, 64]."""
    import torch

    try:
        value = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, depending on what is broken
        raise InputError(f"{file}: not a tensor saved by torch ({error}); download it again") from None
    if not isinstance(value, torch.Tensor) or value.ndim != 3:
        found = getattr(value, "shape", type(value))
        raise InputError(f"{file}: expected a tensor [1, channels, frames], found {found}")
    array = np.ascontiguousarray(value.float().numpy().transpose(0, 2, 1))
    array = array if dtype is None else array.astype(dtype)
    return Tensor(array.shape, array.dtype, lambda: array)


def fold_weight_norm(tensors: dict[str, Tensor], dtype: np.dtype | None) -> dict[str, Tensor]:
    """Replace `X.weight_g` and `X.weight_v` by `X.weight`; float32, unless `dtype` says otherwise."""
    folded = {}
    kind = dtype or np.dtype("float32")
    for name, tensor in tensors.items():
        if name.endswith(".weight_v"):
            stem = name.removesuffix("_v")
            if (g := tensors.get(f"{stem}_g")) is None:
                raise InputError(f"vae: {stem}_v has no {stem}_g beside it; the checkpoint is incomplete")
            expected = (tensor.shape[0],) + (1,) * (len(tensor.shape) - 1)
            if g.shape != expected:
                raise InputError(f"vae: {stem}_g has shape {g.shape}, expected {expected}")
            folded[stem] = Tensor(
                tensor.shape, kind, lambda g=g, v=tensor: fold(g.read(), v.read()).astype(kind, copy=False)
            )
        elif not name.endswith(".weight_g"):
            folded[name] = tensor
        elif f"{name.removesuffix('_g')}_v" not in tensors:
            raise InputError(f"vae: {name} has no weight_v beside it; the checkpoint is incomplete")
    return folded


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
