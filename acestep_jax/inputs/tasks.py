"""The six tasks, each as (instruction, source latents, chunk mask). What comes after does not know tasks.

The transformer's context is, for each latent frame, a source latent and whether the frame is to be made anew:

| task       | source latents                                       | chunk mask           |
|------------|------------------------------------------------------|----------------------|
| text2music | silence                                              | everywhere           |
| repaint    | the song's, silence in the regions                   | 1 in the regions     |
| cover      | the song's through the audio tokenizer, or of codes  | everywhere           |
| extract    | the song's                                           | everywhere           |
| lego       | the song's                                           | 1 in the regions     |
| complete   | the song's                                           | everywhere           |

Source: ACE-Step 1.5, as in diffusers' `AceStepPipeline`.
"""

import dataclasses
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.errors import InputError

TRACKS = tuple("woodwinds brass fx synth strings percussion keyboard guitar bass drums backing_vocals vocals".split())


@dataclasses.dataclass(frozen=True)
class Task:
    """What the prompt asks for, and what the context is made of.

    instruction: to the model; {} stands for the names of tracks.
    plain_instruction: without names, for tasks that take some.
    needs_audio: whether there must be a song to work on.
    tokenized: whether the song goes through the audio tokenizer.
    has_regions: whether the chunk mask is 1 in regions only; silent_regions: whether the source is silent there.
    turbo: whether turbo models were trained for it.
    """

    instruction: str
    plain_instruction: str | None = None
    needs_audio: bool = True
    tokenized: bool = False
    has_regions: bool = False
    silent_regions: bool = False
    turbo: bool = True


TASKS = {
    "text2music": Task("Fill the audio semantic mask based on the given conditions:", needs_audio=False),
    "repaint": Task("Repaint the mask area based on the given conditions:", has_regions=True, silent_regions=True),
    "cover": Task("Generate audio semantic tokens based on the given conditions:", tokenized=True),
    "extract": Task("Extract the {} track from the audio:", "Extract the track from the audio:", turbo=False),
    "lego": Task(
        "Generate the {} track based on the audio context:",
        "Generate the track based on the audio context:",
        has_regions=True,
        turbo=False,
    ),
    "complete": Task("Complete the input track with {}:", "Complete the input track:", turbo=False),
}


def instruction(task_type: str, tracks: Sequence[str] = ()) -> str:
    """What the prompt asks for.

    Args:
        task_type: one of `TASKS`.
        tracks: of `TRACKS`; one for extract and lego, any number for complete, none for the others.

    Raises:
        InputError: if there is no such task or track, or the task takes none or one.
    """
    task = find(task_type)
    for name in tracks:
        if name not in TRACKS:
            raise InputError(f"track_name: unknown track {name!r}; expected one of {', '.join(TRACKS)}")
    if not tracks:
        return task.plain_instruction or task.instruction
    if task.plain_instruction is None:
        raise InputError(f"track_name: the task {task_type} takes none, found {', '.join(tracks)}; leave it out")
    if len(tracks) > 1 and task_type != "complete":
        raise InputError(f"track_name: the task {task_type} takes one, found {', '.join(tracks)}")
    return task.instruction.format(" | ".join(name.upper() for name in tracks))


def find(task_type: str) -> Task:
    """The task of that name. Raises InputError if there is none."""
    if task_type not in TASKS:
        raise InputError(f"task_type: expected one of {', '.join(TASKS)}, found {task_type!r}")
    return TASKS[task_type]


def context_latents(source: jax.Array, silence: jax.Array, silent: jax.Array, mask: jax.Array) -> jax.Array:
    """The transformer's context, [B, T, 2 C]: source latents [B, T, C], those of `silence` [1, T, C] where `silent`
    [B, T], and the chunk mask [B, T] for each channel."""
    source = jnp.where(silent[:, :, None], silence, source)
    return jnp.concatenate([source, jnp.broadcast_to(mask[:, :, None], source.shape).astype(source.dtype)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Extent:
    """Where the regions lie, in latent frames of the song that is made: the source, with what they add on both sides.

    left: frames before the source begins; frames: of the whole; regions: (first, one past the last).
    """

    left: int
    frames: int
    regions: tuple[tuple[int, int], ...]

    def mask(self) -> np.ndarray:
        """[frames] bool, true in the regions."""
        i = np.arange(self.frames)
        return np.any([(start <= i) & (i < end) for start, end in self.regions], axis=0)


def extent(
    starts: Sequence[float | None], ends: Sequence[float | None], source_frames: int, rate: float, max_seconds: float
) -> Extent:
    """Regions given in seconds of the source song. One that begins before 0 or ends after it makes the song longer.

    Args:
        starts: seconds; None: 0.
        ends: seconds; None or -1: the end of the source.
        source_frames: of the source.
        rate: latent frames in a second.
        max_seconds: the longest song.

    Raises:
        InputError: if a region is empty or does not touch the source, or the song becomes longer than max_seconds.
    """
    regions, source_seconds = [], source_frames / rate
    for start, end in zip(starts, ends, strict=True):
        start = 0.0 if start is None else float(start)
        end = source_seconds if end is None or end == -1 and start >= 0 else float(end)
        if not start < end:  # also where either is not a number
            raise InputError(
                f"repainting_start, repainting_end: expected a start before the end, found {start:g} and {end:g} s "
                f"(the song has {source_seconds:g} s)"
            )
        regions.append((start, end))
    # What lies between would be silence that nobody asked for.
    if (late := max(start for start, _ in regions)) > source_seconds:
        raise InputError(f"repainting_start: expected at most the song's end, {source_seconds:g} s, found {late:g} s")
    if (early := min(end for _, end in regions)) < 0:
        raise InputError(
            f"repainting_end: expected 0 s or later, where the song begins, or -1 for its end, found {early:g} s"
        )
    left = max(0.0, -min(start for start, _ in regions))
    seconds = left + max(source_seconds, max(end for _, end in regions))
    if seconds > max_seconds:
        raise InputError(
            f"repainting_start, repainting_end: with these the song is {seconds:g} s long, expected at most "
            f"{max_seconds:g} s"
        )
    shift = int(np.ceil(left * rate))
    inner = [(shift + int(np.floor(start * rate)), shift + int(end * rate)) for start, end in regions]
    frames = max(shift + source_frames, max(end for _, end in inner))
    inner = [(min(start, frames - 1), max(end, start + 1)) for start, end in inner]
    return Extent(shift, frames, tuple(inner))


_CODE = re.compile(r"<\|audio_code_(-?\d+)\|>")


def codes_from_text(text: str, codebook_size: int) -> np.ndarray:
    """[n] int32: the numbers of "<|audio_code_123|>..."; what stands between the codes is ignored.

    Raises:
        InputError: if there is none, or one is out of range.
    """
    codes = [int(number) for number in _CODE.findall(text)]
    if not codes:
        raise InputError(f"audio_codes: expected <|audio_code_N|> one after the other, found none in {text[:40]!r}")
    if bad := [code for code in codes if not 0 <= code < codebook_size]:
        raise InputError(f"audio_codes: expected codes from 0 to {codebook_size - 1}, found {bad[0]}")
    return np.array(codes, np.int32)


def codes_to_text(codes: Sequence[int] | np.ndarray) -> str:
    """The inverse of `codes_from_text`."""
    return "".join(f"<|audio_code_{int(code)}|>" for code in codes)
