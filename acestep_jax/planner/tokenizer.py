"""The language model's tokenizer: Qwen's byte-pair encoding for text, arithmetic for audio codes.

Ids: N text tokens (151643), 26 marks such as `<|im_start|>` and `<think>`, then `<|audio_code_0|>`, ... The user's text
is encoded without marks, so it can neither end nor begin a turn.
"""

import enum
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from acestep_jax.errors import InputError


class Mark(enum.Enum):
    """A special token; its value is its written form. Source: Qwen3's tokenizer_config.json."""

    END_OF_TEXT = "<|endoftext|>"
    TURN = "<|im_start|>"
    END_OF_TURN = "<|im_end|>"
    THINK = "<think>"
    END_OF_THINK = "</think>"


Codes = tuple[int, ...]
Pieces = Sequence["str | Mark | Codes"]  # a prompt

_OFFSETS = {Mark.END_OF_TEXT: 0, Mark.TURN: 1, Mark.END_OF_TURN: 2, Mark.THINK: 24, Mark.END_OF_THINK: 25}
_MARKS = 26  # Qwen3 has others between these
_CODE = "<|audio_code_{}|>"
# Qwen's pre-tokenisation: each digit is separate, and line ends join the punctuation before them.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_symbols() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for. Source: GPT-2."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


class PlannerTokenizer:
    """Text, marks and audio codes to token ids, and back.

    Args:
        vocabulary: id of each text token, 0, 1, ..., written in byte-level symbols.
        merges: pairs of tokens to merge, in order of priority.
        source: name for messages.

    Raises:
        InputError: if it is not a byte-level vocabulary.
    """

    def __init__(self, vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], source: str = "tokenizer"):
        self.size = len(vocabulary)
        symbols = _byte_symbols()
        missing = [symbol for symbol in symbols if symbol not in vocabulary]
        if sorted(vocabulary.values()) != list(range(self.size)) or missing:
            what = f"{len(missing)} bytes are missing" if missing else "the ids have gaps"
            raise InputError(f"{source}: expected a byte-level vocabulary with ids 0, 1, ..., but {what}")
        self._tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
        self._tokenizer.normalizer = normalizers.NFC()
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._tokenizer.decoder = decoders.ByteLevel()
        self._vocabulary = vocabulary
        self.first_code = self.size + _MARKS  # id of audio code 0

    @classmethod
    def from_folder(cls, path: str | Path) -> "PlannerTokenizer":
        """Read a tokenizer from `vocab.json` and `merges.txt`, or from `tokenizer.json`. The 65,535 audio codes that
        it lists are skipped, since reading them takes more than a minute.

        Raises:
            InputError: if there is no tokenizer, or it has another vocabulary.
        """
        path = Path(path)
        vocabulary_file, merges_file, file = path / "vocab.json", path / "merges.txt", path / "tokenizer.json"
        added: dict[str, int] = {}
        try:
            if vocabulary_file.is_file() and merges_file.is_file():
                source = vocabulary_file
                vocabulary = json.loads(vocabulary_file.read_text(encoding="utf-8"))
                lines = merges_file.read_text(encoding="utf-8").split("\n")
                merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
                if (path / "added_tokens.json").is_file():
                    added = json.loads((path / "added_tokens.json").read_text(encoding="utf-8"))
            elif file.is_file():
                source = file
                content = json.loads(file.read_text(encoding="utf-8"))
                vocabulary = dict(content["model"]["vocab"])
                merges = [m.split(" ") if isinstance(m, str) else m for m in content["model"]["merges"]]
                added = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
            else:
                raise InputError(f"{path}: expected vocab.json and merges.txt, or tokenizer.json, found none of them")
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: its vocabulary cannot be read ({error!r}); copy the files again") from None
        vocabulary = {token: i for token, i in vocabulary.items() if token not in added}
        tokenizer = cls(vocabulary, [(m[0], m[1]) for m in merges], str(source))
        tokenizer._check_added(added, str(source))
        return tokenizer

    def _check_added(self, added: dict[str, int], source: str) -> None:
        """Raise InputError if a mark or an audio code has another id in the file than in this class."""
        expected = {mark.value: self.mark(mark) for mark in Mark}
        expected |= {_CODE.format(code): self.first_code + code for code in (0, 63999)}
        for token, index in expected.items():
            if added and added.get(token) != index:
                raise InputError(
                    f"{source}: expected the token {token} with id {index}, found "
                    f"{'none' if token not in added else added[token]}; this is not the vocabulary of a planner of "
                    "ACE-Step 1.5 (a folder acestep-5Hz-lm-*)"
                )

    def mark(self, mark: Mark) -> int:
        """Return the id of a mark."""
        return self.size + _OFFSETS[mark]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, which are never marks or audio codes, whatever the text contains."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_pieces(self, pieces: Pieces) -> np.ndarray:
        """Return the ids of a prompt, [n] int32. Consecutive texts are encoded as one."""
        ids: list[int] = []
        text = ""
        for piece in pieces:
            if isinstance(piece, str):
                text += piece
                continue
            ids += self.encode(text)
            text = ""
            ids += [self.mark(piece)] if isinstance(piece, Mark) else [self.first_code + code for code in piece]
        return np.array(ids + self.encode(text), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Incomplete UTF-8 bytes become U+FFFD; marks and audio codes are written as in a
        prompt."""
        names = {self.mark(mark): mark.value.encode() for mark in Mark}
        found = []
        for i in ids:
            if i < self.size:
                found.append(self.token_bytes[i])
            else:
                found.append(_CODE.format(i - self.first_code).encode() if i >= self.first_code else names.get(i, b""))
        return b"".join(found).decode("utf-8", errors="replace")

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each text token."""
        table = {ord(symbol): byte for symbol, byte in _byte_symbols().items()}
        found = [b""] * self.size
        for token, i in self._vocabulary.items():
            found[i] = token.translate(table).encode("latin-1")
        return found
