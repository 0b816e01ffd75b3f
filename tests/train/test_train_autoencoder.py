"""Training of the autoencoder: its losses against torch, and runs of a tiny one on three short files."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jsonargparse
import numpy as np
import pytest
import soundfile
import torch
from flax import nnx

from acestep_jax.cli import train as cli
from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint
from acestep_jax.models.autoencoder import AutoencoderOobleck, DiagonalGaussian
from acestep_jax.models.config import AutoencoderConfig
from acestep_jax.train import autoencoder, config_file, reconstruction
from acestep_jax.train.checkpoints import Checkpoints
from acestep_jax.train.config import AdamConfig, AutoencoderTrainConfig, OobleckConfig, ReconstructionConfig
from acestep_jax.train.crops import CropSource, read_songs
from acestep_jax.train.run import DivergedError
from tests.parity import assert_close, normal
from tests.training import TINY_AUTOENCODER as MODEL
from tests.training import autoencoder_settings as run_settings
from tests.training import error_of, run_command

RATE = 48000
power = jax.jit(reconstruction.power, static_argnums=1)
spectral_distance = jax.jit(reconstruction.spectral_distance, static_argnums=2)


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """Three chords of half a second, panned."""
    folder = tmp_path_factory.mktemp("songs")
    time = np.arange(RATE // 2) / RATE
    for i in range(3):
        chord = sum(np.sin(2 * math.pi * 110 * 2 ** ((i + step) / 12) * time) for step in (0, 4, 7))
        soundfile.write(folder / f"{i}.wav", 0.2 * np.stack([chord, 0.3 * chord], axis=1), RATE)
    return folder


@pytest.fixture(scope="module")
def run(songs, tmp_path_factory):
    """A whole run: its settings and folder."""
    config = run_settings(songs, tmp_path_factory.mktemp("runs") / "run")
    assert autoencoder.fit(config) == Path(config.out) / "vae"
    return config, Path(config.out)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def arrays(path):
    return {
        name: variable[...] for name, variable in checkpoint.leaves(checkpoint.load(path, names=["vae"])["vae"]).items()
    }


def torch_power(x, window):
    spectrum = torch.stft(
        torch.from_numpy(x).flatten(0, -2),
        window,
        window // 2,
        window=torch.hann_window(window),
        center=False,
        return_complex=True,
    )
    return (spectrum.abs().square() * (4 / window) ** 2).mT.reshape(*x.shape[:-1], -1, window // 2 + 1)


@pytest.mark.parametrize(("window", "samples"), [(64, 640), (256, 1000)])
def test_power_is_that_of_torch(window, samples):
    x = 0.1 * normal(2, 2, samples)
    assert_close(power(x, window), torch_power(x, window).numpy())


def test_a_sine_of_full_scale_has_power_one():
    x = np.sin(2 * np.pi * 8 * np.arange(512) / 64).astype(np.float32)
    assert abs(float(power(x, 64)[3, 8]) - 1) < 1e-5


def test_spectral_distance_is_that_of_torch():
    """With silence in one channel's place, where the floor counts."""
    x, y = 0.1 * normal(2, 2, 1024), 0.1 * normal(2, 2, 1024, seed=1)
    y[1, :, 512:] = 0
    expected = []
    for window in (256, 64):
        middle_side = [np.stack([a[:, 0] + a[:, 1], a[:, 0] - a[:, 1]], axis=1) / 2 for a in (x, y)]
        a, b = ((torch_power(z, window) + 1e-8).sqrt() for z in middle_side)
        convergence = [(torch.linalg.norm((a - b)[:, i]) / torch.linalg.norm(b[:, i])).item() for i in (0, 1)]
        expected.append(np.mean(convergence) + (a.log() - b.log()).abs().mean().item())
    assert_close(spectral_distance(x, y, (256, 64)), np.float32(np.mean(expected)))
    assert float(spectral_distance(y, y, (256, 64))) < 1e-5


def test_spectral_distance_has_a_gradient_at_silence():
    silence = np.zeros((1, 2, 512), np.float32)
    gradient = jax.jit(jax.grad(reconstruction.spectral_distance), static_argnums=2)
    assert np.isfinite(gradient(silence, 0.1 * normal(1, 2, 512), (64,))).all()
    assert np.isfinite(gradient(silence, silence, (64,))).all()


def test_divergence_is_that_of_torch():
    mean, std = normal(2, 5, 6), np.abs(normal(2, 5, 6, seed=1)) + 0.1
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(torch.from_numpy(mean), torch.from_numpy(std)), torch.distributions.Normal(0.0, 1.0)
    )
    assert_close(reconstruction.divergence(DiagonalGaussian(mean, std)), theirs.mean().numpy())


def test_si_sdr_of_known_noise():
    """A hundredth of the power, at right angles to the signal: 20 dB, whatever the scale."""
    y = normal(2, 2, 1000)
    noise = normal(2, 2, 1000, seed=1)
    for i in range(2):
        noise[i] -= (noise[i] * y[i]).sum() / np.square(y[i]).sum() * y[i]
        noise[i] *= 0.1 * np.linalg.norm(y[i]) / np.linalg.norm(noise[i])
    assert np.allclose(reconstruction.si_sdr(3 * (y + noise), y), 20, atol=1e-3)


def test_rescale_keeps_the_reconstruction():
    """And gives the mean squares asked for; small deviations are scaled as the means are."""
    config = MODEL.network
    network = autoencoder.initial(config, 0)
    weights = {name: np.asarray(variable[...]) for name, variable in checkpoint.leaves(network).items()}
    weights["encoder.conv2.bias"] = np.concatenate([normal(6), np.full(6, -7, np.float32)])
    square = np.abs(normal(6)) + 0.1
    x = 0.1 * normal(2, 2, 800)

    @jax.jit
    def both(weights):
        network = checkpoint.assemble(checkpoint.abstract("vae", config), weights)
        posterior = autoencoder.encode(network, x)
        return posterior, autoencoder.decode(network, posterior.mean)

    (before, sound), (after, again) = both(weights), both(autoencoder.rescale(weights, square))
    assert_close(again, sound)
    assert_close(after.mean * np.sqrt(square), before.mean)
    assert_close((after.std - 1e-4) * np.sqrt(square), before.std - 1e-4, 5e-3)


def test_run_folder(run):
    config, folder = run
    assert {"config.yaml", "metrics.jsonl", "loss.png", "checkpoints", "vae"} <= {
        path.name for path in folder.iterdir()
    }
    assert config_file.read(folder / "config.yaml") == config
    training = [row for row in rows(folder) if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, 41))
    assert {"spectrum", "waveform", "kl", "gradient_norm", "learning_rate"} <= training[0].keys()
    validation = [row for row in rows(folder) if "validation_loss" in row]
    assert [row["step"] for row in validation] == [10, 20, 30, 40] and "validation_si_sdr" in validation[0]


def test_loss_falls(run):
    losses = [row["loss"] for row in rows(run[1]) if "loss" in row]
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])


def test_result_reconstructs_as_the_run_did(run, songs):
    """From the averages of the last step, though its latents are scaled; in pieces or not."""
    config, folder = run
    (vae,) = checkpoint.load(folder / "vae", names=["vae"]).values()
    assert vae.config == config.model.network
    with Checkpoints(folder / "checkpoints", 2, writes=False) as saved:
        weights, square = saved.weights(40, "ema"), saved.notes(40)["square"]
    network = checkpoint.assemble(checkpoint.abstract("vae", vae.config), weights)
    crops, _, _ = read_songs(config)
    x = crops.draw(2, 9).astype(np.float32)
    posterior, sound = jax.jit(lambda n: (p := autoencoder.encode(n, x), autoencoder.decode(n, p.mean)))(network)
    again, same_sound = jax.jit(lambda n: (p := n.encode(x), n.decode(p.mean)))(vae)
    assert_close(again.mean * np.sqrt(square), posterior.mean)
    assert_close(same_sound, sound)


@pytest.mark.slow
def test_a_stopped_run_resumes_bit_for_bit(run, songs, tmp_path):
    """As if it had been killed after its third checkpoint; its folder may have moved."""
    config, folder = run
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    shutil.rmtree(moved / "checkpoints" / "40")
    shutil.rmtree(moved / "vae")
    autoencoder.fit(run_settings(songs, moved))
    before, after = arrays(folder / "vae"), arrays(moved / "vae")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    measured = ("audio_seconds_per_second", "memory_gb")
    drop = lambda found: [{k: v for k, v in row.items() if k not in measured} for row in found]  # noqa: E731
    assert drop(rows(folder)) == drop(rows(moved))


def test_export(run, tmp_path, capsys):
    """Of a step that is kept, by the command that exports fine-tunings too."""
    _, folder = run
    assert run_command("export", folder, tmp_path / "last", "--step", "40") == 0
    before, after = arrays(folder / "vae"), arrays(tmp_path / "last")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert "no checkpoint of step 1" in error_of(capsys, "export", folder, tmp_path / "one", "--step", "1")
    # Without averages, the weights themselves.
    shutil.copytree(folder, tmp_path / "plain")
    text = (folder / "config.yaml").read_text()
    assert "ema_decay: 0.5" in text
    (tmp_path / "plain" / "config.yaml").write_text(text.replace("ema_decay: 0.5", "ema_decay: 0"))
    assert run_command("export", tmp_path / "plain", tmp_path / "weights", "--step", "40") == 0
    plain = arrays(tmp_path / "weights")
    assert plain.keys() == before.keys() and not all(np.array_equal(plain[name], before[name]) for name in before)


def test_a_network_alone_is_no_model(run):
    with pytest.raises(InputError, match="the network.s. condition_encoder, text_encoder, transformer are missing"):
        checkpoint.load(run[1] / "vae")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss=ReconstructionConfig(windows=(256, 63))), "loss.windows: expected even"),
        (dict(loss=ReconstructionConfig(windows=(4096,))), "crop_seconds: expected at least .* longest window"),
        (dict(crop_seconds=float("nan")), "crop_seconds: expected"),
        (dict(batch_size=0), "batch_size: expected a number of at least 1, found 0"),
        (dict(optimizer=AdamConfig(ema_decay=1.0)), "optimizer.ema_decay: expected"),
        (dict(model=OobleckConfig(downsampling_ratios=(3, 4), channel_multiples=(1, 2))), "expected even numbers"),
    ],
)
def test_unusable_settings(changes, message):
    with pytest.raises(InputError, match=message):
        run_settings("songs", "run", **changes)


def test_unusable_audio(songs, tmp_path):
    empty, short = tmp_path / "empty", tmp_path / "short"
    empty.mkdir()
    short.mkdir()
    soundfile.write(short / "a.wav", np.zeros((100, 2)), RATE)
    soundfile.write(short / "b.wav", np.ones((100, 2)) / 2, RATE)
    for data, changes, message in (
        (tmp_path / "none", {}, "no such folder"),
        (empty, {}, "no audio files"),
        (short, {}, "none of 1 file.* lower crop_seconds"),
        (songs, dict(validation_fraction=0.9), "holds out all of 3"),
    ):
        with pytest.raises(InputError, match=message):
            autoencoder.fit(run_settings(data, tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_of_other_settings_or_songs_is_not_resumed(run, songs, tmp_path):
    _, folder = run
    with pytest.raises(InputError, match=r"other settings \(model.latent_channels was 6, now 8"):
        autoencoder.fit(run_settings(songs, folder, model=dataclasses.replace(MODEL, latent_channels=8)))
    fewer = tmp_path / "fewer"
    shutil.copytree(songs, fewer)
    (fewer / "0.wav").unlink()
    shutil.copytree(folder, tmp_path / "run")
    text = (folder / "config.yaml").read_text().replace(str(songs), str(fewer))
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(InputError, match="the data of this run changed"):
        autoencoder.fit(run_settings(fewer, tmp_path / "run"))


def test_a_non_finite_loss_stops_the_run(songs, tmp_path, monkeypatch):
    draw = CropSource.draw
    monkeypatch.setattr(
        CropSource, "draw", lambda *args: draw(*args) if len(args) < 4 else np.full_like(draw(*args), np.nan)
    )
    with pytest.raises(DivergedError, match="non-finite since step 1, 5 consecutive steps"):
        autoencoder.fit(run_settings(songs, tmp_path / "run"))


def test_command_line(songs, tmp_path, capsys):
    """Its settings are those of a YAML file too; bad ones give an error of one line."""
    file = tmp_path / "small.yaml"
    file.write_text("model: {channel_multiples: [1, 2, 3, 4, 5]}\nloss: {kl: 0.1}\n")
    arguments = ["--data", "songs", "--out", "run", "--config", str(file), "--model.decoder_channels", "8"]
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    cli.add(parser.add_subcommands(required=True, dest="command"))
    values = parser.parse_args(["train", "autoencoder", *arguments]).train.autoencoder
    found = config_file.instantiate(values, AutoencoderTrainConfig)
    assert found.model.channel_multiples == (1, 2, 3, 4, 5) and found.model.decoder_channels == 8
    assert found.loss.kl == 0.1 and found.model.network.encoder_hidden_size == 128
    missing = error_of(capsys, "autoencoder", "--data", tmp_path / "none", "--out", tmp_path / "run")
    assert "none: no such folder" in missing
    message = error_of(capsys, "autoencoder", "--data", "a", "--out", "b", "--steps", "many")
    assert "--steps: expected a whole number, found many" in message and "train autoencoder --help" in message


def test_the_encoder_can_be_narrower_than_its_output():
    """Which diffusers' cannot."""
    network = AutoencoderConfig(
        encoder_channels=4, encoder_hidden_size=16, decoder_input_channels=8, decoder_channels=2
    )
    vae = jax.eval_shape(lambda: AutoencoderOobleck(network, rngs=nnx.Rngs(0)))
    assert vae.encoder.conv1.kernel.shape == (7, 2, 4) and vae.encoder.conv2.kernel.shape == (3, 64, 16)
    with pytest.raises(InputError, match="encoder_channels: diffusers supports only None"):
        network.to_hf()


def test_codecs_are_aligned():
    """What the benchmark compares with: a shift would cost nearly all of the ratio."""
    from benchmarks.reconstruction import CODECS, through_codec

    time = np.arange(RATE) / RATE
    song = 0.2 * np.stack([np.sin(2 * np.pi * (300 + 500 * time) * time), np.sin(2 * np.pi * 440 * time)])
    for name, codec in CODECS.items():
        sizes = []
        result = through_codec(song.astype(np.float32), codec, sizes)
        assert result.shape == song.shape and 5e3 < sizes[0] < 1.2e4, name
        assert float(reconstruction.si_sdr(result[None], song[None].astype(np.float32))[0]) > 15, name
