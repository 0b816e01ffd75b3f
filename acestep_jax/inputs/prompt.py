"""From a request to token ids: prompt and lyric strings as the model was trained on, and their tokens.

Source: ACE-Step 1.5's prompt templates, as in diffusers' `AceStepPipeline`.
"""

import logging

import numpy as np
from tokenizers import Tokenizer

from acestep_jax.errors import InputError
from acestep_jax.inputs import tasks
from acestep_jax.models.registry import FAMILY

logger = logging.getLogger(__name__)

PAD = "<|endoftext|>"
TIME_SIGNATURES = ("2", "3", "4", "6")


def prompt_text(
    prompt: str,
    *,
    audio_duration: float,
    bpm: int | None = None,
    keyscale: str | None = None,
    timesignature: str | int | None = None,
    instruction: str | None = None,
) -> str:
    """Return the text that the text encoder reads.

    Args:
        prompt: the caption.
        audio_duration: seconds; the model is told whole ones.
        bpm: beats per minute, 30 to 300; None: chosen by the model, as are the next two.
        keyscale: such as "F# minor".
        timesignature: beats in a bar: 2, 3, 4 or 6.
        instruction: None: that of text2music.

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
    instruction = instruction or tasks.instruction(tasks.DEFAULT)
    if not instruction.endswith(":"):
        instruction += ":"
    return FAMILY.prompt.format(
        instruction=instruction,
        caption=prompt,
        bpm="N/A" if bpm is None else bpm,
        timesignature=_or_unknown(timesignature),
        keyscale=_or_unknown(keyscale),
        duration=int(audio_duration),
    )


def lyric_text(lyrics: str, vocal_language: str) -> str:
    """Return the text whose token embeddings the lyric encoder reads."""
    return FAMILY.lyrics.format(language=vocal_language, lyrics=lyrics)


def tokenize(tokenizer: Tokenizer, texts: list[str], *, max_length: int, what: str) -> list[np.ndarray]:
    """Return the token ids of texts, [n] int32 each; warns with the number of tokens cut beyond `max_length`.

    Args:
        what: the name of the texts in messages.

    Raises:
        InputError: if a text holds something that is not a Unicode character.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{what}: not valid text ({error.reason}); is it in UTF-8?") from None
    encodings = tokenizer.encode_batch(texts)
    longest = max(len(encoding.ids) for encoding in encodings)
    if longest > max_length:
        logger.warning(
            "%s: %d tokens, but the model reads %d: %d are cut", what, longest, max_length, longest - max_length
        )
        # The library cuts the text itself, so that the end-of-text token of its post-processor stays.
        tokenizer.enable_truncation(max_length)
        try:
            encodings = tokenizer.encode_batch(texts)
        finally:
            tokenizer.no_truncation()
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


def _or_unknown(value: str | None) -> str:
    return value if value is not None and value.strip() else "N/A"
