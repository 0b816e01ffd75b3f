"""Sharing a model: the networks in memory as a native checkpoint with a model card, in a folder or on the hub."""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from acestep_jax.distributed import on_host
from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint, checkpoint_writer
from acestep_jax.io.cache import SOURCE
from acestep_jax.io.files import as_path, check_new
from acestep_jax.io.manifest import read_manifest
from acestep_jax.models.registry import FAMILY

CARD = "README.md"

_LOAD = """```python
from acestep_jax import AceStepPipeline

pipe = AceStepPipeline.from_pretrained("{name}")
pipe("lofi piano, 80 bpm", lyrics="[Instrumental]", audio_duration=30.0, seed=0).save("song.wav")
```"""


def save_pretrained(
    folder: str | Path,
    networks: Mapping[str, nnx.Module],
    tokenizer: Tokenizer | None,
    *,
    scales: Mapping[str, float],
    sampling: Mapping[str, Any],
    loaded_from: Path | None,
    name: str | None = None,
) -> None:
    """Write networks atomically as a native checkpoint, with the dtypes that they have in memory, and a model card.

    Args:
        folder: must not exist yet.
        networks: by the names of `models.registry`, without adapters.
        scales: scales of the loaded adapters; all must be 0.
        sampling: see `Manifest`.
        loaded_from: the native checkpoint that the networks were read from, for its parts that are not in memory: the
            settings of the tokenizer, the factors of the autoencoder's weight norm, and its source.
        name: name of the model in the card; None: `folder`.

    Raises:
        InputError: if `folder` exists, an adapter is on, a network is missing, or the disk has no room.
    """
    folder = as_path(folder)
    check_new(folder)
    check_networks(networks, tokenizer, scales)
    kept = loaded_from if loaded_from is not None and loaded_from.is_dir() else None
    arrays = {
        f"{network}.{leaf}": variable[...]
        for network, module in networks.items()
        for leaf, variable in checkpoint.leaves(module).items()
    }
    source = _read_source(kept)
    card = model_card(name or str(folder), networks, source)
    extra: dict[str, Any] = {CARD: functools.partial(_write, card)}
    if source:
        extra[SOURCE] = functools.partial(_write, json.dumps(source, indent=2) + "\n")
    for file in kept.glob("*.safetensors") if kept else ():
        extra[file.name] = functools.partial(checkpoint_writer.copy_file, file)
    text = kept / checkpoint.TOKENIZER if kept else None
    checkpoint_writer.save(
        folder,
        {network: module.config for network, module in networks.items()},  # pyright: ignore[reportAttributeAccessIssue]
        _on_host(arrays),
        text.read_text(encoding="utf-8") if text and text.is_file() else tokenizer and tokenizer.to_str(),
        read_manifest(kept, ()).tokenizer_config if kept else {},
        extra,
        sampling=sampling,
        # Mixed precision is for one kind of device; other devices choose their own default.
        dtypes={name: _dtype(module) for name, module in networks.items() if module.runtime.products is None},  # pyright: ignore[reportAttributeAccessIssue]
        quantization={n: kind for n, module in networks.items() if (kind := module.runtime.quantization)},  # pyright: ignore[reportAttributeAccessIssue]
        size=sum(value.nbytes for value in arrays.values()),
    )


def model_card(name: str, networks: Mapping[str, nnx.Module], source: Mapping[str, Any]) -> str:
    """Return the text of a model card in Markdown: its source, its contents, how to load it.

    Args:
        name: an id on the hub, or a folder.
        source: contents of `source.json`; empty: unknown.
    """
    origin = source.get("source")
    on_hub = isinstance(origin, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", origin) and not Path(origin).exists()
    lines = ["---", "library_name: acestep-jax", "pipeline_tag: text-to-audio"]
    lines += [f"base_model: {origin}"] if on_hub else []
    lines += ["tags:", "- music-generation", "- jax", "- flax", "---", "", f"# {Path(name).name}", ""]
    lines += ["ACE-Step 1.5 in the native format of acestep-jax (JAX and Flax NNX).", ""]
    if origin:
        variant = f", variant {source['variant']}" if source.get("variant") else ""
        content = f", `{source['key']}`" if source.get("key") else ""
        where = f"[{origin}](https://huggingface.co/{origin})" if on_hub else f"`{origin}`"
        lines += [f"Made from {where}{variant}{content}.", ""]
    lines += ["| network | parameters | stored as | computed in |", "|---|---|---|---|"]
    for network, module in networks.items():
        values = [variable[...] for variable in checkpoint.leaves(module).values()]
        stored = sorted({np.dtype(value.dtype).name for value in values})
        count = sum(value.size for value in values)
        lines.append(f"| {network} | {count:,} | {', '.join(stored)} | {_dtype(module)} |")
    lines += ["", "```bash", "pip install acestep-jax", "```", "", _LOAD.format(name=name), ""]
    lines += ["## Licence", ""]
    if on_hub:
        lines.append(f"That of the weights it was made from: see https://huggingface.co/{origin}.")
    else:
        lines.append("That of the weights it was made from.")
    return "\n".join(lines) + "\n"


def check_networks(
    networks: Mapping[str, nnx.Module], tokenizer: Tokenizer | None, scales: Mapping[str, float]
) -> None:
    if on := [name for name, scale in scales.items() if scale]:
        raise InputError(
            f"adapters: {', '.join(on)} would be lost, a checkpoint holds only the model; call unload_lora() first, "
            "or merge them into a checkpoint's weights with `acestep-jax convert merge-lora`"
        )
    wanted = [name for name in FAMILY.networks if name not in FAMILY.optional and name not in networks]
    if wanted or tokenizer is None:
        raise InputError(f"{', '.join(wanted) or 'tokenizer'}: not in the pipeline; load it with all networks first")
    if jax.process_count() > 1:
        raise InputError("save_pretrained: expected one process; load the model in one process to save it")


def _read_source(folder: Path | None) -> dict[str, Any]:
    """Return the contents of a checkpoint's `source.json`; {} if there is none."""
    if folder is None:
        return {}
    try:
        values = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = ("source", "variant", "key", "dtype")
    return {name: values[name] for name in known if name in values} if isinstance(values, dict) else {}


def _on_host(arrays: Mapping[str, jax.Array]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays one at a time from their devices."""
    for name, value in arrays.items():
        yield name, on_host(value)


def _dtype(module: Any) -> str:
    return module.runtime.dtype


def _write(text: str, file: Path) -> None:
    file.write_text(text, encoding="utf-8")
