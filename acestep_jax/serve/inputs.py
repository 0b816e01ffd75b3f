"""The folder whose files clients may use, if the server was started with `--inputs`."""

import os
import shutil
import stat
from pathlib import Path

from acestep_jax.errors import InputError


class InputFolder:
    """A folder whose sound files clients may use by their paths.

    Raises:
        InputError: if it is not a folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser().resolve()
        if not self.folder.is_dir():
            raise InputError(f"--inputs: {folder} is not a folder")

    def take(self, field: str, text: str, target: Path, most_bytes: int) -> None:
        """Copy a file of the folder, given by its relative or absolute path, to a path of the server.

        Links are resolved before checking that the file is in the folder. A missing file and a file outside of the
        folder give the same error, so that clients learn nothing about other folders.

        Raises:
            InputError: if there is no such file, it is not a regular file, or it is too large.
        """
        refused = InputError(f"{field}: no such file in the folder of inputs, found {text!r:.80}")
        try:
            path = (self.folder / text).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            raise refused from None
        if not path.is_relative_to(self.folder):
            raise refused
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            raise refused from None
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode) or about.st_size > most_bytes:
            os.close(handle)
            raise (
                InputError(f"{field}: larger than {most_bytes // 2**20} MB") if stat.S_ISREG(about.st_mode) else refused
            )
        with os.fdopen(handle, "rb") as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 2**20)
