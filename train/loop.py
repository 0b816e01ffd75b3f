"""The training loop, the same for adapters, full weights and the autoencoder.

A kind of training is a `Trainer`: its compiled step, its validation, its results. Its batches come from a `Data`.
`train.run` manages the run's folder; the same command resumes from the last checkpoint there.
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
    """The training data of a run."""

    batches: Callable[[int], Iterator[Any]]  # from the number of steps made so far to the batches of the next ones
    validation: Callable[[], Iterable[Any]] | None  # every call gives the same batches
    made_from: dict[str, str]  # hashes of everything besides the settings that the weights depend on, by name
    rate: float  # latent frames per second


class Trainer:
    """The network, the state and the compiled step of a run. Subclasses define what differs between kinds of training.

    config: the settings, with the checkpoint's folder on this machine; requested: the settings as the run stores them.
    fixed: arguments that the step takes between state and batch.
    notes: values that JSON can hold, stored with each checkpoint.
    panels: panels of `loss.png`.
    saves_validated: whether a checkpoint needs the results of a validation.
    """

    panels: tuple[Panel, ...]
    saves_validated = False

    def __init__(self, config: Config, network: nnx.Module, kind: type[nnx.Variable], mesh: Mesh | None = None):
        self.config, self.requested, self.mesh = config, config, mesh
        self.model, params = steps.Model.split(network, kind, mesh)
        self.optimizer = steps.make_optimizer(config.optimizer, config.steps)
        self.shardings = steps.state_shardings(self.model, params, self.optimizer, config.optimizer)
        self.state: steps.TrainState = steps.initial_state(params, self.optimizer, config.optimizer, self.shardings)
        self.fixed: tuple = ()
        self.notes: dict[str, Any] = {}
        self._step: Any = None  # from `step.compiled`
        self._programs: dict[Any, Callable[..., Any]] = {}

    def step(self, batch: Any) -> steps.Metrics:
        """Dispatch one step; return before it is done.

        There is one program for each batch shape. It is compiled ahead of time, so that another dtype or sharding is an
        error instead of a silent recompilation.
        """
        shape = jax.tree.leaves(batch)[0].shape
        if shape not in self._programs:
            self._programs[shape] = self._step.lower(self.state, *self.fixed, batch).compile()
        self.state, metrics = self._programs[shape](self.state, *self.fixed, batch)
        return metrics

    def restore(self, saved: Checkpoints, step: int) -> None:
        """Replace the state with the one in a checkpoint; raise as `Checkpoints.restore` does."""
        target = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), self.state, self.shardings
        )
        del self.state  # there may be no memory for two
        self.state = saved.restore(step, target)

    def validate(self, batches: Iterable[Any]) -> dict[str, float]:
        """Return the metrics of a validation, including "validation_loss"."""
        raise NotImplementedError

    def summarise(self, details: list[dict[str, Any]]) -> dict[str, float]:
        """Return the metrics that summarise the `Metrics.details` of several steps."""
        raise NotImplementedError

    def sample(self, report: Report, step: int) -> None:
        """Report generated samples; called only if the settings have `sample_prompts`."""
        raise NotImplementedError

    def results(self) -> dict[str, steps.Params]:
        """Return the weights of each result by its folder name; the first is the main one."""
        raise NotImplementedError

    @staticmethod
    def write_result(path: Path, config: Config, weights: dict[str, np.ndarray], notes: dict[str, Any]) -> None:
        """Write a result with these host arrays as weights to a new folder."""
        raise NotImplementedError


def train(trainer: Trainer, data: Data) -> Path:
    """Start or resume a run and train to its last step; return the folder of its main result.

    Raises:
        InputError: if the data changed since the run started, another process is training it, or the disk is full.
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
                if pending:  # report the step before while the devices work on this one
                    report_step(report, config, *pending)
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
                report_step(report, config, *pending)
                pending = None
                with report.paused():
                    found = trainer.validate(data.validation()) if validates and data.validation else {}
                    report.write(step, found)
                    if saves:  # before the samples, which may run out of memory
                        report.publish()
                        saved.save(step, trainer.state, dict(trainer.notes), found.get("validation_loss"))
                    if samples:
                        trainer.sample(report, step)
                if stops:
                    break
        if stops:
            raise Preempted  # now that the checkpoint is written
        return write_results(trainer, folder)


def report_step(report: Report, config: Config, step: int, metrics: steps.Metrics) -> None:
    """Report a step; raise DivergedError if the run has diverged."""
    report.add(step, metrics)
    run.check_finite(config, step, int(metrics.bad_steps))


def write_results(trainer: Trainer, folder: Path) -> Path:
    """Write the results of a run, replacing earlier ones; return the folder of the first, or the checkpoints' folder if
    there is no result."""
    results = trainer.results()
    for name, params in results.items():
        weights = {leaf: on_host(value) for leaf, value in params.items()}
        if jax.process_index() == 0:
            write = functools.partial(trainer.write_result, config=trainer.config, weights=weights, notes=trainer.notes)
            run.replace(folder / name, write)
    return folder / next(iter(results), run.CHECKPOINTS)
