"""`acestep-jax tokenize` and `detokenize`: between songs and audio codes."""

from pathlib import Path
from typing import Any

from acestep_jax.cli.parser import Parser, text_or_file
from acestep_jax.cli.runtime import add_checkpoint, add_dtype, model_folder, start
from acestep_jax.inputs.tasks import codes_to_text
from acestep_jax.io import audio
from acestep_jax.io.checkpoint import read_manifest
from acestep_jax.io.files import check_output, publish_file
from acestep_jax.pipeline import AceStepPipeline

NETWORKS = ("vae", "condition_encoder", "audio_tokenizer", "audio_token_detokenizer")
FORMATS = ", ".join(audio.FORMATS)


def add(commands: Any) -> None:
    """Add the two commands."""
    tokenize = Parser(description="Encode a song as audio codes, 5 per second.")
    tokenize.add_argument("song", metavar="FILE", help="Sound file to encode.")
    tokenize.add_argument("--out", metavar="FILE", help="Text file to write the codes to. Default: print them.")
    detokenize = Parser(description="Decode audio codes to a song.")
    detokenize.add_argument(
        "codes", metavar="CODES", help="Codes, as written by tokenize. @FILE reads them from a file."
    )
    detokenize.add_argument(
        "--out", metavar="FILE", default="song.wav", help=f"Sound file to write: {FORMATS}. Default: song.wav."
    )
    for name, parser in (("tokenize", tokenize), ("detokenize", detokenize)):
        add_checkpoint(parser)
        add_dtype(parser)
        parser.add_argument("--overwrite", action="store_true", help="Overwrite an existing output.")
        commands.add_subcommand(name, parser, help=parser.description)


def load(options: Any) -> AceStepPipeline:
    """Load the networks between songs and codes, those that the checkpoint has."""
    path = model_folder(options)
    configs = read_manifest(path).configs
    names = [name for name in NETWORKS if name in configs]
    return AceStepPipeline.from_pretrained(path, dtype=options.dtype, networks=names)


def tokenize(options: Any) -> None:
    """Print the codes of a song, or write them to a file."""
    out = None if options.out is None else Path(options.out)
    if out is not None:
        check_output(out, overwrite=options.overwrite)
    start()
    codes = load(options).song_to_codes(options.song)
    text = codes_to_text(codes)
    if out is None:
        print(text)
        return
    with publish_file(out) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(f"{out}: {len(codes)} codes")


def detokenize(options: Any) -> None:
    """Write the audio of codes."""
    audio.check_output(options.out, overwrite=options.overwrite)
    codes = text_or_file(options.codes)
    start()
    pipe = load(options)
    made = pipe.codes_to_song(codes)
    audio.write(options.out, made, pipe.sample_rate, overwrite=options.overwrite)
    print(f"{options.out}: {made.shape[1] / pipe.sample_rate:g} s")
