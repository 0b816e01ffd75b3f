"""`acestep-jax serve`: songs over HTTP."""

import importlib.metadata
import importlib.util
import ipaddress
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import jax

from acestep_jax.cli.engines import add_engine, check_engine, ended, follow, open_engine, open_models, start_devices
from acestep_jax.cli.parser import Parser
from acestep_jax.cli.runtime import add_dtype
from acestep_jax.distributed import MESH_AXES, all_succeed
from acestep_jax.errors import InputError
from acestep_jax.io import cache
from acestep_jax.io.adapter import resolve_adapters
from acestep_jax.io.checkpoint import SMALL_MODEL, quantization_of
from acestep_jax.io.manifest import read_manifest
from acestep_jax.io.native import native_folder
from acestep_jax.io.planner import planner_folder
from acestep_jax.io.planner_files import DEFAULT_SIZE, PREFIX
from acestep_jax.io.planner_source import PlannerSource
from acestep_jax.loaded import converted_dtype
from acestep_jax.models.runtime import split_dtype

PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
KEY = "ACESTEP_API_KEY"


def add(commands: Any) -> None:
    """Add the command."""
    parser = Parser(
        description="Generate songs over HTTP, with the library's own API, the APIs of ACE-Step's application (REST "
        "and chat) and of acestep.cpp, and an OpenAI-style music endpoint. Needs pip install 'acestep-jax[serve]'."
    )
    # jsonargparse takes no type for an option that appends.
    parser.add_argument(
        "--model",
        "--checkpoint",
        dest="checkpoint",
        metavar="[NAME=]MODEL",
        action="append",
        help="Model to offer, as in `acestep-jax generate`, and the name that clients use (repeatable; the first is "
        "the default; one model at a time is in memory). Default: the small model of this package.",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        action="append",
        help="Variant of the models, if there are several (once for all of them, or once for each --model).",
    )
    parser.add_argument(
        "--planner",
        metavar="MODEL",
        help="Planner of all models: a folder, or the id of a repository such as ACE-Step/acestep-5Hz-lm-0.6B; none: "
        "no planner. Default: each model's own.",
    )
    parser.add_argument(
        "--lora", metavar="NAME=DIR", action="append", help="Adapter that clients may use by its name (repeatable)."
    )
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on. Default: this machine only.")
    parser.add_argument("--port", type=int, default=8001, metavar="N", help="Port. Default: 8001.")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"Key that clients must send; @FILE reads it from a file. Default: the variable {KEY}, or none.",
    )
    parser.add_argument("--insecure", action="store_true", help="Listen on a network address without a key.")
    parser.add_argument(
        "--public-host",
        metavar="NAME",
        action="append",
        help="Host name at which clients reach the server, such as the name of a proxy (repeatable).",
    )
    parser.add_argument(
        "--cors",
        metavar="ORIGIN",
        action="append",
        help="Allowed origin of pages on other hosts, such as http://localhost:5173 (repeatable).",
    )
    parser.add_argument(
        "--data", metavar="DIR", default="acestep-songs", help="Folder for queue and songs. Default: acestep-songs."
    )
    parser.add_argument(
        "--inputs",
        metavar="DIR",
        help="Folder whose sound files clients may use as sources and references, by path. Default: none; clients "
        "upload files.",
    )
    parser.add_argument(
        "--keep-gb",
        type=float,
        default=20.0,
        metavar="GB",
        help="Maximum size of the stored songs, not counting favourites; beyond it, the oldest are deleted. "
        "Default: 20.",
    )
    parser.add_argument("--max-batch", type=int, default=4, metavar="N", help="Maximum batch size. Default: 4.")
    parser.add_argument(
        "--warm", metavar="S,...", help="Durations to compile before /ready, such as 30,60,120. Default: none."
    )
    parser.add_argument(
        "--queue", type=int, default=200, metavar="N", help="Maximum number of waiting songs. Default: 200."
    )
    parser.add_argument(
        "--queue-minutes", type=float, default=30.0, metavar="N", help="Maximum minutes of waiting work. Default: 30."
    )
    parser.add_argument(
        "--max-upload-mb", type=int, default=256, metavar="MB", help="Maximum size of a request. Default: 256."
    )
    parser.add_argument(
        "--max-duration", type=float, default=600.0, metavar="S", help="Longest song and source. Default: 600."
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="Reject fields that would be ignored. Replaced values, such as an unknown model in an API that allows "
        "any, are still only noted in the response.",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="S",
        help="Seconds that songs in progress have to finish after SIGTERM. Default: 30.",
    )
    add_dtype(parser)
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help=f"Number of devices along each of the axes {', '.join(MESH_AXES)}. Default: one device.",
    )
    add_engine(parser)
    commands.add_subcommand("serve", parser, help="Generate songs over HTTP.")


def run(options: Any) -> int:
    """Serve until a signal; return 1 if the engine has ended because of an error.

    Everything that can be checked is checked before anything is loaded.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"serve: {', '.join(missing)} not installed; run pip install 'acestep-jax[serve]'")
    key = _key(options.api_key)
    _check_address(options.host, key, options.insecure)
    warm = _durations(options.warm)
    for name in ("port", "max_batch", "queue", "max_upload_mb"):
        if options[name] < (0 if name == "port" else 1):
            raise InputError(f"--{name.replace('_', '-')}: expected at least 1, found {options[name]}")
    check_engine(options)
    start_devices(options)

    from acestep_jax.serve import app as http
    from acestep_jax.serve.inputs import InputFolder
    from acestep_jax.serve.security import Keys
    from acestep_jax.serve.service import Service
    from acestep_jax.serve.store import Store
    from acestep_jax.serve.submission import Limits

    models, adapters = open_models(options, _offer)
    if jax.process_index() > 0:
        return follow(options, models, adapters)
    with all_succeed():
        inputs = None if options.inputs is None else InputFolder(options.inputs)
        store = Store(options.data)
    tempfile.tempdir = str(store.incoming)  # uploads are spooled there
    limits = Limits(
        queue=options.queue,
        queue_minutes=options.queue_minutes,
        upload_bytes=options.max_upload_mb * 2**20,
        duration=options.max_duration,
        keep_bytes=int(options.keep_gb * 10**9),
    )
    engine = open_engine(options, models, adapters, _offer, max_batch=options.max_batch, warm=warm)
    service = Service(store, engine, limits, strict=options.strict, inputs=inputs)
    application = http.create(
        service,
        Keys(key, store.secret()),
        version=importlib.metadata.version("acestep-jax"),
        hosts=[options.host, *(options.public_host or ())],
        origins=options.cors or (),
    )
    logging.getLogger("acestep_jax.serve").setLevel(logging.INFO)
    address = f"[{options.host}]" if ":" in options.host else options.host
    print(f"acestep-jax: http://{address}:{options.port}, its API at /docs, songs in {store.folder}", flush=True)
    with ended(engine):
        return http.serve(application, service, options.host, options.port, grace=options.grace)


def _offer(options: Any, mesh: Any) -> tuple[list[Any], dict[str, str]]:
    """Return the models and the adapters that the options name."""
    models = _models(options, mesh)
    return models, _adapters(options.lora or (), models)


def _models(options: Any, mesh: Any) -> list[Any]:
    from acestep_jax.serve.models import Model

    given, variants = options.checkpoint or [str(SMALL_MODEL)], options.variant or [None]
    if len(variants) not in (1, len(given)):
        raise InputError(f"--variant: expected one or {len(given)}, one for each --model, found {len(variants)}")
    if len(variants) == 1:
        variants = variants * len(given)
    settings = dict(dtype=options.dtype, mesh=mesh)
    models: list[Any] = []
    for text, variant in zip(given, variants, strict=True):
        name, _, source = text.rpartition("=") if not Path(text).exists() else ("", "", text)
        folder = native_folder(source, variant, dtype=converted_dtype(options.dtype))
        manifest = read_manifest(folder)
        for network in manifest.configs:
            quantization_of(Path(folder), manifest, network, split_dtype(options.dtype)[1])
        planner = _planner(options.planner, source, Path(folder), options.dtype)
        model = Model(name or "model", folder, options=settings | dict(planner=planner), planner=_planner_name(planner))
        model.name = name or _name(source, model)
        if model.name in {other.name for other in models}:
            raise InputError(f"--model: two are called {model.name}; name them: --model NAME={source}")
        models.append(model)
    return models


def _planner(given: str | None, source: str, folder: Path, dtype: str | None) -> str | None:
    """Return the folder of a model's planner, after downloading and converting it if necessary; None: it has none.

    Raises:
        InputError: if the user named one, and it cannot be used.
    """
    if given == "none":
        return None
    found = PlannerSource.of(given, source, folder, dtype=dtype)
    if not found.is_possible:
        return None
    try:
        return str(planner_folder(found.source, dtype=converted_dtype(dtype)))
    except (InputError, OSError) as error:
        if found.named:
            raise
        print(f"acestep-jax: running without the planner ({error}); --planner none silences this", flush=True)
        return None


def _planner_name(folder: str | None) -> str | None:
    """Return the authors' name of a planner, or the name of its folder."""
    if folder is None:
        return None
    about = Path(folder) / cache.SOURCE
    if about.is_file():
        source = Path(str(json.loads(about.read_text(encoding="utf-8"))["source"])).name
        return source if source.startswith(PREFIX) else f"{PREFIX}{DEFAULT_SIZE}"
    return Path(folder).name


def _name(source: str, model: Any) -> str:
    """Return the authors' name of a published model, or the name of its folder."""
    if source == str(SMALL_MODEL):
        return "small"
    variant = model.configs["transformer"].variant
    known = ("turbo", "base", "sft", "xl-turbo", "xl-base", "xl-sft")
    return f"acestep-v15-{variant}" if variant in known else Path(source).stem


def _adapters(given: Any, models: list[Any]) -> dict[str, str]:
    """Return the adapters by name, after reading each for the first model."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not name:
            raise InputError(f"--lora: expected NAME=DIR, found {text!r}")
        if name in found:
            raise InputError(f"--lora: two adapters are called {name}")
        resolve_adapters(folder, 1.0, models[0].configs["transformer"])
        found[name] = folder
    return found


def _key(given: str | None) -> str | None:
    key = os.environ.get(KEY) if given is None else given
    if key and key.startswith("@"):
        key = Path(key[1:]).read_text(encoding="utf-8-sig").strip()
    if given is not None and not key:
        raise InputError("--api-key: is empty; leave it out to serve without a key")
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError("--api-key: expected ASCII without spaces, which every client can send in a header")
    return key or None


def _check_address(host: str, key: str | None, insecure: bool) -> None:
    """Raise InputError for an address that other machines can reach, without a key."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and key is None and not insecure:
        raise InputError(
            f"--host: everyone who can reach {host} could use this server; set a key with --api-key or {KEY}, or give "
            "--insecure"
        )


def _durations(text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise InputError(f"--warm: expected seconds such as 30,60, found {text!r}") from None
