"""Recognises files and folders that are not ACE-Step 1.5 checkpoints, so that errors can say what they are."""

import json
from pathlib import Path

from acestep_jax.io.original import MOST_TOKENS

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_ADAPTERS = ("adapter_config.json", "adapter.json", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_ADAPTER_PARTS = ("lora_", "lokr_", "hada_", "oft_")
_SAFETENSORS = "expected .safetensors files of the model"


def describe(path: Path) -> str | None:
    """Return why `path` is not a checkpoint, for an error that begins with its name; None if it is not recognised."""
    return _describe_folder(path) if path.is_dir() else _describe_file(path)


def _describe_file(file: Path) -> str | None:
    with file.open("rb") as opened:
        first = opened.read(8)
        size = int.from_bytes(first, "little")
        header = opened.read(size) if 2 <= size <= 100_000_000 and file.suffix == ".safetensors" else b""
    if first.startswith(b"GGUF") or file.suffix == ".gguf":
        return f"a GGUF file, quantised for acestep.cpp and its kind, which is not read; {_SAFETENSORS}"
    if file.suffix in _PICKLES or first.startswith((b"PK\x03\x04", b"\x80")):
        return (
            f"a PyTorch pickle, which can hold code and is not read; {_SAFETENSORS}, or load it in torch and save it "
            "with safetensors"
        )
    if file.suffix != ".safetensors":
        return f"a file of an unknown kind; {_SAFETENSORS}"
    if any(f"{part}".encode() in header for part in _ADAPTER_PARTS):
        return "an adapter, not a model; load it with load_lora (--lora) on top of one"
    return None


def _describe_folder(folder: Path) -> str | None:
    if any((folder / name).is_file() for name in _ADAPTERS):
        return "an adapter, not a model; load it with load_lora (--lora) on top of one"
    config = _config(folder)
    if config.get("model_type") == "qwen3" or "Qwen3" in str(config.get("architectures")):
        tokens = config.get("vocab_size")
        if isinstance(tokens, int) and tokens > MOST_TOKENS:
            return "the 5 Hz language model, which plans songs; expected a diffusion model such as acestep-v15-turbo"
        return "only the text encoder; expected the folder of the model, or the one above both"
    if config.get("_class_name") == "AutoencoderOobleck":
        return "only the autoencoder; expected the folder of the model, or the one above both"
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.index*.json")):
        return None
    if files := sorted(folder.glob("*.gguf")):
        return _describe_file(files[0])
    pickles = [file for file in sorted(folder.iterdir()) if file.suffix in _PICKLES and "silence" not in file.name]
    return f"holds {pickles[0].name}, {_describe_file(pickles[0])}" if pickles else None


def _config(folder: Path) -> dict:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
