"""When each line of the lyrics is sung, read from the transformer's cross-attention; LRC files; how well it fits.

    W        probabilities of some heads, [heads, N tokens, M frames]
    path     the cheapest way from (0, 0) to (N - 1, M - 1) by dynamic time warping
    times    of a token, the first and the last frame on its row

Source: ACE-Step 1.5, acestep/core/scoring/dit_alignment.py and dit_score.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from acestep_jax.diffusion import denoise, noise
from acestep_jax.distributed import on_host
from acestep_jax.errors import InputError
from acestep_jax.inputs import sources
from acestep_jax.inputs.collate import collate
from acestep_jax.inputs.prepare import Job
from acestep_jax.inputs.prompt import PAD
from acestep_jax.io.files import as_path, check_output, publish_file
from acestep_jax.models.alignment import alignment_heads
from acestep_jax.planner import attention_maps

SEED = 42  # of the noise that the song is looked at through
FACTOR = 2.0  # of the medians that are taken off
VISIBLE, PRESENT, SLACK = (
    0.1,
    0.01,
    9,
)  # energy of a token that is sung; of frames that count; frames that lines may slip
HEADER = "# Lyric\n"  # what the lyrics follow in the text that is tokenised


class Line(NamedTuple):
    """A line of the lyrics, and when it is sung, in seconds."""

    start: float
    end: float
    text: str


@dataclasses.dataclass(frozen=True)
class Timestamps:
    """When lyrics are sung.

    Attributes:
        lines: in their order; tags such as [Verse] are lines, too.
        score: how well the song fits its lyrics, from 0 to 1.
        codes_score: the same of what the condition alone implies, without the song.
    """

    lines: tuple[Line, ...]
    score: float
    codes_score: float

    def lrc(self) -> str:
        """Return the lines as LRC, `[mm:ss.xx]text` each."""
        return "".join(f"[{_clock(line.start)}]{line.text}\n" for line in self.lines)


def _clock(seconds: float) -> str:
    """Return mm:ss.xx; hundredths are rounded before minutes are taken, so that there is no 60th second."""
    minutes, hundredths = divmod(round(seconds * 100), 6000)
    return f"{minutes:02d}:{hundredths / 100:05.2f}"


def write_lrc(path: str | Path, timestamps: Timestamps, *, overwrite: bool = False) -> Path:
    """Write an LRC file atomically, and return its path.

    Raises:
        InputError: see `check_output`.
    """
    check_output(path, overwrite=overwrite)
    with publish_file(path) as temporary:
        temporary.write_text(timestamps.lrc(), encoding="utf-8")
    return as_path(path)


def check_alignment(config: Any, job: Job) -> None:
    """Raise InputError if the transformer's heads are not known, or the song has no lyrics."""
    alignment_heads(config)
    if not has_lyrics(job.request.lyrics):
        raise InputError("lyrics: timestamps and alignment scores are of what is sung; this song has no lyrics")


def has_lyrics(lyrics: str | None) -> bool:
    """Return whether there is something to sing besides tags."""
    lines = (line.strip() for line in (lyrics or "").splitlines())
    return any(line and not (line.startswith("[") and line.endswith("]")) for line in lines)


def align(
    networks: Mapping[str, Any], tokenizer: Tokenizer, job: Job, latents: np.ndarray, *, steps: int
) -> Timestamps:
    """Return when the lyrics of a song are sung, and how well they fit.

    Args:
        networks: by name, on the device; within the mesh in use.
        tokenizer: of the model.
        job: that the song was made from, or would be.
        latents: [frames, C] float32, of the song.
        steps: of the sampling: the song is looked at through noise of the time 1 / steps.

    Raises:
        InputError: see `check_alignment`; also if the latents are not as long as the job's.
    """
    transformer, encoder = networks["transformer"], networks["condition_encoder"]
    check_alignment(transformer.config, job)
    if len(latents) != job.frames:
        raise InputError(f"latents: expected the song's {job.frames} frames, found {len(latents)}")
    pad = tokenizer.token_to_id(PAD)
    first, texts = token_texts(tokenizer, job.lyric_ids, pad)
    batch = collate([job])
    condition, _, _ = sources.conditions(networks, batch, sources.references(networks, [job]), attend_to_padding=False)
    _, source = sources.source_latents(networks, [job], batch.frames, latents.shape[1])
    drawn = np.array(noise.normal(noise.key(SEED)[None], (batch.frames, latents.shape[1])))
    song = np.zeros_like(drawn)
    song[0, : job.frames] = latents
    maps = on_host(
        attention_maps.attention_maps(
            transformer,
            encoder,
            denoise.Condition(*condition),
            np.concatenate([drawn, song]),
            np.array([1.0, 1.0 / steps], np.float32),
            (source, batch.silent, batch.mask, batch.lengths),
            heads=tuple(sorted(alignment_heads(transformer.config).items())),
        )
    )  # [2, heads, S, T]
    patch = transformer.config.patch_size
    maps = maps[:, :, first : first + len(texts), : -(-job.frames // patch)]
    seconds = job.frames * networks["vae"].hop_length / networks["vae"].config.sampling_rate
    sung = ~tag_mask(texts)
    return Timestamps(
        lines=tuple(lines_of(texts, token_times(maps[1], seconds))),
        score=lyric_score(maps[1].mean(0), sung),
        codes_score=lyric_score(maps[0].mean(0), sung),
    )


def token_texts(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, end: int | None) -> tuple[int, list[str]]:
    """Return the index of the first token of the lyrics, and the text of each of them.

    A character that several tokens make together is the last one's.

    Args:
        ids: of the lyrics with what stands before and after them, see `inputs.prompt.lyric_text`.
        end: the token that they end with.
    """
    ids = [int(i) for i in ids]
    stop = ids.index(end) if end in ids else len(ids)
    texts, said, first = [], "", 0
    for i in range(stop):
        whole = tokenizer.decode(ids[: i + 1], skip_special_tokens=False)
        if HEADER not in said:
            said, first = whole, i + 1
            continue
        whole = said if whole.endswith("�") and i + 1 < stop else whole
        texts.append(whole[len(said) :])
        said = whole
    return first, texts


def tag_mask(texts: Sequence[str]) -> np.ndarray:
    """Return which tokens belong to a tag such as [Verse], with its brackets; [N] bool."""
    mask, inside = np.zeros(len(texts), bool), False
    for i, text in enumerate(texts):
        inside = inside or "[" in text
        mask[i] = inside
        if "]" in text:
            inside = text.rfind("[") > text.rfind("]")
    return mask


def token_times(maps: np.ndarray, seconds: float) -> np.ndarray:
    """Return first and last time of each token, [N, 2] seconds.

    Args:
        maps: [heads, N, M] float32, probabilities.
        seconds: of all frames.
    """
    rows, frames = warp(-sharpened(maps)).T
    count, length = maps.shape[1:]
    times = np.zeros((count, 2))
    for i in range(count):
        own = frames[rows == i]
        times[i] = (own.min(), own.max()) if len(own) else (times[i - 1, 1] if i else 0.0,) * 2
    return times * seconds / length


def sharpened(maps: np.ndarray) -> np.ndarray:
    """Return how much tokens stand out at frames, [N, M] float32, of probabilities [heads, N, M]."""
    maps = np.asarray(maps, np.float32)
    p = _softmax(maps, 2) * _softmax(maps, 1)
    for axis in (2, 1):
        p = np.maximum(p - np.float32(FACTOR) * np.median(p, axis, keepdims=True), 0)
    p = p**2
    return ((p - p.mean()) / (p.std() + np.float32(1e-9))).mean(0)


def _softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def warp(cost: np.ndarray) -> np.ndarray:
    """Return the cheapest path through costs [N, M] from the first cell to the last, [P, 2] int: rows and columns.

    A step goes one row down, one column on, or both. Both, if what it comes from is cheaper than the other two; else a
    row, if that is; else a column. Sums are float32. Cells of one anti-diagonal do not depend on each other, and are
    computed at once.
    """
    count, length = cost.shape
    total = np.full((count + 1, length + 1), np.inf, np.float32)
    total[0, 0] = 0
    came = np.zeros((count + 1, length + 1), np.int8)
    cost = cost.astype(np.float32)
    for diagonal in range(2, count + length + 1):
        i = np.arange(max(1, diagonal - length), min(count, diagonal - 1) + 1)
        j = diagonal - i
        both, row, column = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
        step = np.where((both < row) & (both < column), 0, np.where((row < both) & (row < column), 1, 2))
        came[i, j] = step
        total[i, j] = cost[i - 1, j - 1] + np.choose(step, (both, row, column))
    i, j, path = count, length, []
    while i > 0 and j > 0:
        path.append((i - 1, j - 1))
        step = came[i, j]
        i, j = i - (step != 2), j - (step != 1)
    return np.array(path[::-1])


def lines_of(texts: Sequence[str], times: np.ndarray) -> list[Line]:
    """Return the lines that tokens make, up to and with one that has a line end; blank ones are left out."""
    lines, begin = [], 0
    for i, text in enumerate(texts):
        if "\n" not in text and i + 1 < len(texts):
            continue
        words = "".join(texts[begin : i + 1]).strip()
        if words:
            lines.append(Line(round(float(times[begin, 0]), 3), round(float(times[i, 1]), 3), words))
        begin = i + 1
    return lines


def lyric_score(energy: np.ndarray, sung: np.ndarray) -> float:
    """Return coverage^2 monotonicity^2 confidence, from 0 to 1, in four decimals.

    coverage: how many tokens that are sung stand out anywhere. monotonicity: of how many neighbours the second is not
    before the first. confidence: the mean energy along the path.

    Args:
        energy: [N, M], the mean of probabilities over heads.
        sung: [N] bool, which tokens belong to no tag.
    """
    energy = np.asarray(energy, np.float64)
    spread = energy.max() - energy.min()
    energy = (energy - energy.min()) / spread if spread > 1e-9 else np.zeros_like(energy)
    path = warp(-(energy**2))
    own = energy[sung]
    coverage = float((own.max(1) > VISIBLE).mean()) if len(own) else 1.0
    weights = np.where(own > PRESENT, own, 0.0)
    mass = weights.sum(1)
    places = (weights @ np.arange(energy.shape[1]))[mass > 0] / mass[mass > 0]
    monotonicity = float((places[1:] >= places[:-1] - SLACK).mean()) if len(places) > 1 else 1.0
    confidence = float(energy[path[:, 0], path[:, 1]].mean())
    return round(min(max(coverage**2 * monotonicity**2 * confidence, 0.0), 1.0), 4)
