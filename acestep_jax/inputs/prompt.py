"""From what a user says to token ids: prompt and lyric strings as the model was trained on, and their tokens.

Source: ACE-Step 1.5's prompt templates, as in diffusers' `AceStepPipeline`.
"""

import logging
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from acestep_jax.errors import InputError
from acestep_jax.inputs import tasks

logger = logging.getLogger(__name__)

MAX_PROMPT_TOKENS = 256
MAX_LYRIC_TOKENS = 2048
PAD = "<|endoftext|>"
TIME_SIGNATURES = ("2", "3", "4", "6")


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
    timesignature: str | int | None = None,
    instruction: str | None = None,
) -> str:
    """The text that the text encoder reads.

    Args:
        prompt: the caption.
        audio_duration: seconds; the model is told whole ones.
        bpm: beats per minute, 30 to 300; keyscale: such as "F# minor"; timesignature: 2, 3, 4 or 6, beats in a bar.
            None: the model decides.
        instruction: None: that of text to music.

    Raises:
        InputError: if the prompt is empty, or bpm or timesignature is one the model was not trained on.
    """
    if not prompt.strip():
        raise InputError("prompt: it is empty; describe the music in a few words")
    if bpm is not None and not 30 <= bpm <= 300:
        raise InputError(f"bpm: expected 30 to 300 beats per minute, found {bpm}")
    timesignature = "" if timesignature is None else str(timesignature).strip()
    if timesignature and timesignature not in TIME_SIGNATURES:
        raise InputError(f"timesignature: expected one of {', '.join(TIME_SIGNATURES)}, found {timesignature!r}")
    instruction = instruction or tasks.instruction("text2music")
    if not instruction.endswith(":"):
        instruction += ":"
    metas = (
        f"- bpm: {bpm if bpm is not None else 'N/A'}\n"
        f"- timesignature: {_or_unknown(timesignature)}\n"
        f"- keyscale: {_or_unknown(keyscale)}\n"
        f"- duration: {int(audio_duration)} seconds\n"
    )
    return f"# Instruction\n{instruction}\n\n# Caption\n{prompt}\n\n# Metas\n{metas}<|endoftext|>\n"


def lyric_text(lyrics: str, vocal_language: str) -> str:
    """The text whose token embeddings the lyric encoder reads."""
    return f"# Languages\n{vocal_language}\n\n# Lyric\n{lyrics}<|endoftext|>"


def tokenize(
    tokenizer: Tokenizer, texts: list[str], *, max_length: int, multiple: int, what: str, pad: str | None = None
) -> Tokens:
    """Tokenises a batch; warns with the number of tokens that a text loses past `max_length`.

    Args:
        multiple: lengths are padded to a multiple of it, so that programs are compiled for few lengths.
        what: the name of the texts in messages.
        pad: the token to pad with, where padding is not masked; None: number 0.

    Raises:
        InputError: if `max_length` is below 1, or a text holds what is no Unicode character.
    """
    if max_length < 1:
        raise InputError(f"{what}: expected a maximum length of at least 1 token, found {max_length}")
    for i, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{what} {i}: not valid text ({error.reason}); is it in UTF-8?") from None
    encodings = tokenizer.encode_batch(texts)
    for i, encoding in enumerate(encodings):
        if (length := len(encoding.ids)) > max_length:
            lost = length - max_length
            logger.warning("%s %d has %d tokens and the model reads %d: %d are cut", what, i, length, max_length, lost)
    if any(len(encoding.ids) > max_length for encoding in encodings):
        # The library cuts the text itself, so that the end-of-text token of its post-processor stays.
        tokenizer.enable_truncation(max_length)
        try:
            encodings = tokenizer.encode_batch(texts)
        finally:
            tokenizer.no_truncation()
    rows = [encoding.ids for encoding in encodings]
    size = -(-max(map(len, rows)) // multiple) * multiple
    ids = np.full((len(rows), size), (pad and tokenizer.token_to_id(pad)) or 0, np.int32)
    mask = np.zeros((len(rows), size), bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return Tokens(ids, mask)


def _or_unknown(value: str | None) -> str:
    return value if value is not None and value.strip() else "N/A"
