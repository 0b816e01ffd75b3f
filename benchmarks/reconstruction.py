"""Reconstruction error of an autoencoder compared with two codecs: `python -m benchmarks.reconstruction DIR AUDIO_DIR`.

The same excerpts pass through the autoencoder (posterior means) and through libsndfile's Opus and MP3 codecs.
"""

import argparse
import functools
import io
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import soundfile

from acestep_jax.errors import InputError
from acestep_jax.io import audio, checkpoint
from acestep_jax.models.autoencoder import AutoencoderOobleck
from acestep_jax.models.kernels.compiler import COMPILER_OPTIONS
from acestep_jax.train.audio_files import find_audio
from acestep_jax.train.reconstruction import si_sdr, spectral_distance
from benchmarks import measure

RATE = 48000
WINDOWS = (4096, 2048, 1024, 512, 256, 128)

# libsndfile's compression levels for 64 kbit/s: Opus has about 256 - 250 level kbit/s per channel, MP3 always 320 - 288
# level.
CODECS = {
    "Opus": dict(format="OGG", subtype="OPUS", compression_level=(256 - 64 / 2) / 250),
    "MP3": dict(format="MP3", subtype="MPEG_LAYER_III", compression_level=(320 - 64) / 288, bitrate_mode="CONSTANT"),
}
MOST_DELAY = 4096  # samples


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reconstruction", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="DIR", help="native checkpoint with a vae")
    parser.add_argument("audio_dir", metavar="AUDIO_DIR", help="folder of songs that it was not trained on")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="length of the excerpt from the middle of each song [10]"
    )
    parser.add_argument("--songs", type=int, default=20, help="most songs to use, spread evenly over the folder [20]")
    options = parser.parse_args()

    songs = read(Path(options.audio_dir), options.songs, round(options.seconds * RATE))
    (vae,) = checkpoint.load(options.checkpoint, names=["vae"]).values()
    frames = RATE * vae.config.decoder_input_channels / vae.hop_length
    measure.print_header()
    print(
        f"{len(songs)} songs, {options.seconds:g} s of each; libsndfile {soundfile.__libsndfile_version__}; medians\n"
    )
    row = measure.print_table(["", "rate", "SI-SDR, dB", "distance of spectra"])
    row("autoencoder", f"{frames:.0f} values/s", *score(songs, through_autoencoder(vae)))
    for name, settings in CODECS.items():
        sizes: list[int] = []
        figures = score(songs, functools.partial(through_codec, settings=settings, sizes=sizes))
        row(name, f"{np.mean(sizes) * 8 / options.seconds / 1000:.0f} kbit/s", *figures)

    decode = jax.jit(type(vae).decode, compiler_options=COMPILER_OPTIONS)
    latents = np.zeros((1, songs[0].shape[1] // vae.hop_length, vae.config.decoder_input_channels), np.float32)
    times = [_seconds(lambda: decode(vae, latents)) for _ in range(6)]
    print(f"\ndecoding {options.seconds:g} s takes {np.median(times[1:]):.2f} s")


def read(folder: Path, most: int, samples: int) -> list[np.ndarray]:
    """Read the middles of songs spread evenly over a folder, [2, samples] each; shorter songs are left out."""
    sources = find_audio(folder)
    picked = [sources[i] for i in np.unique(np.linspace(0, len(sources) - 1, most).round().astype(int))]
    songs = [audio.read(folder / source, RATE) for source in picked]
    excerpts = []
    for song in songs:
        if (spare := song.shape[1] - samples) >= 0:
            excerpts.append(song[:, spare // 2 : spare // 2 + samples])
    if not excerpts:
        raise InputError(
            f"{folder}: expected songs of at least {samples / RATE:g} s, found none; use shorter --seconds"
        )
    return excerpts


def score(songs: list[np.ndarray], process: Callable[[np.ndarray], np.ndarray]) -> tuple[str, str]:
    """Return the medians over songs of SI-SDR and of the spectral distance."""
    ratios, distances = [], []
    for song in songs:
        result = process(song)
        ratios.append(float(si_sdr(result[None], song[None])[0]))
        distances.append(float(_distance(result[None], song[None])))
    return f"{np.median(ratios):.1f}", f"{np.median(distances):.2f}"


@jax.jit
def _distance(x: jax.Array, y: jax.Array) -> jax.Array:
    return spectral_distance(x, y, WINDOWS)


def through_autoencoder(vae: AutoencoderOobleck) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that encodes and decodes a song, [2, samples]."""
    encode, decode = (jax.jit(f, compiler_options=COMPILER_OPTIONS) for f in (type(vae).encode, type(vae).decode))

    def process(song: np.ndarray) -> np.ndarray:
        padding = -song.shape[1] % vae.hop_length  # the last frame may be cut
        sound = np.pad(song, ((0, 0), (0, padding)))[None]
        return np.asarray(decode(vae, encode(vae, sound).mean))[0, :, : song.shape[1]]

    return process


def through_codec(song: np.ndarray, settings: dict, sizes: list[int]) -> np.ndarray:
    """Return a song, [2, samples], after a codec, with its delay removed; append its size in bytes to `sizes`."""
    file = io.BytesIO()
    soundfile.write(file, song.T, RATE, **settings)
    sizes.append(file.tell())
    file.seek(0)
    result = soundfile.read(file, dtype="float32")[0].T
    spread = song.shape[1] + MOST_DELAY
    # The delay is the shift with the highest correlation.
    product = np.fft.rfft(result.mean(0), 2 * spread) * np.fft.rfft(song.mean(0), 2 * spread).conj()
    correlation = np.fft.irfft(product)
    shifts = np.arange(-MOST_DELAY, MOST_DELAY + 1)
    shift = int(shifts[np.argmax(correlation[shifts])])
    padded = np.pad(result, ((0, 0), (MOST_DELAY, 2 * MOST_DELAY)))
    return padded[:, MOST_DELAY + shift :][:, : song.shape[1]]


def _seconds(call: Callable[[], jax.Array]) -> float:
    start = time.perf_counter()
    call().block_until_ready()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
