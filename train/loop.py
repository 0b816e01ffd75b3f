"""`python -m train fit`: from a data folder and a checkpoint to an adapter or a fine-tuned checkpoint.

A run is a folder: `config.yaml`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `loss.png`, `samples/` and, at its
end, `adapter/` or `model/`. The same command goes on from the last checkpoint.
"""

import contextlib
import fcntl
import functools
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from acestep_jax.train import config as settings
from acestep_jax.train import dataset
from acestep_jax.train import step as steps
from acestep_jax.train.checkpoints import Checkpoints
from acestep_jax.train.config import TrainConfig
from acestep_jax.train.data_folder import fingerprint, read_index, text_sha256
from acestep_jax.train.objective import Batch, Frozen, freeze
from acestep_jax.train.report import Report
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from acestep_jax import AceStepPipeline
from acestep_jax.cli import parse_mesh
from acestep_jax.distributed import variable_sharding
from acestep_jax.errors import InputError
from acestep_jax.inputs.codec import on_host
from acestep_jax.inputs.programs import REFERENCE_FRAMES
from acestep_jax.io import checkpoint
from acestep_jax.io.adapter import Adapter, save_adapter
from acestep_jax.models.lora import add_lora

logger = logging.getLogger(__name__)

# What a run may change when it goes on: nothing that the weights depend on, but for the length of the schedule.
CHANGEABLE = ("steps", "out", "save_every", "log_every", "keep", "max_bad_steps", "mesh", "remat", "examples.workers")
CHANGEABLE += ("report.",)

CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"


class DivergedError(InputError):
    """The loss was not a number for too many steps in a row."""


def fit(config: TrainConfig) -> Path:
    """Runs, or goes on with, a fine-tuning; returns the folder of the result, `adapter/` or `model/` of `config.out`.

    Raises:
        InputError: if the data, the checkpoint or the settings do not go together, the run in `config.out` had other
            settings, a disk is full, or (DivergedError) the loss is no number for `max_bad_steps` steps in a row.
    """
    folder = Path(config.out)
    mesh = parse_mesh(config.mesh)
    _check_batch(config, mesh)
    check_folder(folder, config)
    index = read_index(config.data)
    if (found := fingerprint(config.checkpoint)) != index.checkpoint:
        raise InputError(
            f"{config.data}: was made with another autoencoder or text encoder ({index.checkpoint[:12]}) than those of "
            f"{config.checkpoint} ({found[:12]}); preprocess again with this checkpoint"
        )
    training_songs, held_out = dataset.split(index, config.examples.validation_fraction)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        trainer = Trainer(config, mesh)
        silence = np.asarray(trainer.silence(max(index.crop_seconds) * index.latents_per_second))
        make = lambda songs: dataset.Examples(Path(config.data), index, songs, config.examples, silence)  # noqa: E731
        examples = make(training_songs)
        _all_here("checked")  # before one of them makes the folder that the others look for
        if jax.process_index() == 0:
            folder.mkdir(exist_ok=True)
        with locked(folder):
            if jax.process_index() == 0:
                settings.write(folder / CONFIG, config)
            made_from = {
                "data": text_sha256([[song.sha256, song.text_sha256, song.repeat] for song in index.songs]),
                "checkpoint": fingerprint(config.checkpoint, ("transformer", "condition_encoder")),
            }
            trainer.run(folder, examples, make(held_out) if held_out else None, made_from)
            result = trainer.write_results(folder)
            _all_here("results")
            return result


class Trainer:
    """The networks, the compiled step and the state of a run."""

    def __init__(self, config: TrainConfig, mesh: Mesh | None):
        self.config, self.mesh = config, mesh
        path = Path(config.checkpoint)
        covers = config.examples.cover > 0
        manifest = checkpoint.read_manifest(path)
        if covers and (missing := [n for n in checkpoint.OPTIONAL_NETWORKS if n not in manifest.configs]):
            raise InputError(f"{path}: has no {' and '.join(missing)}, which covers need; set examples.cover to 0")
        lora = config.method == "lora"
        (transformer,) = checkpoint.load(
            path,
            dtype=config.dtype,
            param_dtype=None if lora else "float32",
            remat=config.remat,
            mesh=mesh,
            names=["transformer"],
        ).values()
        if lora:
            transformer = add_lora(transformer, config.lora, rngs=nnx.Rngs(config.seed))
        kind = nnx.LoRAParam if lora else nnx.Param
        self.model, params = steps.Model.take_apart(transformer, kind, mesh)
        del transformer
        others = ["condition_encoder", *(checkpoint.OPTIONAL_NETWORKS if covers else ())]
        networks = checkpoint.load(path, dtype=config.dtype, mesh=mesh, names=others)
        self.frozen: Frozen = freeze(networks, _embedding(path, manifest, config.dtype, mesh), REFERENCE_FRAMES)
        self.optimizer = steps.make_optimizer(config.optimizer, config.steps)
        self.learning_rate = steps.learning_rate(config.optimizer, config.steps)
        self.shardings = steps.state_shardings(self.model, params, self.optimizer, config.optimizer)
        self.state = steps.initial_state(params, self.optimizer, config.optimizer, self.shardings)
        self._step = steps.make_step(self.model, self.optimizer, config, self.shardings)
        self._evaluate = steps.make_evaluation(self.model, config, self.shardings)
        self._programs: dict[Any, Callable] = {}
        self._pipeline: AceStepPipeline | None = None

    def silence(self, frames: float) -> jax.Array:
        """Latents of silence, [frames, 64] float32."""
        return self.frozen.condition_encoder.silence(int(frames))[0].astype(jnp.float32)

    def step(self, batch: Batch) -> steps.Metrics:
        """Makes one step with a batch on the devices; returns before it is done.

        There is one program for each length of crop. It is compiled ahead, so that other shapes, dtypes or shardings
        would be an error and not a silent compilation.
        """
        arguments = self.state, self.model.frozen, self.frozen, batch
        frames = batch.mean.shape[-2]
        if frames not in self._programs:
            self._programs[frames] = self._step.lower(*arguments).compile()
        self.state, metrics = self._programs[frames](*arguments)
        return metrics

    def run(
        self,
        folder: Path,
        examples: dataset.Examples,
        held_out: dataset.Examples | None,
        made_from: dict[str, str],
    ) -> None:
        """From the last checkpoint in `folder`, or the beginning, to the last step.

        Args:
            made_from: hashes of all that the weights come from besides the settings, by name.
        """
        config = self.config
        size, accumulation = config.examples.batch_size, config.optimizer.accumulation
        rows = steps.rows_of_process(self.mesh, size)
        batches = iter(dataset.training_batches(examples, config.seed, accumulation, rows))
        saved = Checkpoints(folder / CHECKPOINTS, config.keep)
        first = 0
        if saved.steps:
            first = saved.steps[-1]
            notes = saved.notes(first)
            if changed := [name for name, value in made_from.items() if notes["made_from"][name] != value]:
                raise InputError(
                    f"{folder}: the {' and the '.join(changed)} of this run changed after its last checkpoint; put "
                    "back what it began with, or begin a new run with another --out"
                )
            self.restore(saved, first)
            batches.set_state(notes["iterator"])
            logger.info("%s: going on from step %d", folder, first)
        report = Report(folder, first, config.steps, config.report.log_every, examples.rate)
        with report, saved:
            pending: tuple[int, steps.Metrics] | None = None
            for step in range(first + 1, config.steps + 1):
                batch = steps.place(next(batches), self.mesh, 1, rows, size)
                metrics = self.step(batch)
                if pending:  # of the step before: the devices are busy with this one meanwhile
                    self._look_at(report, *pending)
                pending = step, metrics
                last = step == config.steps
                samples = config.report.sample_prompts and (last or step % config.report.sample_every == 0)
                saves = last or step % config.save_every == 0
                validates = held_out is not None and (saves or step % config.report.validate_every == 0)
                if not (validates or samples or saves):
                    continue
                self._look_at(report, *pending)
                pending = None
                with report.paused():
                    loss = self._validate(report, step, held_out) if validates else None
                    if saves:  # before the samples, which may need more memory than there is
                        notes = {"iterator": batches.get_state(), "made_from": made_from}
                        saved.save(step, self.state, notes, loss)
                    if samples:
                        self._sample(report, step)

    def restore(self, saved: Checkpoints, step: int) -> None:
        """Takes over the state of a checkpoint; raises as `Checkpoints.restore` does."""
        target = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), self.state, self.shardings
        )
        self.state = None  # there may not be room for two
        self.state = saved.restore(step, target)

    def _look_at(self, report: Report, step: int, metrics: steps.Metrics) -> None:
        report.add(step, metrics, self.learning_rate)
        if (bad := int(metrics.bad_steps)) >= self.config.max_bad_steps:
            raise DivergedError(
                f"{self.config.out}: the loss is not a number since step {step - bad + 1}, {bad} steps in a row. Begin "
                "a new run with another --out and a lower optimizer.learning_rate, or look at the data; the "
                "checkpoints of this one are good"
            )

    def _validate(self, report: Report, step: int, held_out: dataset.Examples) -> float:
        """The mean loss of the held-out songs at fixed times and noise."""
        size = self.config.examples.batch_size
        rows = steps.rows_of_process(self.mesh, size)
        errors, elements = 0.0, 0.0
        for whole in dataset.validation_batches(held_out):
            mine = jax.tree.map(lambda x: x[np.asarray(rows)], whole)
            batch = steps.place(mine, self.mesh, 0, rows, size)
            error, element = self._evaluate(self.state.params, self.model.frozen, self.frozen, batch)
            errors, elements = errors + error, elements + element
        by_time = np.asarray(errors / elements)
        report.validation(step, loss := float(by_time.mean()), steps.validation_times(self.config), by_time)
        return loss

    def _sample(self, report: Report, step: int) -> None:
        """A song of each of the fixed prompts, from the same noise each time."""
        config = self.config
        if self._pipeline is None:
            path = config.checkpoint
            networks = checkpoint.load(path, dtype=config.dtype, mesh=self.mesh, names=["text_encoder", "vae"])
            self._pipeline = AceStepPipeline(
                transformer=None,
                condition_encoder=self.frozen.condition_encoder,
                tokenizer=checkpoint.load_tokenizer(path),
                mesh=self.mesh,
                **networks,
            )
        self._pipeline.transformer = self.transformer()
        for i, prompt in enumerate(config.report.sample_prompts):
            song = self._pipeline(prompt, "[Instrumental]", config.report.sample_seconds, seed=i)
            report.sample(step, i, prompt, song.audios[0], song.sample_rate)
        self._pipeline.transformer = None

    def transformer(self, params: steps.Params | None = None) -> nnx.Module:
        """As it is now, or with other weights of what learns."""
        return self.model.merge(self.state.params if params is None else params, self.model.frozen)

    def write_results(self, folder: Path) -> Path:
        """Writes `adapter/` or `model/`, and with `-ema` to their names those of the averages; returns the former.

        A whole checkpoint is not written by several processes: then it is the folder of checkpoints that is returned.
        """
        lora = self.config.method == "lora"
        if not lora and jax.process_count() > 1:
            logger.warning("%s: write the model with `python -m train export %s DST`, in one process", folder, folder)
            return folder / CHECKPOINTS
        name = "adapter" if lora else "model"
        for target, params in ((folder / name, self.state.params), (folder / f"{name}-ema", self.state.ema)):
            if params is None:
                continue
            arrays = {leaf: on_host(value) for leaf, value in params.items()}
            if jax.process_index() == 0:
                replace(target, functools.partial(write_result, config=self.config, arrays=arrays))
        return folder / name


def replace(target: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder in place of that of an earlier end of the run."""
    fresh = target.with_name(f".{target.name}-new")
    for left in (fresh, *target.parent.glob(f".{fresh.name}-*")):
        shutil.rmtree(left, ignore_errors=True)
    write(fresh)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def write_result(path: Path, config: TrainConfig, arrays: dict[str, np.ndarray]) -> None:
    """Writes an adapter or a checkpoint with these weights, whole or not at all; raises InputError if `path` exists."""
    if config.method == "lora":
        save_adapter(path, Adapter(config.lora, arrays))
    else:
        checkpoint.save_changed(config.checkpoint, path, "transformer", arrays)


def export(run: str | Path, destination: str | Path, *, step: int | None = None, ema: bool = False) -> int:
    """Writes the adapter or the checkpoint of one of a run's steps, also while the run goes on; on the host alone.

    Args:
        step: one that is kept; None: the best on the held-out songs or, if none was validated, the latest.
        ema: the averages of the weights.

    Returns:
        The step.

    Raises:
        InputError: if `run` holds no run or no such step, or `destination` exists.
    """
    run, destination = Path(run), Path(destination)
    checkpoint.check_new(destination)
    config = settings.read(run / CONFIG)
    if ema and not config.optimizer.ema_decay:
        raise InputError(f"{run}: has no averages of the weights; they need optimizer.ema_decay")
    with Checkpoints(run / CHECKPOINTS, config.keep, writes=False) as saved:
        step = saved.choose(step)
        weights = saved.weights(step, "ema" if ema else "params")
    write_result(destination, config, weights)
    return step


def check_folder(folder: Path, config: settings.Config) -> None:
    """Raises InputError if a run with these settings can neither begin in this folder nor go on there."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; choose another --out")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"{folder}: the folder {folder.absolute().parent} does not exist; create it first")
    if not (folder / CONFIG).is_file():
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder}: already exists and holds no run; remove it or choose another --out")
        return
    made = [int(path.name) for path in (folder / CHECKPOINTS).glob("*") if path.name.isdecimal()]
    if not made:  # it failed before it had anything to lose
        return
    found = settings.differences(settings.read(folder / CONFIG, type(config)), config)
    if changed := {k: v for k, v in found.items() if not k.startswith(CHANGEABLE)}:
        listing = ", ".join(f"{name} was {before!r}, now {now!r}" for name, (before, now) in changed.items())
        raise InputError(f"{folder}: holds a run with other settings ({listing}); use those, or another --out")
    if max(made) > config.steps:
        raise InputError(
            f"{folder}: has made {max(made)} steps already, more than steps ({config.steps}); `python -m train export` "
            "writes the result of an earlier one"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second command from going on with the same run beside this one."""
    if jax.process_index():
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: this run is going on in another process; wait for its end or stop it"
            ) from None
        yield


def _all_here(name: str) -> None:
    """Waits until every process has come this far."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _check_batch(config: TrainConfig, mesh: Mesh | None) -> None:
    parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    if config.examples.batch_size % parts:
        raise InputError(
            f"examples.batch_size: {config.examples.batch_size} does not divide by the mesh's data and fsdp ({parts}); "
            "give a multiple of that"
        )


def _embedding(path: Path, manifest: checkpoint.Manifest, dtype: str | None, mesh: Mesh | None) -> jax.Array:
    """The text encoder's embedding table alone, [vocabulary, 1024]."""
    leaf = "embed_tokens.embedding"
    variable = checkpoint.leaves(checkpoint.abstract("text_encoder", manifest.configs["text_encoder"]))[leaf]
    stored = checkpoint.network_leaves(path, manifest)["text_encoder"][leaf]
    target = jax.ShapeDtypeStruct(stored.shape, dtype or stored.dtype, sharding=variable_sharding(variable, mesh))
    return checkpoint.load_leaves(path, "text_encoder", {leaf: target})[leaf]
