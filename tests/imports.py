"""What test files import, read from their text, so that files can be told apart before they are imported."""

import ast
import functools
import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = ("tests", "acestep_jax", "convert", "train", "benchmarks", "examples", "notebooks")


@functools.cache
def packages(path: Path) -> frozenset[str]:
    """Return the foreign packages that importing a file of ours imports, directly or through other files of ours.

    Only what is imported at the top of a module counts: an import within a function needs no package before it runs.
    """
    found, seen, waiting = set(), {path}, [path]
    while waiting:
        for name in _imported_modules(waiting.pop()):
            if (package := name.split(".")[0]) not in OURS:
                found.add("torch" if name.startswith("safetensors.torch") else package)
            elif (file := _file(name)) is not None and file not in seen:
                seen.add(file)
                waiting.append(file)
    return frozenset(found)


def missing_packages(path: Path) -> list[str]:
    """Return the packages that importing a file of ours needs and that are not installed."""
    return sorted(name for name in packages(path) if importlib.util.find_spec(name) is None)


@functools.cache
def _imported_modules(path):
    """Return the names of all modules that a file imports at its top; `from a import b` may name the module a.b."""
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@functools.cache
def _file(module):
    """Return the file of a module of ours, or None where the name is that of something in a module."""
    parts = module.split(".")
    if parts[:2] in (["acestep_jax", "convert"], ["acestep_jax", "train"]):
        parts = parts[1:]
    base = ROOT.joinpath(*parts)
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)
