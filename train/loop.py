"""The training loop, the same for adapters, full weights and the autoencoder.

A kind of training is a `Trainer`: its compiled step, its validation, its results. What it learns from is a `Data`.
`train.run` keeps the folder; the same command resumes from the last checkpoint there.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from acestep_jax import preemption
from acestep_jax.distributed import on_host
from acestep_jax.errors import Preempted
from acestep_jax.io.files import as_path
from acestep_jax.train import run
from acestep_jax.train import step as steps
from acestep_jax.train.checkpoints import Checkpoints
from acestep_jax.train.config import Config
from acestep_jax.train.report import Panel, Report

logger = logging.getLogger(__name__)


class Data(NamedTuple):
    """What a run learns from."""

    batches: Callable[[int], Iterator[Any]]  # those after a number of steps, one for each step
    validation: Callable[[], Iterable[Any]] | None  # the same batches at every call
    made_from: dict[str, str]  # hashes of all that the weights depend on besides the settings, by name
    rate: float  # latent frames per second


class Trainer:
    """The network, the state and the compiled step of a run. Subclasses say what differs between kinds of training.

    config: the settings, with the checkpoint's folder on this machine; requested: as the run's folder keeps them.
    fixed: what the step takes between state and batch.
    notes: what JSON can hold, stored with each checkpoint.
    panels: of `loss.png`.
    saves_validated: whether a checkpoint needs what a validation finds.
    """

    panels: tuple[Panel, ...]
    saves_validated = False

    def __init__(self, config: Config, network: nnx.Module, kind: type[nnx.Variable], mesh: Mesh | None = None):
        self.config, self.requested, self.mesh = config, config, mesh
        self.model, params = steps.Model.take_apart(network, kind, mesh)
        self.optimizer = steps.make_optimizer(config.optimizer, config.steps)
        self.shardings = steps.state_shardings(self.model, params, self.optimizer, config.optimizer)
        self.state: steps.TrainState = steps.initial_state(params, self.optimizer, config.optimizer, self.shardings)
        self.fixed: tuple = ()
        self.notes: dict[str, Any] = {}
        self._step: Any = None  # of `step.compiled`
        self._programs: dict[Any, Callable[..., Any]] = {}

    def step(self, batch: Any) -> steps.Metrics:
        """Make one step; return before it is done.

        There is one program for each shape of batch. It is compiled ahead of time, so that other dtypes or shardings
        are an error and not a silent compilation.
        """
        shape = jax.tree.leaves(batch)[0].shape
        if shape not in self._programs:
            self._programs[shape] = self._step.lower(self.state, *self.fixed, batch).compile()
        self.state, metrics = self._programs[shape](self.state, *self.fixed, batch)
        return metrics

    def restore(self, saved: Checkpoints, step: int) -> None:
        """Replace the state by that of a checkpoint; raise as `Checkpoints.restore` does."""
        target = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), self.state, self.shardings
        )
        del self.state  # there may not be room for two
        self.state = saved.restore(step, target)

    def validate(self, batches: Iterable[Any]) -> dict[str, float]:
        """Return the line of metrics of a validation, "validation_loss" among them."""
        raise NotImplementedError

    def summarise(self, details: list[dict[str, Any]]) -> dict[str, float]:
        """Return what a line of metrics says of the `Metrics.details` of some steps."""
        raise NotImplementedError

    def sample(self, report: Report, step: int) -> None:
        """Report samples of what the network generates; only where the settings have `sample_prompts`."""
        raise NotImplementedError

    def results(self) -> dict[str, steps.Params]:
        """Return the weights of each result, by the name of its folder; the first is the main one."""
        raise NotImplementedError

    @staticmethod
    def write_result(path: Path, config: Config, weights: dict[str, np.ndarray], notes: dict[str, Any]) -> None:
        """Write a result with these weights, on the host, to a new folder."""
        raise NotImplementedError


def train(trainer: Trainer, data: Data) -> Path:
    """Start or resume a run, to its last step; return the folder of its main result.

    Raises:
        InputError: if the data changed since the run started, another process trains it, or a disk is full.
        DivergedError: if the loss or a gradient is non-finite in `max_bad_steps` consecutive steps.
        Preempted: after SIGTERM, with a checkpoint of the last step.
    """
    config = trainer.config
    with run.opened(as_path(config.out), trainer.requested) as folder:
        saved = Checkpoints(folder / run.CHECKPOINTS, config.keep)
        first = saved.steps[-1] if saved.steps else 0
        if first:
            run.check_unchanged(folder, saved.notes(first)["made_from"], data.made_from)
            trainer.restore(saved, first)
            logger.info("%s: resuming from step %d", folder, first)
        trainer.notes["made_from"] = data.made_from
        report = Report(folder, first, config, data.rate, trainer.summarise, trainer.panels)
        batches = data.batches(first)
        with report, saved:
            pending: tuple[int, steps.Metrics] | None = None
            stops = False
            for step in range(first + 1, config.steps + 1):
                metrics = trainer.step(next(batches))
                if pending:  # of the step before: the devices are busy with this one meanwhile
                    look_at(report, config, *pending)
                pending = step, metrics

                last = step == config.steps
                stops = not last and preemption.requested_at(step)
                saves = last or stops or step % config.save_every == 0
                validates = data.validation is not None and (saves or step % config.report.validate_every == 0)
                samples = config.report.sample_prompts and (last or step % config.report.sample_every == 0)
                if stops:  # little time is left
                    validates, samples = validates and trainer.saves_validated, False
                if not (saves or validates or samples):
                    continue
                look_at(report, config, *pending)
                pending = None
                with report.paused():
                    found = trainer.validate(data.validation()) if validates and data.validation else {}
                    report.write(step, found)
                    if saves:  # before the samples, which may need more memory than there is
                        report.publish()
                        saved.save(step, trainer.state, dict(trainer.notes), found.get("validation_loss"))
                    if samples:
                        trainer.sample(report, step)
                if stops:
                    break
        if stops:
            raise Preempted  # now that the checkpoint is written
        return write_results(trainer, folder)


def look_at(report: Report, config: Config, step: int, metrics: steps.Metrics) -> None:
    """Report a step, and stop the run if it has diverged."""
    report.add(step, metrics)
    run.check_finite(config, step, int(metrics.bad_steps))


def write_results(trainer: Trainer, folder: Path) -> Path:
    """Write the results of a run in place of earlier ones; return the folder of the first, or that of the checkpoints
    if there is none."""
    results = trainer.results()
    for name, params in results.items():
        weights = {leaf: on_host(value) for leaf, value in params.items()}
        if jax.process_index() == 0:
            write = functools.partial(trainer.write_result, config=trainer.config, weights=weights, notes=trainer.notes)
            run.replace(folder / name, write)
    return folder / next(iter(results), run.CHECKPOINTS)
