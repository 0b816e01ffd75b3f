"""From a request to token ids: prompt and lyric strings as the model was trained on, and their tokens.

Source: ACE-Step 1.5's prompt templates, as in diffusers' `AceStepPipeline`.
"""

import logging
from collections.abc import Sequence

import numpy as np
from tokenizers import Encoding, Tokenizer

from acestep_jax.errors import InputError
from acestep_jax.inputs import fields, tasks
from acestep_jax.models.registry import FAMILY

logger = logging.getLogger(__name__)

PAD = "<|endoftext|>"
# Version of the rule for cutting prompts that are too long. Increase it when the rule changes, so that training data
# with such prompts is made again. Version 1, before there was a number, cut the end of the text.
CUT_RULE = 2
_METADATA = ("bpm", "timesignature", "keyscale", "duration")


class Prompt(str):
    """The text that the text encoder reads, with the position of the caption in it.

    Attributes:
        before, caption, after: its parts; the caption may be cut without losing the part after it.
    """

    before: str
    caption: str
    after: str

    def __new__(cls, before: str, caption: str, after: str) -> "Prompt":
        self = super().__new__(cls, f"{before}{caption}{after}")
        self.before, self.caption, self.after = before, caption, after
        return self

    def beyond(self, size: int) -> list[str]:
        """Return the names of the fields that are not completely within the first `size` characters."""
        ends = {"caption": len(self.before) + len(self.caption)}
        for name in _METADATA:
            start = self.after.find(f"- {name}: ")
            ends[name] = len(self.before) + len(self.caption) + self.after.find("\n", start)
        return [name for name, end in ends.items() if end > size]


def prompt_text(
    prompt: str,
    *,
    audio_duration: float,
    bpm: str | float | None = None,
    keyscale: str | None = None,
    timesignature: str | float | None = None,
    instruction: str | None = None,
) -> Prompt:
    """Return the text that the text encoder reads.

    Args:
        prompt: the caption.
        audio_duration: seconds; the prompt has whole seconds.
        bpm: beats per minute, 30 to 300; None: the model chooses it, as for the next two.
        keyscale: such as "F# minor".
        timesignature: beats in a bar: 2, 3, 4 or 6.
        instruction: the task's instruction; None: text2music's.

    Raises:
        InputError: if the prompt is empty, or the model was not trained on a value, see `inputs.fields`.
    """
    if not prompt.strip():
        raise InputError("prompt: it is empty; describe the music in a few words")
    instruction = instruction or tasks.instruction(tasks.DEFAULT)
    if not instruction.endswith(":"):
        instruction += ":"
    values = dict(
        instruction=instruction,
        bpm=_or_unknown(fields.bpm(bpm)),
        timesignature=_or_unknown(fields.timesignature(timesignature)),
        keyscale=_or_unknown(fields.keyscale(keyscale)),
        duration=int(audio_duration),
    )
    before, _, after = FAMILY.prompt.partition("{caption}")
    return Prompt(before.format(**values), fields.lines(prompt), after.format(**values))


def stems_caption(local: str, whole: str, instruction: str, *, explicit: bool) -> str:
    """Return the caption for models fine-tuned on stems: one track, the whole song, and whether the chunk mask is
    explicit. Instructions for a segment leave out the whole song. Source: ACE-Step 1.5,
    acestep/core/generation/handler/conditioning_text.py.

    Args:
        local: description of the track.
        whole: description of the song.
        explicit: whether the chunk mask is 0 and 1.
    """
    lines = [f"Local: {local}", f"Mask Control: {str(explicit).lower()}"]
    return "\n".join(lines if "a segment" in instruction.lower() else [f"Global: {whole}", *lines])


def lyric_text(lyrics: str, vocal_language: str) -> str:
    """Return the text whose token embeddings the lyric encoder reads; raise InputError on an unknown language."""
    return FAMILY.lyrics.format(language=fields.vocal_language(vocal_language), lyrics=fields.lines(lyrics))


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], *, max_length: int, what: str, keep_metadata: bool = True
) -> list[np.ndarray]:
    """Return the token ids of texts, [n] int32 each; a warning says what is cut of a text beyond `max_length` tokens.

    Args:
        what: the name of the texts in messages.
        keep_metadata: whether to cut a long caption, so that the part after it in a `Prompt` is read; otherwise the end
            of the text is cut, as in diffusers.

    Raises:
        InputError: if a text contains anything but Unicode characters.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{what}: not valid text ({error.reason}); is it in UTF-8?") from None
    encodings = tokenizer.encode_batch([str(text) for text in texts])
    said: set[str] = set()
    for i, text in enumerate(texts):
        if (length := len(encodings[i].ids)) <= max_length:
            continue
        message = f"{what}: {length} tokens, but the model reads {max_length}: "
        if (
            isinstance(text, Prompt)
            and keep_metadata
            and (caption := _fitting(tokenizer, text, max_length)) is not None
        ):
            encodings[i] = tokenizer.encode(f"{text.before}{caption}{text.after}")
            message += f"the caption is cut after {len(caption)} characters, ...{caption[-30:]!r}; the rest stays"
        else:
            encodings[i] = _cut(tokenizer, str(text), max_length)
            message += f"{length - max_length} are cut"
            if isinstance(text, Prompt):
                size = max((end for _, end in encodings[i].offsets), default=0)
                message += f", and with them {', '.join(text.beyond(size))}; shorten the prompt"
        if message not in said:
            logger.warning("%s", message)
        said.add(message)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


def _cut(tokenizer: Tokenizer, text: str, max_length: int) -> Encoding:
    """Return the encoding cut to `max_length`, as with the library's truncation, which leaves room for the
    post-processor's end-of-text token. The tokenizer itself is not changed, because other threads use it."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    encoding.truncate(max_length - tokenizer.num_special_tokens_to_add(False))
    return tokenizer.post_process(encoding)


def _fitting(tokenizer: Tokenizer, text: Prompt, max_length: int) -> str | None:
    """Return the longest beginning of the caption with which the prompt fits, cut between words if there is room for
    one word; None if the prompt does not fit even without a caption."""

    def fits(caption: str) -> bool:
        return len(tokenizer.encode(f"{text.before}{caption}{text.after}").ids) <= max_length

    low, high = 0, len(text.caption)  # `low` characters fit, `high` do not
    if not fits(""):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(text.caption[:middle].rstrip()) else (low, middle)
    caption = text.caption[:low]
    if not text.caption[low : low + 1].isspace() and len(words := caption.rsplit(None, 1)) == 2 and fits(words[0]):
        caption = words[0]
    return caption.rstrip()


def _or_unknown(value: str | int | None) -> str | int:
    return "N/A" if value is None else value
