"""What the package promises before any network runs."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.heavy
def test_import_needs_no_torch():
    foreign = run_python(
        "import sys, acestep_jax, acestep_jax.cli; loaded = {name.split('.')[0] for name in sys.modules};"
        "print(*loaded & {'torch', 'diffusers', 'transformers', 'peft', 'huggingface_hub', 'convert', 'train'})"
    )
    assert foreign == ""


@pytest.mark.heavy
def test_public_names():
    names = run_python("import acestep_jax; print(*(n for n in acestep_jax.__all__ if hasattr(acestep_jax, n)))")
    assert {"AceStepPipeline", "AceStepTransformer1DModel", "TransformerConfig"} <= set(names.split())
