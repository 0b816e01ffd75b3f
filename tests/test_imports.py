"""Which part of the library may import which, read from the import statements: no part imports one further down."""

import ast
import functools
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]
FOLDERS = {"acestep_jax": "acestep_jax", "convert": "acestep_jax.convert", "train": "acestep_jax.train"}
# A part imports itself and the lines above its own. A module belongs to the longest of these names that it begins with.
ORDER = """errors settings
io.files
distributed
preemption
models
io
memory placement
diffusion
arguments inputs.fields
request
inputs
planner
song
loaded
converting
planning
pipeline
convert train serve
cli
__main__ convert.__main__ train.__main__""".split("\n")
LEVEL = {part: level for level, line in enumerate(ORDER) for part in line.split()}
# What a request may contain is known without reading a file.
ONLY = {"request": {"errors", "settings", "arguments", "inputs.fields", "models", "diffusion"}}
TORCH = {"torch", "diffusers", "transformers", "peft", "accelerate"}


def modules() -> dict[str, Path]:
    """Return the file of each module of the package."""
    found = {}
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            names = [package, *file.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(names).removesuffix(".__init__")] = file
    return found


@functools.cache
def imported(file: Path) -> frozenset[str]:
    """Return what a file imports anywhere in it, `from a import b` as "a.b"."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: import by the full name, not relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return frozenset(names)


MODULES = modules()


def part_of(module: str) -> str | None:
    """Return the part of `ORDER` that a module, or a name in it, belongs to; public names are of the pipeline."""
    if module.startswith("acestep_jax.") and module.count(".") == 1 and module not in MODULES:
        return "pipeline"
    name = module.removeprefix("acestep_jax.")
    return max((part for part in LEVEL if f"{name}.".startswith(f"{part}.")), key=len, default=None)


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_order(module):
    part = "pipeline" if module == "acestep_jax" else part_of(module)
    assert part is not None, f"{module} has no place in ORDER"
    names = imported(MODULES[module])
    parts = {name: part_of(name) for name in names if name.split(".")[0] in ("acestep_jax", "convert", "train")}
    wrong = {name for name, other in parts.items() if other is None}
    wrong |= {name for name, other in parts.items() if other and other != part and LEVEL[other] >= LEVEL[part]}
    if part in ONLY:
        wrong |= {name for name, other in parts.items() if other not in ONLY[part] | {part}}
    assert not wrong, f"{module} is of {part} and must not import {sorted(wrong)}"


@pytest.mark.parametrize("module", [name for name in MODULES if part_of(name) not in ("convert", "convert.__main__")])
def test_only_conversion_needs_torch(module):
    assert not {name.split(".")[0] for name in imported(MODULES[module])} & TORCH


# What the extra `serve` brings, and the modules that speak HTTP.
WEB = {"fastapi", "starlette", "uvicorn", "multipart", "python_multipart", "prometheus_client"}
HTTP = {
    f"acestep_jax.serve.{name}"
    for name in (
        "app native page plans polls http security uploads files waiting metrics "
        "authors authors_lora chat cpp cpp_latents cpp_planner"
    ).split()
}


@pytest.mark.parametrize("module", [name for name in MODULES if name not in HTTP])
def test_only_http_needs_the_web(module):
    assert not {name.split(".")[0] for name in imported(MODULES[module])} & WEB


def test_only_its_engine_needs_ray():
    users = [name for name, file in MODULES.items() if "ray" in {name.split(".")[0] for name in imported(file)}]
    assert users == ["acestep_jax.serve.ray_engine"]
