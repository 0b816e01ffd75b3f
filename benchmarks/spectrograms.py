"""Spectrograms of several songs in one picture."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import librosa
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

COLUMNS = 2
RANGE = 70  # dB from black to white


def draw(path: str | Path, songs: Sequence[np.ndarray], titles: Sequence[str], rate: int) -> None:
    """Write a picture, replacing an existing one. songs: [channels, samples] each; rate: Hz."""
    rows = -(-len(songs) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(12, 2.5 * rows), sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(songs) :]:
        axis.remove()
    for axis, song, title in zip(axes.flat, songs, titles, strict=False):
        power = librosa.feature.melspectrogram(
            y=song.mean(0), sr=rate, n_fft=4096, hop_length=480, n_mels=160, fmax=16000
        )
        decibel = librosa.power_to_db(power, ref=np.max, top_db=RANGE)
        librosa.display.specshow(
            decibel, sr=rate, hop_length=480, fmax=16000, x_axis="s", y_axis="mel", ax=axis, cmap="magma"
        )
        axis.set(xlabel="", ylabel="")
        axis.set_title("\n".join(textwrap.wrap(title, 80)), fontsize=9, loc="left")
        axis.label_outer()
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
