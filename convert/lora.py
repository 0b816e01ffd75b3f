"""LoRA adapters to and from PyTorch: `python -m convert lora-to-torch` and `lora-from-torch`.

Layouts, with A [r, in] and B [out, r] of each linear layer in tensors of their own:

- peft: a folder as PEFT and ACE-Step's own application write it, with the original model's names, such as
  `base_model.model.layers.0.self_attn.q_proj.lora_A.weight`. The strength is in `adapter_config.json`. It is for
  `PeftModel.from_pretrained(model.decoder, folder)`.
- diffusers: a folder for `load_lora_weights`, with diffusers' names, such as
  `transformer.layers.0.self_attn.to_q.lora_A.weight`. The strength is in the header of the file.
- comfyui: a file with the original model's names, such as
  `diffusion_model.decoder.layers.0.self_attn.q_proj.lora_down.weight`. The strength is in a tensor `alpha` beside it.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from acestep_jax.convert import original, rules
from acestep_jax.convert.lora_reader import (
    DIFFUSERS_KEY,
    DIFFUSERS_WEIGHTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    linear_layers,
    read_lora,
)
from safetensors.numpy import save

from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint
from acestep_jax.io.adapter import Adapter, check_adapter, load_adapter, save_adapter

LAYOUTS = ("peft", "diffusers", "comfyui")


def lora_from_torch(source: str | Path, destination: str | Path, *, model: str | Path | None = None) -> None:
    """Makes an acestep-jax adapter of one of PyTorch, in whichever layout it is.

    Args:
        source: the folder or the .safetensors file.
        destination: the folder to make.
        model: the native checkpoint that the adapter is for, to check that it fits. An adapter that leaves out the
            last layers needs it, for it does not tell how many there are.

    Raises:
        InputError: see `read_lora`; also if `destination` exists. Nothing is written then.
    """
    destination = Path(destination)
    checkpoint.check_new(destination)
    if model is None:
        adapter = read_lora(Path(source))
    else:
        config = checkpoint.read_manifest(model).configs["transformer"]
        adapter = read_lora(Path(source), config.num_hidden_layers)
        check_adapter(adapter, config, str(source))
    save_adapter(destination, adapter)


def lora_to_torch(source: str | Path, destination: str | Path, *, layout: str) -> None:
    """Writes an adapter in one of `LAYOUTS`; `lora_from_torch` gives the same values back, bit for bit.

    Of the config, rank, alpha and use_dora come back; targets as whole paths; dropout, which matters to further
    training alone, from peft only.

    Args:
        source: the folder of an acestep-jax adapter.
        destination: the folder to make; for comfyui the .safetensors file.

    Raises:
        InputError: if `source` is no adapter, `destination` exists, or the layout cannot express the adapter.
    """
    if layout not in LAYOUTS:
        raise InputError(f"--layout: expected {', '.join(LAYOUTS)}, found {layout!r}")
    source, destination = Path(source), Path(destination)
    checkpoint.check_new(destination)
    adapter = load_adapter(source)
    if unknown := sorted({leaf.rpartition(".")[0] for leaf in adapter.leaves} - linear_layers()):
        raise InputError(f"{source}: {unknown[0]} is no linear layer of ACE-Step 1.5's transformer; nothing to write")
    if layout == "comfyui":
        _write_comfyui(destination, source, adapter)
        return
    with checkpoint.publish(destination, sum(value.nbytes for value in adapter.leaves.values())) as folder:
        (_write_peft if layout == "peft" else _write_diffusers)(folder, adapter)


class _Module(NamedTuple):
    """The adapter of one torch module, by diffusers' name: A [r, in], B [out, r], magnitude [out]."""

    name: str
    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None


def _modules(adapter: Adapter) -> Iterator[_Module]:
    for layer in sorted({leaf.rpartition(".")[0] for leaf in adapter.leaves}):
        parts = [adapter.leaves.get(f"{layer}.{part}") for part in ("lora_a", "lora_b", "lora_magnitude")]
        names, rule = rules.to_torch("transformer", f"{layer}.kernel", parts[0].shape)
        for row, name in enumerate(names):
            a, b, m = [p[row] if p is not None and rules.is_stacked(f"{layer}.kernel") else p for p in parts]
            a, b = (np.ascontiguousarray(rule.to_torch(factor)) for factor in (a, b))
            yield _Module(name.removesuffix(".weight"), a, b, m)


def _original(module: str) -> str:
    """diffusers' name of a module as the original model's decoder has it."""
    return original.original_name("transformer", f"{module}.weight").removeprefix("decoder.").removesuffix(".weight")


def _write_peft(folder: Path, adapter: Adapter) -> None:
    modules = [module._replace(name=_original(module.name)) for module in _modules(adapter)]
    _save(folder / PEFT_WEIGHTS, _peft_tensors("base_model.model.", modules), {})
    values = {"peft_type": "LORA", "inference_mode": True, "lora_dropout": adapter.config.dropout}
    values |= _peft_config(adapter, modules)
    (folder / PEFT_CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_diffusers(folder: Path, adapter: Adapter) -> None:
    modules = list(_modules(adapter))
    # Without lora_dropout: diffusers leaves the layers it adds in training mode, where dropout acts.
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
    file.write_bytes(save(tensors, {"format": "pt"} | metadata))  # `save_file` would let nobody else read it


def _peft_tensors(prefix: str, modules: list[_Module]) -> dict[str, np.ndarray]:
    tensors = {}
    for name, a, b, magnitude in modules:
        tensors |= {f"{prefix}{name}.lora_A.weight": a, f"{prefix}{name}.lora_B.weight": b}
        if magnitude is not None:
            tensors[f"{prefix}{name}.lora_magnitude_vector"] = np.ascontiguousarray(magnitude)
    return tensors


def _peft_config(adapter: Adapter, modules: list[_Module]) -> dict[str, Any]:
    """The arguments of `peft.LoraConfig`. A target is the end of a module's name, here what follows its layer."""
    config = adapter.config
    return {
        "r": config.rank,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "target_modules": sorted({re.sub(r"^layers\.\d+\.", "", module.name) for module in modules}),
        "use_dora": config.use_dora,
        "bias": "none",
    }
