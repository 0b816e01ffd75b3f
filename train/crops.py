"""Random crops from a folder of audio, for training without captions."""

import logging
import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from acestep_jax.errors import InputError
from acestep_jax.io import audio
from acestep_jax.io.files import as_path
from acestep_jax.models.config import AutoencoderConfig
from acestep_jax.train.audio_files import find_audio
from acestep_jax.train.config import AutoencoderTrainConfig
from acestep_jax.train.data_folder import file_sha256, text_sha256

logger = logging.getLogger(__name__)

VALIDATION_BATCHES = 8
MIN_POWER = 1e-6  # least power of a validation crop: SI-SDR is undefined for silence


class CropSource:
    """Audio held in memory as float16, whose error is 70 dB below the signal, and crops of it.

    Args:
        files: audio files; files shorter than a crop are ignored.
        samples: length of a crop, in samples.
        config: configuration of the autoencoder, for the sample rate and the channels.

    Raises:
        InputError: if a file cannot be read, or none is long enough.
    """

    def __init__(self, files: list[Path], samples: int, config: AutoencoderConfig):
        self.samples = samples
        progress = tqdm(files, "reading", unit="file", disable=None)
        read = (audio.read(file, config.sampling_rate, config.audio_channels) for file in progress)
        self.sounds = [sound.astype(np.float16) for sound in read if sound.shape[1] >= samples]
        if not self.sounds:
            raise InputError(
                f"none of {len(files)} file(s) is as long as a crop, {samples} samples; lower crop_seconds"
            )
        if len(self.sounds) < len(files):
            logger.warning("%d file(s) are shorter than a crop and ignored", len(files) - len(self.sounds))
        starts = np.array([sound.shape[1] - samples + 1 for sound in self.sounds], np.float64)
        self._probabilities = starts / starts.sum()

    def draw(self, size: int, *seed: int) -> np.ndarray:
        """Draw crops [size, channels, samples] float16 uniformly from all audio; the same seed gives the same crops."""
        random = np.random.default_rng(seed)
        crops = []
        for i in random.choice(len(self.sounds), size, p=self._probabilities):
            start = random.integers(self.sounds[i].shape[1] - self.samples + 1)
            crops.append(self.sounds[i][:, start : start + self.samples])
        return np.stack(crops)


def read_songs(config: AutoencoderTrainConfig) -> tuple[CropSource, CropSource | None, dict[str, str]]:
    """Return the songs to train on, the held-out songs, and a hash of all of them.

    The held-out songs are chosen by the bytes of the files, not by their names.
    """
    folder = as_path(config.data)
    files = {file_sha256(folder / source): folder / source for source in find_audio(folder)}
    names = sorted(files)  # copies of a file count once
    count = math.ceil(config.validation_fraction * len(names)) if config.validation_fraction else 0
    if count >= len(names):
        raise InputError(
            f"validation_fraction: {config.validation_fraction} holds out all of {len(names)} file(s); set it to 0"
        )
    sides = []
    for side in (names[count:], names[:count]):
        sides.append(
            CropSource([files[name] for name in side], config.crop_samples, config.model.network) if side else None
        )
    return *sides, {"data": text_sha256(names)}


def validation_crops(songs: CropSource, size: int) -> list[np.ndarray]:
    """Return batches of crops, the same for every run on these songs; none is silent."""
    crops, seed = [], 0
    while len(crops) < VALIDATION_BATCHES * size and seed < 100:
        drawn = songs.draw(size, seed)
        crops += [crop for crop in drawn if np.square(crop, dtype=np.float32).mean() >= MIN_POWER]
        seed += 1
    if len(crops) < size:
        raise InputError("the songs to validate on are nearly all silent; check them")
    crops = crops[: max(len(crops) // size, 1) * size][: VALIDATION_BATCHES * size]
    return [np.stack(crops[i : i + size]) for i in range(0, len(crops), size)]
