"""The language model's prompt in each mode, as pieces of text, marks and audio codes.

    <|im_start|>system
    # Instruction
    {instruction}

    <|im_end|>
    <|im_start|>user
    {user}<|im_end|>
    <|im_start|>assistant

Modes: `generate` writes metadata for a caption and lyrics, then audio codes for them; `inspire` writes a song for a
query, `format` rewrites caption and lyrics, `understand` describes audio codes.

Source: ACE-Step 1.5, acestep/llm_inference.py and acestep/constants.py, as of May 2026; Qwen3's chat template.
"""

from acestep_jax.errors import InputError, nearest
from acestep_jax.planner import cot
from acestep_jax.planner.metadata import INSTRUMENTAL, Known, Metadata
from acestep_jax.planner.tokenizer import Mark, Pieces

INSTRUCTIONS = {
    "generate": "Generate audio semantic tokens based on the given conditions:",
    "inspire": "Expand the user's input into a more detailed and specific musical description:",
    "format": "Format the user's input into a more detailed and specific musical description:",
    "understand": "Understand the given musical conditions and describe the audio semantics accordingly:",
}
NOTHING = "NO USER INPUT"


def metadata_prompt(mode: str, known: Known) -> list:
    """Return the prompt after which the model writes metadata and, except in `generate`, lyrics.

    Raises:
        InputError: if the mode is unknown, or there are no audio codes to understand.
    """
    if mode not in INSTRUCTIONS:
        raise InputError(f"mode: {nearest(mode, INSTRUCTIONS)}, found {mode!r}")
    caption, lyrics = known.caption, known.lyrics
    if mode == "generate":
        user = _song(caption, lyrics)
    elif mode == "inspire":
        query = caption if caption.strip() else NOTHING
        user = (f"{query}\n\ninstrumental: {'true' if known.instrumental else 'false'}",)
    elif mode == "format":
        caption, lyrics = caption if caption.strip() else NOTHING, lyrics if lyrics.strip() else INSTRUMENTAL
        user = (f"# Caption\n{caption}\n\n# Lyric\n{lyrics}",)
    else:
        if not known.codes:
            raise InputError("codes: expected audio codes to understand, found none")
        user = (tuple(known.codes),)
    return _chat(mode, user)


def codes_prompt(known: Known, metadata: Metadata) -> list:
    """Return the prompt after which the model writes audio codes: the user's own caption and lyrics, and the metadata
    as its thoughts. These include the caption only if the planner changed it."""
    thoughts = cot.dump(
        bpm=metadata.bpm,
        caption=metadata.caption if metadata.caption != known.caption else None,
        duration=metadata.duration,
        keyscale=metadata.keyscale,
        language=metadata.language,
        timesignature=metadata.timesignature,
    )
    return [
        *_chat("generate", _song(known.caption, known.lyrics)),
        *(Mark.THINK, f"\n{thoughts}\n", Mark.END_OF_THINK, "\n\n"),
    ]


def unconditional_codes_prompt(negative_prompt: str = "") -> list:
    """Return the prompt that guidance of audio codes steers away from; an empty one means no user input."""
    user = negative_prompt if negative_prompt.strip() else NOTHING
    return [*_chat("generate", (user,)), Mark.THINK, "\n\n", Mark.END_OF_THINK, "\n\n"]


def unconditional_understand_prompt() -> list:
    """Return the prompt of `understand` without audio codes, the baseline for scores."""
    return _chat("understand", (NOTHING,))


def _song(caption: str, lyrics: str) -> Pieces:
    return (f"# Caption\n{caption}\n\n# Lyric\n{lyrics}\n",)


def _chat(mode: str, user: Pieces) -> list:
    return [
        *(Mark.TURN, f"system\n# Instruction\n{INSTRUCTIONS[mode]}\n\n", Mark.END_OF_TURN, "\n"),
        *(Mark.TURN, "user\n", *user, Mark.END_OF_TURN, "\n"),
        *(Mark.TURN, "assistant\n"),
    ]
