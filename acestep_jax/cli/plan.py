"""`acestep-jax plan`, `rewrite` and `describe`: turn words into a plan, improve words, describe a song."""

import json
import sys
from pathlib import Path
from typing import Any

import jax

from acestep_jax.cli.codes import NETWORKS
from acestep_jax.cli.options import add_instrumental, is_instrumental
from acestep_jax.cli.parser import Parser, add_fields, name_flags, read_fields
from acestep_jax.cli.runtime import add_checkpoint, add_devices, add_dtype, add_planner, model_folder, start
from acestep_jax.distributed import parse_mesh
from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint
from acestep_jax.io.files import as_path, check_output, publish_file
from acestep_jax.io.planner_source import PlannerSource
from acestep_jax.pipeline import AceStepPipeline
from acestep_jax.planner.plan import Plan
from acestep_jax.request import Planning, Request, split

# Fields that a user may give for a planned song, and those for the planner's sampling.
SONG = ("lyrics", "audio_duration", "vocal_language", "bpm", "keyscale", "timesignature")
SAMPLING = tuple(name for name in Planning.__dataclass_fields__ if name.startswith("lm_"))
TEXT_SAMPLING = ("lm_seed", "lm_temperature", "lm_top_k", "lm_top_p", "lm_repetition_penalty")


def add(commands: Any) -> None:
    """Add the three commands."""
    plan = Parser(
        description="Plan a song: caption, lyrics, metadata and audio codes, which `acestep-jax generate --plan` reads."
    )
    plan.add_argument("wish", metavar="WISH", help='What the song should be like, such as "a sad song about the sea".')
    add_instrumental(plan, "Plan music without vocals.")
    plan.add_argument("--no-codes", dest="codes", action="store_false", help="Write only text, without audio codes.")
    rewrite = Parser(description="Write a more detailed caption, lyrics in the model's format, and metadata.")
    rewrite.add_argument("wish", metavar="PROMPT", help="Description of the music.")
    for name, parser in (("plan", plan), ("rewrite", rewrite)):
        add_fields(parser, Request, SONG)
        add_fields(parser, Planning, (*SAMPLING, "use_cot_caption", "best_of") if name == "plan" else TEXT_SAMPLING)
        parser.add_argument("--out", metavar="FILE", help="File to write the plan to, as JSON. Default: print it.")
        _add_model(parser)
        add_devices(parser)
        commands.add_subcommand(name, parser, help=parser.description)
    describe = Parser(description="Describe songs: caption, lyrics, tempo, key, time signature and language.")
    describe.add_argument("songs", metavar="FILE", nargs="+", help="Sound files.")
    describe.add_argument(
        "--captions",
        action="store_true",
        help="Write the description next to each song, as SONG.json, where training looks for it.",
    )
    add_fields(describe, Planning, TEXT_SAMPLING)
    _add_model(describe)
    commands.add_subcommand("describe", describe, help=describe.description)


def _add_model(parser: Parser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="Overwrite existing outputs.")
    add_checkpoint(parser)
    add_planner(parser)
    add_dtype(parser)


def plan(options: Any) -> None:
    """Print the plan of a wish, or write it to a file."""
    _write(
        options,
        lambda pipe, given: pipe.plan(options.wish, instrumental=options.instrumental, codes=options.codes, **given),
    )


def rewrite(options: Any) -> None:
    """Print a request rewritten by the planner, or write it to a file."""
    _write(options, lambda pipe, given: pipe.rewrite(options.wish, **given))


def _write(options: Any, make: Any) -> None:
    try:
        given = {**read_fields(options, Request), **read_fields(options, Planning)}
        if "instrumental" in options:
            is_instrumental(options, given)
        requested, planned, _ = split(given)
        for kind, values in ((Request, dict(prompt=options.wish) | requested), (Planning, planned)):
            kind(**values)  # checks them before anything slow
        if options.out is not None:
            check_output(options.out, overwrite=options.overwrite)
        start(options.distributed)
        pipe = AceStepPipeline(mesh=parse_mesh(options.mesh))
        found = PlannerSource.of(options.planner, options.checkpoint, as_path(options.checkpoint), dtype=options.dtype)
        pipe.planner_source = found
        made: Plan = make(pipe, given)
    except InputError as error:
        raise name_flags(error, (Request, Planning)) from None
    if jax.process_index() != 0:
        return
    if options.out is None:
        print(made.to_json())
    else:
        made.save(options.out, overwrite=options.overwrite)
        print(f"{made.describe()}\n\n{options.out}: {len(made.audio_codes)} audio codes, seed {made.lm_seed}")


def describe(options: Any) -> int:
    """Print the description of each song, or write it next to the song; return 1 if one could not be described."""
    given = read_fields(options, Planning)
    try:
        Planning(**given)
    except InputError as error:
        raise name_flags(error, (Planning,)) from None
    outputs = [as_path(song).with_suffix(".json") for song in options.songs]
    if options.captions:
        for output in outputs:
            check_output(output, overwrite=options.overwrite)
            if outputs.count(output) > 1:
                raise InputError(f"{output}: would describe several of the songs; rename all but one")
    start()
    path = model_folder(options)
    names = [name for name in NETWORKS if name in checkpoint.read_manifest(path).configs]
    pipe = AceStepPipeline.from_pretrained(path, dtype=options.dtype, networks=names, planner=options.planner)
    failed = False
    for song, output in zip(options.songs, outputs, strict=True):
        try:
            made = pipe.describe(song, **given)
        except (InputError, OSError) as error:
            failed = True
            print(f"acestep-jax: {error}", file=sys.stderr)
            continue
        if options.captions:
            _write_caption(output, made)
            print(output, flush=True)
        else:
            print(f"{song}\n{made.describe()}\n", flush=True)
    return int(failed)


def _write_caption(path: Path, made: Plan) -> None:
    values = {name: getattr(made, name) for name in ("caption", "lyrics", "bpm", "keyscale", "timesignature")}
    values = {name: value for name, value in values.items() if value is not None}
    if made.vocal_language is not None:
        values["language"] = made.vocal_language
    with publish_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
