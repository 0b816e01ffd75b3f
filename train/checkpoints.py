"""The checkpoints of a run, through Orbax: written while training goes on, whole or not at all, restored strictly."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from acestep_jax.checkpoint import flatten, is_disk_full, nest
from acestep_jax.errors import InputError
from train.step import TrainState

METRIC = "validation_loss"


class Saved(NamedTuple):
    """A checkpoint that was restored."""

    state: TrainState
    iterator: dict[str, Any]  # of the data


class Checkpoints:
    """Those of one run, by step. The latest `keep` stay, and of all that were validated the best.

    Args:
        folder: of the checkpoints.
        writes: whether this is the run itself, which may remove what a killed one has begun.
    """

    def __init__(self, folder: Path, keep: int, *, writes: bool = True):
        self.folder = folder
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[METRIC],
            reverse=True,  # the last n of the falling order stay
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # the caller decides
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=writes,
        )

    @property
    def steps(self) -> list[int]:
        """The complete ones, in order."""
        return sorted(found.step for found in self._checkpointer.checkpoints)

    @property
    def best(self) -> int | None:
        """The step with the lowest validation loss."""
        losses = {found.step: found.metrics[METRIC] for found in self._checkpointer.checkpoints if found.metrics}
        return min(losses, key=losses.get) if losses else None

    def save(self, step: int, state: TrainState, iterator: dict[str, Any], validation_loss: float | None) -> None:
        """Copies the state out of the devices, then goes on in the background.

        Raises:
            InputError: if this or the save before it finds the disk full.
        """
        with self._writing():
            self._checkpointer.save_checkpointables_async(
                step,
                {"state": nest(dict(_named(state)))},
                metrics=None if validation_loss is None else {METRIC: validation_loss},
                custom_metadata={"iterator": iterator},
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        """Waits for what is being written; raises as `save` does, unless the run has failed already."""
        try:
            with self._writing():
                self._checkpointer.wait()
        except Exception:
            if kind is None:
                raise
        finally:
            self._checkpointer.close()

    def restore(self, step: int, target: TrainState) -> Saved:
        """The checkpoint of a step.

        Args:
            target: shapes, dtypes and shardings of what to restore.

        Raises:
            InputError: naming the first leaf that is missing, unexpected or of another shape or dtype.
        """
        path = self.folder / str(step)
        metadata = self._checkpointer.checkpointables_metadata(step)
        stored = dict(flatten(metadata.metadata["state"]))
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
        loaded = self._checkpointer.load_checkpointables(step, {"state": nest(wanted)})
        arrays = dict(flatten(loaded["state"]))
        state = jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name, _ in _named(target)])
        return Saved(state, metadata.custom_metadata["iterator"])

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises many kinds
            if not is_disk_full(error):
                raise
            kept = f"step {self.steps[-1]} is the last that is kept" if self.steps else "none is kept"
            raise InputError(
                f"{self.folder}: the disk is full, so a checkpoint could not be written; {kept}. Make room and run the "
                "same command again"
            ) from error


def _named(state: TrainState) -> Iterator[tuple[str, Any]]:
    """The leaves by dotted name, in the order of the tree."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf
