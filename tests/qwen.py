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
    symbol = lambda token: token.decode("latin-1").translate(alphabet)  # noqa: E731
    rank = {token: i for i, token in enumerate(ranks)}
    pairs = (_merge(token, rank) for token in ranks if len(token) > 1)
    merges = [(symbol(first), symbol(second)) for first, second in filter(None, pairs)]
    return {symbol(token): i for token, i in rank.items()}, merges


def _byte_symbols():
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _merge(token, rank):
    """The pair of parts that byte-pair encoding joins last to make `token`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    ranks = [rank.get(token[i : i + 2], 10**9) for i in range(len(token) - 1)]
    own = rank[token]
    while len(ranks) > 1:
        lowest = min(ranks)
        if lowest >= own:
            return None
        i = ranks.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del ranks[i]
        for j in (i - 1, i):
            if 0 <= j < len(ranks):
                ranks[j] = rank.get(parts[j] + parts[j + 1], 10**9)
    return parts
