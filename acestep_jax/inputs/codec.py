"""Songs, their latents at 25 Hz, and their codes at 5 Hz."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from acestep_jax.errors import InputError
from acestep_jax.inputs import programs, tasks
from acestep_jax.io import checkpoint
from acestep_jax.models.audio_tokenizer import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer
from acestep_jax.models.autoencoder import AutoencoderOobleck
from acestep_jax.models.condition_encoder import AceStepConditionEncoder
from acestep_jax.request import Audio, Model, check_length, load_audio

# Lengths are padded, so that few programs are compiled; padding is masked.
FRAMES_BUCKET = 256  # latent frames; more for long songs, see `bucket`


class Codec:
    """The networks that take songs apart and put them together; the condition encoder for its latents of silence."""

    def __init__(
        self,
        vae: AutoencoderOobleck,
        condition_encoder: AceStepConditionEncoder,
        audio_tokenizer: AceStepAudioTokenizer | None = None,
        audio_token_detokenizer: AceStepAudioTokenDetokenizer | None = None,
    ):
        self.vae = vae
        self.condition_encoder = condition_encoder
        self.audio_tokenizer = audio_tokenizer
        self.audio_token_detokenizer = audio_token_detokenizer

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, dtype: str | None = None) -> "Codec":
        """Loads these networks of a native checkpoint, see `AceStepPipeline.from_checkpoint`."""
        names = ["vae", "condition_encoder"]
        names += [name for name in checkpoint.OPTIONAL_NETWORKS if name in checkpoint.read_manifest(path).configs]
        return cls(**checkpoint.load(path, dtype=dtype, names=names))

    @property
    def model(self) -> Model:
        """What requests are checked against."""
        tokenizer = self.audio_tokenizer if self.audio_token_detokenizer is not None else None
        return Model(
            sample_rate=self.vae.config.sampling_rate,
            hop=self.vae.hop_length,
            channels=self.vae.config.audio_channels,
            codebook_size=None if tokenizer is None else tokenizer.quantizer.codebook_size,
            window=5 if tokenizer is None else tokenizer.config.pool_window_size,
        )

    def encode(self, waves: Sequence[np.ndarray], size: int) -> np.ndarray:
        """Songs [channels, samples], whole frames each -> latents [n, size, 64] float32, zero after the end."""
        hop = self.vae.hop_length
        padded = np.zeros((len(waves), self.vae.config.audio_channels, size * hop), np.float32)
        for row, wave in zip(padded, waves, strict=True):
            row[:, : wave.shape[1]] = wave
        lengths = np.array([wave.shape[1] for wave in waves], np.int32)
        latents = np.array(on_host(programs.encode_audio(self.vae, padded, lengths)))
        for row, length in zip(latents, lengths, strict=True):
            row[length // hop :] = 0
        return latents

    def tokenize(self, latents: np.ndarray, frames: Sequence[int]) -> list[np.ndarray]:
        """Latents [n, T, 64] -> codes [ceil(frames / 5)] int32 of each song."""
        lengths = np.array(frames, np.int32)
        codes = on_host(programs.tokenize(self.audio_tokenizer, self.condition_encoder, latents, lengths))
        return [row[: -(-length // self.model.window)] for row, length in zip(codes, frames, strict=True)]

    def detokenize(self, codes: Sequence[np.ndarray], size: int) -> np.ndarray:
        """Codes [n] int32 of each song -> latents [songs, size, 64] float32; arbitrary after each song's end."""
        padded = np.zeros((len(codes), -(-size // self.model.window)), np.int32)
        for row, numbers in zip(padded, codes, strict=True):
            row[: len(numbers)] = numbers
        latents = on_host(programs.detokenize(self.audio_tokenizer, self.audio_token_detokenizer, padded))
        return latents[:, :size]

    def song_to_codes(self, song: Audio) -> np.ndarray:
        """[n] int32, 5 codes for each second of a song, a file or an array [channels, samples].

        Raises:
            InputError: if there is no audio tokenizer, or see `load_audio`.
        """
        self._check_tokenizer()
        wave = load_audio(song, "song", self.model)
        wave = np.pad(wave, ((0, 0), (0, -wave.shape[1] % self.vae.hop_length)))
        frames = wave.shape[1] // self.vae.hop_length
        return self.tokenize(self.encode([wave], bucket(frames)), [frames])[0]

    def codes_to_song(self, text: str) -> np.ndarray:
        """Audio [channels, samples] float32 of codes as text, with a peak of -1 dBFS: how much of a song they hold.

        Raises:
            InputError: if there is no audio tokenizer, no code in the text, or one that is out of range.
        """
        self._check_tokenizer()
        codes = tasks.codes_from_text(text, self.model.codebook_size)
        frames = len(codes) * self.model.window
        check_length(frames / self.model.rate, "audio_codes")
        latents = self.detokenize([codes], bucket(frames))
        audio = programs.decode(self.vae, latents, np.array([frames], np.int32), np.array([True]))
        return np.asarray(audio)[0, :, : frames * self.vae.hop_length]

    def _check_tokenizer(self) -> None:
        if self.model.codebook_size is None:
            raise InputError("the checkpoint has no audio tokenizer and detokenizer; convert one that has them")


def bucket(frames: int) -> int:
    """`frames`, rounded up to a multiple of FRAMES_BUCKET, or of an eighth of the power of two below: at most an eighth
    more than asked for beyond 2048 frames, and 31 sizes up to 600 s."""
    step = max(FRAMES_BUCKET, 2 ** (frames - 1).bit_length() // 16)
    return -(-frames // step) * step


def on_host(x: jax.Array) -> np.ndarray:
    """All of an array, also of one that is spread over several processes."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
