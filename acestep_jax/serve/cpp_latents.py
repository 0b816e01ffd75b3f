"""Latents in acestep.cpp's protocol: as sources and references of songs, and `/vae`, which makes them of sound and
back. They are float32 [frames, channels], little-endian, without a header.
"""

from pathlib import Path
from typing import Any

from fastapi import HTTPException, Response

from acestep_jax.errors import InputError
from acestep_jax.request import Request, Sampling
from acestep_jax.serve import sounds, uploads
from acestep_jax.serve.engine import Work
from acestep_jax.serve.files import StoredFile, found_or_404
from acestep_jax.serve.lenient import Fields
from acestep_jax.serve.operations import LATENTS_FILE, Operation, Operations
from acestep_jax.serve.planner_task import PlannerTask
from acestep_jax.serve.service import Service

UPLOADS = {
    "audio": "src_audio",
    "ref_audio": "reference_audio",
    "src_latents": "src_latents",
    "ref_latents": "reference_latents",
}
NAMES = {ours: name for name, ours in UPLOADS.items()}
FORMATS = {"mp3": "mp3", "wav16": "wav", "wav24": "wav24", "wav32": "wav32", "wav": "wav", "flac": "flac"}
WINS = {"src_latents": "src_audio", "reference_latents": "reference_audio"}  # over what, where both are sent
SOURCES = ("src_latents", "src_audio")
MAX_FRAMES = 15_000
MISSING = "Job not found"


def prefer_latents(service: Service, body: uploads.Body) -> None:
    """Leave sound out where its latents were sent as well.

    Raises:
        HTTPException: 413 for latents of more than ten minutes.
    """
    channels = next(iter(service.engine.models.values())).configs["vae"].decoder_input_channels
    for latents, sound in WINS.items():
        if latents not in body.files:
            continue
        assert body.uploads is not None
        if (body.uploads / latents).stat().st_size > MAX_FRAMES * channels * 4:
            raise HTTPException(413, f"{NAMES[latents]}: exceeds max frames, {MAX_FRAMES}")
        if sound in body.files:
            body.files.remove(sound)
            (body.uploads / sound).unlink()


def check_unused(service: Service, body: uploads.Body) -> None:
    """Raise InputError, with --strict, for a file that is no source, where there is no song to make."""
    body.ignored(strict=service.strict)
    unused = [name for name in body.files if name not in SOURCES]
    if service.strict and unused:
        raise InputError(
            f"{NAMES[unused[0]]}: expected audio or src_latents alone; references are of /synth, and the server was "
            "started with --strict"
        )


def source_of(body: uploads.Body) -> dict[str, Any]:
    """Return the source of a body as a field of `Request`; empty if there is none."""
    found = [name for name in SOURCES if name in body.files]
    return {found[0]: str((body.uploads or Path()) / found[0])} if found else {}


def check_format(fields: Fields) -> str:
    """Return the format of the requested sound file, a name of `sounds.FORMATS`.

    Raises:
        InputError: if there is none of that name.
    """
    form = fields.text("output_format", default="mp3")
    if form not in FORMATS:
        raise InputError(f"output_format: expected one of {', '.join(FORMATS)}, found {form!r:.80}")
    return FORMATS[form]


def conversion(service: Service, fields: Fields, body: uploads.Body) -> tuple[Work, dict[str, Any]]:
    """Return the work and the response format for /vae.

    Raises:
        InputError: unless there is either sound or latents.
    """
    found = [name for name in ("src_audio", "src_latents") if name in body.files]
    if len(found) != 1:
        raise InputError(
            "audio, src_latents: expected exactly one of them as a file of multipart/form-data, found "
            f"{'both' if found else 'neither'}"
        )
    form = check_format(fields)
    prefer_latents(service, body)
    request = Request("", seed=0, **source_of(body))
    planner_task = PlannerTask("encode" if found == ["src_audio"] else "decode", required=True)
    model = next(iter(service.engine.models))
    return Work(request, Sampling(), model, planner_task=planner_task, is_song=False), dict(form=form)


def converted(operations: Operations, operation: Operation) -> Response:
    """Return the latents or the sound that /vae gave; in another format than FLAC it is made now, and
    cached next to it.

    Raises:
        HTTPException: 404 if newer results have taken its place meanwhile.
    """
    assert operation.files is not None
    latents = operation.files / LATENTS_FILE
    if latents.exists():
        return StoredFile(latents, missing=MISSING, media_type="application/octet-stream")
    form = sounds.FORMATS[operation.extra["form"]]
    with found_or_404(MISSING):
        return StoredFile(operations.sound(operation, form), missing=MISSING, media_type=form.media_type)


def part(operation: Operation, boundary: str) -> bytes:
    """Return the part of a body of several that holds the latents of a song that was described; empty if there are
    none.

    Raises:
        HTTPException: 404 if newer results have taken its place meanwhile.
    """
    if operation.files is None:
        return b""
    head = 'Content-Type: application/octet-stream\r\nContent-Disposition: form-data; name="latent"'
    with found_or_404(MISSING):
        data = (operation.files / LATENTS_FILE).read_bytes()
    return f"--{boundary}\r\n{head}\r\n\r\n".encode() + data + b"\r\n"
