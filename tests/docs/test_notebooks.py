"""The notebooks run, in a reduced form and with what they assert, and what is saved of them is fit to be published."""

import os
import re

import nbformat
import pytest
from packaging.requirements import Requirement

from notebooks import execute

# The numbers of the cell tagged "parameters" that cost time.
REDUCED = {
    "01_generate": dict(STEPS=2, COMPARED_STEPS=[2]),
    "02_convert_and_verify": dict(STEPS=2),
    "03_lora_finetune": dict(
        CLIPS=2, CLIP_SECONDS=10.0, HELD_OUT=2, GENERATED=2, TRAINING_STEPS=3, STEPS=2, BATCH_SIZE=2, RANK=2
    ),
    "04_edit": dict(STEPS=2, STRENGTHS=[1.0, 0.5]),
    "05_tpu_and_sharding": dict(SECONDS=10.0, STEPS=2, REPEATS=1, TPU_SECONDS=30, TPU_LAYERS=2),
}
# Players and pictures that each has.
SHOWN = {
    "01_generate": (7, 9),
    "02_convert_and_verify": (1, 1),
    "03_lora_finetune": (7, 5),
    "04_edit": (6, 6),
    "05_tpu_and_sharding": (0, 0),
}
LOCAL = re.compile(r"(?<![\w.:/])(/(home|root|work|tmp|Users|usr|opt|var|content|mnt|private)/|[A-Za-z]:\\)")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(output):
    """What a reader would see of an output in words; sound and images are left out."""
    texts = [output.get("text", ""), *output.get("traceback", [])]
    texts += [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return re.sub(r"base64,[\w+/=\s]+", "", "\n".join(texts))


def reduce(notebook, values):
    """Puts small numbers in place of those of the parameters."""
    (cell,) = (cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", ()))
    for name, value in values.items():
        cell.source, found = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value}  ", cell.source, flags=re.MULTILINE)
        assert found == 1, name


def test_all_are_here():
    assert execute.names() == sorted(REDUCED)


# Two take nearly two minutes each.
LONG = ("03_lora_finetune", "05_tpu_and_sharding")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in REDUCED])
def test_runs(name, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ["ACESTEP_TEST_CACHE"])
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    notebook = execute.read(name)
    reduce(notebook, REDUCED[name])
    execute.execute(notebook)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    data = [output.get("data", {}) for output in outputs]
    players, pictures = (
        sum("<audio" in kinds.get("text/html", "") for kinds in data),
        sum("image/png" in k for k in data),
    )
    assert (players, pictures) == SHOWN[name]
    execute.clean(notebook)
    shown = "\n".join(text_of(output) for cell in code_cells(notebook) for output in cell.outputs)
    assert shown and not LOCAL.search(shown)


@pytest.mark.parametrize("name", REDUCED)
def test_opens_and_installs_on_colab(name):
    notebook = execute.read(name)
    link = f"https://colab.research.google.com/github/acestep-jax/acestep-jax/blob/main/notebooks/{name}.ipynb"
    assert notebook.cells[0].cell_type == "markdown"
    assert f"(https://colab.research.google.com/assets/colab-badge.svg)]({link})" in notebook.cells[0].source
    install = code_cells(notebook)[0].source
    assert 'find_spec("acestep_jax") is None' in install
    assert "https://github.com/acestep-jax/acestep-jax" in install and '"--editable", package' in install
    assert '"cuda"' in install and '"tpu"' in install
    (line,) = (line.strip() for line in install.splitlines() if line.strip().startswith("package = "))
    for extras in ([], ["train"], ["train", "cuda"]):
        found = {"extras": extras}
        exec(line, found)
        requirement = Requirement(found["package"].replace("./acestep-jax", "acestep-jax"))
        assert "[]" not in found["package"] and requirement.extras == set(extras)


@pytest.mark.parametrize("name", REDUCED)
def test_what_is_saved(name):
    notebook, file = execute.read(name), execute.FOLDER / f"{name}.ipynb"
    nbformat.validate(notebook)
    assert file.stat().st_size < 3e6
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        assert not LOCAL.search(cell.source)
        for output in cell.get("outputs", ()):
            assert output.output_type != "error" and output.get("name") != "stderr"
            assert not LOCAL.search(text_of(output))


@pytest.mark.parametrize("name", REDUCED)
def test_is_executed(name):
    """By `python notebooks/execute.py`, from the first cell to the last."""
    cells = code_cells(execute.read(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) > len(cells) / 2


def test_execute_keeps_what_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(execute, "FOLDER", tmp_path)
    sources = {
        "good": ["import os, sys", "open('made.txt', 'w')\nprint('hello')\nprint(os.getcwd(), file=sys.stderr)"],
        "bad": ["raise ValueError('no')"],
    }
    for name, cells in sources.items():
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
        (tmp_path / f"{name}.ipynb").write_text(nbformat.writes(notebook))
    before = (tmp_path / "bad.ipynb").read_bytes()
    assert execute.main([]) == 1
    assert "ValueError" in capsys.readouterr().err
    assert (tmp_path / "bad.ipynb").read_bytes() == before
    outputs = [cell.outputs for cell in execute.read("good").cells]
    assert [[output.text for output in found] for found in outputs] == [[], ["hello\n"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.ipynb", "good.ipynb"]
    first = (tmp_path / "good.ipynb").read_bytes()
    assert execute.main(["good"]) == 0
    assert (tmp_path / "good.ipynb").read_bytes() == first
