"""8-bit weights in checkpoints: quantised during conversion of a model, or from a native checkpoint.

acestep-jax convert quantize SRC DST --dtype int8
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint, checkpoint_writer
from acestep_jax.io.files import as_path, check_new
from acestep_jax.io.manifest import check_unquantized, read_manifest
from acestep_jax.models.config import NetworkConfig
from acestep_jax.models.quantization import NETWORKS, parts, quantize_array
from acestep_jax.models.runtime import QUANTIZATIONS, Runtime


def kinds_of(configs: Mapping[str, NetworkConfig], kind: str | None) -> dict[str, str]:
    """Return `Manifest.quantization` for these networks, quantised to one of `runtime.QUANTIZATIONS` or None."""
    return {} if kind is None else {name: kind for name in configs if name in NETWORKS}


class Quantizer:
    """Converts the weights of a network to stored arrays.

    Args:
        name: name of the network.
        kind: one of `runtime.QUANTIZATIONS`; None: it is not quantised.
    """

    def __init__(self, name: str, config: NetworkConfig, kind: str | None):
        self.name, self.kind = name, kind
        self.parts = {} if kind is None else parts(checkpoint.abstract(name, config, Runtime(quantization=kind)))

    def __call__(self, leaf: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the arrays of a leaf with their names, the network's first: values and scales, or the leaf itself."""
        if self.kind is None or leaf not in self.parts:
            yield f"{self.name}.{leaf}", value
            return
        scale, axis = self.parts[leaf]
        host = checkpoint.host_sharding()
        made = jax.jit(quantize_array, static_argnums=(1, 2))(jax.device_put(value, host), self.kind, axis)
        for name, array in zip((leaf, scale), made, strict=True):
            yield f"{self.name}.{name}", np.asarray(array)


def quantize_checkpoint(source: str | Path, destination: str | Path, dtype: str) -> None:
    """Write a native checkpoint of a model or a planner with 8-bit weights of its layers; loading it does not need the
    original. Everything else is copied unchanged.

    Args:
        source: a native checkpoint.
        destination: the folder to create.
        dtype: one of `runtime.QUANTIZATIONS`.

    Raises:
        InputError: if `source` is not a native checkpoint, or already quantised, `destination` exists, or the disk has
            no room. Nothing is written in these cases.
    """
    if dtype not in QUANTIZATIONS:
        raise InputError(f"--dtype: expected {' or '.join(QUANTIZATIONS)}, found {dtype!r}")
    source = as_path(source)
    check_new(as_path(destination))
    manifest = read_manifest(source, ())
    check_unquantized(source, manifest, "what is quantised are")
    kinds = kinds_of(manifest.configs, dtype)
    if not kinds:
        raise InputError(f"{source}: holds {', '.join(manifest.configs)}, of which none is quantised")
    stored = checkpoint.network_leaves(source, manifest)

    def arrays(bar: tqdm) -> Iterator[tuple[str, np.ndarray]]:
        for name, shapes in stored.items():
            bar.set_description(f"quantising {name}")
            quantizer = Quantizer(name, manifest.configs[name], kinds.get(name))
            for group in checkpoint.batches(shapes.items()):
                for leaf, value in checkpoint.read_leaves(source, name, group).items():
                    yield from quantizer(leaf, value)
                bar.update(len(group))

    text = source / checkpoint.TOKENIZER
    with tqdm(total=sum(map(len, stored.values())), unit="parameter", disable=None) as bar:
        checkpoint_writer.save(
            destination,
            manifest.configs,
            arrays(bar),
            text.read_text(encoding="utf-8") if text.is_file() else None,
            manifest.tokenizer_config,
            checkpoint_writer.other_files(source),
            sampling=manifest.sampling,
            dtypes=manifest.dtypes,
            quantization=kinds,
        )
