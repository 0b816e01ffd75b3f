"""`acestep-jax train`: prepare training data, train, and export the results of steps.

The options of `fit` and `autoencoder` are the settings of `acestep_jax.train.config`; they have underscores in YAML
files, and dashes or underscores as options. Dependencies of a command are imported when it runs.
"""

import dataclasses
from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import jsonargparse

from acestep_jax.cli.parser import Parser
from acestep_jax.cli.runtime import add_distributed, add_variant
from acestep_jax.errors import InputError
from acestep_jax.models.runtime import DTYPES
from acestep_jax.train import config_file
from acestep_jax.train.config import AutoencoderTrainConfig, TrainConfig

PROGRAM = "acestep-jax train"


def add(commands: Any) -> None:
    """Add `train` to the commands of the main program. `commands`: the result of `add_subcommands`."""
    train = Parser(description="Train adapters, whole models and autoencoders.")
    commands.add_subcommand("train", train, help="Fine-tune a model, or train an autoencoder.")
    actions = train.add_subcommands(required=True, dest="command", metavar="COMMAND")

    def command(name: str, text: str, settings: type | None = None, **kinds: str) -> Parser:
        kinds |= dict(_kinds(settings)) if settings is not None else {}
        added = Parser(description=text, kinds=kinds)
        actions.add_subcommand(name, added, help=text)
        added.prog = f"{PROGRAM} {name}"
        added.formatter_class = jsonargparse.DefaultHelpFormatter  # shows types and defaults of settings
        if settings is not None:
            config_file.add_settings(added, settings)
        return added

    preprocess = command("preprocess", "Encode a folder of songs, or only its changes.", crop_seconds="numbers")
    preprocess.add_argument(
        "audio_dir", metavar="AUDIO_DIR", help="Folder of songs, with captions and lyrics next to them."
    )
    preprocess.add_argument("data_dir", metavar="DATA_DIR", help="Folder of training data to create or update.")
    preprocess.add_argument(
        "--checkpoint",
        "--model",
        metavar="MODEL",
        required=True,
        help="Native checkpoint, PyTorch checkpoint or id of a repository on the Hugging Face hub.",
    )
    add_variant(preprocess)
    preprocess.add_argument(
        "--crop_seconds",
        metavar="SECONDS",
        type=float,
        nargs="+",
        default=[60.0],
        help="Lengths of the crops to train on, in seconds, 1 to 600.",
    )
    preprocess.add_argument("--dtype", help=f"Dtype of the encoders, {', '.join(DTYPES)}. By default as stored.")
    add_distributed(preprocess, "each of which encodes a part of the songs on its first device")

    fit = command("fit", "Fine-tune the transformer on preprocessed songs.", TrainConfig)
    add_distributed(fit, "with a mesh over all their devices")
    command("autoencoder", "Train an autoencoder from scratch on a folder of audio.", AutoencoderTrainConfig)

    export = command("export", "Write the result of a step of a run, which may be in progress.", step="a whole number")
    export.add_argument("run", metavar="RUN_DIR", help="Folder of a run.")
    export.add_argument("destination", metavar="DST", help="Folder to create.")
    export.add_argument(
        "--step", type=int, help="Step to export. By default the best on the held-out songs, or the latest."
    )
    export.add_argument(
        "--ema",
        action="store_true",
        help="Export the moving averages of the weights. An autoencoder is always exported from them if there are any.",
    )


def run(options: jsonargparse.Namespace) -> int | None:
    """Run the command that the options of `train` name.

    Raises:
        InputError: for invalid input; a setting at the start of the message is spelled as its option.
    """
    values = options[options.command]
    try:
        return _COMMANDS[options.command](values)
    except InputError as error:
        name, colon, rest = str(error).partition(": ")
        if colon and name in values and values[name] != name:  # a folder with that name is not a setting
            error.args = (f"{flag(name)}: {rest}",)
        raise


def _preprocess(values: jsonargparse.Namespace) -> None:
    from acestep_jax import preemption
    from acestep_jax.cli.runtime import start
    from acestep_jax.distributed import all_succeed
    from acestep_jax.io.native import native_folder
    from acestep_jax.train.preprocess import preprocess

    start(values.pop("distributed"))
    given = dict(vars(values))
    with all_succeed():
        given["checkpoint"] = native_folder(given["checkpoint"], given.pop("variant"))
    with preemption.handled():
        preprocess(**given)


def _fit(values: jsonargparse.Namespace) -> None:
    from acestep_jax import preemption
    from acestep_jax.cli.runtime import start

    settings = config_file.instantiate(values, TrainConfig)
    start(values.distributed)
    from acestep_jax.train.finetune import fit

    with preemption.handled(in_step=True):
        print(fit(settings))


def _autoencoder(values: jsonargparse.Namespace) -> None:
    from acestep_jax import preemption
    from acestep_jax.cli.runtime import start

    settings = config_file.instantiate(values, AutoencoderTrainConfig)
    start()
    from acestep_jax.train.autoencoder import fit

    with preemption.handled(in_step=True):
        print(fit(settings))


def _export(values: jsonargparse.Namespace) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # a run in progress may hold the accelerators
    from acestep_jax.train.export import export

    print(f"{values.destination}: step {export(**vars(values))}")


_COMMANDS = {"preprocess": _preprocess, "fit": _fit, "autoencoder": _autoencoder, "export": _export}


def flag(name: str) -> str:
    """Return the option of a setting."""
    return f"--{name.replace('_', '-')}"


def _kinds(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting by dotted name, with a description of its values."""
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        tuple[str, ...]: 'a list such as \'["one", "two"]\'',
        tuple[float, ...]: "a list such as '[30, 60]'",
        tuple[int, ...]: "a list of whole numbers such as '[2, 4]'",
    }
    for field in dataclasses.fields(config):
        name: str = f"{prefix}{field.name}"
        kind: Any = field.type
        if NoneType in get_args(kind):  # such as float | None
            kind = get_args(kind)[0]
        if dataclasses.is_dataclass(kind):
            yield from _kinds(kind, f"{name}.")
        else:
            yield name, f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else words[kind]
