"""LoRA adapters to and from PyTorch: `acestep-jax convert lora-to-torch` and `lora-from-torch`.

Layouts, in which A [r, in] and B [out, r] of each linear layer are separate tensors:

- peft: a folder as written by PEFT and ACE-Step's own application, with the original model's names, such as
  `base_model.model.layers.0.self_attn.q_proj.lora_A.weight`. Rank and alpha are in `adapter_config.json`.
  `PeftModel.from_pretrained(model.decoder, folder)` reads it.
- diffusers: a folder for `load_lora_weights`, with diffusers' names, such as
  `transformer.layers.0.self_attn.to_q.lora_A.weight`. Rank and alpha are in the header of the file.
- comfyui: a file with the original model's names, such as
  `diffusion_model.decoder.layers.0.self_attn.q_proj.lora_down.weight`. Alpha is a separate tensor.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint, original, rules
from acestep_jax.io.adapter import CONFIG, Adapter, check_adapter, load_adapter, save_adapter
from acestep_jax.io.adapter_names import linear_layers
from acestep_jax.io.adapter_reader import DIFFUSERS_WEIGHTS
from acestep_jax.io.adapter_settings import DIFFUSERS_KEY, PEFT_CONFIG, PEFT_WEIGHTS
from acestep_jax.io.files import as_path, check_new, on_this_machine, publish_folder
from acestep_jax.models.config import TransformerConfig

LAYOUTS = ("peft", "diffusers", "comfyui")


def lora_from_torch(source: str | Path, destination: str | Path, *, model: str | Path | None = None) -> None:
    """Convert a PyTorch adapter, in any layout that `adapter_reader.read_lora` supports, to an acestep-jax adapter.

    Args:
        source: the folder or the .safetensors file.
        destination: the folder to create.
        model: the native checkpoint that the adapter is for, to check that they match. It is required for an adapter
            without the last layers, since such a file does not say how many layers there are.

    Raises:
        InputError: see `load_adapter`; also if `destination` exists. Nothing is written in these cases.
    """
    destination = as_path(destination)
    check_new(destination)
    if (as_path(source) / CONFIG).is_file():
        raise InputError(f"{source}: is an acestep-jax adapter already; use it with acestep-jax generate --lora")
    if model is None:
        adapter = load_adapter(source)
    else:
        config = checkpoint.read_manifest(model).configs["transformer"]
        assert isinstance(config, TransformerConfig)
        adapter = load_adapter(source, config.num_hidden_layers)
        check_adapter(adapter, config, str(source))
    save_adapter(destination, adapter)


def lora_to_torch(source: str | Path, destination: str | Path, *, layout: str) -> None:
    """Write an adapter in one of `LAYOUTS`; `lora_from_torch` restores the same values bit for bit.

    Of the config, rank, alpha and use_dora are restored, and targets as full paths. Dropout, which matters only for
    further training, is restored only from peft.

    Args:
        source: the folder of an acestep-jax adapter.
        destination: the folder to create, or the .safetensors file for comfyui.

    Raises:
        InputError: if `source` is not an adapter, `destination` exists, or the layout cannot express the adapter.
    """
    if layout not in LAYOUTS:
        raise InputError(f"--layout: expected {', '.join(LAYOUTS)}, found {layout!r}")
    source, destination = as_path(source), on_this_machine(destination)
    check_new(destination)
    if not (source / CONFIG).is_file():
        raise InputError(f"{source}: expected {CONFIG} of an acestep-jax adapter, found none")
    adapter = load_adapter(source)
    if products := [leaf for leaf in adapter.leaves if not leaf.rpartition(".")[2].startswith("lora_")]:
        raise InputError(
            f"{source}: {products[0]} is of a LoKr or LoHa adapter, which is written in none of the layouts; use its "
            "own file, or merge-lora and to-torch"
        )
    if unknown := sorted({leaf.rpartition(".")[0] for leaf in adapter.leaves} - linear_layers()):
        raise InputError(
            f"{source}: {unknown[0]} is not a linear layer of ACE-Step 1.5's transformer; expected only those"
        )
    if layout == "comfyui":
        _write_comfyui(destination, source, adapter)
        return
    with publish_folder(destination, sum(value.nbytes for value in adapter.leaves.values())) as folder:
        (_write_peft if layout == "peft" else _write_diffusers)(folder, adapter)


class _Module(NamedTuple):
    """The adapter of one torch module, by diffusers' name: A [r, in], B [out, r], magnitude [out]."""

    name: str
    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None


def _modules(adapter: Adapter) -> Iterator[_Module]:
    for layer in sorted({leaf.rpartition(".")[0] for leaf in adapter.leaves}):
        a, b = adapter.leaves[f"{layer}.lora_a"], adapter.leaves[f"{layer}.lora_b"]
        magnitude = adapter.leaves.get(f"{layer}.lora_magnitude")
        names, rule = rules.to_torch("transformer", f"{layer}.kernel", a.shape)
        for row, name in enumerate(names):
            at = row if rules.is_stacked(f"{layer}.kernel") else ...
            yield _Module(
                name.removesuffix(".weight"),
                np.ascontiguousarray(rule.to_torch(a[at])),
                np.ascontiguousarray(rule.to_torch(b[at])),
                None if magnitude is None else magnitude[at],
            )


def _original(module: str) -> str:
    """Return the original decoder's name for a module that diffusers calls `module`."""
    return original.original_name("transformer", f"{module}.weight").removeprefix("decoder.").removesuffix(".weight")


def _write_peft(folder: Path, adapter: Adapter) -> None:
    modules = [module._replace(name=_original(module.name)) for module in _modules(adapter)]
    _save(folder / PEFT_WEIGHTS, _peft_tensors("base_model.model.", modules), {})
    values = {"peft_type": "LORA", "inference_mode": True, "lora_dropout": adapter.config.dropout}
    values |= _peft_config(adapter, modules)
    (folder / PEFT_CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_diffusers(folder: Path, adapter: Adapter) -> None:
    modules = list(_modules(adapter))
    # Without lora_dropout: diffusers leaves the layers that it adds in training mode, so dropout would be active.
    values = {f"transformer.{key}": value for key, value in _peft_config(adapter, modules).items()}
    metadata = {DIFFUSERS_KEY: json.dumps(values, indent=2, sort_keys=True)}
    _save(folder / DIFFUSERS_WEIGHTS, _peft_tensors("transformer.", modules), metadata)


def _write_comfyui(file: Path, source: Path, adapter: Adapter) -> None:
    if file.suffix != ".safetensors":
        raise InputError(f"{file}: the layout comfyui is one file; expected a name that ends in .safetensors")
    if adapter.config.use_dora:
        raise InputError(
            f"{source}: a DoRA adapter, which ComfyUI would distort: it divides by the norm of the weights without the "
            "adapter; use another layout, or merge-lora and to-torch --layout original"
        )
    tensors = {}
    for name, a, b, _ in _modules(adapter):
        prefix = f"diffusion_model.decoder.{_original(name)}"
        alpha = np.array(adapter.config.alpha, np.float32)
        tensors |= {f"{prefix}.lora_down.weight": a, f"{prefix}.lora_up.weight": b, f"{prefix}.alpha": alpha}
    with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.absolute().parent) as folder:
        _save(Path(folder) / file.name, tensors, {})
        (Path(folder) / file.name).rename(file)


def _save(file: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    file.write_bytes(
        save(tensors, {"format": "pt"} | metadata)
    )  # `save_file` would make the file readable only by its owner


def _peft_tensors(prefix: str, modules: list[_Module]) -> dict[str, np.ndarray]:
    tensors = {}
    for name, a, b, magnitude in modules:
        tensors |= {f"{prefix}{name}.lora_A.weight": a, f"{prefix}{name}.lora_B.weight": b}
        if magnitude is not None:
            tensors[f"{prefix}{name}.lora_magnitude_vector"] = np.ascontiguousarray(magnitude)
    return tensors


def _peft_config(adapter: Adapter, modules: list[_Module]) -> dict[str, Any]:
    """Return the arguments of `peft.LoraConfig`. A target is the part of a name after the layer."""
    config = adapter.config
    return {
        "r": config.rank,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "target_modules": sorted({re.sub(r"^layers\.\d+\.", "", module.name) for module in modules}),
        "use_dora": config.use_dora,
        "bias": "none",
    }
