"""`acestep-jax train autoencoder`: from a folder of audio to an autoencoder, from scratch.

There is no discriminator: the loss is a spectral distance at several resolutions, the error of the waveform and a small
KL divergence, see `train.reconstruction`. The result, `vae/`, is a checkpoint of only this network:
`checkpoint.load(path, names=["vae"])`.
"""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from acestep_jax.diffusion import noise
from acestep_jax.io import checkpoint, checkpoint_writer
from acestep_jax.io.files import as_path
from acestep_jax.models.autoencoder import AutoencoderOobleck, DiagonalGaussian
from acestep_jax.models.config import AutoencoderConfig
from acestep_jax.models.kernels.compiler import COMPILER_OPTIONS
from acestep_jax.settings import with_own_settings
from acestep_jax.train import reconstruction
from acestep_jax.train import step as steps
from acestep_jax.train.config import AutoencoderTrainConfig, ReconstructionConfig
from acestep_jax.train.crops import read_songs, validation_crops
from acestep_jax.train.loop import Data, Trainer, train
from acestep_jax.train.report import Panel
from acestep_jax.train.run import check_folder
from acestep_jax.train.step import Metrics, Params, TrainState

RESULT = "vae"
INITIAL_SCALE = -2.0  # before softplus: a standard deviation of 0.13


@with_own_settings
def fit(config: AutoencoderTrainConfig) -> Path:
    """Start or resume a training run; return the folder of its result, `vae/` in `config.out`.

    Raises:
        InputError: if the audio or the settings cannot be used, the run in `config.out` has other settings, the disk is
            full, or (DivergedError) the loss is non-finite in `max_bad_steps` consecutive steps.
    """
    check_folder(as_path(config.out), config)
    songs, held_out, made_from = read_songs(config)
    crops = validation_crops(held_out or songs, config.batch_size)
    network = config.model.network
    data = Data(
        lambda first: (songs.draw(config.batch_size, config.seed, step) for step in itertools.count(first + 1)),
        lambda: crops,
        made_from,
        network.sampling_rate / network.hop_length,
    )
    return train(AutoencoderTraining(config), data)


class Validation(NamedTuple):
    """The validation metrics of a batch, with the posterior means as latents."""

    loss: jax.Array
    spectrum: jax.Array
    waveform: jax.Array
    kl: jax.Array
    si_sdr: jax.Array  # dB
    square: jax.Array  # [latent channels], mean square of sampled latents


class AutoencoderTraining(Trainer):
    """Training of an autoencoder from random weights."""

    panels = (
        Panel("loss", {"loss": "training", "validation_loss": "held-out songs"}),
        Panel("distance of spectra", {"spectrum": "training", "validation_spectrum": "held-out songs"}),
        Panel("SI-SDR, dB", {"validation_si_sdr": "held-out songs"}, scale="linear"),
    )

    saves_validated = True  # validation measures the scale of the latents

    def __init__(self, config: AutoencoderTrainConfig):
        super().__init__(config, initial(config.model.network, config.seed), nnx.Param)
        self._step = make_step(self.model, self.optimizer, config, self.shardings)
        self._evaluate = make_evaluation(self.model, config)

    @property
    def averages(self) -> Params:
        """The EMA of the weights if there is one, else the weights."""
        return self.state.params if self.state.ema is None else self.state.ema

    def restore(self, saved: Any, step: int) -> None:
        super().restore(saved, step)
        self.notes["square"] = saved.notes(step)["square"]

    def validate(self, batches: Iterable[np.ndarray]) -> dict[str, float]:
        """Return the means over the batches, and note the mean square of the latents, by which the result is scaled."""
        found = [self._evaluate(self.averages, batch) for batch in batches]
        found = jax.tree.map(lambda *values: np.mean(values, axis=0), *found)
        self.notes["square"] = [float(value) for value in found.square]
        values = {name: float(value) for name, value in found._asdict().items() if name != "square"}
        low, high = np.quantile(np.sqrt(found.square), (0.0, 1.0))
        values |= {"latent_rms_least": float(low), "latent_rms_most": float(high)}
        return {f"validation_{name}": value for name, value in values.items()}

    def summarise(self, details: list[dict[str, np.ndarray]]) -> dict[str, float]:
        """Return the mean of each term of the loss over the steps whose loss is finite."""
        good = [step for step in details if np.isfinite(sum(step.values()))] or details
        return {name: float(np.mean([step[name] for step in good])) for name in details[0]}

    def results(self) -> dict[str, Params]:
        return {RESULT: self.averages}

    @staticmethod
    def write_result(
        path: Path, config: AutoencoderTrainConfig, weights: dict[str, np.ndarray], notes: dict[str, Any]
    ) -> None:
        """Write a checkpoint of the network with rescaled latents; raise InputError if `path` exists."""
        arrays = rescale(weights, np.maximum(notes["square"], 1e-8))
        names = checkpoint.leaf_shapes("vae", config.model.network)
        pairs = [(f"vae.{name}", np.asarray(arrays[name])) for name in names]
        checkpoint_writer.save(path, {"vae": config.model.network}, pairs, tokenizer=None, tokenizer_config={})


def make_step(
    model: steps.Model, optimizer: Any, config: AutoencoderTrainConfig, shardings: steps.Shardings
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Return the jitted step: (state, crops [B, channels, samples]) -> (state, Metrics).

    `Metrics.details` holds the unweighted terms of the loss.
    """

    def step(state: TrainState, crops: jax.Array) -> tuple[TrainState, Metrics]:
        sound = crops.astype(jnp.float32)
        key = jax.random.fold_in(noise.key(config.seed), state.step)
        warmup = jnp.minimum((state.step + 1) / max(config.loss.spectrum_warmup, 1), 1.0)

        def objective(params: Params):
            network = model.merge(params, model.frozen)
            posterior = encode(network, sound)
            return losses(sound, decode(network, posterior.sample(key)), posterior, config.loss, warmup)

        (loss, terms), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
        frames = jnp.float32(crops.shape[0] * crops.shape[2] / config.model.network.hop_length)
        return steps.update(state, gradients, optimizer, config.optimizer, loss=loss, frames=frames, details=terms)

    return steps.compiled(step, shardings)


def make_evaluation(model: steps.Model, config: AutoencoderTrainConfig) -> Callable[[Params, np.ndarray], Validation]:
    """Return the jitted (params, crops [B, channels, samples]) -> Validation."""

    def evaluate(params: Params, crops: jax.Array) -> Validation:
        sound = crops.astype(jnp.float32)
        network = model.merge(params, model.frozen)
        posterior = encode(network, sound)
        result = decode(network, posterior.mean)
        square = (jnp.square(posterior.mean) + jnp.square(posterior.std)).mean((0, 1))
        loss, terms = losses(sound, result, posterior, config.loss)
        return Validation(loss, **terms, si_sdr=reconstruction.si_sdr(result, sound).mean(), square=square)

    return jax.jit(evaluate, compiler_options=COMPILER_OPTIONS)


def losses(
    sound: jax.Array,
    result: jax.Array,
    posterior: DiagonalGaussian,
    config: ReconstructionConfig,
    warmup: jax.Array | float = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return loss = warmup w_s spectrum + w_w waveform + w_k kl and its terms for a result [B, channels, samples]."""
    spectrum = reconstruction.spectral_distance(result, sound, config.windows)
    waveform = jnp.abs(result - sound).mean()
    kl = reconstruction.divergence(posterior)
    loss = warmup * config.spectrum * spectrum + config.waveform * waveform + config.kl * kl
    return loss, dict(spectrum=spectrum, waveform=waveform, kl=kl)


def initial(config: AutoencoderConfig, seed: int) -> AutoencoderOobleck:
    """Return a network that is nearly a chain of plain convolutions, with little noise on its latents: the residual
    branches, if not scaled down, would amplify their input a thousandfold, and noise would drown the signal to learn.
    """
    network = AutoencoderOobleck(config, rngs=nnx.Rngs(noise.key(seed)))
    for name, variable in checkpoint.leaves(network).items():
        value = variable.get_value()
        if ".res_unit" in name and name.endswith("conv2.kernel") or name == "decoder.conv2.kernel":
            variable.set_value(0.1 * value)
        elif name == "encoder.conv2.bias":
            variable.set_value(value.at[value.size // 2 :].set(INITIAL_SCALE))
    return network


def encode(network: AutoencoderOobleck, sound: jax.Array) -> DiagonalGaussian:
    """Encode [B, channels, samples] at once; `AutoencoderOobleck.encode` encodes one song after the other."""
    return DiagonalGaussian.of(network.encoder(jnp.moveaxis(sound, 1, 2)))


def decode(network: AutoencoderOobleck, latents: jax.Array) -> jax.Array:
    """Decode [B, frames, latent channels] to [B, channels, samples]."""
    return jnp.moveaxis(network.decoder(latents), 1, 2)


def rescale(weights: dict[str, np.ndarray], square: np.ndarray) -> dict[str, np.ndarray]:
    """Rescale latents whose mean square is `square`, [channels], to a mean square of 1, without changing the
    reconstruction; return the new weights.

    Means are rescaled exactly, by the encoder's last layer and the decoder's first. Standard deviations softplus(x) are
    rescaled by shifting x, which is exact where they are small: softplus(x) is then exp(x).
    """
    scale = np.sqrt(np.asarray(square, np.float32))
    last, first = "encoder.conv2", "decoder.conv1"
    factor, shift = np.concatenate([1 / scale, np.ones_like(scale)]), np.concatenate([0 * scale, -np.log(scale)])
    return weights | {
        f"{last}.kernel": weights[f"{last}.kernel"] * factor,
        f"{last}.bias": weights[f"{last}.bias"] * factor + shift,
        f"{first}.kernel": weights[f"{first}.kernel"] * scale[:, None],
    }
