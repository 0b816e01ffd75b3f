"""From what a user says to token ids: prompt and lyric strings as the model was trained on, and their tokens.

Source: ACE-Step 1.5's prompt templates, as in diffusers' `AceStepPipeline`.
"""

import logging
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from acestep_jax.errors import InputError

logger = logging.getLogger(__name__)

INSTRUCTION = "Fill the audio semantic mask based on the given conditions:"
MAX_PROMPT_TOKENS = 256
MAX_LYRIC_TOKENS = 2048


class Tokens(NamedTuple):
    """Token ids of a batch, right-padded: [B, S] int32, and which are tokens: [B, S] bool."""

    ids: np.ndarray
    mask: np.ndarray


def prompt_text(
    prompt: str,
    *,
    audio_duration: float,
    bpm: int | None = None,
    keyscale: str | None = None,
    timesignature: str | None = None,
    instruction: str | None = None,
) -> str:
    """The text that the text encoder reads.

    Args:
        prompt: the caption.
        audio_duration: seconds; the model is told whole ones.
        bpm, keyscale, timesignature: such as 120, "F# minor" and "4"; None: the model decides.
        instruction: None: that of text to music.

    Raises:
        InputError: if the prompt is empty.
    """
    if not prompt.strip():
        raise InputError("prompt: it is empty; describe the music in a few words")
    instruction = instruction or INSTRUCTION
    if not instruction.endswith(":"):
        instruction += ":"
    metas = (
        f"- bpm: {bpm if bpm is not None and bpm > 0 else 'N/A'}\n"
        f"- timesignature: {_or_unknown(timesignature)}\n"
        f"- keyscale: {_or_unknown(keyscale)}\n"
        f"- duration: {int(audio_duration)} seconds\n"
    )
    return f"# Instruction\n{instruction}\n\n# Caption\n{prompt}\n\n# Metas\n{metas}<|endoftext|>\n"


def lyric_text(lyrics: str, vocal_language: str) -> str:
    """The text whose token embeddings the lyric encoder reads."""
    return f"# Languages\n{vocal_language}\n\n# Lyric\n{lyrics}<|endoftext|>"


def tokenize(tokenizer: Tokenizer, texts: list[str], *, max_length: int, multiple: int, what: str) -> Tokens:
    """Tokenises a batch; warns with the number of tokens that a text loses past `max_length`.

    Args:
        multiple: lengths are padded to a multiple of it, so that programs are compiled for few lengths.
        what: the name of the texts in the warning.
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    whole = [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    for i, length in enumerate(whole):
        if length > max_length:
            logger.warning(
                "%s %d has %d tokens and the model reads %d: the last %d are cut",
                what,
                i,
                length,
                max_length,
                length - max_length,
            )
    # The library cuts the text itself, so that the end-of-text token of its post-processor stays.
    tokenizer.enable_truncation(max_length)
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    tokenizer.no_truncation()
    size = -(-max(map(len, rows)) // multiple) * multiple
    ids = np.zeros((len(rows), size), np.int32)
    mask = np.zeros((len(rows), size), bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return Tokens(ids, mask)


def _or_unknown(value: str | None) -> str:
    return value if value is not None and value.strip() else "N/A"
