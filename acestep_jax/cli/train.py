"""`acestep-jax train`: songs to training data, training, and the results of its steps.

The options of `fit` and `autoencoder` are the settings of `acestep_jax.train.config`; in YAML files they have
underscores, as options dashes or underscores. What a command needs is imported when it runs.
"""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import jsonargparse

from acestep_jax.cli import parser
from acestep_jax.cli.runtime import add_distributed
from acestep_jax.errors import InputError
from acestep_jax.models.config import DTYPES
from acestep_jax.train import config_file
from acestep_jax.train.config import AutoencoderTrainConfig, TrainConfig

PROGRAM = "acestep-jax train"


class Parser(jsonargparse.ArgumentParser):
    """The parser of one command: options with dashes, errors in words. `finish` it after its last argument."""

    def finish(self, kinds: dict[str, str]) -> None:
        """Spell every option with dashes; underscores are accepted as well. `kinds`: what options may be, by name."""
        self._kinds = kinds
        # The library clears `required` while it parses.
        self._required = [action for action in self._actions if action.required]
        for action in self._actions:
            dashed = [option.replace("_", "-") for option in action.option_strings]
            self._option_string_actions |= dict.fromkeys(dashed, action)
            action.option_strings = dashed

    def parse_args(self, args=None, namespace=None, env=None, defaults=True, **options) -> jsonargparse.Namespace:
        """Parse the options of this command; raise InputError for an unknown one, or one that is missing."""
        options.pop("_skip_validation", None)  # by which the main program would find errors late, and name others
        values = super().parse_args(args, namespace, env, defaults, **options)
        if missing := [action for action in self._required if values.get(action.dest) is None]:
            names = ", ".join(
                action.option_strings[0] if action.option_strings else str(action.metavar) for action in missing
            )
            raise InputError(f"{names}: missing; {self._advice}")
        return values

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise InputError with the library's message in words."""
        files = [value for flag, value in itertools.pairwise(self.args or ()) if flag == "--config"]
        files += [arg.partition("=")[2] for arg in self.args or () if arg.startswith("--config=")]
        where = f" (settings come from {', '.join(files)} and the command line)" if files else ""
        explained = self._explain(message)
        end = " " if explained.endswith("?") and not where else "; "
        raise InputError(f"{explained}{where}{end}{self._advice}") from ex

    @property
    def _advice(self) -> str:
        return f"`{self.prog} --help` lists all options"

    def _explain(self, message: str) -> str:
        if found := re.search(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL):
            name, rest = found.groups()
            value = re.search(r"(?:Got|Given) value: ([^\n]*)", rest)
            if value and name in self._kinds:
                return f"{flag(name)}: expected {self._kinds[name]}, found {value[1]}"
            return f"{flag(name)}: {' '.join(rest.split())}"
        if found := re.fullmatch(r"argument (--[\w.-]+): (.*)", message, re.DOTALL):
            return f"{found[1]}: {found[2]}"
        if found := re.fullmatch(r"unrecognized arguments: (--[\w.-]+)?(.*)", message, re.DOTALL):
            if found[1] is None:
                return f"unexpected argument {found[2]}"
            return f"{found[1]}: unknown option{self._suggestion(found[1].lstrip('-'), flag)}"
        if found := re.fullmatch(
            r"(?:Group '([\w.]+)' does not accept o|O)ption '([\w.-]+)'(?: is not accepted)?", message
        ):
            name = ".".join(filter(None, found.groups()))
            return f"{name}: unknown setting{self._suggestion(name, str)}"
        return " ".join(message.split())

    def _suggestion(self, name: str, spelled) -> str:
        """Return the known names nearest to an unknown one: those with the same last part, else those spelled alike."""
        known = [action.dest for action in self._actions if action.option_strings and action.dest != "help"]
        name = name.replace("-", "_")
        near = [one for one in known if one.rpartition(".")[2] == name.rpartition(".")[2]]
        near = near or difflib.get_close_matches(name, known, n=1)
        lasts = {one.rpartition(".")[2]: one for one in known}
        near = near or [lasts[last] for last in difflib.get_close_matches(name.rpartition(".")[2], lasts, n=1)]
        return f"; did you mean {' or '.join(map(spelled, near))}?" if near else ""


def add(commands: Any) -> None:
    """Add `train` to the commands of the main program, what its parser's `add_subcommands` has returned."""
    train = parser.Parser(description="Train adapters, whole models and autoencoders.")
    commands.add_subcommand("train", train, help="fine-tune a model, or train an autoencoder")
    kinds = train.add_subcommands(required=True, dest="command", metavar="COMMAND")

    def command(name: str, text: str, settings: type | None = None) -> Parser:
        added = Parser(description=f"{text[0].upper()}{text[1:]}.")
        kinds.add_subcommand(name, added, help=text)
        added.prog = f"{PROGRAM} {name}"
        added.formatter_class = jsonargparse.DefaultHelpFormatter  # which shows types and defaults of settings
        if settings is not None:
            config_file.add_settings(added, settings)
        return added

    preprocess = command("preprocess", "encode a folder of songs, or what changed in it")
    preprocess.add_argument(
        "audio_dir", metavar="AUDIO_DIR", help="Folder of songs, with captions and lyrics beside them."
    )
    preprocess.add_argument("data_dir", metavar="DATA_DIR", help="Folder of training data to create or update.")
    preprocess.add_argument("--checkpoint", metavar="DIR", required=True, help="Native checkpoint.")
    preprocess.add_argument(
        "--crop_seconds",
        metavar="SECONDS",
        type=float,
        nargs="+",
        default=[60.0],
        help="Lengths of the crops to train on, in seconds, 1 to 600.",
    )
    preprocess.add_argument("--dtype", help=f"Dtype of the encoders, {', '.join(DTYPES)}. By default as stored.")

    fit = command("fit", "fine-tune the transformer on preprocessed songs", TrainConfig)
    add_distributed(fit)
    autoencoder = command(
        "autoencoder", "train an autoencoder from scratch on a folder of audio", AutoencoderTrainConfig
    )

    export = command("export", "write the result of a step of a run, which may be in progress")
    export.add_argument("run", metavar="RUN_DIR", help="Folder of a run.")
    export.add_argument("destination", metavar="DST", help="Folder to create.")
    export.add_argument(
        "--step", type=int, help="Step to export. By default the best on the held-out songs, or the latest."
    )
    export.add_argument(
        "--ema",
        action="store_true",
        help="Export the moving averages of the weights. An autoencoder is always made of them if they are kept.",
    )
    preprocess.finish({"crop_seconds": "numbers"})
    fit.finish(dict(_kinds(TrainConfig)))
    autoencoder.finish(dict(_kinds(AutoencoderTrainConfig)))
    export.finish({"step": "a whole number"})


def run(options: jsonargparse.Namespace) -> int | None:
    """Run the command that the options of `train` name.

    Raises:
        InputError: among others; a setting at the beginning of its message is spelled as the option.
    """
    values = options[options.command]
    try:
        return _COMMANDS[options.command](values)
    except InputError as error:
        name, colon, rest = str(error).partition(": ")
        if colon and name in values and values[name] != name:  # a folder of that name is no setting
            error.args = (f"{flag(name)}: {rest}",)
        raise


def _preprocess(values: jsonargparse.Namespace) -> None:
    from acestep_jax.cli.runtime import start
    from acestep_jax.train.preprocess import preprocess

    start()
    preprocess(**vars(values))


def _fit(values: jsonargparse.Namespace) -> None:
    from acestep_jax.cli.runtime import start

    settings = config_file.instantiate(values, TrainConfig)
    start(values.distributed)
    from acestep_jax.train.finetune import fit

    print(fit(settings))


def _autoencoder(values: jsonargparse.Namespace) -> None:
    from acestep_jax.cli.runtime import start

    settings = config_file.instantiate(values, AutoencoderTrainConfig)
    start()
    from acestep_jax.train.autoencoder import fit

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
    """Yield every setting by dotted name, with what it may be."""
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
