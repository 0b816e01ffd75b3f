"""`acestep-jax train export`: the result of a run at one of its checkpoints, for every kind of training."""

from pathlib import Path

from acestep_jax.errors import InputError
from acestep_jax.io.files import as_path, check_new
from acestep_jax.train import config_file
from acestep_jax.train.autoencoder import AutoencoderTraining
from acestep_jax.train.checkpoints import Checkpoints
from acestep_jax.train.config import AutoencoderTrainConfig
from acestep_jax.train.finetune import FineTuning, located
from acestep_jax.train.run import CHECKPOINTS, CONFIG


def export(run: str | Path, destination: str | Path, *, step: int | None = None, ema: bool = False) -> int:
    """Write the adapter, model or autoencoder of a checkpoint, on the host; the run may be in progress.

    Args:
        run: the folder of a run.
        destination: the folder to create.
        step: step of a checkpoint; None: the best one on the held-out songs or, if none was validated, the latest.
        ema: write the EMA of the weights. An autoencoder is always written from its EMA if there is one.

    Returns:
        The step that was written.

    Raises:
        InputError: if `run` holds no run or no such step, or `destination` exists.
    """
    run, destination = as_path(run), as_path(destination)
    check_new(destination)
    config = config_file.read(run / CONFIG)
    of_autoencoder, averages = isinstance(config, AutoencoderTrainConfig), bool(config.optimizer.ema_decay)
    if ema and not averages:
        raise InputError(f"{run}: has no moving averages of the weights; they need --optimizer.ema-decay")
    with Checkpoints(run / CHECKPOINTS, config.keep, writes=False) as saved:
        step = saved.choose(step)
        weights = saved.weights(step, "ema" if ema or of_autoencoder and averages else "params")
        notes = saved.notes(step)
    if isinstance(config, AutoencoderTrainConfig):
        AutoencoderTraining.write_result(destination, config, weights, notes)
    else:
        if config.method == "full":  # it provides the networks that were not trained
            config, _ = located(config)
        FineTuning.write_result(destination, config, weights, notes)
    return step
