"""The tasks, as one table. Later steps and training read its flags; they never compare names of tasks.

The transformer's context consists, for each latent frame, of a source latent and a flag: whether to generate the frame.

| task       | source latents                                            | chunk mask       |
|------------|-----------------------------------------------------------|------------------|
| text2music | silence                                                   | everywhere       |
| repaint    | the source's, silence in the regions                      | 1 in the regions |
| cover      | the source's through the audio tokenizer, or of its codes | everywhere       |
| cover-nofsq | the source's                                             | everywhere       |
| extract    | the source's                                              | everywhere       |
| lego       | the source's                                              | 1 in the regions |
| complete   | the source's                                              | everywhere       |

Source: ACE-Step 1.5, as in diffusers' `AceStepPipeline`.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from acestep_jax.errors import InputError

TRACKS = tuple("woodwinds brass fx synth strings percussion keyboard guitar bass drums backing_vocals vocals".split())

_SOURCE = ("src_audio", "src_latents")
_COVER = ("audio_cover_strength", "cover_noise_strength")
_EDIT = ("flow_edit_morph", "flow_edit_source_caption", "flow_edit_source_lyrics")
_REGIONS = ("repainting_start", "repainting_end")


@dataclasses.dataclass(frozen=True)
class Task:
    """What a task accepts, its context, and whether it is trained.

    Attributes:
        instruction: for the model; {} stands for the names of tracks.
        plain_instruction: the instruction without tracks, for tasks that take tracks.
        accepts: fields of `Request` and `Sampling` that this task accepts, out of those that only some tasks accept.
        needs_source: whether a source or audio codes are required.
        tokenized: whether the source goes through the audio tokenizer.
        silent_source: whether the source latents are silence everywhere.
        has_regions: whether the chunk mask is 1 only in regions.
        silent_regions: whether the source latents are silence in the regions; outside, the source's audio is kept.
        max_tracks: maximum number of tracks.
        turbo: whether turbo models were trained for the task.
        with_codes: task of a request that has audio codes; None: the same task.
        trained: whether training samples the task.
    """

    instruction: str
    plain_instruction: str | None = None
    accepts: tuple[str, ...] = _SOURCE
    needs_source: bool = True
    tokenized: bool = False
    silent_source: bool = False
    has_regions: bool = False
    silent_regions: bool = False
    max_tracks: int = 0
    turbo: bool = True
    with_codes: str | None = None
    trained: bool = False


DEFAULT = "text2music"

TASKS = {
    DEFAULT: Task(
        "Fill the audio semantic mask based on the given conditions:",
        accepts=_EDIT,
        needs_source=False,
        silent_source=True,
        with_codes="cover",
        trained=True,
    ),
    "repaint": Task(
        "Repaint the mask area based on the given conditions:",
        accepts=(*_SOURCE, *_REGIONS),
        has_regions=True,
        silent_regions=True,
        trained=True,
    ),
    "cover": Task(
        "Generate audio semantic tokens based on the given conditions:",
        accepts=(*_SOURCE, *_COVER, *_EDIT, "audio_codes"),
        tokenized=True,
        trained=True,
    ),
    "cover-nofsq": Task(
        "Generate audio semantic tokens based on the given conditions:",
        accepts=(*_SOURCE, *_COVER, *_EDIT),
    ),
    "extract": Task(
        "Extract the {} track from the audio:",
        "Extract the track from the audio:",
        accepts=(*_SOURCE, "track_name"),
        max_tracks=1,
        turbo=False,
    ),
    "lego": Task(
        "Generate the {} track based on the audio context:",
        "Generate the track based on the audio context:",
        accepts=(*_SOURCE, *_REGIONS, "track_name"),
        has_regions=True,
        max_tracks=1,
        turbo=False,
    ),
    "complete": Task(
        "Complete the input track with {}:",
        "Complete the input track:",
        accepts=(*_SOURCE, "track_name", "complete_track_classes"),
        max_tracks=len(TRACKS),
        turbo=False,
    ),
}


def find(task_type: str) -> Task:
    """Return the task called `task_type`.

    Raises:
        InputError: if there is no such task.
    """
    if task_type not in TASKS:
        raise InputError(f"task_type: expected one of {', '.join(TASKS)}, found {task_type!r}")
    return TASKS[task_type]


def accepting(field: str) -> list[str]:
    """Return the names of the tasks that accept a field."""
    special = {name for task in TASKS.values() for name in task.accepts}
    return [name for name, task in TASKS.items() if field not in special or field in task.accepts]


def instruction(task_type: str, tracks: Sequence[str] = ()) -> str:
    """Return the instruction of a task.

    Args:
        task_type: one of `TASKS`.
        tracks: some of `TRACKS`, at most `Task.max_tracks`.

    Raises:
        InputError: if the task or a track is unknown, or there are too many tracks for the task.
    """
    task = find(task_type)
    for name in tracks:
        if name not in TRACKS:
            raise InputError(f"track_name: unknown track {name!r}; expected one of {', '.join(TRACKS)}")
    if not tracks:
        return task.plain_instruction or task.instruction
    if len(tracks) > task.max_tracks:
        most = {0: "no track", 1: "one track"}.get(task.max_tracks, f"{task.max_tracks} tracks")
        raise InputError(f"track_name: the task {task_type} takes {most}, found {', '.join(tracks)}; leave out others")
    return task.instruction.format(" | ".join(name.upper() for name in tracks))


@dataclasses.dataclass(frozen=True)
class Extent:
    """The regions of a song. Regions may extend the song beyond its source, on both sides.

    Attributes:
        left: number of latent frames before the source begins.
        frames: number of latent frames of the whole song.
        regions: (first, one past the last) latent frame of each region.
        seconds: (start, end) of each region, where the audio changes; within its frames.
    """

    left: int
    frames: int
    regions: tuple[tuple[int, int], ...]
    seconds: tuple[tuple[float, float], ...]

    def mask(self) -> np.ndarray:
        """Return [frames] bool, true in the regions."""
        i = np.arange(self.frames)
        return np.any([(start <= i) & (i < end) for start, end in self.regions], axis=0)


def extent(
    starts: Sequence[float | None],
    ends: Sequence[float | None],
    source_frames: int,
    rate: float,
    max_seconds: float,
    *,
    outward: bool = True,
) -> Extent:
    """Return the regions in latent frames, given in seconds of the source.

    A region that begins before 0, or ends after the source, extends the song.

    Args:
        starts: seconds; None: 0.
        ends: seconds; None or -1: the end of the source.
        source_frames: number of latent frames of the source.
        rate: latent frames per second.
        max_seconds: maximum length of a song.
        outward: whether to round outwards: frames that a region only touches belong to it, and the audio changes
            exactly where the region was requested. Otherwise both ends are rounded down to frames, as in diffusers.

    Raises:
        InputError: if a region is empty or does not touch the source, or the song would be longer than max_seconds.
    """
    regions, source_seconds = [], source_frames / rate
    for start, end in zip(starts, ends, strict=True):
        start = 0.0 if start is None else float(start)
        end = source_seconds if end is None or end == -1 and start >= 0 else float(end)
        if not start < end:  # also if one of them is NaN
            raise InputError(
                f"repainting_start, repainting_end: expected a start before the end, found {start:g} and {end:g} s "
                f"(the song has {source_seconds:g} s)"
            )
        regions.append((start, end))
    # A gap between source and region would be silence that nobody requested.
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
    shift = _ceil(left * rate) if outward else int(np.ceil(left * rate))

    def last(end: float) -> int:
        return _ceil(end * rate) if outward else int(end * rate)

    inner = [
        (shift + int(np.floor(start * rate + (_NEAR if outward else 0))), shift + last(end)) for start, end in regions
    ]
    frames = max(shift + source_frames, max(end for _, end in inner))
    inner = [(min(start, frames - 1), max(end, start + 1)) for start, end in inner]
    seconds = [(start / rate, end / rate) for start, end in inner]
    if outward:
        # Without a source, the whole frame is new.
        seconds = [
            (shift / rate + start if start >= 0 else first, shift / rate + end if end <= source_seconds else last)
            for (start, end), (first, last) in zip(regions, seconds, strict=True)
        ]
    return Extent(shift, frames, tuple(inner), tuple(seconds))


_NEAR = 1e-6  # tolerance in frames for rounding errors of region ends


def _ceil(frames: float) -> int:
    return int(np.ceil(frames - _NEAR))


_CODE = re.compile(r"<\|audio_code_(-?\d+)\|>")


def codes_from_text(text: str, codebook_size: int) -> np.ndarray:
    """Return the audio codes in a text such as "<|audio_code_123|>...", [n] int32; any other text is ignored.

    Raises:
        InputError: if there is no code, or one is out of range.
    """
    codes = [int(number) for number in _CODE.findall(text)]
    if not codes:
        raise InputError(f"audio_codes: expected <|audio_code_N|> one after the other, found none in {text[:40]!r}")
    if bad := [code for code in codes if not 0 <= code < codebook_size]:
        raise InputError(f"audio_codes: expected codes from 0 to {codebook_size - 1}, found {bad[0]}")
    return np.array(codes, np.int32)


def codes_to_text(codes: Sequence[int] | np.ndarray) -> str:
    """Return codes as text, the inverse of `codes_from_text`."""
    return "".join(f"<|audio_code_{int(code)}|>" for code in codes)
