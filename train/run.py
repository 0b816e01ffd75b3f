"""The folder of a run, the same for every kind of training: its lock, the checks before resuming, its results.

config.yaml  checkpoints/  metrics.jsonl  tensorboard/  loss.png  samples/  and the results, such as adapter/
"""

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from acestep_jax.errors import InputError
from acestep_jax.io.files import check_parent, check_writable, is_remote, remove_tree
from acestep_jax.train import config_file
from acestep_jax.train.config import Config

CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"

# The settings that a resumed run may change: none that the weights depend on, except the length of the schedule. The
# checkpoint may have moved or been renamed; its contents are compared separately.
CHANGEABLE = (
    "steps",
    "out",
    "checkpoint",
    "variant",
    "revision",
    "save_every",
    "log_every",
    "keep",
    "max_bad_steps",
    "mesh",
    "remat",
    "examples.workers",
    "report.",  # all of these
)


class DivergedError(InputError):
    """The loss or a gradient was non-finite in too many consecutive steps."""


def check_folder(folder: Path, config: Config) -> None:
    """Raise InputError if a run with these settings can be neither started nor resumed in a folder."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; choose another --out")
    check_parent(folder)
    check_writable(folder / CONFIG if folder.exists() else folder)
    if not (folder / CONFIG).is_file():
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder}: already exists and holds no run; remove it or choose another --out")
        return
    made = [int(path.name) for path in (folder / CHECKPOINTS).glob("*") if path.name.isdecimal()]
    if not made:  # the run failed before its first checkpoint
        return
    before = config_file.read(folder / CONFIG)
    if type(before) is not type(config):
        raise InputError(f"{folder}: holds a run of another kind of training; choose another --out")
    found = config_file.differences(before, config)
    if changed := {k: v for k, v in found.items() if not _is_changeable(k)}:
        listing = ", ".join(f"{name} was {before!r}, now {now!r}" for name, (before, now) in changed.items())
        raise InputError(f"{folder}: holds a run with other settings ({listing}); use those, or another --out")
    if max(made) > config.steps:
        raise InputError(
            f"{folder}: has made {max(made)} steps already, more than steps ({config.steps}); `acestep-jax train "
            "export` writes the result of an earlier step"
        )


def _is_changeable(name: str) -> bool:
    """Return whether a resumed run may change a setting, given by its dotted name."""
    return any(name.startswith(known) if known.endswith(".") else name == known for known in CHANGEABLE)


@contextlib.contextmanager
def opened(folder: Path, config: Config) -> Iterator[Path]:
    """Create the folder and its `config.yaml`, and hold its lock until the results are written.

    Raises:
        InputError: if another process holds the lock.
    """
    _all_here("checked")  # the first process creates the folder only after all others have checked it
    if jax.process_index() == 0:
        folder.mkdir(parents=is_remote(folder), exist_ok=True)
    with _locked(folder):
        if jax.process_index() == 0:
            config_file.write(folder / CONFIG, config)
        yield folder
        _all_here("results")


def check_unchanged(folder: Path, before: dict[str, str], now: dict[str, str]) -> None:
    """Raise InputError if the hashes of a run's inputs, by name, differ from those at its last checkpoint."""
    if changed := [name for name, value in now.items() if before[name] != value]:
        raise InputError(
            f"{folder}: the {' and the '.join(changed)} of this run changed after its last checkpoint; restore what it "
            "started with, or start a new run with another --out"
        )


def check_finite(config: Config, step: int, bad_steps: int) -> None:
    """Raise DivergedError if `bad_steps`, the consecutive non-finite steps up to this one, reach the limit."""
    if bad_steps >= config.max_bad_steps:
        raise DivergedError(
            f"{config.out}: the loss or its gradient is non-finite since step {step - bad_steps + 1}, {bad_steps} "
            "consecutive steps. Start a new run with another --out and a lower --optimizer.learning-rate, or check the "
            "data; the checkpoints of this run are good"
        )


def replace(target: Path, write: Callable[[Path], None]) -> None:
    """Write a result folder, replacing the one from when the run ended before."""
    if is_remote(target):  # a remote folder cannot be renamed
        remove_tree(target)
        write(target)
        return
    fresh = target.with_name(f".{target.name}-new")
    for left in (fresh, *target.parent.glob(f".{fresh.name}-*")):
        remove_tree(left)
    write(fresh)
    remove_tree(target)
    fresh.rename(target)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Prevent a second command from training the same run at the same time; Cloud Storage has no locks."""
    if jax.process_index() or is_remote(folder):
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is training this run; wait for its end or stop it") from None
        yield


def _all_here(name: str) -> None:
    """Wait until every process has reached this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
