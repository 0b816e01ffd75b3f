"""The audio files in a folder of songs, and the files next to them."""

from pathlib import Path, PurePosixPath

from acestep_jax.errors import InputError
from acestep_jax.io.files import files_below, is_remote

# Includes formats that libsndfile cannot read, so that such files are reported.
SUFFIXES = frozenset(".wav .flac .mp3 .ogg .opus .aif .aiff .m4a .aac .mp4 .wma".split())


def find_audio(audio_dir: Path) -> list[str]:
    """Return the audio files below a folder, see `find_files`."""
    return find_files(audio_dir)[0]


def find_files(audio_dir: Path) -> tuple[list[str], list[str]]:
    """Return the audio files below a folder and all other files, as sorted relative paths, without hidden files.

    Links to folders are followed. A folder that can be reached in several ways is searched once, so loops end.

    Raises:
        InputError: if there are no audio files.
    """
    if not audio_dir.is_dir():
        raise InputError(f"{audio_dir}: no such folder; expected one with songs")
    every = files_below(audio_dir) if is_remote(audio_dir) else _files_below(audio_dir)
    audio_files, others = [], []
    for name in every:
        file = PurePosixPath(name)
        if file.name[0] != ".":
            sound = file.suffix.lower() in SUFFIXES and (is_remote(audio_dir) or (audio_dir / name).is_file())
            (audio_files if sound else others).append(name)
    if not audio_files:
        raise InputError(f"{audio_dir}: no audio files here or below; expected {', '.join(sorted(SUFFIXES))}")
    return sorted(audio_files), sorted(others)


def _files_below(top: Path) -> list[str]:
    """Return all files in a local folder and its subfolders, see `find_files`."""
    found, seen, folders = [], set(), [top]
    links: list[Path] = []
    while folders or links:
        # Links come last, so that a folder inside `top` is found under its own name.
        folder = folders.pop() if folders else links.pop(0)
        if (real := folder.resolve()) in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(folder.iterdir())
        except OSError:
            if folder == top:
                raise
            found.append(f"{folder.relative_to(top).as_posix()}/")  # reported among the files that were not used
            continue
        for entry in entries:
            if not entry.is_dir():
                found.append(entry.relative_to(top).as_posix())
            elif not entry.name.startswith("."):
                (links if entry.is_symlink() else folders).append(entry)
    return found
