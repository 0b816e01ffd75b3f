"""`acestep-jax convert`: checkpoints and adapters between PyTorch and the native format."""

from typing import Any

from jsonargparse import ArgumentParser, Namespace

from acestep_jax.cli.options import add_lora, lora_scales
from acestep_jax.cli.parser import Parser
from acestep_jax.cli.runtime import add_variant

DTYPES = "float32, bfloat16 or float16"
KINDS = "int8 or fp8"


def add(commands: Any) -> None:
    """Add the command "convert" and its subcommands. `commands`: the result of `add_subcommands`."""
    about = "Convert checkpoints and adapters between PyTorch and the native format."
    parser = Parser(description=about)
    commands.add_subcommand("convert", parser, help="Convert checkpoints and adapters from and to PyTorch.")
    commands = parser.add_subcommands(required=True, dest="command", metavar="COMMAND")

    command = _command(commands, "from-torch", "Convert a PyTorch checkpoint to a native one.")
    _add_source(command)
    command.add_argument("destination", metavar="DST", help="Folder to create for the native checkpoint.")
    command.add_argument(
        "--dtype",
        metavar="DTYPE",
        help=f"Cast all weights to {DTYPES}, or quantise the weights of layers to {KINDS}. Default: the dtypes of SRC.",
    )

    command = _command(commands, "quantize", "Write a native checkpoint with 8-bit weights of its layers.")
    command.add_argument("source", metavar="SRC", help="Folder of a native checkpoint, of a model or a planner.")
    command.add_argument("destination", metavar="DST", help="Folder to create for the quantised checkpoint.")
    command.add_argument("--dtype", metavar="DTYPE", required=True, help=f"Dtype of the quantised weights: {KINDS}.")

    command = _command(commands, "to-torch", "Convert a native checkpoint to a PyTorch one.")
    command.add_argument("source", metavar="SRC", help="Folder of a native checkpoint.")
    command.add_argument("destination", metavar="DST", help="Folder to create for the PyTorch checkpoint.")
    command.add_argument(
        "--layout",
        metavar="LAYOUT",
        required=True,
        help='Layout to write: "diffusers", or "original" for the one of ACE-Step\'s own application.',
    )

    command = _command(commands, "verify", "Run a PyTorch checkpoint in torch and in JAX and compare every stage.")
    _add_source(command)

    command = _command(commands, "lora-from-torch", "Convert a LoRA adapter of PEFT, diffusers or ComfyUI.")
    command.add_argument("source", metavar="SRC", help="Folder or .safetensors file of the adapter.")
    command.add_argument("destination", metavar="DST", help="Folder to create for the acestep-jax adapter.")
    command.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="Native checkpoint that the adapter is for, to check that they match; required for an adapter without the "
        "last layers.",
    )

    command = _command(commands, "lora-to-torch", "Convert an adapter for PEFT, diffusers or ComfyUI.")
    command.add_argument("source", metavar="SRC", help="Folder of an acestep-jax adapter.")
    command.add_argument(
        "destination", metavar="DST", help='Folder to create, or the .safetensors file for the layout "comfyui".'
    )
    command.add_argument(
        "--layout",
        metavar="LAYOUT",
        required=True,
        help='Layout to write: "peft" (which ACE-Step\'s own application reads too), "diffusers" or "comfyui".',
    )

    command = _command(commands, "merge-lora", "Write a native checkpoint with adapters merged into its weights.")
    command.add_argument("source", metavar="SRC", help="Folder of a native checkpoint.")
    command.add_argument("destination", metavar="DST", help="Folder to create for the merged checkpoint.")
    add_lora(command, required=True)

    command = _command(commands, "random-torch", "Write a PyTorch checkpoint with random weights, for trials.")
    command.add_argument("destination", metavar="DST", help="Folder to create for the PyTorch checkpoint.")
    command.add_argument(
        "--size",
        choices=("tiny", "2B"),
        default="tiny",
        help='Size of the networks; "2B" is the published size.',
    )
    command.add_argument(
        "--variant", choices=("turbo", "base", "sft"), default="turbo", help="Variant that the checkpoint claims to be."
    )
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="Dtype of all weights."
    )
    command.add_argument("--seed", type=int, default=0, help="Seed of the weights; the same seed gives the same bytes.")


def run(options: Namespace) -> int | None:
    """Run the command `options.command`; return 1 if `verify` found a difference.

    Raises:
        InputError, OSError: if a file or an option cannot be used.
        ModuleNotFoundError: if the extra "convert" is not installed.
    """
    given = options[options.command]
    if options.command == "from-torch":
        from acestep_jax.io.conversion import from_torch

        from_torch(
            given.source,
            given.destination,
            dtype=given.dtype,
            vae=given.vae,
            text_encoder=given.text_encoder,
            variant=given.variant,
        )
    elif options.command == "quantize":
        from acestep_jax.io.quantizing import quantize_checkpoint

        quantize_checkpoint(given.source, given.destination, given.dtype)
    elif options.command == "to-torch":
        from acestep_jax.convert.to_torch import to_torch

        to_torch(given.source, given.destination, layout=given.layout)
    elif options.command == "verify":
        from acestep_jax.convert.verify import verify

        parts = dict(vae=given.vae, text_encoder=given.text_encoder, variant=given.variant)
        return 0 if verify(given.source, **parts) else 1
    elif options.command == "lora-from-torch":
        from acestep_jax.convert.lora import lora_from_torch

        lora_from_torch(given.source, given.destination, model=given.checkpoint)
    elif options.command == "lora-to-torch":
        from acestep_jax.convert.lora import lora_to_torch

        lora_to_torch(given.source, given.destination, layout=given.layout)
    elif options.command == "merge-lora":
        from acestep_jax.convert.merge import merge_lora

        merge_lora(given.source, given.destination, *lora_scales(given))
    else:
        from acestep_jax.convert.random_checkpoint import write_random_checkpoint

        write_random_checkpoint(
            given.destination, size=given.size, variant=given.variant, dtype=given.dtype, seed=given.seed
        )
    return None


def _command(commands: Any, name: str, what: str) -> ArgumentParser:
    """Add a command with the description `what`; see `Parser` for wrong arguments."""
    parser = Parser(description=what)
    commands.add_subcommand(name, parser, help=what)
    return parser


def _add_source(parser: ArgumentParser) -> None:
    """Add the options that name a PyTorch checkpoint."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="PyTorch checkpoint: a folder of diffusers or ACE-Step, a file of ComfyUI or a hub id.",
    )
    add_variant(parser)
    parser.add_argument(
        "--vae",
        metavar="DIR",
        help="Folder or file of the autoencoder. Default: the folder vae next to SRC.",
    )
    parser.add_argument(
        "--text-encoder",
        metavar="DIR",
        help="Folder or file of the text encoder. Default: the folder Qwen3-Embedding-0.6B next to SRC.",
    )
