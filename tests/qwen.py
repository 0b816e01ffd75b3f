"""Qwen's real vocabulary, which the package dashscope carries."""

import base64
import functools
from importlib.util import find_spec
from pathlib import Path

import pytest

# The pre-tokenisation of Qwen's tokenizers.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def real_vocabulary():
    """Return the id of each token, in byte-level symbols, and the pairs that are merged; skip without the package."""
    if (spec := find_spec("dashscope")) is None:
        pytest.skip("dashscope is not installed")
    # Where it lies, because its import takes seconds.
    text = (Path(*spec.submodule_search_locations) / "resources/qwen.tiktoken").read_text()
    ranks = [base64.b64decode(line.split()[0]) for line in text.splitlines() if line]
    alphabet = _byte_symbols()
    symbols = ["".join(alphabet[byte] for byte in token) for token in ranks]
    rank = {token: i for i, token in enumerate(ranks)}
    merges = [pair for token in ranks if len(token) > 1 and (pair := _merge(token, rank, alphabet))]
    return {symbol: i for i, symbol in enumerate(symbols)}, merges


def _byte_symbols():
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _merge(token, rank, alphabet):
    """The pair of parts that byte-pair encoding joins last to make `token`."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        ranks = [rank.get(parts[i] + parts[i + 1], 10**9) for i in range(len(parts) - 1)]
        i = min(range(len(ranks)), key=ranks.__getitem__)
        if ranks[i] >= rank[token]:
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple("".join(alphabet[byte] for byte in part) for part in parts)
