"""Pack the trained checkpoint for shipping: compressed, with an embedding for every tempo."""

import math
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from acestep_jax.io import checkpoint, checkpoint_writer
from examples.synthetic_music.styles import STYLES


def write_packed(source: Path, destination: Path, dtype: str) -> None:
    """Write a compressed copy of a checkpoint with its weights in another dtype, to be computed in float32. Tempi that
    did not occur in training get the embedding of the nearest one, see `read_as_nearest`.

    Raises:
        InputError: if `source` is not a checkpoint or `destination` exists.
    """
    manifest = checkpoint.read_manifest(source)
    stored = checkpoint.network_leaves(source, manifest)
    tokenizer = checkpoint.load_tokenizer(source)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for name, shapes in stored.items():
            for leaf, value in checkpoint.read_leaves(source, name, shapes).items():
                if (name, leaf) == ("text_encoder", "embed_tokens.embedding"):
                    value = read_as_nearest(value, tokenizer)
                yield f"{name}.{leaf}", value.astype(jnp.dtype(dtype))

    text = (source / checkpoint.TOKENIZER).read_text(encoding="utf-8")
    checkpoint_writer.save(
        destination,
        manifest.configs,
        arrays(),
        text,
        manifest.tokenizer_config,
        sampling=manifest.sampling,
        dtypes=dict.fromkeys(manifest.configs, "float32"),
        compress=True,
    )


def read_as_nearest(table: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return the embeddings [vocabulary, D], where every number between the tempi of the composer's songs has the
    embedding of the nearest of these tempi: the transformer does not generalise to tempi that it was not trained on."""
    known = sorted({bpm for style in STYLES.values() for bpm in style.bpm})
    table, ids = table.copy(), tokenizer.get_vocab()
    for number in range(known[0], known[-1]):
        nearest = min(known, key=lambda bpm: abs(math.log(bpm / number)))
        table[ids[f"Ġ{number}"]] = table[ids[f"Ġ{nearest}"]]  # the tokenizer's sign for a space
    return table
