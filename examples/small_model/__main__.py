"""`python -m examples.small_model`: the stages of the small model's training that `acestep-jax train` does not have."""

import argparse
import sys
from pathlib import Path

import numpy as np

from acestep_jax.cli.runtime import use_compilation_cache
from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint
from acestep_jax.io.files import check_new
from examples.small_model.pack import write_packed
from examples.small_model.requests import song_and_prompt
from examples.small_model.start import TEXT_ENCODER, save_networks, write_start
from examples.small_model.text_encoder import FIRST_SEED, train_text_encoder
from examples.small_model.tokenizer import train_tokenizer

TOKENIZER_PROMPTS = 20_000


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit status: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(prog="python -m examples.small_model", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("text-encoder", help="Train a tokenizer and a text encoder.")
    command.add_argument("destination", metavar="DST", type=Path, help="Folder to create.")
    command.add_argument("--steps", type=int, default=1500, help="Number of training steps [1500].")
    command.add_argument("--batch-size", type=int, default=32, help="Prompts per step [32].")
    command.add_argument("--seed", type=int, default=0, help="Seed of the random weights [0].")
    command = commands.add_parser("start", help="Write the checkpoint that the transformer's training starts from.")
    command.add_argument("destination", metavar="DST", type=Path, help="Folder to create.")
    command.add_argument(
        "--vae", metavar="DIR", type=Path, required=True, help="Autoencoder, from `acestep-jax train autoencoder`."
    )
    command.add_argument(
        "--text-encoder", metavar="DIR", type=Path, required=True, help="Text encoder, from the command of this name."
    )
    command.add_argument("--seed", type=int, default=0, help="Seed of the random weights [0].")
    command = commands.add_parser("pack", help="Pack a trained checkpoint for shipping.")
    command.add_argument("source", metavar="SRC", type=Path, help="Native checkpoint.")
    command.add_argument("destination", metavar="DST", type=Path, help="Folder to create.")
    command.add_argument("--dtype", default="bfloat16", help="Dtype of the stored weights [bfloat16].")
    options = parser.parse_args(arguments)
    try:
        if options.command == "text-encoder":
            text_encoder(options.destination, options.steps, options.batch_size, options.seed)
        elif options.command == "start":
            vae = checkpoint.load(options.vae, names=["vae"])["vae"]
            encoder = checkpoint.load(options.text_encoder, names=["text_encoder"])["text_encoder"]
            tokenizer = checkpoint.load_tokenizer(options.text_encoder)
            write_start(options.destination, vae, encoder, tokenizer, options.seed)
        else:
            write_packed(options.source, options.destination, options.dtype)
    except (InputError, OSError) as error:
        print(f"small_model: {error}", file=sys.stderr)
        return 2
    return 0


def text_encoder(destination: Path, steps: int, batch_size: int, seed: int) -> None:
    """Train a tokenizer and a text encoder, and write them as a checkpoint of one network."""
    use_compilation_cache()
    check_new(destination)
    prompts = (song_and_prompt(FIRST_SEED + i)[1] for i in range(TOKENIZER_PROMPTS))
    tokenizer = train_tokenizer(prompts, TEXT_ENCODER.vocab_size)
    network, errors = train_text_encoder(TEXT_ENCODER, tokenizer, steps=steps, batch_size=batch_size, seed=seed)
    print(f"mean error of the last 50 steps: {np.mean(errors[-50:]):.3f}; of the first step: {np.mean(errors[:1]):.3f}")
    save_networks(destination, {"text_encoder": network}, tokenizer)


if __name__ == "__main__":
    sys.exit(main())
