"""`python -m convert merge-lora SRC DST --lora DIR`: a native checkpoint with adapters in its weights."""

from collections.abc import Sequence
from pathlib import Path

from acestep_jax.io import checkpoint
from acestep_jax.io.adapter import Adapter, merge_adapters


def merge_lora(
    source: str | Path, destination: str | Path, adapters: Sequence[Adapter], scales: Sequence[float]
) -> None:
    """Writes a checkpoint whose transformer is that of `source` after `merge_adapters`; all else stays as it is.

    The transformer is in memory as a whole, the other networks some arrays at a time.

    Raises:
        InputError: if `source` is no native checkpoint, `destination` exists, or an adapter is for another model.
    """
    checkpoint.check_new(Path(destination))
    transformer = merge_adapters(checkpoint.load(source, names=["transformer"])["transformer"], adapters, scales)
    adapted = {f"{leaf.rpartition('.')[0]}.kernel" for adapter in adapters for leaf in adapter.leaves}
    arrays = {leaf: v[...] for leaf, v in checkpoint.leaves(transformer).items() if leaf in adapted}
    checkpoint.save_changed(source, destination, "transformer", arrays)
