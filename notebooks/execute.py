"""`python notebooks/execute.py [NAME ...]`: execute the notebooks and store their outputs in them.

Each one runs in a fresh kernel in a temporary folder. Its standard error is dropped, because it holds progress bars and
warnings with local paths.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent
TIMEOUT = 3600  # seconds per cell


def names() -> list[str]:
    """Return the names of all notebooks, in order."""
    return sorted(file.stem for file in FOLDER.glob("*.ipynb"))


def read(name: str) -> nbformat.NotebookNode:
    """Read a notebook by name."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(notebook: nbformat.NotebookNode, folder: Path | None = None) -> None:
    """Execute the cells in a folder, None: a temporary one, with this repository on the path. Raises
    CellExecutionError."""
    paths = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory(prefix="acestep-jax-notebook-") as temporary:
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(folder or temporary)}},
        )
        client.execute(env=environment)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Remove standard error and metadata, which differ from run to run."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "metadata" in output:
                    output.metadata = {}


def write(name: str, notebook: nbformat.NotebookNode) -> None:
    """Write the notebook atomically."""
    temporary = FOLDER / f".{name}.ipynb.tmp"
    try:
        nbformat.validate(notebook)
        temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        temporary.replace(FOLDER / f"{name}.ipynb")
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0, or 1 if a notebook failed, which is then left unchanged."""
    parser = argparse.ArgumentParser(prog="python notebooks/execute.py", description=__doc__.split("\n")[0])
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"{', '.join(names())} [all]")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(names()):
        parser.error(f"unknown notebook {', '.join(sorted(unknown))}; expected any of {', '.join(names())}")
    status = 0
    for name in options.names or names():
        notebook, start = read(name), time.monotonic()
        try:
            execute(notebook)
        except CellExecutionError as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
            continue
        clean(notebook)
        write(name, notebook)
        size = (FOLDER / f"{name}.ipynb").stat().st_size
        print(f"{name}: {time.monotonic() - start:.0f} s, {size / 1e6:.1f} MB", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
