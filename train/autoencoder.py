"""`python -m train autoencoder`: from a folder of audio to an autoencoder, from random weights.

Without a discriminator: it learns by spectra at several resolutions, the waveform and a small divergence, see
`train.reconstruction`. A run is a folder as of `train.loop`; its result, `vae/`, is a checkpoint of this one network,
`checkpoint.load(path, names=["vae"])`. The same command goes on from the last checkpoint.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from acestep_jax.train import config as settings
from acestep_jax.train import reconstruction
from acestep_jax.train import step as steps
from acestep_jax.train.checkpoints import Checkpoints
from acestep_jax.train.config import AutoencoderTrainConfig
from acestep_jax.train.crops import Songs, read_songs, validation_crops
from acestep_jax.train.loop import CHECKPOINTS, CONFIG, DivergedError, check_folder, locked, replace
from acestep_jax.train.report import Log, Panel
from acestep_jax.train.step import Params, TrainState
from flax import nnx

from acestep_jax.errors import InputError
from acestep_jax.inputs.programs import COMPILER_OPTIONS
from acestep_jax.io import checkpoint
from acestep_jax.models.autoencoder import AutoencoderOobleck, DiagonalGaussian
from acestep_jax.models.config import AutoencoderConfig

RESULT = "vae"
INITIAL_SPREAD = -2.0  # before softplus: a deviation of 0.13


class Metrics(NamedTuple):
    """Of one step."""

    loss: jax.Array
    spectrum: jax.Array  # the loss's parts, before their weights
    waveform: jax.Array
    kl: jax.Array
    grad_norm: jax.Array  # before it is limited
    bad_steps: jax.Array  # how many in a row, up to this one, had gradients that are no numbers and were left out
    updates: jax.Array  # made before this step


class Validation(NamedTuple):
    """Of a batch, by the means of the posteriors."""

    loss: jax.Array
    spectrum: jax.Array
    waveform: jax.Array
    kl: jax.Array
    si_sdr: jax.Array  # dB
    square: jax.Array  # [latent channels], mean of the squared latents, as sampled


class Trainer:
    """The network, the compiled programs and the state of a run."""

    def __init__(self, config: AutoencoderTrainConfig):
        self.config = config
        network = initial(config.model.network, config.seed)
        self.model, params = steps.Model.take_apart(network, nnx.Param, None)
        self.optimizer = steps.make_optimizer(config.optimizer, config.steps)
        self.learning_rate = steps.learning_rate(config.optimizer, config.steps)
        self.shardings = steps.state_shardings(self.model, params, self.optimizer, config.optimizer)
        self.state = steps.initial_state(params, self.optimizer, config.optimizer, self.shardings)
        self._step = jax.jit(self._update, donate_argnums=0, compiler_options=COMPILER_OPTIONS)
        self._evaluate = jax.jit(self._evaluation, compiler_options=COMPILER_OPTIONS)

    @property
    def weights(self) -> Params:
        """The averages, if they are kept."""
        return self.state.params if self.state.ema is None else self.state.ema

    def step(self, crops: np.ndarray) -> Metrics:
        """Makes one step with [B, channels, samples]."""
        self.state, metrics = self._step(self.state, crops)
        return metrics

    def validate(self, crops: list[np.ndarray]) -> Validation:
        """The means over batches."""
        found = [self._evaluate(self.weights, batch) for batch in crops]
        return jax.tree.map(lambda *values: np.mean(values, axis=0), *found)

    def restore(self, saved: Checkpoints, step: int) -> None:
        target = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), self.state, self.shardings
        )
        self.state = saved.restore(step, target)

    def _losses(
        self, sound: jax.Array, result: jax.Array, posterior: DiagonalGaussian, share: jax.Array | float = 1.0
    ) -> tuple[jax.Array, ...]:
        """The loss and its parts, of the result [B, channels, samples] for `sound`.

        share: of the weight of the spectra.
        """
        loss = self.config.loss
        spectrum = reconstruction.spectral_distance(result, sound, loss.windows)
        waveform = jnp.abs(result - sound).mean()
        kl = reconstruction.divergence(posterior)
        return share * loss.spectrum * spectrum + loss.waveform * waveform + loss.kl * kl, spectrum, waveform, kl

    def _update(self, state: TrainState, crops: jax.Array) -> tuple[TrainState, Metrics]:
        sound = crops.astype(jnp.float32)
        key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
        share = jnp.minimum((state.step + 1) / max(self.config.loss.spectrum_warmup, 1), 1.0)

        def objective(params: Params):
            network = self.model.merge(params, self.model.frozen)
            posterior = encode(network, sound)
            loss, *parts = self._losses(sound, decode(network, posterior.sample(key)), posterior, share)
            return loss, parts

        (loss, parts), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        ema, decay = state.ema, self.config.optimizer.ema_decay
        if decay:
            ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(gradients)))
        made = state.step - state.opt_state.total_notfinite
        metrics = Metrics(loss, *parts, grad_norm=norm, bad_steps=opt_state.notfinite_count, updates=made)
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    def _evaluation(self, params: Params, crops: jax.Array) -> Validation:
        sound = crops.astype(jnp.float32)
        network = self.model.merge(params, self.model.frozen)
        posterior = encode(network, sound)
        result = decode(network, posterior.mean)
        square = (jnp.square(posterior.mean) + jnp.square(posterior.std)).mean((0, 1))
        ratio = reconstruction.si_sdr(result, sound).mean()
        return Validation(*self._losses(sound, result, posterior), si_sdr=ratio, square=square)


def train(config: AutoencoderTrainConfig) -> Path:
    """Runs, or goes on with, a training; returns the folder of the result, `vae/` of `config.out`.

    Raises:
        InputError: if the audio or the settings cannot be used, the run in `config.out` had others, the disk is full,
            or (DivergedError) the loss is no number for `max_bad_steps` steps in a row.
    """
    folder = Path(config.out)
    check_folder(folder, config)
    songs, held_out, made_from = read_songs(config)
    trainer = Trainer(config)
    folder.mkdir(exist_ok=True)
    with locked(folder):
        settings.write(folder / CONFIG, config)
        square = run(trainer, folder, songs, held_out, made_from)
        weights = {name: np.asarray(value) for name, value in trainer.weights.items()}
        replace(folder / RESULT, functools.partial(write_result, config=config, weights=weights, square=square))
    return folder / RESULT


def run(trainer: Trainer, folder: Path, songs: Songs, held_out: Songs | None, made_from: dict[str, str]) -> list[float]:
    """From the last checkpoint in `folder`, or the beginning, to the last step; returns `Validation.square`."""
    config = trainer.config
    saved = Checkpoints(folder / CHECKPOINTS, config.keep)
    first, square = 0, []
    if saved.steps:
        first = saved.steps[-1]
        notes = saved.notes(first)
        if notes["made_from"] != made_from:
            raise InputError(
                f"{folder}: the data of this run changed after its last checkpoint; put back what it began with, or "
                "begin a new run with another --out"
            )
        trainer.restore(saved, first)
        square = notes["square"]
    check = validation_crops(held_out or songs, config.batch_size)
    report = Report(folder, first, config.steps, config.log_every, config.batch_size * config.crop_seconds)
    with report, saved:
        for step in range(first + 1, config.steps + 1):
            metrics = trainer.step(songs.draw(config.batch_size, config.seed, step))
            report.add(step, metrics, trainer.learning_rate)
            if (bad := int(metrics.bad_steps)) >= config.max_bad_steps:
                raise DivergedError(
                    f"{config.out}: the loss is not a number since step {step - bad + 1}, {bad} steps in a row. Begin "
                    "a new run with another --out and a lower optimizer.learning_rate, or look at the data"
                )
            if step == config.steps or step % config.save_every == 0:
                with report.paused():
                    found = trainer.validate(check)
                    square = [float(value) for value in found.square]
                    report.validation(step, found)
                    saved.save(step, trainer.state, {"made_from": made_from, "square": square}, float(found.loss))
    return square


def initial(config: AutoencoderConfig, seed: int) -> AutoencoderOobleck:
    """A network that begins near a chain of plain convolutions, with little noise on its latents: full residual
    branches would, one after the other, amplify their input a thousandfold, and noise hide what there is to learn."""
    network = AutoencoderOobleck(config, rngs=nnx.Rngs(seed))
    for name, variable in checkpoint.leaves(network).items():
        value = variable.get_value()
        if ".res_unit" in name and name.endswith("conv2.kernel") or name == "decoder.conv2.kernel":
            variable.set_value(0.1 * value)
        elif name == "encoder.conv2.bias":
            variable.set_value(value.at[value.size // 2 :].set(INITIAL_SPREAD))
    return network


def encode(network: AutoencoderOobleck, sound: jax.Array) -> DiagonalGaussian:
    """[B, channels, samples] in one piece, where `AutoencoderOobleck.encode` takes one song after the other."""
    return DiagonalGaussian.of(network.encoder(jnp.moveaxis(sound, 1, 2)))


def decode(network: AutoencoderOobleck, latents: jax.Array) -> jax.Array:
    """[B, frames, latent channels] -> [B, channels, samples]."""
    return jnp.moveaxis(network.decoder(latents), 1, 2)


def rescale(weights: Params, square: np.ndarray) -> Params:
    """Weights of the same reconstruction, whose latents have a mean square of 1 where they had `square`, [channels].

    Exact for means, by the last layer of the encoder and the first of the decoder. Deviations softplus(x) are scaled by
    a shift of x, which is exact for small ones: softplus(x) is then exp(x).
    """
    scale = np.sqrt(np.asarray(square, np.float32))
    last, first = "encoder.conv2", "decoder.conv1"
    factor, shift = np.concatenate([1 / scale, np.ones_like(scale)]), np.concatenate([0 * scale, -np.log(scale)])
    return weights | {
        f"{last}.kernel": weights[f"{last}.kernel"] * factor,
        f"{last}.bias": weights[f"{last}.bias"] * factor + shift,
        f"{first}.kernel": weights[f"{first}.kernel"] * scale[:, None],
    }


def write_result(path: Path, config: AutoencoderTrainConfig, weights: Params, square: list[float]) -> None:
    """Writes a checkpoint of the network, its latents rescaled; raises InputError if `path` exists."""
    arrays = rescale(weights, np.maximum(square, 1e-8))
    pairs = [(f"vae.{name}", np.asarray(arrays[name])) for name in checkpoint.leaf_shapes("vae", config.model.network)]
    checkpoint.save(path, {"vae": config.model.network}, pairs, tokenizer=None, tokenizer_config={})


def is_run(folder: str | Path) -> bool:
    """Whether it is the folder of such a run."""
    file = Path(folder) / CONFIG
    return file.is_file() and "model" in yaml.safe_load(file.read_text(encoding="utf-8"))


def export(run: str | Path, destination: str | Path, *, step: int | None = None) -> int:
    """Writes the network of one of a run's steps, also while the run goes on: averages, if they are kept.

    Args:
        step: one that is kept; None: the best on the held-out songs.

    Returns:
        The step.

    Raises:
        InputError: if `run` holds no run or no such step, or `destination` exists.
    """
    run = Path(run)
    config = settings.read(run / CONFIG, AutoencoderTrainConfig)
    with Checkpoints(run / CHECKPOINTS, config.keep, writes=False) as saved:
        step = saved.choose(step)
        weights = saved.weights(step, "ema" if config.optimizer.ema_decay else "params")
        square = saved.notes(step)["square"]
    write_result(Path(destination), config, weights, square)
    return step


class Report(Log):
    """The mean of each metric over `log_every` steps; `seconds`: of audio in a step."""

    def __init__(self, folder: Path, step: int, steps: int, log_every: int, seconds: float):
        super().__init__(folder, step, steps, log_every)
        self.seconds = seconds
        self._rows: list[dict[str, float]] = []

    def add(self, step: int, metrics: Metrics, learning_rate: Callable[[int], float]) -> None:
        """One step more; `learning_rate` by how many updates were made before."""
        self._rows.append({name: float(value) for name, value in metrics._asdict().items()})
        self.advance(self._rows[-1]["loss"])
        if step % self.log_every:
            return
        names = ("loss", "spectrum", "waveform", "kl", "grad_norm")
        # A step that is left out must not make the line of all others no number.
        good = [row for row in self._rows if math.isfinite(row["loss"] + row["grad_norm"])] or self._rows
        values = {name: float(np.mean([row[name] for row in good])) for name in names}
        values |= {
            "learning_rate": float(learning_rate(int(metrics.updates))),
            "bad_steps": sum(row["bad_steps"] > 0 for row in self._rows),
            "audio_seconds_per_second": self.seconds * len(self._rows) / self.lap(),
        }
        self.write(step, values)
        self._rows = []

    def validation(self, step: int, found: Validation) -> None:
        """Of held-out songs, or of the others if there are none."""
        values = {name: float(value) for name, value in found._asdict().items() if name != "square"}
        low, high = np.quantile(np.sqrt(found.square), (0.0, 1.0))
        values |= {"latent_rms_least": float(low), "latent_rms_most": float(high)}
        self.write(step, {f"validation_{name}": value for name, value in values.items()})

    def panels(self) -> list[Panel]:
        return [
            Panel("loss", {"loss": "training", "validation_loss": "held-out songs"}),
            Panel("distance of spectra", {"spectrum": "training", "validation_spectrum": "held-out songs"}),
            Panel("SI-SDR, dB", {"validation_si_sdr": "held-out songs"}, scale="linear"),
        ]
