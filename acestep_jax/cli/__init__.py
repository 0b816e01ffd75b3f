"""`acestep-jax generate`, `tokenize`, `detokenize` and `info`."""

import argparse
import importlib.metadata
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

import jax

from acestep_jax.diffusion.guidance import GUIDANCE
from acestep_jax.diffusion.solvers import SOLVERS
from acestep_jax.distributed import MESH_AXES, make_mesh
from acestep_jax.errors import InputError
from acestep_jax.inputs import tasks
from acestep_jax.inputs.codec import Codec
from acestep_jax.inputs.tasks import codes_to_text
from acestep_jax.io import audio, checkpoint
from acestep_jax.io.adapter import Adapter, check_scale, resolve_adapters
from acestep_jax.io.files import publish_file
from acestep_jax.models.config import DTYPES
from acestep_jax.pipeline import AceStepPipeline
from acestep_jax.serve import jsonl


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="acestep-jax", description="ACE-Step 1.5 music generation in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="turn a prompt into an audio file")
    add = generate.add_argument
    add("prompt", metavar="PROMPT", nargs="?", help="what the music is like")
    _add_checkpoint(generate, "a checkpoint that `python -m convert from-torch` made")
    add("--out", metavar="FILE", help=f"{', '.join(audio.FORMATS)}, by suffix [song.wav]")
    add("--overwrite", action="store_true", help="replace FILE, or the songs of --batch, if they exist")
    add("--lyrics", metavar="TEXT", default="", help='the lyrics, "[Instrumental]", or @FILE to read them from a file')
    add("--language", metavar="CODE", default="en", help="of the lyrics [en]")
    add("--duration", metavar="SECONDS", type=float, help="10 to 600 [60; with --source, as long as that]")
    add("--bpm", type=int, help="beats per minute [the model's choice]")
    add("--key", metavar="KEY", help='such as "F# minor" [the model\'s choice]')
    add("--time-signature", metavar="N", help="2, 3, 4 or 6 [the model's choice]")
    add("--seed", type=int, help="the same seed gives the same song [a new one, which is printed]")
    add("--task", choices=tasks.TASKS, default="text2music", help="[text2music]")
    add("--source", metavar="FILE", help="the song to work on, for all tasks but text2music")
    add(
        "--start", metavar="SECONDS", type=float, action="append", help="of what repaint makes anew, below 0 to add to "
    )
    add("--end", metavar="SECONDS", type=float, action="append", help="the song; --start and --end may be repeated")
    add("--track", metavar="NAME", action="append", help="of extract, lego and complete, there repeated: a track")
    add("--codes", metavar="TEXT", help="a cover of such codes as tokenize writes, or of those in @FILE")
    add("--cover-strength", metavar="STRENGTH", type=float, default=1.0, help="0 to 1, part of the steps [1]")
    add("--cover-noise", metavar="STRENGTH", type=float, help="0 to 1, start that near to the source of a cover [0]")
    add("--reference", metavar="FILE", help="music of the timbre that is wanted")
    add("--steps", type=int, help="[turbo: 8; others: 50]")
    add("--shift", type=float, help="of the time steps towards the noise [turbo: 3; others: 1]")
    add("--guidance", type=float, help="strength, 1 for none [turbo: none; base, sft: 7; small: 3]")
    add("--guidance-rule", choices=GUIDANCE, help="[apg]")
    add("--solver", choices=SOLVERS, help="[euler]")
    add(
        "--noise", metavar="KIND", help="torch: what PyTorch draws on a GPU from the seed, torch:A100 on this one [jax]"
    )
    add(
        "--batch",
        metavar="FILE",
        help="instead of PROMPT: a JSON object on each line, with the arguments of AceStepPipeline as keys; those not "
        "given are the options here. Finished songs are skipped",
    )
    add("--out-dir", metavar="DIR", help="where --batch puts a song and its settings for each line")
    add("--batch-size", metavar="N", type=int, default=1, help="songs that --batch makes at once [1]")
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

    for name, text in (("tokenize", "turn music into codes, 5 a second"), ("detokenize", "turn codes into audio")):
        command = commands.add_parser(name, help=text)
        add = command.add_argument
        if name == "tokenize":
            add("song", metavar="FILE", help="the music")
            add("--out", metavar="FILE", help="a text file [printed]")
        else:
            add("codes", metavar="CODES", help="as tokenize writes them, or @FILE to read them from a file")
            add("--out", metavar="FILE", default="song.wav", help=f"{', '.join(audio.FORMATS)}, by suffix [song.wav]")
        _add_checkpoint(command, "a native checkpoint")
        add("--dtype", help=f"{', '.join(DTYPES)} [as stored]")
        add("--overwrite", action="store_true", help="replace the output if it exists")

    info = commands.add_parser("info", help="versions, devices, and what a checkpoint holds")
    _add_checkpoint(info, "a native checkpoint")
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser, what: str) -> None:
    path = checkpoint.SMALL_MODEL
    parser.add_argument("--checkpoint", metavar="DIR", default=path, help=f"{what} [the small model of this package]")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 if songs of a batch failed, or 2 after an error message."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    options = _parser().parse_args(arguments)
    try:
        return (
            dict(generate=generate, tokenize=tokenize, detokenize=detokenize, info=info)[options.command](options) or 0
        )
    except (InputError, OSError) as error:
        print(f"acestep-jax: {error}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        advice = "try --dtype bfloat16, a shorter --duration, or several devices with --mesh"
        print(f"acestep-jax: the device has too little memory for this; {advice}", file=sys.stderr)
        return 2


def generate(options: argparse.Namespace) -> int | None:
    """Writes one song, or those of a file. What can be checked without the weights is checked before they are loaded.

    Returns 1 if songs of a file failed.
    """
    if options.distributed is not None:
        join_processes(options.distributed)
    use_compilation_cache()
    writes = jax.process_index() == 0
    arguments = song_arguments(options)
    out = "song.wav" if options.out is None else options.out
    if options.batch is not None:
        if options.out is not None:
            raise InputError("--out: is for one song; use --out-dir for the songs of --batch")
        songs, failures = read_batch(options, arguments)
    elif options.prompt is None:
        raise InputError("give a PROMPT, or --batch with a file of them")
    elif options.out_dir is not None:
        raise InputError("--out-dir: is for the songs of --batch; use --out for one song")
    elif writes:
        audio.check_output(out, overwrite=options.overwrite)
        for name, path in (("--source", options.source), ("--reference", options.reference)):
            if path is not None and Path(path).resolve() == Path(out).resolve():
                raise InputError(f"--out: {out} is the {name} itself; choose another name")
    mesh = parse_mesh(options.mesh)
    adapters, scales = load_loras(options.lora, options.checkpoint)
    pipe = AceStepPipeline.from_checkpoint(options.checkpoint, dtype=options.dtype, mesh=mesh)
    pipe.load_lora(adapters, scales)
    if options.batch is not None:
        return run_batch(pipe, songs, failures, options)
    song = pipe(options.prompt, **arguments)
    if not writes:
        return None
    song.save(out, overwrite=options.overwrite)
    seconds = song.audios.shape[-1] / song.sample_rate
    print(f"{out}: {seconds:g} s, seed {song.seeds[0]}")
    return None


def song_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The options of a song as arguments of the pipeline, those that were given."""
    tracks = options.track or []
    complete = options.task == "complete"
    if len(tracks) > 1 and not complete:
        raise InputError(f"--track: the task {options.task} takes one, found {', '.join(tracks)}")
    arguments = dict(
        lyrics=text_or_file(options.lyrics),
        audio_duration=options.duration,
        vocal_language=options.language,
        seed=options.seed,
        bpm=options.bpm,
        keyscale=options.key,
        timesignature=options.time_signature,
        task_type=options.task,
        track_name=tracks[0] if tracks and not complete else None,
        complete_track_classes=tracks if complete else None,
        src_audio=options.source,
        reference_audio=options.reference,
        audio_codes=options.codes and text_or_file(options.codes),
        repainting_start=options.start,
        repainting_end=options.end,
        audio_cover_strength=options.cover_strength,
        cover_noise_strength=options.cover_noise,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        shift=options.shift,
        guidance=options.guidance_rule,
        solver=options.solver,
        noise=options.noise,
    )
    return {name: value for name, value in arguments.items() if value is not None}


def read_batch(options: argparse.Namespace, arguments: dict[str, Any]) -> tuple[list[jsonl.Song], list[str]]:
    """The songs of --batch, and what is wrong with other lines; makes the folder for them."""
    if options.prompt is not None:
        raise InputError(f"PROMPT, --batch: give one of them, found both ({options.prompt!r})")
    if options.out_dir is None:
        raise InputError("--out-dir: give a folder for the songs of --batch")
    if options.batch_size < 1:
        raise InputError(f"--batch-size: expected at least 1, found {options.batch_size}")
    found = jsonl.read(options.batch, options.out_dir, arguments)
    Path(options.out_dir).mkdir(parents=True, exist_ok=True)
    return found


def run_batch(pipe: AceStepPipeline, songs: list[jsonl.Song], failures: list[str], options: argparse.Namespace) -> int:
    """Makes the songs, and reports at the end what failed. Returns 1 if anything did."""
    about = dict(
        checkpoint=str(Path(options.checkpoint).resolve()),
        dtype=options.dtype,
        lora=options.lora,
        version=importlib.metadata.version("acestep-jax"),
    )
    for song, error in jsonl.generate(pipe, songs, options.batch_size, about, overwrite=options.overwrite):
        if error is not None:
            failures.append(f"{song.place}: {error}")
        elif jax.process_index() == 0:
            print(song.path, flush=True)
    for failure in failures if jax.process_index() == 0 else ():
        print(f"acestep-jax: {failure}", file=sys.stderr)
    return 1 if failures else 0


def tokenize(options: argparse.Namespace) -> None:
    """Prints the codes of a song, or writes them to a file."""
    use_compilation_cache()
    out = None if options.out is None else Path(options.out)
    if out is not None and not out.absolute().parent.is_dir():
        raise InputError(f"{out}: the folder {out.absolute().parent} does not exist; create it first")
    if out is not None and out.exists() and (out.is_dir() or not options.overwrite):
        raise InputError(f"{out}: already exists; remove it, choose another name, or use --overwrite")
    codes = Codec.from_checkpoint(options.checkpoint, dtype=options.dtype).song_to_codes(options.song)
    text = codes_to_text(codes)
    if out is None:
        print(text)
        return
    with publish_file(out) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(f"{out}: {len(codes)} codes")


def detokenize(options: argparse.Namespace) -> None:
    """Writes the audio of codes."""
    use_compilation_cache()
    audio.check_output(options.out, overwrite=options.overwrite)
    codec = Codec.from_checkpoint(options.checkpoint, dtype=options.dtype)
    made = codec.codes_to_song(text_or_file(options.codes))
    audio.write(options.out, made, codec.model.sample_rate, overwrite=options.overwrite)
    print(f"{options.out}: {made.shape[1] / codec.model.sample_rate:g} s")


def text_or_file(text: str) -> str:
    """The text, or what stands in the file after @."""
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{text[1:]}: not UTF-8 text ({error}); save it as UTF-8") from None


def info(options: argparse.Namespace) -> None:
    """Prints versions, devices and the networks of a checkpoint."""
    for package in ("acestep-jax", "jax", "flax", "orbax-checkpoint"):
        print(f"{package:<24} {importlib.metadata.version(package)}")
    print(f"{'devices':<24} {', '.join(map(str, jax.devices()))}")
    path = Path(options.checkpoint)
    print(f"{'checkpoint':<24} {path}")
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


def load_loras(entries: list[str | float], path: str | Path) -> tuple[list[Adapter], list[float]]:
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
