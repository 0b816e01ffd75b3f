"""`acestep-jax generate`: one song, or the songs of a JSONL file."""

import importlib.metadata
import logging
import sys
from typing import Any

import jax
from jax.sharding import Mesh

from acestep_jax import preemption
from acestep_jax.arguments import arguments, flag
from acestep_jax.cli.options import add_instrumental, add_lora, is_instrumental, lora_scales
from acestep_jax.cli.parser import Parser, add_fields, name_flags, read_fields
from acestep_jax.cli.runtime import add_checkpoint, add_devices, add_dtype, add_planner, model_folder, start
from acestep_jax.distributed import all_succeed, local_mesh, parse_mesh
from acestep_jax.errors import InputError
from acestep_jax.inputs.keywords import requests_of
from acestep_jax.inputs.prepare import prepare
from acestep_jax.io import audio, checkpoint
from acestep_jax.io.adapter import resolve_adapters
from acestep_jax.io.files import as_path, check_output, check_writable, identity
from acestep_jax.io.native import is_native
from acestep_jax.models.config import TransformerConfig
from acestep_jax.models.registry import FAMILY
from acestep_jax.pipeline import AceStepPipeline
from acestep_jax.planner.metadata import INSTRUMENTAL
from acestep_jax.planner.plan import Plan
from acestep_jax.planner.timestamps import check_alignment, write_lrc
from acestep_jax.request import FILES, KINDS, Arguments, Request, Sampling
from acestep_jax.serve import jsonl


def add(commands: Any) -> None:
    """Add the command."""
    parser = Parser(description="Generate a song from a prompt, or the songs of a JSONL file.")
    add_checkpoint(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="Description of the music.")
    parser.add_argument(
        "--out", metavar="FILE", help=f"Sound file to write: {', '.join(audio.FORMATS)}. Default: song.wav."
    )
    parser.add_argument("--overwrite", action="store_true", help="Overwrite existing outputs.")
    for kind in KINDS:
        add_fields(parser, kind)
    add_instrumental(parser, f'Request no vocals: short for --lyrics "{INSTRUMENTAL}".')
    parser.add_argument(
        "--plan", metavar="FILE", help="Plan to use instead of PROMPT, as written by `acestep-jax plan`."
    )
    add_planner(parser)
    parser.add_argument("--lrc", action="store_true", help="Also write SONG.lrc, with timestamps of the lyrics.")
    parser.add_argument(
        "--batch",
        metavar="FILE",
        help="JSONL file to use instead of PROMPT: one object per line, with the arguments of AceStepPipeline as keys. "
        "Options of this command are the defaults. Finished songs are skipped.",
    )
    parser.add_argument("--out-dir", metavar="DIR", help="Folder for the songs of --batch and their settings.")
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        help="Number of songs of --batch to generate at once. Default: 1; with --distributed and without --mesh, one "
        "on each device of a process.",
    )
    add_lora(parser)
    add_dtype(parser)
    add_devices(parser)
    commands.add_subcommand("generate", parser, help="Generate a song from a prompt.")


def run(options: Any) -> int | None:
    """Write one song, or the songs of a file; return 1 if songs of a file failed.

    Everything that can be checked without the weights is checked before they are loaded.
    """
    try:
        given = read_fields(options, Arguments)
        if is_instrumental(options, given):
            given["lyrics"] = INSTRUMENTAL
        return run_batch(options, given) if options.batch is not None else run_one(options, given)
    except InputError as error:
        raise name_flags(error, KINDS) from None


def run_one(options: Any, given: dict[str, Any]) -> None:
    """Write the song of PROMPT."""
    if options.plan is not None:
        if options.prompt is not None:
            raise InputError(f"PROMPT, --plan: expected one of them, found both ({options.prompt!r})")
        given = dict(prompt=Plan.load(options.plan), **given)
    elif options.prompt is None:
        raise InputError("PROMPT: missing; describe the music, or give --plan, or a file of requests with --batch")
    if options.out_dir is not None:
        raise InputError("--out-dir: for the songs of --batch only; use --out for one song")
    if options.batch_size is not None:
        raise InputError("--batch-size: for the songs of --batch only; leave it out for one song")
    (request,), planning, sampling = requests_of(given)
    out = "song.wav" if options.out is None else options.out
    start(options.distributed)
    writes = jax.process_index() == 0
    if writes:
        audio.check_output(out, overwrite=options.overwrite)
        if options.lrc:
            check_output(as_path(out).with_suffix(".lrc"), overwrite=options.overwrite)
        for name in FILES:
            path = getattr(request, name)
            if path is not None and identity(str(path)) == identity(out):
                option = flag(name, arguments(Request)[name][1])
                raise InputError(f"--out: {out} is the {option} itself; choose another name")
    if not is_native(as_path(options.checkpoint)):
        check_request(request, sampling)
    path = model_folder(options)
    manifest = checkpoint.read_manifest(path)
    job = prepare(request, manifest.configs, checkpoint.load_tokenizer(path), sampling, manifest.sampling)
    if options.lrc:
        check_alignment(manifest.configs["transformer"], job)
    pipe = load(options, path, parse_mesh(options.mesh))
    finished = [0] if options.plan is not None else []
    ((request, plan),) = pipe.planned([request], planning, sampling, finished=finished)
    if plan is not None:
        job = pipe.prepare(request, sampling)
        if writes:
            print(f"{plan.describe()}\n", flush=True)
    (song,) = pipe.run([job], sampling)
    if writes:
        song.save(out, overwrite=options.overwrite)
    times = pipe.timestamps(song, request, sampling) if options.lrc else None
    if not writes:
        return
    if times is not None:
        write_lrc(as_path(out).with_suffix(".lrc"), times, overwrite=options.overwrite)
        print(f"{as_path(out).with_suffix('.lrc')}: {len(times.lines)} lines, alignment score {times.score:g}")
    assert song.audio is not None
    again = f"seed {song.seed}" + (f", retake seed {song.retake_seed}" if song.retake_seed is not None else "")
    print(f"{out}: {song.audio.shape[1] / song.sample_rate:g} s, {again}")


def run_batch(options: Any, given: dict[str, Any]) -> int:
    """Write the songs of --batch and report failures at the end; return 1 if there are any."""
    if options.prompt is not None:
        raise InputError(f"PROMPT, --batch: expected one of them, found both ({options.prompt!r})")
    for option, given_too in (("--plan", options.plan), ("--lrc", options.lrc or None)):
        if given_too is not None:
            raise InputError(f"{option}: for one song only; leave it out with --batch")
    if options.out is not None:
        raise InputError("--out: for one song only; use --out-dir for the songs of --batch")
    if options.out_dir is None:
        raise InputError("--out-dir: missing; give a folder for the songs of --batch")
    if options.batch_size is not None and options.batch_size < 1:
        raise InputError(f"--batch-size: expected at least 1, found {options.batch_size}")
    start(options.distributed)
    apart = jax.process_count() > 1 and options.mesh is None  # each process makes its own songs
    mesh = local_mesh() if apart else parse_mesh(options.mesh)
    batch_size = options.batch_size or (jax.local_device_count() if apart else 1)
    lines, unusable = jsonl.read(options.batch, options.out_dir, given)
    as_path(options.out_dir).mkdir(parents=True, exist_ok=True)
    check_writable(as_path(options.out_dir) / "songs")
    path = model_folder(options)
    pipe = load(options, path, mesh)
    folders, scales = lora_scales(options)
    about = dict(
        checkpoint=identity(path),
        dtype=options.dtype,
        lora=[[folder, scale] for folder, scale in zip(folders, scales, strict=True)],
        version=importlib.metadata.version("acestep-jax"),
    )
    if options.planner is not None:
        about["planner"] = identity(options.planner)
    if any(line.planning.thinking for line in lines):
        _ = pipe.planner  # raises now if there is none
    reports = apart or jax.process_index() == 0
    failures = unusable if jax.process_index() == 0 else []
    with all_succeed(), preemption.handled(in_step=not apart):
        for line, error in jsonl.generate(pipe, lines, batch_size, about, overwrite=options.overwrite):
            if error is not None:
                failures.append(f"{line.place}: {error}")
            elif reports:
                print(line.path, flush=True)
    for failure in failures if reports else ():
        print(f"acestep-jax: {failure}", file=sys.stderr)
    return 1 if failures or unusable else 0


def check_request(request: Request, sampling: Sampling) -> None:
    """Check a request before its model is downloaded or converted: against the architecture of the published models.

    Errors of a request hardly ever depend on the model, and a download takes minutes. The request is prepared again
    with the model's own tokenizer when it is available; warnings are logged then.

    Raises:
        InputError, OSError: see `prepare`.
    """
    configs: dict[str, Any] = {name: config() for name, (_, config) in FAMILY.networks.items()}
    if request.global_caption:  # only the model itself says whether it was fine-tuned on stems
        configs["transformer"] = TransformerConfig(is_lego_sft=True)
    logging.disable(logging.WARNING)
    try:
        prepare(request, configs, checkpoint.load_tokenizer(checkpoint.SMALL_MODEL), sampling)
    finally:
        logging.disable(logging.NOTSET)


def load(options: Any, path: str, mesh: Mesh | None) -> AceStepPipeline:
    """Load the pipeline with its adapters; adapters are checked before the weights are loaded.

    Args:
        path: the native checkpoint, see `model_folder`.
    """
    folders, scales = lora_scales(options)
    if folders:
        config: Any = checkpoint.read_manifest(path).configs["transformer"]
        adapters, scales = resolve_adapters(folders, scales, config)
    pipe = AceStepPipeline.from_pretrained(path, dtype=options.dtype, mesh=mesh, planner=options.planner)
    if folders:
        pipe.load_lora(adapters, scales)
    return pipe
