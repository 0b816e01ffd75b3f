"""A native checkpoint with adapters merged into its weights: `acestep-jax convert merge-lora SRC DST --lora DIR`."""

from collections.abc import Sequence
from pathlib import Path

from acestep_jax.io import checkpoint, checkpoint_writer
from acestep_jax.io.adapter import Adapter, merge_adapters, resolve_adapters
from acestep_jax.io.files import as_path, check_new
from acestep_jax.io.manifest import check_unquantized
from acestep_jax.models.config import TransformerConfig
from acestep_jax.models.transformer import AceStepTransformer1DModel


def merge_lora(
    source: str | Path,
    destination: str | Path,
    adapters: Sequence[str | Path | Adapter],
    scales: float | Sequence[float] = 1.0,
) -> None:
    """Write a copy of `source` with adapters merged into its transformer; nothing else changes.

    The whole transformer is held in memory; the other networks are copied a few arrays at a time.

    Args:
        source: a native checkpoint.
        destination: the folder to create.
        adapters: the adapters or their folders.
        scales: one scale for all adapters, or one for each.

    Raises:
        InputError: if `source` is not a native checkpoint, `destination` exists, a scale is not a finite number, or an
            adapter is for another model. Nothing is written in these cases.
    """
    check_new(as_path(destination))
    manifest = checkpoint.read_manifest(source)
    check_unquantized(source, manifest, "adapters are merged into")
    config = manifest.configs["transformer"]
    assert isinstance(config, TransformerConfig)
    adapters, scales = resolve_adapters(adapters, scales, config)
    transformer = checkpoint.load(source, names=["transformer"])["transformer"]
    assert isinstance(transformer, AceStepTransformer1DModel)
    transformer = merge_adapters(transformer, adapters, scales)
    adapted = {f"{leaf.rpartition('.')[0]}.kernel" for adapter in adapters for leaf in adapter.leaves}
    arrays = {leaf: v[...] for leaf, v in checkpoint.leaves(transformer).items() if leaf in adapted}
    checkpoint_writer.save_changed(source, destination, "transformer", arrays)
