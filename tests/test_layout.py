"""How the suite is laid out: folders like those of the package, and unit tests that need no PyTorch."""

import ast

import pytest

from tests.imports import ROOT, missing_packages, packages

pytestmark = pytest.mark.unit
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
# What `pip install -e . pytest` and the extra `train` do not bring.
FORBIDDEN = {"torch", "diffusers", "transformers", "peft", "accelerate", "dashscope", "librosa", "nbformat", "sphinx"}


def marked_unit(path):
    """Return whether the code of a test file names the marker."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return any(isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.unit" for node in nodes)


@pytest.mark.parametrize("path", filter(marked_unit, TESTS), ids=lambda path: path.name)
def test_files_with_unit_tests_are_collected_without_torch(path):
    """A file that cannot be imported without these packages is ignored under `-m unit`, and its unit tests with it."""
    assert not packages(path) & FORBIDDEN, "import it within the functions that need it"


def test_folders_mirror_the_package():
    for path in TESTS:
        folder = path.parent.relative_to(ROOT / "tests")
        assert (ROOT / "acestep_jax" / folder).is_dir() or (ROOT / folder).is_dir(), path


def test_imports_are_followed(tmp_path):
    """Through helpers, and not into functions; what is not installed is named."""
    assert "torch" in packages(ROOT / "tests/convert/test_convert.py")
    assert "diffusers" in packages(ROOT / "convert/random_checkpoint.py")
    assert "torch" not in packages(ROOT / "tests/parity.py")
    path = tmp_path / "test_it.py"
    path.write_text("import os, numpy as np\nfrom no_such_package.part import x\ndef f():\n    import not_this\n")
    assert packages(path) == {"os", "numpy", "no_such_package"}
    assert missing_packages(path) == ["no_such_package"]
