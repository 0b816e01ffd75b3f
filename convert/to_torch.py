"""Native checkpoints to PyTorch: `acestep-jax convert to-torch SRC DST --layout diffusers|original`."""

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint, original, rules
from acestep_jax.io.conversion import WEIGHT_NORM
from acestep_jax.io.files import as_path, check_new, local_copy, on_this_machine, publish_folder
from acestep_jax.io.manifest import check_unquantized
from acestep_jax.io.planner_files import tokenizer_files
from acestep_jax.io.pretrained import fold, weight_norm
from acestep_jax.io.safetensors_writer import write_safetensors
from acestep_jax.models.config import ConditionEncoderConfig, NetworkConfig
from acestep_jax.models.registry import FAMILY, PLANNER

logger = logging.getLogger(__name__)

LAYOUTS = ("diffusers", "original")

_CLASSES = {
    "transformer": ("diffusers", "AceStepTransformer1DModel"),
    "condition_encoder": ("ace_step", "AceStepConditionEncoder"),
    "text_encoder": ("transformers", "Qwen3Model"),
    "vae": ("diffusers", "AutoencoderOobleck"),
    "audio_tokenizer": ("ace_step", "AceStepAudioTokenizer"),
    "audio_token_detokenizer": ("ace_step", "AceStepAudioTokenDetokenizer"),
}
_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1, "shift": 1.0}

# (torch name, shape, dtype, read), as `write_safetensors` expects them.
Entry = tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]


def to_torch(source: str | Path, destination: str | Path, *, layout: str) -> None:
    """Write a checkpoint in the layout of diffusers ("diffusers") or of ACE-Step's own application ("original").

    In the original layout `destination` holds `acestep-v15-turbo/` (or -base, -xl-sft, ...), `vae/` and
    `Qwen3-Embedding-0.6B/`. The published folders also hold the model's Python code, which is not part of a native
    checkpoint: to run the application, replace the `model.safetensors` in a published folder of the same name. Weights
    are written as stored; a checkpoint converted from PyTorch without a change of dtype is restored bit for bit.

    Args:
        source: the folder of a native checkpoint, a model or a planner.
        destination: the folder to create.
        layout: one of `LAYOUTS`; for a planner only "original", which makes `destination` a folder like
            acestep-5Hz-lm-1.7B.

    Raises:
        InputError: if `source` is not a native checkpoint, `destination` exists, or a network that the original layout
            needs is missing.
    """
    if layout not in LAYOUTS:
        raise InputError(f"--layout: expected {' or '.join(LAYOUTS)}, found {layout!r}")
    source, destination = as_path(source), on_this_machine(destination)
    check_new(destination)
    manifest = checkpoint.read_manifest(source, ())
    check_unquantized(source, manifest, "PyTorch's layouts have")
    if set(manifest.configs) == {PLANNER}:
        if layout != "original":
            raise InputError("--layout: a planner has no folder in the layout of diffusers; use original")
        _write_planner(source, destination, manifest)
        return
    manifest = checkpoint.read_manifest(source)
    checkpoint.load_tokenizer(source)
    if layout == "original" and (missing := [n for n in FAMILY.optional if n not in manifest.configs]):
        raise InputError(f"{source}: the original layout needs {', '.join(missing)}, which this checkpoint lacks")
    encoder = manifest.configs["condition_encoder"]
    assert isinstance(encoder, ConditionEncoderConfig)
    alternating = dataclasses.replace(encoder, timbre_layer_types=None)
    if layout == "diffusers" and encoder.timbre_windows() != alternating.timbre_windows():
        raise InputError(
            f"{source}: condition_encoder: timbre_layer_types is {list(encoder.timbre_layer_types or ())}, but "
            "diffusers' timbre encoder has sliding and full attention in turn; use --layout original"
        )
    stored = checkpoint.network_leaves(source, manifest)
    with tqdm(total=sum(map(len, stored.values())), unit="tensor", disable=None) as bar:
        read = _Reader(source, stored, bar)
        entries = {name: _entries(source, name, leaves, read) for name, leaves in stored.items()}
        every = [entry for part in entries.values() for entry in part]
        size = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype, _ in every)
        with publish_folder(destination, size) as folder:
            write = _write_diffusers if layout == "diffusers" else _write_original
            write(folder, source, manifest, entries)


def _entries(source: Path, network: str, leaves: dict[str, jax.ShapeDtypeStruct], read: "_Reader") -> list[Entry]:
    """Return the tensors of a network in the order of our leaves, so each group of leaves is read once."""
    factors = _stored_factors(source) if network == "vae" else {}
    result: list[Entry] = []
    for name, leaf in leaves.items():
        names, rule = rules.to_torch(network, name, leaf.shape)
        dtype = np.dtype(leaf.dtype)
        shape = rules.torch_shape(name, rule, leaf.shape)
        if not rules.is_stacked(name):
            value = lambda name=name, rule=rule: rule.to_torch(read(network, name))  # noqa: E731
            if network == "vae" and names[0].endswith(".weight"):
                result += _weight_norm_entries(names[0], shape, dtype, value, factors)
            else:
                result.append((names[0], shape, dtype, value))
            continue
        for row, torch_name in enumerate(names):
            value = lambda name=name, rule=rule, row=row: rule.to_torch(read(network, name)[row])  # noqa: E731
            result.append((torch_name, shape, dtype, value))
    return result


class _Reader:
    """Reads leaves in groups of at most `BATCH_BYTES` (at least one leaf); keeps only the last group in memory."""

    def __init__(self, source: Path, stored: dict[str, dict[str, jax.ShapeDtypeStruct]], bar: tqdm):
        self.source, self.bar = source, bar
        self.groups = {network: list(checkpoint.batches(leaves.items())) for network, leaves in stored.items()}
        self.held: dict[tuple[str, str], np.ndarray] = {}
        self.seen: set[tuple[str, str]] = set()

    def __call__(self, network: str, name: str) -> np.ndarray:
        if (network, name) not in self.held:
            self.held.clear()
            group = next(group for group in self.groups[network] if name in group)
            loaded = checkpoint.read_leaves(self.source, network, group)
            self.held = {(network, leaf): value for leaf, value in loaded.items()}
            self.bar.set_description(network)
            self.bar.update(len(self.held.keys() - self.seen))
            self.seen |= self.held.keys()
        return self.held[network, name]


def _stored_factors(source: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Return the weight-norm factors that kernels were folded from; none if the checkpoint does not store them."""
    file = source / WEIGHT_NORM
    if not file.is_file():
        return {}
    file = local_copy(file)

    def read(name: str) -> np.ndarray:
        with safe_open(file, framework="np") as reader:
            return reader.get_tensor(name)

    try:
        with safe_open(file, framework="np") as reader:
            return {name: (lambda name=name: read(name)) for name in reader.keys()}
    except SafetensorError as error:
        raise InputError(
            f"{file}: damaged ({error}); remove it; it is needed only to restore the weights bit for bit"
        ) from None


def _weight_norm_entries(
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    kernel: Callable[[], np.ndarray],
    factors: dict[str, Callable[[], np.ndarray]],
) -> list[Entry]:
    """Return `X.weight_g` and `X.weight_v` for `X.weight`: the factors it was folded from, or new ones if it changed.

    New factors are v = kernel and g = |kernel|, which fold to the kernel itself.
    """
    g_shape = (shape[0],) + (1,) * (len(shape) - 1)
    names = f"{name}_g", f"{name}_v"
    if all(n in factors for n in names):
        g, v = factors[names[0]](), factors[names[1]]()
        if v.shape == shape and np.array_equal(fold(g, v).astype(dtype), kernel()):
            return [(names[0], g_shape, g.dtype, factors[names[0]]), (names[1], shape, v.dtype, factors[names[1]])]
    return [
        (names[0], g_shape, dtype, lambda: weight_norm(kernel()).astype(dtype)),
        (names[1], shape, dtype, kernel),
    ]


def _write_diffusers(folder: Path, source: Path, manifest: checkpoint.Manifest, entries: dict[str, list[Entry]]):
    for name, config in manifest.configs.items():
        _write_network(folder / name, name, config, entries[name])
    _write_tokenizer(folder / "tokenizer", source, manifest)
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER)
    index: dict[str, Any] = {"_class_name": "AceStepPipeline"}
    index |= {name: list(_CLASSES[name]) for name in manifest.configs}
    index["scheduler"] = ["diffusers", _SCHEDULER["_class_name"]]
    index["tokenizer"] = ["transformers", manifest.tokenizer_config.get("tokenizer_class", "PreTrainedTokenizerFast")]
    _write_json(folder / "model_index.json", index)


def _write_original(folder: Path, source: Path, manifest: checkpoint.Manifest, entries: dict[str, list[Entry]]):
    import torch

    model = folder / original.model_folder(manifest.configs)
    model.mkdir()
    _write_json(model / "config.json", original.join_config(manifest.configs))
    found = [(name, entry) for name in original.PREFIXES.values() for entry in entries[name]]
    tensors = [
        (original.original_name(name, torch_name), shape, dtype, read)
        for name, (torch_name, shape, dtype, read) in found
        if torch_name != "silence_latent"
    ]
    write_safetensors(model / "model.safetensors", tensors)
    (silence,) = (read() for _, (torch_name, _, _, read) in found if torch_name == "silence_latent")
    value = torch.from_numpy(np.ascontiguousarray(silence.astype(np.float32).transpose(0, 2, 1)))
    torch.save(value, model / "silence_latent.pt")
    for name, target in (("vae", original.VAE), ("text_encoder", original.TEXT_ENCODER)):
        _write_network(folder / target, name, manifest.configs[name], entries[name])
    _write_tokenizer(folder / original.TEXT_ENCODER, source, manifest)
    _write_vocabulary(folder / original.TEXT_ENCODER, source)


def _write_planner(source: Path, destination: Path, manifest: checkpoint.Manifest) -> None:
    """Write a planner as a folder like ACE-Step's published ones, with its tokenizer files unchanged."""
    stored = checkpoint.network_leaves(source, manifest)
    with tqdm(total=len(stored[PLANNER]), unit="tensor", disable=None) as bar:
        entries = _entries(source, PLANNER, stored[PLANNER], _Reader(source, stored, bar))
        size = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype, _ in entries)
        with publish_folder(destination, size) as folder:
            _write_json(folder / "config.json", manifest.configs[PLANNER].to_hf())
            named = [(original.original_name(PLANNER, n), shape, dtype, read) for n, shape, dtype, read in entries]
            write_safetensors(folder / "model.safetensors", named)
            for file in tokenizer_files(source):
                shutil.copyfile(file, folder / file.name)


def _write_network(folder: Path, name: str, config: NetworkConfig, entries: list[Entry]) -> None:
    """Write the folder of one network as diffusers saves it, or transformers for the text encoder."""
    folder.mkdir()
    values, file = {"_class_name": _CLASSES[name][1]} | config.to_hf(), "diffusion_pytorch_model.safetensors"
    if name == "text_encoder":
        values, file = config.to_hf(), "model.safetensors"
        entries = [(original.original_name(name, n), shape, dtype, read) for n, shape, dtype, read in entries]
    _write_json(folder / "config.json", values)
    write_safetensors(folder / file, entries)


def _write_tokenizer(folder: Path, source: Path, manifest: checkpoint.Manifest) -> None:
    folder.mkdir(exist_ok=True)
    text = (source / checkpoint.TOKENIZER).read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", manifest.tokenizer_config)


def _write_vocabulary(folder: Path, source: Path) -> None:
    """Write `vocab.json` and `merges.txt`; without them, acestep.cpp's converter writes a model without a tokenizer."""
    model = json.loads((source / checkpoint.TOKENIZER).read_text(encoding="utf-8")).get("model") or {}
    if model.get("type") != "BPE":
        logger.warning(
            "%s: tokenizer of type %s; vocab.json and merges.txt, which acestep.cpp reads, exist only for BPE",
            source / checkpoint.TOKENIZER,
            model.get("type"),
        )
        return
    text = json.dumps(model["vocab"], ensure_ascii=False)
    (folder / "vocab.json").write_text(text + "\n", encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
