"""`acestep-jax generate` and `acestep-jax info`."""

import argparse
import importlib.metadata
import logging
import math
import os
import sys
from pathlib import Path

import jax

from acestep_jax import audio, checkpoint
from acestep_jax.adapter import Adapter, check_scale, resolve_adapters
from acestep_jax.config import DTYPES
from acestep_jax.errors import InputError
from acestep_jax.pipeline import AceStepPipeline
from acestep_jax.sharding import MESH_AXES, make_mesh


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="acestep-jax", description="ACE-Step 1.5 music generation in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="turn a prompt into an audio file")
    add = generate.add_argument
    add("prompt", metavar="PROMPT", help="what the music is like")
    add("--checkpoint", metavar="DIR", required=True, help="a checkpoint that `python -m convert from-torch` made")
    add("--out", metavar="FILE", default="song.wav", help=f"{', '.join(audio.FORMATS)}, by suffix [song.wav]")
    add("--overwrite", action="store_true", help="replace FILE if it exists")
    add("--lyrics", metavar="TEXT", default="", help='the lyrics, "[Instrumental]", or @FILE to read them from a file')
    add("--language", metavar="CODE", default="en", help="of the lyrics [en]")
    add("--duration", metavar="SECONDS", type=float, default=60.0, help="10 to 600 [60]")
    add("--bpm", type=int, help="beats per minute [the model's choice]")
    add("--key", metavar="KEY", help='such as "F# minor" [the model\'s choice]')
    add("--time-signature", metavar="N", help="2, 3, 4 or 6 [the model's choice]")
    add("--seed", type=int, help="the same seed gives the same song [a new one, which is printed]")
    add("--steps", type=int, help="[turbo: 8; base, sft: 50]")
    add("--shift", type=float, help="of the time steps towards the noise [turbo: 3; base, sft: 1]")
    add("--guidance", type=float, help="strength, 1 for none [turbo: none; base, sft: 7]")
    add_lora_options(generate)
    add("--dtype", help=f"{', '.join(DTYPES)} [as stored]")
    add("--mesh", metavar="AXIS=N,...", help=f"devices for each of {', '.join(MESH_AXES)} [one device]")
    add(
        "--distributed",
        nargs="?",
        const="",
        metavar="HOST:PORT,COUNT,INDEX",
        help="run as one of several processes, with a mesh over the devices of all: the address of process 0, how many "
        "there are and which this is; without a value JAX finds out (TPU pods, SLURM, Open MPI). Process 0 writes FILE",
    )

    info = commands.add_parser("info", help="versions, devices, and what a checkpoint holds")
    info.add_argument("--checkpoint", metavar="DIR", help="a native checkpoint")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 after an error message."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    options = _parser().parse_args(arguments)
    try:
        (generate if options.command == "generate" else info)(options)
    except (InputError, OSError) as error:
        print(f"acestep-jax: {error}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        advice = "try --dtype bfloat16, a shorter --duration, or several devices with --mesh"
        print(f"acestep-jax: the device has too little memory for this; {advice}", file=sys.stderr)
        return 2
    return 0


def generate(options: argparse.Namespace) -> None:
    """Writes one song. The output's name, the lyrics file, the mesh and the adapters are checked before the weights
    are loaded."""
    if options.distributed is not None:
        join_processes(options.distributed)
    use_compilation_cache()
    writes = jax.process_index() == 0
    if writes:
        audio.check_output(options.out, overwrite=options.overwrite)
    lyrics = options.lyrics
    if lyrics.startswith("@"):
        try:
            lyrics = Path(lyrics[1:]).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{lyrics[1:]}: not UTF-8 text ({error}); save it as UTF-8") from None
    mesh = parse_mesh(options.mesh)
    adapters, scales = load_loras(options.lora, options.checkpoint)
    pipe = AceStepPipeline.from_checkpoint(options.checkpoint, dtype=options.dtype, mesh=mesh)
    pipe.load_lora(adapters, scales)
    song = pipe(
        options.prompt,
        lyrics=lyrics,
        audio_duration=options.duration,
        vocal_language=options.language,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        shift=options.shift,
        seed=options.seed,
        bpm=options.bpm,
        keyscale=options.key,
        timesignature=options.time_signature,
    )
    if not writes:
        return
    song.save(options.out, overwrite=options.overwrite)
    seconds = song.audios.shape[-1] / song.sample_rate
    print(f"{options.out}: {seconds:g} s, seed {song.seeds[0]}")


def info(options: argparse.Namespace) -> None:
    """Prints versions, devices and the networks of a checkpoint."""
    for package in ("acestep-jax", "jax", "flax", "orbax-checkpoint"):
        print(f"{package:<24} {importlib.metadata.version(package)}")
    print(f"{'devices':<24} {', '.join(map(str, jax.devices()))}")
    if options.checkpoint is None:
        return
    path = Path(options.checkpoint)
    manifest = checkpoint.read_manifest(path)
    stored = checkpoint.stored_leaves(path)
    print(f"{'variant':<24} {manifest.configs['transformer'].variant}")
    for name, config in manifest.configs.items():
        sizes = [math.prod(leaf.shape) for key, leaf in stored.items() if key.startswith(f"{name}.")]
        print(f"{name:<24} {sum(sizes):>13,} parameters, {config.param_dtype}")


def add_lora_options(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """--lora and --lora-scale, for `load_loras`. Both fill one list, with texts and numbers, so that it tells which
    scale came after which adapter."""
    lora = dict(dest="lora", action="append", default=[])
    parser.add_argument(
        "--lora",
        metavar="DIR",
        required=required,
        help="an adapter; may be repeated, what they change adds up",
        **lora,
    )
    parser.add_argument(
        "--lora-scale", metavar="STRENGTH", type=float, help="of the --lora before it, 0 for none [1]", **lora
    )


def load_loras(entries: list[str | float], path: str) -> tuple[list[Adapter], list[float]]:
    """Adapters and their scales from the values of --lora (text) and --lora-scale (numbers), in the order given.

    Raises:
        InputError: if a scale follows no adapter, or an adapter cannot be used with the checkpoint at `path`.
    """
    folders, scales = [], []
    for previous, entry in zip([None, *entries], entries, strict=False):
        if isinstance(entry, str):
            folders.append(entry)
            scales.append(1.0)
        elif isinstance(previous, str):
            check_scale(entry, "--lora-scale")
            scales[-1] = entry
        else:
            raise InputError(f"--lora-scale: expected right after the --lora that it is for, found {entry:g} elsewhere")
    if not folders:
        return [], []
    return resolve_adapters(folders, scales, checkpoint.read_manifest(path).configs["transformer"])


def join_processes(text: str) -> None:
    """Connects to the other processes. `text`: "HOST:PORT,COUNT,INDEX", or nothing for what JAX finds out itself.

    Raises:
        InputError: if it is neither, or JAX finds no cluster.
    """
    if not text:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise InputError(f"--distributed: JAX finds no cluster ({error}); give HOST:PORT,COUNT,INDEX") from None
        return
    address, *numbers = text.split(",")
    if ":" not in address or len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
        raise InputError(f"--distributed: expected HOST:PORT,COUNT,INDEX, found {text!r}")
    count, index = map(int, numbers)
    if index >= count:
        raise InputError(f"--distributed: INDEX must be less than COUNT, found {text!r}")
    jax.distributed.initialize(address, count, index)


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that they are compiled once for all runs: where JAX_COMPILATION_CACHE_DIR
    says, else in the user's cache folder."""
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "acestep-jax"))


def parse_mesh(text: str | None):
    """A mesh from such as "data=2,tensor=4"; None from None. Raises InputError if it cannot be, or several processes
    have none."""
    if text is None:
        if jax.process_count() > 1:
            raise InputError(
                f"--distributed: give --mesh as well; the processes have {jax.device_count()} devices together"
            )
        return None
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or not size.isdecimal() or int(size) < 1 or axis in sizes:
            raise InputError(
                f"--mesh: expected AXIS=N,... with axes {', '.join(MESH_AXES)} and N of at least 1, found {text!r}"
            )
        sizes[axis] = int(size)
    return make_mesh(**sizes)


if __name__ == "__main__":
    sys.exit(main())
