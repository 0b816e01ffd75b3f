"""A small model, and a clip for it to overfit, which shows that training works.

`python -m tests.overfit make DIR` writes both, `compare DATA CHECKPOINT AUDIO PICTURE` compares the result.

Nothing can be heard through a random autoencoder, so the weights of this one are set by hand: it is a modified discrete
cosine transform of what lies below 400 Hz, 32 bands of 12.5 Hz at 25 frames a second. All other networks are random.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from acestep_jax import AceStepPipeline
from acestep_jax.convert.random_checkpoint import random_pipeline
from acestep_jax.io import audio
from acestep_jax.train.data_folder import read_index, read_records

CAPTION, BPM, KEY, SIGNATURE = "slow electric piano over a warm bass", 96, "D minor", "4"
SECONDS, SAMPLE_RATE = 10, 48000
BANDS, HOP = 32, 60  # of the transform, which runs at 1500 Hz
LINEAR = -20.0  # the logarithm of a snake's frequency at which it is the identity

_WIDTHS = dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=16)
_SMALL = dict(hidden_size=128, intermediate_size=256, head_dim=32, **_WIDTHS)
SIZES = {
    "transformer": _SMALL | dict(num_hidden_layers=4, in_channels=3 * BANDS, audio_acoustic_hidden_dim=BANDS),
    "condition_encoder": _SMALL
    | dict(
        text_hidden_dim=48,
        timbre_hidden_dim=BANDS,
        num_lyric_encoder_hidden_layers=2,
        num_timbre_encoder_hidden_layers=2,
    ),
    "audio_tokenizer": _SMALL | dict(fsq_dim=128, audio_acoustic_hidden_dim=BANDS),
    "audio_token_detokenizer": _SMALL | dict(audio_acoustic_hidden_dim=BANDS),
    "text_encoder": dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, head_dim=16)
    | {key: _WIDTHS[key] for key in ("num_attention_heads", "num_key_value_heads")},
    "vae": dict(
        encoder_hidden_size=2 * BANDS,
        decoder_channels=8,
        decoder_input_channels=BANDS,
        channel_multiples=[1, 1, 1, 2, 4],
    ),
}


def write_checkpoint(folder: Path) -> None:
    """Write a diffusers folder of the turbo variant."""
    pipeline = random_pipeline(SIZES)
    set_autoencoder(pipeline.vae)
    pipeline.save_pretrained(folder)


def write_song(folder: Path) -> np.ndarray:
    """Write a clip of 10 s and its caption, as a user would; return it, [2, samples]."""
    folder.mkdir()
    clip = song()
    audio.write(folder / "clip.wav", clip, SAMPLE_RATE)
    lines = f"caption: {CAPTION}\nbpm: {BPM}\nkey: {KEY}\nsignature: {SIGNATURE}\n"
    (folder / "clip.txt").write_text(lines, encoding="utf-8")
    return clip


def song() -> np.ndarray:
    """Return four chords, a bass note and four quavers to each beat pair, below 400 Hz. [2, samples] float32."""
    rng = np.random.default_rng(0)
    time = np.arange(SECONDS * SAMPLE_RATE) / SAMPLE_RATE
    beat = 60 / BPM
    chords = [(38, (50, 57, 62, 65)), (34, (53, 58, 62, 65)), (41, (53, 57, 60, 65)), (36, (55, 60, 64, 67))]
    sound = np.zeros_like(time)

    def play(start: float, pitch: int, decay: float, level: float) -> None:
        since = np.clip(time - start, 0, None)
        tone = np.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * since)
        sound[:] += level * tone * np.exp(-since / decay) * np.clip(since / 0.02, 0, 1)

    for i in range(int(SECONDS / (beat / 2))):
        bass, notes = chords[i // 4 % 4]
        if i % 4 == 0:
            play(i * beat / 2, bass, 0.9, 1.0)
            play(i * beat / 2, bass + 12, 0.5, 0.4)
        play(i * beat / 2, notes[int(rng.integers(4))], 0.4, 0.6)
    return np.tile(0.7 * sound / np.abs(sound).max(), (2, 1)).astype(np.float32)


@torch.no_grad()
def set_autoencoder(vae: torch.nn.Module) -> None:
    """Set the weights of an autoencoder with strides 2, 4, 4, 6, 10 to those of the transform.

    The first three strides average down to 1500 Hz and interpolate linearly back, the fourth puts six samples into six
    channels, and the kernel of the last is the window, two hops of sixty samples.
    """
    for name, value in vae.named_parameters():
        value.copy_(torch.full_like(value, LINEAR if name.endswith(".alpha") else 0.0))
        if name.endswith("weight_v"):
            value.fill_(1.0)  # its length is a divisor and must not be 0; `weight_g`, the length, stays 0

    def put(layer: torch.nn.Module, kernel: np.ndarray) -> None:
        """Write a kernel into the first channels of both sides."""
        whole = torch.zeros_like(layer.weight_v)
        whole[tuple(map(slice, kernel.shape))] = torch.from_numpy(kernel).float()
        norm = whole.flatten(1).norm(dim=1)[:, None, None]
        layer.weight_g.copy_(norm)
        layer.weight_v.copy_(torch.where(norm > 0, whole, 1.0))

    centre = np.eye(7)[3]
    put(vae.encoder.conv1, np.full((1, 2, 1), 0.5) * centre)
    put(vae.decoder.conv2, np.ones((2, 1, 1)) * centre)
    for i, stride in enumerate((2, 4, 4)):
        taps = np.arange(2 * stride) + 0.5
        put(vae.encoder.block[i].conv1, (np.abs(taps - stride) < stride / 2)[None, None] / stride)
        put(vae.decoder.block[-1 - i].conv_t1, (1 - np.abs(taps - stride) / stride)[None, None])
    apart = np.eye(12)[3:9]  # [channel, tap]
    put(vae.encoder.block[3].conv1, apart[:, None])
    put(vae.decoder.block[1].conv_t1, apart[:, None])
    time, band = np.arange(2 * HOP) + 0.5, np.arange(BANDS)[:, None] + 0.5
    window = np.sin(np.pi * time / (2 * HOP))
    basis = np.sqrt(2 / HOP) * window * np.cos(np.pi / HOP * (time + HOP / 2) * band)
    basis = basis.reshape(BANDS, 20, 6).transpose(0, 2, 1)  # [band, channel, tap]
    put(vae.encoder.block[4].conv1, basis)
    put(vae.decoder.block[0].conv_t1, basis)
    unit = np.eye(BANDS)[:, :, None]
    put(vae.encoder.conv2, 4.0 * unit * np.eye(3)[1])  # for latents of about one
    put(vae.decoder.conv1, unit / 4.0 * centre)
    vae.encoder.conv2.bias[BANDS:] = LINEAR  # a posterior of nearly no variance


def similarity(data: Path, checkpoint: Path, steps: int | None = None, seed: int = 1) -> float:
    """Return the cosine between the latents of the only song of a data folder and those generated from its texts."""
    (song,) = read_index(data).songs
    (record,) = read_records(data / song.shard, [song.row])
    made = AceStepPipeline.from_checkpoint(checkpoint)(
        song.caption,
        song.lyrics,
        song.seconds,
        song.language,
        steps,
        seed=seed,
        bpm=song.bpm,
        keyscale=song.keyscale,
        timesignature=song.timesignature,
        output_type="latent",
    ).latents[0]
    return float(np.vdot(made, record["mean"]) / np.linalg.norm(made) / np.linalg.norm(record["mean"]))


def draw_spectrograms(file: Path, clip: np.ndarray, made: np.ndarray) -> None:
    """Draw the spectrograms of both sounds, [2, samples], from 0 to 600 Hz."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.2), layout="constrained", sharey=True)
    for ax, title, sound in zip(axes, ("the clip", "generated with its prompt"), (clip, made), strict=True):
        size = SAMPLE_RATE // 4
        sound = sound[0] + 1e-9  # no logarithm of zero
        *_, image = ax.specgram(sound, size, SAMPLE_RATE, noverlap=size * 3 // 4, vmin=-80, vmax=-20)
        ax.set(title=title, ylim=(0, 600), xlim=(0.125, 9.875), xlabel="s")
    axes[0].set_ylabel("Hz")
    figure.colorbar(image, ax=axes, label="dB")
    figure.savefig(file, dpi=80)


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    if command == "make":
        folder = Path(*paths)
        folder.mkdir()
        write_checkpoint(folder / "torch")
        write_song(folder / "songs")
    else:  # compare DATA CHECKPOINT AUDIO PICTURE
        data, checkpoint, file, picture = map(Path, paths)
        clip, made = song(), audio.read(file, SAMPLE_RATE, 2)
        for steps in (8, 50):
            print(f"cosine of latents, {steps} steps: {similarity(data, checkpoint, steps):.4f}")
        print(f"correlation of waveforms: {np.corrcoef(clip[0], made[0])[0, 1]:.4f}")
        draw_spectrograms(picture, clip, made)
