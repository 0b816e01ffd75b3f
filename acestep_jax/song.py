"""The results of a pipeline: a song, or the songs of a batch."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from acestep_jax.errors import InputError
from acestep_jax.io import audio
from acestep_jax.io.files import as_path
from acestep_jax.planner.plan import Plan

if TYPE_CHECKING:
    from acestep_jax.planner.timestamps import Timestamps


@dataclasses.dataclass(frozen=True)
class Song:
    """One song.

    Attributes:
        audio: [channels, samples] float32; None with `output_type="latent"`.
        latents: [frames, C] float32.
        sample_rate: Hz.
        seed: seed that reproduces the song; None if noise or a key was given instead.
        retake_seed: seed of the second noise, which reproduces a variation; None if it has none.
        plan: the planner's plan; None: it was not planned.
        timestamps: timestamps of its lyrics; None: not requested, or unknown.
    """

    audio: np.ndarray | None
    latents: np.ndarray
    sample_rate: int
    seed: int | None
    retake_seed: int | None = None
    plan: Plan | None = None
    timestamps: "Timestamps | None" = None

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the song atomically as WAV, FLAC, OGG or MP3, by suffix. With several processes, call this in one.

        Raises:
            InputError: if there is no audio, or see `audio.check_output`.
            OSError: if the file cannot be written.
        """
        audio.write(path, self._sound(), self.sample_rate, overwrite=overwrite)
        return as_path(path)

    def _sound(self) -> np.ndarray:
        """Return the audio; raise InputError if there is none."""
        if self.audio is None:
            raise InputError('song.save: there is no audio, because of output_type="latent"; use output_type="np"')
        return self.audio


class AudioPipelineOutput(Sequence[Song]):
    """The songs of one call: a sequence of `Song`, and arrays of the whole batch under diffusers' names."""

    def __init__(self, songs: Sequence[Song]):
        self._songs = tuple(songs)

    @overload
    def __getitem__(self, index: int) -> Song: ...
    @overload
    def __getitem__(self, index: slice) -> "AudioPipelineOutput": ...
    def __getitem__(self, index: int | slice) -> "Song | AudioPipelineOutput":
        return AudioPipelineOutput(self._songs[index]) if isinstance(index, slice) else self._songs[index]

    def __len__(self) -> int:
        return len(self._songs)

    def __iter__(self) -> Iterator[Song]:
        return iter(self._songs)

    @property
    def audio(self) -> np.ndarray | None:
        """The audio of the only song, [channels, samples] float32; see `Song.audio`."""
        return self._only.audio

    @property
    def seed(self) -> int | None:
        """The seed of the only song."""
        return self._only.seed

    @property
    def retake_seed(self) -> int | None:
        """The seed of the second noise of the only song; see `Song.retake_seed`."""
        return self._only.retake_seed

    @property
    def audios(self) -> np.ndarray | None:
        """[B, channels, samples] float32, padded with silence to the longest song; None without audio."""
        songs = [song.audio for song in self if song.audio is not None]
        return _padded(songs, axis=1) if songs else None

    @property
    def latents(self) -> np.ndarray:
        """[B, frames, C] float32, padded with zeros to the longest song."""
        return _padded([song.latents for song in self], axis=0)

    @property
    def sample_rate(self) -> int:
        """Sample rate of all songs, in Hz."""
        return self._songs[0].sample_rate

    @property
    def seeds(self) -> tuple[int | None, ...] | None:
        """The seed of each song; None if no song has one."""
        seeds = tuple(song.seed for song in self)
        return None if set(seeds) == {None} else seeds

    @property
    def samples(self) -> tuple[int, ...]:
        """The number of samples of each song; empty without audio."""
        return tuple(song.audio.shape[1] for song in self if song.audio is not None)

    @property
    def frames(self) -> tuple[int, ...]:
        """The number of latent frames of each song."""
        return tuple(len(song.latents) for song in self)

    def save(self, path: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write every song, see `Song.save`. A batch becomes `song-0.wav`, `song-1.wav`, ..."""
        path = as_path(path)
        paths = [path] if len(self) == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(len(self))]
        for song, target in zip(self, paths, strict=True):  # check all of them before the first is written
            song._sound()
            audio.check_output(target, overwrite=overwrite)
        return [song.save(target, overwrite=overwrite) for song, target in zip(self, paths, strict=True)]

    @property
    def _only(self) -> Song:
        if len(self) != 1:
            raise InputError(f"expected one song, found {len(self)}; use result[i], or .audios and .seeds of the batch")
        return self._songs[0]


def _padded(arrays: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Return arrays as one batch, with zeros up to the longest along `axis`."""
    size = max(array.shape[axis] for array in arrays)
    shape = list(arrays[0].shape)
    shape[axis] = size
    batch = np.zeros((len(arrays), *shape), np.float32)
    for i, array in enumerate(arrays):
        batch[(i, *(slice(n) for n in array.shape))] = array
    return batch
