"""From a data folder to batches, through Grain.

The song, crop, task and window of an example depend only on the seed and on the index of the example in the run, so a
resumed run, or one with another number of processes, sees the same examples.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from acestep_jax.errors import InputError
from acestep_jax.inputs import tasks
from acestep_jax.io.files import local_copy
from acestep_jax.train.config import TASKS, DataConfig
from acestep_jax.train.data_folder import Index, IndexEntry, crop_durations, decode_record, text_key
from acestep_jax.train.objective import Batch

TEXT_MULTIPLE = 32  # tokens; similar data then share programs, which may be compiled already
VALIDATION_TASK = next(i for i, name in enumerate(TASKS) if tasks.TASKS[name].silent_source)

# Streams of the random numbers drawn with NumPy.
_SHUFFLE, _EXAMPLE, _CROP = range(3)


class Records:
    """Random access to the records of some songs: item i is song i with its arrays."""

    def __init__(self, folder: Path, songs: Sequence[IndexEntry]):
        self.songs = songs
        shards = sorted({song.shard for song in songs})
        sources = {shard: ArrayRecordDataSource(str(local_copy(folder / shard))) for shard in shards}
        self._rows = [(sources[song.shard], song.row) for song in songs]

    def __len__(self) -> int:
        return len(self.songs)

    def __getitem__(self, i: int) -> tuple[IndexEntry, dict[str, np.ndarray]]:
        source, row = self._rows[i]
        return self.songs[i], decode_record(source[row])


def split(index: Index, fraction: float) -> tuple[list[IndexEntry], list[IndexEntry]]:
    """Return the songs to train on and the held-out songs.

    The songs whose files have the smallest hashes are held out, so copies and repeats of a song are never on both sides
    of the split. Adding songs may move a held-out song to the training set.

    Raises:
        InputError: if no songs would be left to train on.
    """
    distinct = sorted({song.sha256 for song in index.songs})
    count = math.ceil(fraction * len(distinct)) if fraction else 0
    if count >= len(distinct):
        raise InputError(
            f"examples.validation_fraction: {fraction} holds out all of {len(distinct)} song(s); set it to 0"
        )
    held_out = set(distinct[:count])
    training = [song for song in index.songs if song.sha256 not in held_out]
    return training, [song for song in index.songs if song.sha256 in held_out]


class Examples:
    """Makes examples whose shapes differ only in time, so a step compiles once for each crop length."""

    def __init__(
        self, folder: Path, index: Index, songs: Sequence[IndexEntry], config: DataConfig, silence: np.ndarray
    ):
        """
        Args:
            silence: latents of silence, [frames, 64], at least as many frames as the longest crop.

        Raises:
            InputError: if the data were not prepared for one of `config.crop_seconds`.
        """
        self.config, self.silence, self.rate = config, silence, index.latents_per_second
        self.crops = tuple(config.crop_seconds) or index.crop_seconds
        if unknown := sorted(set(self.crops) - set(index.crop_seconds)):
            raise InputError(
                f"examples.crop_seconds: {folder} was prepared for {list(index.crop_seconds)}, found {unknown}; "
                "preprocess again with --crop-seconds (only the texts are encoded again)"
            )
        self.records = Records(folder, songs)
        self.text_size = _round_up(max(song.prompt_tokens for song in index.songs), TEXT_MULTIPLE)
        self.lyric_size = _round_up(max(song.lyric_tokens for song in index.songs), TEXT_MULTIPLE)

    def make(self, i: int, number: int, crop: float, task: int, rng: np.random.Generator | None) -> Batch[Any]:
        """Return example `number` of the run, from song i: a random crop and, for a task with regions, a random window;
        without `rng`, the middle of the song."""
        song, arrays = self.records[i]
        size = int(crop * self.rate)
        length = min(size, song.frames)
        begin = (song.frames - length) // 2 if rng is None else int(rng.integers(song.frames - length + 1))
        mean = self.silence[:size].copy()
        mean[:length] = arrays["mean"][begin : begin + length]
        std = np.zeros_like(mean)
        std[:length] = arrays["std"][begin : begin + length]
        window = (0, length)
        if rng is not None and tasks.TASKS[TASKS[task]].has_regions:
            width = int(rng.integers(1, length + 1))
            first = int(rng.integers(length - width + 1))
            window = (first, first + width)
        (duration,) = crop_durations(song.seconds, (crop,))
        text, lyrics = arrays[text_key(TASKS[task], duration)], arrays["lyric_ids"]
        return Batch(
            mean=mean,
            std=std,
            lengths=np.int32(length),
            text=_pad(text, self.text_size),
            text_lengths=np.int32(len(text)),
            lyric_ids=_pad(lyrics, self.lyric_size),
            lyric_lengths=np.int32(len(lyrics)),
            tasks=np.int32(task),
            windows=np.asarray(window, np.int32),
            numbers=np.uint32(number),
        )


def training_batches(
    examples: Examples, seed: int, accumulation: int, rows: Sequence[int], first: int = 0
) -> grain.IterDataset:
    """Return an endless stream of `Batch`es of arrays [accumulation, len(rows), ...], one for each step.

    Every song occurs `repeat` times in an epoch, in an order that changes from epoch to epoch.

    Args:
        examples: examples of the songs to train on.
        seed: seed of the run.
        accumulation: batches per step.
        rows: rows of the global batch that this process needs.
        first: number of steps to skip, which a resumed run has made already.
    """
    config = examples.config
    songs = [i for i, song in enumerate(examples.records.songs) for _ in range(song.repeat)]
    order = grain.MapDataset.source(songs).seed(_seed(seed, _SHUFFLE)).shuffle().repeat()
    batch, step_size = config.batch_size, config.batch_size * accumulation

    def load(step: int) -> Batch[np.ndarray]:
        # All examples of a step have one length, so that they fit one program.
        crop = examples.crops[np.random.default_rng([seed, _CROP, step]).integers(len(examples.crops))]
        parts = []
        for part in range(accumulation):
            made = []
            for row in rows:
                number = step * step_size + part * batch + row
                rng = np.random.default_rng([seed, _EXAMPLE, number])
                task = int(rng.choice(len(TASKS), p=config.task_weights))
                song = order[number]
                assert song is not None  # the loader filters no items
                made.append(examples.make(song, number, crop, task, rng))
            parts.append(_stack(made))
        return _stack(parts)

    options = grain.ReadOptions(num_threads=config.workers, prefetch_buffer_size=2 * config.workers)
    return grain.MapDataset.range(first, 2**31).map(load).to_iter_dataset(options)


def validation_batches(examples: Examples) -> Iterator[Batch[np.ndarray]]:
    """Yield batches of held-out songs for `VALIDATION_TASK`, with the longest crop from the middle of each; arrays
    [B, ...]. The last batch is padded with examples of length 0."""
    size, count = examples.config.batch_size, len(examples.records)
    for first in range(0, count, size):
        made = [
            examples.make(i, i, max(examples.crops), VALIDATION_TASK, None)
            for i in range(first, min(first + size, count))
        ]
        made += [made[-1]._replace(lengths=np.int32(0))] * (size - len(made))
        yield _stack(made)


def _stack(batches: Sequence[Batch[Any]]) -> Batch[np.ndarray]:
    return Batch(*(np.stack(leaves) for leaves in zip(*batches, strict=True)))


def _pad(x: np.ndarray, size: int) -> np.ndarray:
    return np.pad(x, ((0, size - len(x)),) + ((0, 0),) * (x.ndim - 1))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _seed(seed: int, stream: int) -> int:
    return int(np.random.SeedSequence([seed, stream]).generate_state(1)[0] >> 1)
