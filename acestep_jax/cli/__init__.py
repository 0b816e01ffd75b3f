"""`acestep-jax`: generate songs, convert weights, train."""

import importlib.metadata
import logging
import sys
from collections.abc import Callable
from typing import Any

import jax

from acestep_jax.cli import codes, convert, generate, info, plan, serve, train, warm
from acestep_jax.cli.parser import Parser
from acestep_jax.errors import InputError, Preempted
from acestep_jax.placement import is_out_of_memory
from acestep_jax.preemption import EXIT_CODE

MODULES = (generate, plan, codes, serve, convert, train, warm, info)  # each adds its commands to the parser
COMMANDS: dict[str, Callable[[Any], int | None]] = {
    "generate": generate.run,
    "plan": plan.plan,
    "rewrite": plan.rewrite,
    "describe": plan.describe,
    "tokenize": codes.tokenize,
    "detokenize": codes.detokenize,
    "serve": serve.run,
    "convert": convert.run,
    "train": train.run,
    "warm": warm.run,
    "info": info.run,
}
OUT_OF_MEMORY = (
    "the device has too little memory for this; try --dtype bfloat16, a shorter --duration, several devices with "
    "--mesh or, in training, --remat full and smaller batches"
)


def parser() -> Parser:
    """Return the parser of all commands."""
    version = importlib.metadata.version("acestep-jax")
    program = Parser(prog="acestep-jax", description="ACE-Step 1.5 music generation in JAX.", version=version)
    commands = program.add_subcommands(required=True, dest="command", metavar="COMMAND")
    for module in MODULES:
        module.add(commands)
    program.finish()
    return program


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status.

    0: done; 1: some songs of a batch failed, or `convert verify` found a difference; 2: an error message was printed;
    130: interrupted; 143: ended by SIGTERM, after work in progress has been saved.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        options = parser().parse_args(words)
        return COMMANDS[options.command](options[options.command]) or 0
    except (InputError, OSError) as error:
        message = str(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "acestep_jax":
            raise
        extra = next((word for word in words if word in ("convert", "train")), None)
        package = f"acestep-jax[{extra}]" if extra else "acestep-jax"
        message = f"{error.name} is not installed; run pip install '{package}'"
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message = OUT_OF_MEMORY
    except KeyboardInterrupt:
        print("acestep-jax: interrupted; the same command resumes from what was written", file=sys.stderr)
        return 130
    except Preempted:
        print("acestep-jax: SIGTERM; the same command resumes from what was written", file=sys.stderr)
        return EXIT_CODE
    print(f"acestep-jax: {message}", file=sys.stderr)
    return 2
