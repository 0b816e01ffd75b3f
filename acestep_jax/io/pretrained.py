"""Finds and reads the tensors of a PyTorch checkpoint, in any layout, under one set of names, without PyTorch.

Layouts: "diffusers", a folder with `model_index.json` and a folder for each network; "original", the folder of a
diffusion model as ACE-Step publishes it, with the autoencoder and the text encoder in folders next to it; ComfyUI's
files, see `io.comfyui`. No tensor is read before its `read` is called, and no file stays open or mapped into memory
between two tensors.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from acestep_jax.errors import InputError
from acestep_jax.io import comfyui, original
from acestep_jax.io.adapter_names import some
from acestep_jax.io.checkpoint import load_tokenizer
from acestep_jax.io.companions import SILENCE, TOKENIZER, Fetch, find_companion
from acestep_jax.io.foreign import describe
from acestep_jax.io.safetensors_reader import Tensor, read_header
from acestep_jax.io.torch_file import read_tensor
from acestep_jax.models.config import ConditionEncoderConfig, NetworkConfig, TransformerConfig
from acestep_jax.models.registry import FAMILY
from acestep_jax.models.runtime import QUANTIZATIONS

logger = logging.getLogger(__name__)

INDEX = "model_index.json"
WEIGHT_FILES = ("diffusion_pytorch_model", "model")


@dataclasses.dataclass(frozen=True)
class TorchCheckpoint:
    """A checkpoint as `tensors[network][name]`, with diffusers' names.

    `weight_norm` are the factors that the weights of `vae` are folded from. `files` are all files that it was read
    from, `extra_files` the ones that a native checkpoint copies unchanged, by name. `tokenizer` is the text of
    `tokenizer.json`; None: it is among these. `quantization` is the quantisation of layers at conversion, see
    `models.quantization`; None: none.
    """

    configs: dict[str, NetworkConfig]
    tensors: dict[str, dict[str, Tensor]]
    weight_norm: dict[str, Tensor]
    tokenizer: str | None
    tokenizer_config: dict[str, Any]
    files: tuple[Path, ...]
    extra_files: dict[str, Path] = dataclasses.field(default_factory=dict)
    quantization: str | None = None


@dataclasses.dataclass
class _Parts:
    """The contents of a layout: configs and tensors by network, the folder of the tokenizer, and the config files."""

    configs: dict[str, NetworkConfig]
    tensors: dict[str, dict[str, Tensor]]
    tokenizer: Path
    files: list[Path]


def cast_to(dtype: str | None) -> np.dtype | None:
    """Return the NumPy dtype that tensors are cast to for one of `runtime.DTYPES`; None: no cast, as for weights to
    quantise."""
    return None if dtype is None or dtype in QUANTIZATIONS else np.dtype(getattr(ml_dtypes, dtype, dtype))


def open_checkpoint(
    source: str | Path,
    *,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    fetch: Fetch | None = None,
) -> TorchCheckpoint:
    """Open a checkpoint of any layout; read configs and the headers of the weight files, but no weights.

    Args:
        source: a folder of any layout, or a .safetensors file.
        vae, text_encoder: folders or files, if they are not next to `source`.
        dtype: dtype that every tensor is cast to when it is read; None keeps its own, and float8 becomes bfloat16. With
            one of `runtime.QUANTIZATIONS`, layers are quantised at conversion.
        variant: model to use if a folder has several, such as turbo or xl-base; or the variant of a file whose name
            does not tell it.
        fetch: function that gets the small files that ComfyUI's weights lack, see `io.companions`; None: from the hub.

    Raises:
        InputError: if `source` is not a checkpoint, or a part of it is missing, damaged or unknown.
    """
    path = Path(source)
    kind = cast_to(dtype)
    if not path.exists():
        raise InputError(f"{path}: no such folder; expected a PyTorch checkpoint or the id of a hub repository")
    if path.is_file() and (what := describe(path)) is not None:
        raise InputError(f"{path}: {what}")
    if path.is_file() and (path.parent / "config.json").is_file():  # one file of a folder
        path = path.parent.parent if (path.parent.parent / INDEX).is_file() else path.parent
    if path.is_file():
        found = _open_file(path, vae, text_encoder, kind, variant, fetch)
    elif (path / INDEX).is_file():
        if vae is not None or text_encoder is not None:
            raise InputError(
                f"{path}: holds its own vae and text encoder; --vae and --text-encoder are only for the original layout"
            )
        found = _open_diffusers(path, kind)
    elif (model := _comfyui_model(path, variant)) is not None:
        found = _open_file(model, vae, text_encoder, kind, variant, fetch)
    else:
        found = _open_original(path, vae, text_encoder, kind, variant)
    checkpoint = _finish(path, found, kind, variant)
    return dataclasses.replace(checkpoint, quantization=dtype if dtype in QUANTIZATIONS else None)


def _finish(path: Path, found: _Parts, dtype: np.dtype | None, variant: str | None) -> TorchCheckpoint:
    """Check the variant, read the tokenizer and fold the convolutions."""
    holds = original.model_folder(found.configs).removeprefix(original.MODEL_PREFIX)
    if variant is not None and not original.is_variant(holds, variant):
        raise InputError(
            f"variant: {path} holds the variant {holds}, not {variant}; leave variant out or give that one"
        )
    folder = found.tokenizer
    if not (folder / TOKENIZER).is_file():
        raise InputError(
            f"{folder}: no tokenizer.json; take it from Qwen3-Embedding-0.6B in the hub's repository "
            f"ACE-Step/Ace-Step1.5, or write one with transformers.AutoTokenizer.from_pretrained({str(folder)!r})"
            f".save_pretrained({str(folder)!r})"
        )
    load_tokenizer(folder)
    settings = folder / "tokenizer_config.json"
    weight_norm = {n: t for n, t in found.tensors["vae"].items() if n.endswith((".weight_g", ".weight_v"))}
    files = {tensor.file for tensors in found.tensors.values() for tensor in tensors.values() if tensor.file}
    files |= {*found.files, folder / TOKENIZER, *([settings] if settings.is_file() else [])}
    return TorchCheckpoint(
        configs=found.configs,
        tensors=found.tensors | {"vae": fold_weight_norm(found.tensors["vae"], dtype)},
        weight_norm=weight_norm,
        tokenizer=(folder / TOKENIZER).read_text(encoding="utf-8"),
        tokenizer_config=read_json(settings) if settings.is_file() else {},
        files=tuple(sorted(files)),
    )


def _open_diffusers(path: Path, dtype: np.dtype | None) -> _Parts:
    folders = {name: path / name for name in FAMILY.networks}
    for name in FAMILY.networks:
        if not folders[name].is_dir():
            if name not in FAMILY.optional:
                raise InputError(f"{path}: the folder {name}/ is missing; expected a complete diffusers checkpoint")
            del folders[name]
    configs = {name: _read_config(name, folder) for name, folder in folders.items()}
    return _Parts(
        configs=configs | {"condition_encoder": _with_timbre_token(configs, path)},
        tensors={name: _network_tensors(folder, name, dtype) for name, folder in folders.items()},
        tokenizer=path / "tokenizer",
        files=[folder / "config.json" for folder in folders.values()],
    )


def _with_timbre_token(configs: dict[str, NetworkConfig], path: Path) -> ConditionEncoderConfig:
    """Return the condition encoder's config with the timbre token of ACE-Step's XL models, recognised by their size."""
    transformer, encoder = configs["transformer"], configs["condition_encoder"]
    assert isinstance(transformer, TransformerConfig) and isinstance(encoder, ConditionEncoderConfig)
    if transformer.hidden_size == encoder.hidden_size:
        return encoder
    logger.warning(
        "%s: an XL model by its size: the timbre of a reference is read from the token that ACE-Step's own code reads "
        "for XL, not from the first frame as diffusers does",
        path,
    )
    return dataclasses.replace(encoder, timbre_special_token=True)


def _open_original(
    path: Path,
    vae: str | Path | None,
    text_encoder: str | Path | None,
    dtype: np.dtype | None,
    variant: str | None,
) -> _Parts:
    try:
        model, *folders = original.find_folders(path, vae, text_encoder, variant)
    except InputError:
        if (what := describe(path)) is not None:
            raise InputError(f"{path}: {what}") from None
        raise
    configs = original.split_config(read_json(model / "config.json"), str(model / "config.json"))
    tensors = original.split_names(file_tensors(model, dtype), str(model))
    tensors["condition_encoder"]["silence_latent"] = _silence_latent(model / SILENCE, dtype)
    for name, folder in zip(("vae", "text_encoder"), folders, strict=True):
        configs[name] = _read_config(name, folder)
        tensors[name] = _network_tensors(folder, name, dtype)
    return _Parts(configs, tensors, folders[1], [folder / "config.json" for folder in (model, *folders)])


def _comfyui_model(path: Path, variant: str | None) -> Path | None:
    """Return the diffusion model in a folder of ComfyUI's models or split files; None if it is not such a folder.

    Raises:
        InputError: if there are several for the variant, or none.
    """
    for above in (path, path / "split_files", path / "models"):
        folder = above / comfyui.FOLDERS[comfyui.MODEL]
        if folder.is_dir():
            files = [file for file in sorted(folder.glob("*.safetensors")) if "ace" in file.name.lower()]
            wanted = [file for file in files if variant is None or original.names_variant(file.stem, variant)]
            if len(wanted) == 1:
                return wanted[0]
            names = ", ".join(file.name for file in wanted or files) or "none"
            which = "no model" if variant is None else f"no model of the variant {variant}"
            raise InputError(
                f"{folder}: {'several models' if wanted else which}; expected one, found {names}; give variant, or the "
                "path of the file"
            )
    return None


def _open_file(
    file: Path,
    vae: str | Path | None,
    text_encoder: str | Path | None,
    dtype: np.dtype | None,
    variant: str | None,
    fetch: Fetch | None,
) -> _Parts:
    """Open a .safetensors file of ComfyUI, with the other networks in it or next to it."""
    found = comfyui.parts(read_header(file, dtype))
    if comfyui.MODEL not in found:
        alone = {comfyui.VAE: "the autoencoder", comfyui.TEXT_ENCODER: "the text encoder"}
        alone[comfyui.PLANNER] = "the 5 Hz language model, which plans songs,"
        what = next((f"holds only {alone[part]}" for part in found), "no tensors of ACE-Step 1.5")
        raise InputError(f"{file}: {what}; expected the diffusion model, with or without the other networks")
    found[comfyui.MODEL].pop("silence_latent", None)
    configs = comfyui.model_config(found[comfyui.MODEL], comfyui.find_variant(file.stem, variant), str(file))
    tensors = original.split_names(found[comfyui.MODEL], str(file))
    given = {comfyui.VAE: vae, comfyui.TEXT_ENCODER: text_encoder}
    places, files = [file.parent], []
    for part, path in given.items():
        if part in found and path is None:
            raw, where = found[part], file
        else:
            where = Path(path) if path is not None else _find_part(file, part)
            if where.is_dir():
                places.append(where)
                files.append(where / "config.json")
                configs[part] = _read_config(part, where)
                tensors[part] = _network_tensors(where, part, dtype)
                continue
            places.append(where.parent)
            raw = comfyui.parts(read_header(where, dtype)).get(part)
            if raw is None:
                raise InputError(f"{where}: expected the {part}, found something else")
        if part == comfyui.VAE:
            tensors[part] = comfyui.vae_names(raw)
            configs[part] = comfyui.vae_config(tensors[part], str(where))
        else:
            tensors[part] = comfyui.text_encoder_names(raw)
            configs[part] = comfyui.text_encoder_config(tensors[part], str(where))
    silence = find_companion(SILENCE, places, fetch)
    tensors["condition_encoder"]["silence_latent"] = _silence_latent(silence, dtype)
    return _Parts(configs, tensors, find_companion(TOKENIZER, places, fetch).parent, files)


def _find_part(file: Path, part: str) -> Path:
    """Return the file or folder of a part for the diffusion model `file`, in ComfyUI's folders or next to it."""
    name = comfyui.FILES[part]
    folder = {comfyui.VAE: original.VAE, comfyui.TEXT_ENCODER: original.TEXT_ENCODER}[part]
    places = [file.parent.parent / comfyui.FOLDERS[part] / name, file.parent / name, file.parent / folder]
    places.append(file.parent.parent / folder)
    for place in places:
        if place.is_file() or (place / "config.json").is_file():
            return place
    option = f"--{part.replace('_', '-')}"
    raise InputError(
        f"{file}: holds only the diffusion model, and there is no {part} at {places[0]}, {name} or {folder}/ next to "
        f"it; put it there, or convert with acestep-jax convert from-torch {option} PATH"
    )


def _read_config(name: str, folder: Path) -> NetworkConfig:
    return FAMILY.networks[name][1].from_hf(read_json(folder / "config.json"), str(folder / "config.json"))


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


def _network_tensors(folder: Path, network: str, dtype: np.dtype | None) -> dict[str, Tensor]:
    tensors = file_tensors(folder, dtype)
    return comfyui.text_encoder_names(tensors) if network == "text_encoder" else tensors


def file_tensors(folder: Path, dtype: np.dtype | None) -> dict[str, Tensor]:
    """Return all tensors of a folder, from one safetensors file or from the shards that an index names."""
    index, file = _weight_files(folder)
    if index is None:
        return read_header(file, dtype)
    shards: dict[str, set[str]] = {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index}: no weight_map from tensors to files; download it again")
    for name, shard in weight_map.items():
        shards.setdefault(shard, set()).add(name)
    tensors = {}
    for shard, names in sorted(shards.items()):
        found = read_header(folder / shard, dtype)
        if missing := sorted(names - found.keys()):
            raise InputError(f"{folder / shard}: {index.name} promises {some(missing)}, which is not in it")
        tensors |= found
    return tensors


def _weight_files(folder: Path) -> tuple[Path | None, Path]:
    """Return the index of a folder's shards, or None, and its single file; a variant such as fp16 if there is no other.

    Raises:
        InputError: if there are none, or several variants.
    """
    for stem in WEIGHT_FILES:
        index, file = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if index.is_file():
            return index, file
        if file.is_file():
            return None, file
    for stem in WEIGHT_FILES:
        found = {index.suffixes[-2]: index for index in folder.glob(f"{stem}.safetensors.index.*.json")}
        files = {file.suffixes[-2]: file for file in folder.glob(f"{stem}.*.safetensors") if "-of-" not in file.name}
        kinds = sorted(found.keys() | files.keys())
        if len(kinds) > 1:
            names = ", ".join(path.name for path in (files | found).values())
            raise InputError(f"{folder}: weights in several dtypes, {names}; leave one of them there")
        if kinds:
            return found.get(kinds[0]), files.get(kinds[0], folder / f"{stem}.safetensors")
    names = " or ".join(f"{stem}.safetensors" for stem in WEIGHT_FILES)
    what = describe(folder)
    raise InputError(f"{folder}: {what or 'no weights'}; expected {names}, or its index and shards")


def _silence_latent(file: Path, dtype: np.dtype | None) -> Tensor:
    """Return the latents of silence: [1, 64, 15000] in a file of torch, read as [1, 15000, 64], float32."""
    value = read_tensor(file)
    if value.ndim != 3:
        raise InputError(f"{file}: expected a tensor [1, channels, frames], found {list(value.shape)}")
    array = np.ascontiguousarray(value.astype(np.float32).transpose(0, 2, 1))
    array = array if dtype is None else array.astype(dtype)
    return Tensor(array.shape, array.dtype, lambda: array, file)


def fold(g: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Compute the weight v * g / |v| of weight norm in float32, with the norm over all axes but the first."""
    v = v.astype(np.float32)
    return v * (g.astype(np.float32) / weight_norm(v))


def weight_norm(v: np.ndarray) -> np.ndarray:
    """Compute |v| over all axes but the first; float32, rounded once."""
    squares = np.square(v.astype(np.float64))
    return np.sqrt(squares.sum(axis=tuple(range(1, v.ndim)), keepdims=True)).astype(np.float32)


def fold_weight_norm(tensors: dict[str, Tensor], dtype: np.dtype | None) -> dict[str, Tensor]:
    """Replace `X.weight_g` and `X.weight_v` by `X.weight`; float32, unless `dtype` says otherwise."""
    folded = {}
    kind = dtype or np.dtype("float32")
    for name, tensor in tensors.items():
        if name.endswith(".weight_v"):
            stem = name.removesuffix("_v")
            if (g := tensors.get(f"{stem}_g")) is None:
                raise InputError(f"vae: {stem}_v has no matching {stem}_g; the checkpoint is incomplete")
            expected = (tensor.shape[0],) + (1,) * (len(tensor.shape) - 1)
            if g.shape != expected:
                raise InputError(f"vae: {stem}_g has shape {g.shape}, expected {expected}")
            folded[stem] = Tensor(
                tensor.shape, kind, lambda g=g, v=tensor: fold(g.read(), v.read()).astype(kind, copy=False)
            )
        elif not name.endswith(".weight_g"):
            folded[name] = tensor
        elif f"{name.removesuffix('_g')}_v" not in tensors:
            raise InputError(f"vae: {name} has no matching weight_v; the checkpoint is incomplete")
    return folded
