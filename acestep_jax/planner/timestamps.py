"""Timestamps of the lyrics' lines from the transformer's cross-attention; LRC files; alignment scores.

    W        attention probabilities of some heads, [heads, N tokens, M frames]
    path     the cheapest path from (0, 0) to (N - 1, M - 1) by dynamic time warping
    times    the first and the last frame in a token's row of the path

Source: ACE-Step 1.5, acestep/core/scoring/dit_alignment.py and dit_score.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
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

SEED = 42  # seed of the noise that is added to the song
FACTOR = 2.0  # factor of the subtracted medians
VISIBLE = 0.1  # minimum energy of a sung token
PRESENT = 0.01  # minimum energy of the frames that count
SLACK = 9  # tolerance of the line order, in frames
HEADER = "# Lyric\n"  # precedes the lyrics in the tokenised text


class TimedText(NamedTuple):
    """A line or a word of the lyrics with its start and end, in seconds."""

    start: float
    end: float
    text: str


@dataclasses.dataclass(frozen=True)
class Timestamps:
    """The timestamps of the lyrics.

    Attributes:
        lines: lines in order; tags such as [Verse] are lines, too.
        words: words in order, without tags; in a language without spaces, a line is one word.
        score: how well the song matches its lyrics, from 0 to 1.
        codes_score: the same for the condition alone, without the song.
    """

    lines: tuple[TimedText, ...]
    score: float
    codes_score: float
    words: tuple[TimedText, ...] = ()

    def lrc(self) -> str:
        """Return the lines as LRC, `[mm:ss.xx]text` each."""
        return "".join(f"[{_clock(line.start)}]{line.text}\n" for line in self.lines)


def _clock(seconds: float) -> str:
    """Return mm:ss.xx; hundredths are rounded before minutes are split off, so that seconds stay below 60."""
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
    """Raise InputError if the transformer's alignment heads are unknown, or the song has no lyrics."""
    alignment_heads(config)
    if not has_lyrics(job.request.lyrics):
        raise InputError("lyrics: timestamps and alignment scores need sung lyrics; this song has no lyrics")


def has_lyrics(lyrics: str | None) -> bool:
    """Return whether there is something to sing besides tags."""
    lines = (line.strip() for line in (lyrics or "").splitlines())
    return any(line and not (line.startswith("[") and line.endswith("]")) for line in lines)


def align(
    networks: Mapping[str, Any],
    tokenizer: Tokenizer,
    job: Job,
    latents: np.ndarray,
    silent: jax.Array | None,
    *,
    steps: int,
) -> Timestamps:
    """Return the timestamps of a song's lyrics, and how well the song matches them.

    Args:
        networks: networks by name, on the device or the active mesh.
        tokenizer: tokenizer of the model.
        job: job that the song was made from, or would be.
        latents: [frames, C] float32, latents of the song.
        silent: timbre of a song without a reference, see `sources.SilentTimbre`.
        steps: number of sampling steps; noise is added to the song as at t = 1 / steps.

    Raises:
        InputError: see `check_alignment`; also if the latents do not have the job's length.
    """
    transformer, encoder = networks["transformer"], networks["condition_encoder"]
    check_alignment(transformer.config, job)
    if len(latents) != job.frames:
        raise InputError(f"latents: expected the song's {job.frames} frames, found {len(latents)}")
    pad = tokenizer.token_to_id(PAD)
    first, texts = token_texts(tokenizer, job.lyric_ids, pad)
    batch = collate([job])
    references = sources.references(networks, [job])
    condition, _, _ = sources.conditions(networks, batch, references, silent, attend_to_padding=False)
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
    sung, times = ~tag_mask(texts), token_times(maps[1], seconds)
    return Timestamps(
        lines=tuple(lines_of(texts, times)),
        words=tuple(words_of(texts, times, sung)),
        score=lyric_score(maps[1].mean(0), sung),
        codes_score=lyric_score(maps[0].mean(0), sung),
    )


def token_texts(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, end: int | None) -> tuple[int, list[str]]:
    """Return the index of the first token of the lyrics, and the text of each of their tokens.

    A character that spans several tokens belongs to the last one.

    Args:
        ids: token ids of the whole lyric prompt, see `inputs.prompt.lyric_text`.
        end: the token that ends it.
    """
    ids = [int(i) for i in ids]
    stop = ids.index(end) if end in ids else len(ids)
    texts, prefix, first = [], "", 0
    for i in range(stop):
        text = tokenizer.decode(ids[: i + 1], skip_special_tokens=False)
        if HEADER not in prefix:
            prefix, first = text, i + 1
            continue
        text = prefix if text.endswith("�") and i + 1 < stop else text
        texts.append(text[len(prefix) :])
        prefix = text
    return first, texts


def tag_mask(texts: Sequence[str]) -> np.ndarray:
    """Return whether each token belongs to a tag such as [Verse], including brackets; [N] bool."""
    mask, inside = np.zeros(len(texts), bool), False
    for i, text in enumerate(texts):
        inside = inside or "[" in text
        mask[i] = inside
        if "]" in text:
            inside = text.rfind("[") > text.rfind("]")
    return mask


def token_times(maps: np.ndarray, seconds: float) -> np.ndarray:
    """Return start and end of each token, [N, 2] seconds.

    Args:
        maps: [heads, N, M] float32, attention probabilities.
        seconds: duration of all frames.
    """
    rows, frames = warp(-sharpened(maps)).T
    count, length = maps.shape[1:]
    times = np.zeros((count, 2))
    for i in range(count):
        own = frames[rows == i]
        times[i] = (own.min(), own.max()) if len(own) else (times[i - 1, 1] if i else 0.0,) * 2
    return times * seconds / length


def sharpened(maps: np.ndarray) -> np.ndarray:
    """Return how much each token stands out at each frame, [N, M] float32, from probabilities [heads, N, M]."""
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

    A step advances one row, one column, or both. It advances both if the cell that it comes from is cheaper than the
    other two; else one row, if that is; else one column. Sums are float32. Cells of one anti-diagonal do not depend on
    each other, and are computed together.
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


def lines_of(texts: Sequence[str], times: np.ndarray) -> list[TimedText]:
    """Join tokens to lines, each up to and including a token with a line end; return them without blank lines."""
    lines, begin = [], 0
    for i, text in enumerate(texts):
        if "\n" not in text and i + 1 < len(texts):
            continue
        words = "".join(texts[begin : i + 1]).strip()
        if words:
            lines.append(TimedText(round(float(times[begin, 0]), 3), round(float(times[i, 1]), 3), words))
        begin = i + 1
    return lines


def words_of(texts: Sequence[str], times: np.ndarray, sung: np.ndarray) -> list[TimedText]:
    """Return the words that tokens make: one begins with a space, or after a line end. Tags are left out.

    Args:
        sung: [N] bool, which tokens belong to no tag.
    """
    words: list[TimedText] = []
    begins = True
    for text, (start, end), is_sung in zip(texts, times, sung, strict=True):
        own = text.strip()
        if own and is_sung:
            start, end = round(float(start), 3), round(float(end), 3)
            if begins or text[0].isspace():
                words.append(TimedText(start, end, own))
            else:
                words[-1] = words[-1]._replace(end=end, text=words[-1].text + own)
        begins = not is_sung or not own or text[-1:].isspace()
    return words


def lyric_score(energy: np.ndarray, sung: np.ndarray) -> float:
    """Return coverage^2 monotonicity^2 confidence, from 0 to 1, rounded to four decimals.

    coverage: fraction of sung tokens that stand out anywhere. monotonicity: fraction of neighbouring pairs in which the
    second is not before the first. confidence: mean energy along the path.

    Args:
        energy: [N, M], mean of the probabilities over heads.
        sung: [N] bool, whether a token is sung, which tags are not.
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
