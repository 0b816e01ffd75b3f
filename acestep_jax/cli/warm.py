"""`acestep-jax warm`: compile the programs for songs of some durations ahead of time."""

import dataclasses
import time
from typing import Any

import jax

from acestep_jax.cli.generate import load
from acestep_jax.cli.options import add_lora
from acestep_jax.cli.parser import Parser, add_fields, name_flags, read_fields
from acestep_jax.cli.runtime import add_checkpoint, add_devices, add_dtype, add_planner, model_folder, start
from acestep_jax.distributed import parse_mesh
from acestep_jax.errors import InputError
from acestep_jax.inputs.prepare import prepare
from acestep_jax.io import checkpoint
from acestep_jax.request import KINDS, Planning, Request, Sampling


def add(commands: Any) -> None:
    """Add the command."""
    parser = Parser(
        description="Compile the programs for songs of some durations, by generating a song of each. Programs are kept "
        "on disk, see JAX_COMPILATION_CACHE_DIR, so that later runs with the same options need not compile, on this "
        "machine or on others of the same kind that share the folder. Longer prompts and lyrics need other programs: "
        "give examples that are as long as yours."
    )
    add_checkpoint(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", default="piano", help="Description of the music.")
    parser.add_argument(
        "--durations", metavar="S", nargs="+", type=float, required=True, help="Durations of songs in seconds."
    )
    add_fields(parser, Request, ("lyrics",))
    add_fields(parser, Planning)
    add_fields(parser, Sampling)
    add_planner(parser)
    add_lora(parser)
    add_dtype(parser)
    add_devices(parser)
    commands.add_subcommand("warm", parser, help="Compile the programs that songs need ahead of time.")


def run(options: Any) -> None:
    """Generate a song of each duration, and print how long each took."""
    try:
        planning, sampling = Planning(**read_fields(options, Planning)), Sampling(**read_fields(options, Sampling))
        words: dict[str, Any] = {"lyrics": "[Instrumental]", "seed": 0, **read_fields(options, Request)}
        request = Request(**words)
    except InputError as error:
        raise name_flags(error, KINDS) from None
    try:
        requests = [dataclasses.replace(request, audio_duration=seconds) for seconds in options.durations]
    except InputError as error:
        raise InputError(f"--durations: {error}") from None
    start(options.distributed)
    path = model_folder(options)
    manifest = checkpoint.read_manifest(path)
    tokenizer = checkpoint.load_tokenizer(path)
    for request in requests:
        prepare(request, manifest.configs, tokenizer, sampling, manifest.sampling)
    pipe = load(options, path, parse_mesh(options.mesh))
    for request in requests:
        begin = time.perf_counter()
        ((planned, _),) = pipe.planned([request], planning, sampling)
        pipe.run([pipe.prepare(planned, sampling)], sampling)
        if jax.process_index() == 0:
            print(f"{request.audio_duration:g} s: ready after {time.perf_counter() - begin:.1f} s", flush=True)
    if jax.process_index() == 0:
        print(f"programs are kept in {jax.config.jax_compilation_cache_dir}")  # pyright: ignore[reportAttributeAccessIssue]
