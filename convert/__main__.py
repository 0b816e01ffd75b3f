"""`python -m convert`: PyTorch checkpoints to native ones, back, and side by side."""

import argparse
import sys

from acestep_jax.cli import add_lora_options, load_loras
from acestep_jax.errors import InputError
from acestep_jax.models.config import DTYPES


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def source_options(command: argparse.ArgumentParser) -> None:
        command.add_argument("source", metavar="SRC", help="a diffusers folder, an original folder or a hub id")
        command.add_argument("--vae", metavar="DIR", help="original layout: the autoencoder's folder [beside SRC: vae]")
        command.add_argument(
            "--text-encoder",
            metavar="DIR",
            help="original layout: the text encoder's folder [beside SRC: Qwen3-Embedding-0.6B]",
        )

    command = commands.add_parser("from-torch", help="convert a PyTorch checkpoint to the native one")
    source_options(command)
    command.add_argument("destination", metavar="DST", help="the folder to make")
    command.add_argument("--dtype", help=f"of all weights, one of {', '.join(DTYPES)} [as they are]")

    command = commands.add_parser("to-torch", help="convert a native checkpoint to a PyTorch one")
    command.add_argument("source", metavar="SRC", help="a native checkpoint")
    command.add_argument("destination", metavar="DST", help="the folder to make")
    command.add_argument("--layout", required=True, help="diffusers or original")

    command = commands.add_parser("verify", help="run a PyTorch checkpoint in torch and in JAX and compare every stage")
    source_options(command)

    command = commands.add_parser("lora-from-torch", help="convert a LoRA adapter of PEFT, diffusers or ComfyUI")
    command.add_argument("source", metavar="SRC", help="its folder or .safetensors file")
    command.add_argument("destination", metavar="DST", help="the folder to make")
    command.add_argument(
        "--checkpoint",
        dest="model",
        metavar="DIR",
        help="the native checkpoint it is for, to check that it fits; needed where it leaves out the last layers",
    )

    command = commands.add_parser("lora-to-torch", help="convert an adapter for PEFT, diffusers or ComfyUI")
    command.add_argument("source", metavar="SRC", help="an adapter")
    command.add_argument("destination", metavar="DST", help="the folder to make; comfyui: the .safetensors file")
    command.add_argument(
        "--layout",
        required=True,
        help="peft (for ACE-Step's own application too), diffusers or comfyui",
    )

    command = commands.add_parser("merge-lora", help="make a native checkpoint with adapters merged into it")
    command.add_argument("source", metavar="SRC", help="a native checkpoint")
    command.add_argument("destination", metavar="DST", help="the folder to make")
    add_lora_options(command, required=True)

    command = commands.add_parser("random-torch", help="make a PyTorch checkpoint with random weights, for trials")
    command.add_argument("destination", metavar="DST", help="the folder to make")
    command.add_argument("--size", choices=("tiny", "2B"), default="tiny", help="[tiny]")
    command.add_argument("--variant", choices=("turbo", "base", "sft"), default="turbo", help="[turbo]")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="[float32]")
    command.add_argument("--seed", type=int, default=0, help="[0]")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 if `verify` found a difference, 2 after an error message."""
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    try:
        if command == "from-torch":
            from acestep_jax.convert.from_torch import from_torch

            from_torch(options.pop("source"), options.pop("destination"), **options)
        elif command == "to-torch":
            from acestep_jax.convert.to_torch import to_torch

            to_torch(**options)
        elif command == "lora-from-torch":
            from acestep_jax.convert.lora import lora_from_torch

            lora_from_torch(**options)
        elif command == "lora-to-torch":
            from acestep_jax.convert.lora import lora_to_torch

            lora_to_torch(**options)
        elif command == "merge-lora":
            from acestep_jax.convert.merge import merge_lora

            merge_lora(options["source"], options["destination"], *load_loras(options["lora"], options["source"]))
        elif command == "verify":
            from acestep_jax.convert.verify import verify

            return 0 if verify(**options) else 1
        else:
            from acestep_jax.convert.random_checkpoint import write_random_checkpoint

            write_random_checkpoint(**options)
    except (InputError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("acestep_jax", "convert"):
            raise
        print(f"convert: {error.name} is not installed; run pip install -e '.[convert]'", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
