"""Helpers of the notebooks: terminal commands, an audio player and spectrograms."""

import functools
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Audio, display

from acestep_jax import cli
from acestep_jax.io import audio as audio_files

TICKS = (100, 500, 1000, 2000, 4000, 8000)  # Hz


def run(command: str) -> None:
    """Run `acestep-jax ...`, `python -m convert ...` or `python -m train ...` in the process of the notebook, because
    only one process can use a TPU. Raises RuntimeError if the command fails."""
    print("$", command)
    words = shlex.split(command)
    arguments = words[1:] if words[0] == "acestep-jax" else words[2:]
    if status := cli.main(arguments):
        raise RuntimeError(f"exit status {status}: {command}")


def listen(audio: np.ndarray, title: str = "", rate: int = 48000, regions: Sequence[tuple[float, float]] = ()) -> None:
    """Show a spectrogram and a player, with the audio embedded as an MP3. audio: [channels, samples]; regions:
    (start, end) in seconds, which are highlighted."""
    show(audio, title, rate, regions)
    play(audio, rate)


def play(audio: np.ndarray, rate: int = 48000) -> None:
    """Show a player. audio: [channels, samples]."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "song.mp3"
        audio_files.write(file, audio, rate)
        display(Audio(filename=str(file), embed=True))


def show(audio: np.ndarray, title: str = "", rate: int = 48000, regions: Sequence[tuple[float, float]] = ()) -> None:
    """Show a spectrogram. audio: [channels, samples]; regions: (start, end) in seconds, which are highlighted."""
    figure, axes = plt.subplots(figsize=(8, 2.1), dpi=64)
    draw(axes, audio, title, rate, regions)
    figure.tight_layout()
    plt.show()


def draw(axes, audio: np.ndarray, title: str = "", rate: int = 48000, regions: Sequence[tuple] = ()) -> None:
    """Draw the spectrogram of `show` on axes of matplotlib, 60 dB from black to yellow."""
    spectrum = log_mel(audio, rate)
    seconds, top = audio.shape[-1] / rate, spectrum.max()
    extent = (0, seconds, 0, len(spectrum))
    axes.imshow(spectrum, origin="lower", aspect="auto", extent=extent, cmap="inferno", vmin=top - 60, vmax=top)
    axes.set_yticks(np.interp(TICKS, mel_bands(len(spectrum))[1:-1], np.arange(len(spectrum)) + 0.5))
    axes.set_yticklabels([f"{hertz / 1000:g}k" if hertz >= 1000 else f"{hertz}" for hertz in TICKS])
    axes.set_title(title, fontsize=9, loc="left")
    for start, end in regions:
        axes.axvspan(start, end, facecolor="none", edgecolor="cyan", linewidth=1.5)


def log_mel(audio: np.ndarray, rate: int = 48000, bands: int = 80) -> np.ndarray:
    """Compute the power of the mean of the channels, [bands, frames] in dB, from 40 Hz to 12 kHz at 50 frames a second.

    audio: [channels, samples].
    """
    mono = np.asarray(audio, np.float32).mean(axis=0)
    size, hop = 4096, rate // 50
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(mono, size // 2), size)[::hop]
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(size).astype(np.float32)))).T / size
    return 10 * np.log10(np.maximum(_filters(bands, size, rate) @ power, 1e-8))


def mel_bands(bands: int) -> np.ndarray:
    """Return the centre frequencies of triangular filters and the two outer edges, in Hz, [bands + 2]."""
    ends = 2595 * np.log10(1 + np.array([40, 12000]) / 700)
    return 700 * (10 ** (np.linspace(*ends, bands + 2) / 2595) - 1)


@functools.cache
def _filters(bands: int, size: int, rate: int) -> np.ndarray:
    """Return the filters, [bands, size // 2 + 1], each with a sum of one."""
    hertz, edges = np.fft.rfftfreq(size, 1 / rate), mel_bands(bands)[:, None]
    rise, fall = (hertz - edges[:-2]) / np.diff(edges, axis=0)[:-1], (edges[2:] - hertz) / np.diff(edges, axis=0)[1:]
    weights = np.maximum(0, np.minimum(rise, fall))
    # A filter that is narrower than a bin takes the nearest bin.
    empty = np.flatnonzero(weights.sum(axis=1) == 0)
    weights[empty, np.argmin(np.abs(hertz - edges[1:-1][empty]), axis=1)] = 1
    return weights / weights.sum(axis=1, keepdims=True)
