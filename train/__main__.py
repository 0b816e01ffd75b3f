"""`python -m train`: songs to training data, and training."""

import argparse
import logging
import sys

import jax

from acestep_jax.cli import join_processes, use_compilation_cache
from acestep_jax.errors import InputError
from acestep_jax.models.config import DTYPES


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("preprocess", help="encode a folder of songs, or what changed in it since")
    command.add_argument("audio_dir", metavar="AUDIO_DIR", help="songs, with their captions and lyrics beside them")
    command.add_argument("data_dir", metavar="DATA_DIR", help="the folder of data to make or bring up to date")
    command.add_argument("--checkpoint", metavar="DIR", required=True, help="a native checkpoint")
    command.add_argument(
        "--crop-seconds",
        metavar="SECONDS",
        type=float,
        nargs="+",
        default=[60.0],
        help="lengths of crop to train on, 1 to 600 [60]",
    )
    command.add_argument("--dtype", help=f"of the encoders: {', '.join(DTYPES)} [as stored]")

    # The settings of the next two are those of `train.config`, which parses them.
    commands.add_parser(
        "autoencoder", help="train an autoencoder on a folder of audio", add_help=False, allow_abbrev=False
    )
    command = commands.add_parser(
        "fit", help="fine-tune the transformer on such data", add_help=False, allow_abbrev=False
    )
    command.add_argument("--distributed", nargs="?", const="")

    command = commands.add_parser("export", help="write the result of one of a run's steps")
    command.add_argument("run", metavar="RUN_DIR", help="the folder of a run, which may still go on")
    command.add_argument("destination", metavar="DST", help="the folder to make")
    command.add_argument("--step", type=int, help="[the best on the held-out songs, or the latest]")
    command.add_argument(
        "--ema", action="store_true", help="the averages of the weights; an autoencoder is always made of them"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 after an error message, or 130 if it was interrupted."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    options, settings = _parser().parse_known_args(arguments)
    options = vars(options)
    try:
        command = options.pop("command")
        if settings and command not in ("fit", "autoencoder"):
            raise InputError(f"unknown argument(s) {' '.join(settings)}; see `python -m train {command} --help`")
        if command == "preprocess":
            from acestep_jax.train.preprocess import preprocess

            use_compilation_cache()
            preprocess(**options)
        elif command == "export":
            jax.config.update("jax_platforms", "cpu")  # a run that goes on may hold the accelerators
            from acestep_jax.train import autoencoder, loop

            if autoencoder.is_run(options["run"]):
                del options["ema"]
                step = autoencoder.export(**options)
            else:
                step = loop.export(**options)
            print(f"{options['destination']}: step {step}")
        elif command == "autoencoder":
            from acestep_jax.train import config

            settings = config.parse(settings, config.AutoencoderTrainConfig)
            use_compilation_cache()
            from acestep_jax.train.autoencoder import train

            print(train(settings))
        else:
            from acestep_jax.train import config

            settings = config.parse(settings)
            if options["distributed"] is not None:
                join_processes(options["distributed"])
            use_compilation_cache()
            from acestep_jax.train.loop import fit

            print(fit(settings))
    except (InputError, OSError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("acestep_jax", "convert", "train"):
            raise
        print(f"train: {error.name} is not installed; run pip install -e '.[train]'", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        advice = "try --dtype bfloat16 or, in training, --remat full, smaller batches or several devices with --mesh"
        print(f"train: the device has too little memory for this; {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train: stopped; the same command goes on from what was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
