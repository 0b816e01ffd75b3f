"""The two small files that ComfyUI's weights lack: the tokenizer, and the latents of silence.

ComfyUI has both in its code. They are the same for all published models: the tokenizer is Qwen3's, and the latents are
silence encoded by the common autoencoder.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from acestep_jax.errors import InputError
from acestep_jax.io.original import MODEL_PREFIX, REPOSITORY, TEXT_ENCODER

TOKENIZER, SILENCE = "tokenizer.json", "silence_latent.pt"
# Where they are in that repository, and in a copy of it.
PLACES = {TOKENIZER: f"{TEXT_ENCODER}/{TOKENIZER}", SILENCE: f"{MODEL_PREFIX}turbo/{SILENCE}"}

Fetch = Callable[[str], Path]


def find_companion(name: str, places: Sequence[Path], fetch: Fetch | None = None) -> Path:
    """Return the path of a file of `PLACES`: in one of some folders, or fetched.

    Args:
        fetch: see `fetch_companion`.

    Raises:
        InputError: if it cannot be found, with advice.
    """
    for place in places:
        for file in (place / name, place / PLACES[name]):
            if file.is_file():
                return file
    try:
        return (fetch or fetch_companion)(PLACES[name])
    except InputError as error:
        raise InputError(
            f"{places[0]}: no {name} here, which weights of ComfyUI do not contain, and it could not be fetched "
            f"({error}); download {PLACES[name]} of https://huggingface.co/{REPOSITORY} and put {name} in this folder"
        ) from None


def fetch_companion(
    path: str, *, token: str | None = None, cache_dir: str | Path | None = None, local_files_only: bool = False
) -> Path:
    """Return the path of a file of `REPOSITORY` in the hub's cache, see `hub.locate_file`; raise InputError as that."""
    from acestep_jax.io import hub  # importing the client takes a fifth of a second

    return hub.locate_file(REPOSITORY, path, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
