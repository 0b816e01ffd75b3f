"""Conversion between audio, latents and audio codes by the networks of a loaded model."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from acestep_jax.distributed import on_host
from acestep_jax.errors import InputError
from acestep_jax.inputs import programs, sources, tasks
from acestep_jax.inputs.buckets import BUCKETS
from acestep_jax.inputs.latents import load_latents
from acestep_jax.inputs.prepare import check_length, codebook_size, load_audio
from acestep_jax.io import audio
from acestep_jax.loaded import LoadedModel
from acestep_jax.request import Audio


class CodecModel(LoadedModel):
    """A loaded model that converts between audio, latents and audio codes."""

    def song_to_codes(self, song: Audio) -> np.ndarray:
        """Return the audio codes of a song, [n] int32, 5 for each second.

        Args:
            song: a sound file, or an array [channels, samples].

        Raises:
            InputError: if the model has no audio tokenizer, or the song cannot be read.
        """
        self._check_tokenizer()
        with self.on_mesh(), self.placement.stage(self.networks) as networks:
            latents, frames = self._latents_of(networks, song)
            return sources.tokenize(networks, latents, [frames])[0]

    def song_to_latents(self, song: Audio) -> np.ndarray:
        """Return the latents of a song, [frames, C] float32, as `src_latents` takes them.

        Args:
            song: a sound file, or an array [channels, samples].

        Raises:
            InputError: if the song cannot be read.
            OSError: if there is no such file.
        """
        with self.on_mesh(), self.placement.stage(self.networks) as networks:
            latents, frames = self._latents_of(networks, song)
        return latents[0, :frames]

    def latents_to_codes(self, latents: Audio) -> np.ndarray:
        """Return the audio codes of a song's latents, [n] int32, 5 for each second; see `latents_to_song`.

        Raises:
            InputError: if the model has no audio tokenizer, or see `latents_to_song`.
        """
        self._check_tokenizer()
        padded, frames = self._padded(latents)
        with self.on_mesh(), self.placement.stage(self.networks) as networks:
            return sources.tokenize(networks, padded, [frames])[0]

    def latents_to_song(self, latents: Audio) -> np.ndarray:
        """Decode latents to audio [channels, samples] float32 with a peak of -1 dBFS.

        Args:
            latents: [frames, C] or [1, frames, C], such as `Song.latents`, or a file of them, see
                `Request.src_latents`.

        Raises:
            InputError: if they have another shape, or are of less than 1 s or more than 600 s.
            OSError: if there is no such file.
        """
        padded, frames = self._padded(latents)
        with self.on_mesh(), self.placement.stage(self.networks) as networks:
            return self._decoded(networks, padded, frames, "latents")

    def _padded(self, latents: Audio) -> tuple[np.ndarray, int]:
        """Return latents that were given, [1, bucket, C] with zeros as padding, and the number of frames."""
        given = load_latents(latents, "latents", self.need("vae").config)
        frames = len(given)
        return np.pad(given, ((0, BUCKETS.frames_of(frames) - frames), (0, 0)))[None], frames

    def _latents_of(self, networks: Mapping[str, Any], song: Audio) -> tuple[np.ndarray, int]:
        """Return the latents of a song, [1, bucket, C] with zeros as padding, and its number of frames."""
        vae = self.need("vae")
        wave = load_audio(song, "song", vae.config)
        wave = np.pad(wave, ((0, 0), (0, -wave.shape[1] % vae.hop_length)))
        frames = wave.shape[1] // vae.hop_length
        latents = sources.encode_audio(networks["vae"], [wave], BUCKETS.frames_of(frames))
        audio.check_finite(latents, "song", "of the latents, after encoding,")
        return latents, frames

    def codes_to_song(self, text: str) -> np.ndarray:
        """Decode audio codes, given as text, to audio [channels, samples] float32 with a peak of -1 dBFS.

        Raises:
            InputError: if the model has no audio tokenizer, or the text has no code or one that is out of range.
        """
        codes = tasks.codes_from_text(text, self._check_tokenizer())
        frames = len(codes) * self.need("audio_tokenizer").config.pool_window_size
        check_length(frames / self.latents_per_second, "audio_codes")
        with self.on_mesh(), self.placement.stage(self.networks) as networks:
            latents = sources.detokenize(networks, [codes], BUCKETS.frames_of(frames))
            return self._decoded(networks, latents, frames, "audio_codes")

    def _decoded(self, networks: Mapping[str, Any], latents: Any, frames: int, name: str) -> np.ndarray:
        """Return the audio of padded latents, [channels, samples] float32 with a peak of -1 dBFS; raise InputError that
        names `name` if it is not finite."""
        made = on_host(programs.decode(networks["vae"], latents, np.array([frames], np.int32), np.array([True])))
        made = made[0, :, : frames * self.need("vae").hop_length]
        audio.check_finite(made, name, "of the audio, after decoding,")
        return made

    def _check_tokenizer(self) -> int:
        """Return the size of the codebook; raise InputError if the networks for audio codes are missing."""
        size = codebook_size(self.configs)
        if size is None:
            raise InputError("the checkpoint has no audio tokenizer and detokenizer; convert one that has them")
        self.need("condition_encoder")  # its silence fills up the last code
        return size
