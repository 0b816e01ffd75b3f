"""The trained checkpoint as it is shipped: small, and with an answer to every tempo."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from acestep_jax.io import checkpoint
from examples.synthetic_music.styles import STYLES


def write_packed(source: Path, destination: Path, dtype: str) -> None:
    """Writes a copy of a checkpoint with its weights in another dtype, computed in float32, compressed. Tempi that no
    song had are read as their neighbours, see `read_as_nearest`.

    Raises:
        InputError: if `source` is no checkpoint or `destination` exists.
    """
    manifest = checkpoint.read_manifest(source)
    stored = checkpoint.network_leaves(source, manifest)
    configs = {n: dataclasses.replace(c, dtype="float32", param_dtype=dtype) for n, c in manifest.configs.items()}
    tokenizer = checkpoint.load_tokenizer(source)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for name, shapes in stored.items():
            for leaf, value in checkpoint.read_leaves(source, name, shapes).items():
                if (name, leaf) == ("text_encoder", "embed_tokens.embedding"):
                    value = read_as_nearest(value, tokenizer)
                yield f"{name}.{leaf}", value.astype(jnp.dtype(dtype))

    text = (source / checkpoint.TOKENIZER).read_text(encoding="utf-8")
    checkpoint.save(destination, configs, arrays(), text, manifest.tokenizer_config, compress=True)


def read_as_nearest(table: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The embeddings [vocabulary, D], where a number between the tempi of the composer's songs has that of the nearest
    of them: what a transformer makes of a tempo that it never heard is any other."""
    known = sorted({bpm for style in STYLES.values() for bpm in style.bpm})
    table, ids = table.copy(), tokenizer.get_vocab()
    for number in range(known[0], known[-1]):
        nearest = min(known, key=lambda bpm: abs(math.log(bpm / number)))
        table[ids[f"Ġ{number}"]] = table[ids[f"Ġ{nearest}"]]  # the tokenizer's sign for a space
    return table
