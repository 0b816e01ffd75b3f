"""The checkpoints of a run, through Orbax: written atomically in the background, restored strictly."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from acestep_jax.errors import InputError
from acestep_jax.io.checkpoint import flatten, host_sharding, nest
from acestep_jax.io.files import absolute, is_disk_full
from acestep_jax.train.step import TrainState

METRIC = "validation_loss"


class Checkpoints:
    """The checkpoints of one run, by step: the latest `keep` and the one with the lowest validation loss.

    Args:
        folder: folder of the checkpoints.
        keep: number of latest checkpoints to keep.
        writes: whether the run itself opens them; it removes checkpoints that a killed process left incomplete.
    """

    def __init__(self, folder: Path, keep: int, *, writes: bool = True):
        self.folder = folder
        training: Any = ocp.training
        policies = training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[METRIC],
            reverse=True,  # the last n in decreasing order are kept
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._checkpointer: Any = training.Checkpointer(
            absolute(folder),
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),  # the caller decides
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=writes,
        )

    @property
    def steps(self) -> list[int]:
        """The steps of complete checkpoints, in order."""
        return sorted(found.step for found in self._checkpointer.checkpoints)

    @property
    def best(self) -> int | None:
        """The step with the lowest validation loss."""
        losses: dict[int, float] = {
            found.step: found.metrics[METRIC] for found in self._checkpointer.checkpoints if found.metrics
        }
        return min(losses, key=losses.__getitem__) if losses else None

    def choose(self, step: int | None) -> int:
        """Return `step`; if it is None, the best step, or the latest one if none was validated.

        Raises:
            InputError: if there is no checkpoint of that step.
        """
        if not self.steps:
            raise InputError(f"{self.folder.parent}: no checkpoint is complete yet")
        if step is None:
            step = self.steps[-1] if self.best is None else self.best
        if step not in self.steps:
            kept = ", ".join(map(str, self.steps))
            raise InputError(f"{self.folder.parent}: no checkpoint of step {step}; there are {kept}")
        return step

    def save(self, step: int, state: TrainState, notes: dict[str, Any], validation_loss: float | None) -> None:
        """Copy the state from the devices to the host, then write it in the background.

        Args:
            step: number of steps that the state has made.
            state: the state to write.
            notes: values that JSON can hold, stored with the state.
            validation_loss: the lowest one makes the best checkpoint; None: not validated.

        Raises:
            InputError: if the disk is full, at this save or at the one before it.
        """
        known = validation_loss is not None and math.isfinite(validation_loss)
        with self._writing():
            self._checkpointer.save_checkpointables_async(
                step,
                {"state": nest(dict(_named(state)))},
                metrics={METRIC: validation_loss} if known else None,
                custom_metadata=notes,
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        """Wait for pending writes; raise as `save` does, unless the run has failed already."""
        try:
            with self._writing():
                self._checkpointer.wait()
        except Exception:
            if kind is None:
                raise
        finally:
            self._checkpointer.close()

    def notes(self, step: int) -> dict[str, Any]:
        """Return the notes that `save` got."""
        return self._metadata(step).custom_metadata

    def weights(self, step: int, part: str) -> dict[str, np.ndarray]:
        """Load only the "params" or the "ema" of a step to the host, by dotted path; raise as `restore` does."""
        host = host_sharding()
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)
            for name, leaf in flatten(self._metadata(step).metadata["state"][part])
        }
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            loaded = self._load(step, {part: nest(target)})
        return {name: np.asarray(value) for name, value in flatten(loaded[part])}

    def restore(self, step: int, target: TrainState) -> TrainState:
        """Return the state of a step.

        Args:
            step: step of a complete checkpoint.
            target: shapes, dtypes and shardings of the state.

        Raises:
            InputError: if an array is missing, unexpected or has another shape or dtype (the first one is named), or
                the checkpoint is damaged.
        """
        path = self.folder / str(step)
        stored = dict(flatten(self._metadata(step).metadata["state"]))
        wanted = dict(_named(target))
        for name in sorted(wanted.keys() | stored.keys()):
            if name not in stored:
                problem = "is missing"
            elif name not in wanted:
                problem = "is not part of this run"
            elif (found := (tuple(stored[name].shape), stored[name].dtype)) != (
                expected := (wanted[name].shape, wanted[name].dtype)
            ):
                problem = f"is {found[1]}{list(found[0])}, expected {expected[1]}{list(expected[0])}"
            else:
                continue
            raise InputError(f"{path}: {name} {problem}; was it written by a run with other settings?")
        arrays = dict(flatten(self._load(step, nest(wanted))))
        return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name, _ in _named(target)])

    def _metadata(self, step: int):
        with self._reading(step):
            return self._checkpointer.checkpointables_metadata(step)

    def _load(self, step: int, target: dict[str, Any]) -> dict[str, Any]:
        with self._reading(step):
            return self._checkpointer.load_checkpointables(step, {"state": target})["state"]

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, KeyError) as error:  # from Orbax and TensorStore for missing or truncated files
            raise InputError(
                f"{self.folder / str(step)}: damaged ({error}); remove it to resume from the checkpoint before it"
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises many types
            if not is_disk_full(error):
                raise
            kept = f"step {self.steps[-1]} is the last that is kept" if self.steps else "none is kept"
            raise InputError(
                f"{self.folder}: the disk is full, so a checkpoint could not be written; {kept}. Free some space and "
                "run the same command again"
            ) from error


def _named(state: TrainState) -> Iterator[tuple[str, Any]]:
    """Yield the arrays of a state with their dotted names, in tree order."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf
