"""The notebooks run, in a reduced form and with what they assert, and what is saved of them is fit to be published."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib

import nbformat
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from acestep_jax.io.checkpoint import SMALL_MODEL
from notebooks import execute
from tests.qwen import real_vocabulary

# The numbers of the cell tagged "parameters" that cost time.
REDUCED = {
    "01_generate": dict(STEPS=2, COMPARED_STEPS=[2]),
    "02_convert_and_verify": dict(STEPS=2),
    "03_lora_finetune": dict(
        CLIPS=2, CLIP_SECONDS=10.0, HELD_OUT=2, GENERATED=2, TRAINING_STEPS=3, STEPS=2, BATCH_SIZE=2, RANK=2
    ),
    "04_edit": dict(STEPS=2, STRENGTHS=[1.0, 0.5]),
    "05_tpu_and_sharding": dict(SECONDS=10.0, STEPS=2, REPEATS=1, TPU_SECONDS=30, TPU_LAYERS=2),
    "06_plan": dict(STEPS=2),
}
# Players and pictures that each has.
SHOWN = {
    "01_generate": (7, 9),
    "02_convert_and_verify": (1, 1),
    "03_lora_finetune": (7, 5),
    "04_edit": (6, 6),
    "05_tpu_and_sharding": (0, 0),
    "06_plan": (3, 3),
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


@pytest.mark.slow  # one to two minutes each; `.ci/run` runs the first
@pytest.mark.parametrize("name", REDUCED)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", REDUCED)
def test_runs_again(name, monkeypatch, tmp_path):
    """In the folder where it ran before, in a new kernel: with files of its own."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ["ACESTEP_TEST_CACHE"])
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    for _ in range(2):
        notebook = execute.read(name)
        reduce(notebook, REDUCED[name])
        execute.execute(notebook, tmp_path)
        assert not any(output.output_type == "error" for cell in code_cells(notebook) for output in cell.outputs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files-1", "files-2"]


@pytest.mark.slow
def test_planner(monkeypatch, tmp_path):
    """What runs with the official planner, with a random one of its vocabulary."""
    pytest.importorskip("dashscope")
    config = dict(vocab_size=217204, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8)
    config |= dict(num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    folder = tmp_path / "acestep-5Hz-lm-0.6B"
    Qwen3ForCausalLM(Qwen3Config(**config)).to(torch.bfloat16).save_pretrained(folder)
    vocabulary, merges = real_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ["ACESTEP_TEST_CACHE"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = execute.read("06_plan")
    reduce(notebook, dict(STEPS=2, OFFICIAL=True, SOURCE=repr(str(SMALL_MODEL)), PLANNER=repr(str(folder))))
    execute.execute(notebook, tmp_path)
    assert (tmp_path / "files-1" / "official.wav").exists()


def first_cell(name):
    """The first cell, and what this notebook needs, which is all that it does not have in common with the others."""
    found = re.fullmatch(r"(.*)^EXTRAS, OTHERS = ([^#]*)(  #.*)", code_cells(execute.read(name))[0].source, re.M | re.S)
    return found[1] + found[3], ast.literal_eval(found[2])


@pytest.mark.parametrize("name", REDUCED)
def test_opens_on_colab_and_kaggle(name):
    notebook = execute.read(name)
    address = f"github.com/acestep-jax/acestep-jax/blob/main/notebooks/{name}.ipynb"
    assert notebook.cells[0].cell_type == "markdown"
    for badge, link in (
        ("colab.research.google.com/assets/colab-badge.svg", address.replace("github", "colab.research.google", 1)),
        ("kaggle.com/static/images/open-in-kaggle.svg", f"kaggle.com/kernels/welcome?src=https://{address}"),
    ):
        link = link.replace("colab.research.google.com/", "colab.research.google.com/github/")
        assert f"(https://{badge})](https://{link})" in notebook.cells[0].source
    assert first_cell(name)[0] == first_cell("01_generate")[0]


def test_extras_are_those_of_the_package():
    known = tomllib.loads((execute.FOLDER.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"cuda12", "tpu", *(extra for name in REDUCED for extra in first_cell(name)[1][0])} <= known.keys()


# The device's file, what JAX finds before and after, whether pip accepts the JAX that is there; what is installed.
RUNTIMES = {
    "T4 with a JAX that works": ("/dev/nvidia0", ["gpu", "gpu"], True, [("[train]", True)]),
    "T4 with a JAX that is too old": (
        "/dev/nvidia0",
        ["gpu", "gpu"],
        False,
        [("[train]", True), ("[train,cuda12]", False)],
    ),
    "T4 with the JAX of a CPU": ("/dev/nvidia0", ["cpu", "gpu"], True, [("[train,cuda12]", False)]),
    "T4 without JAX": ("/dev/nvidia0", [None, "gpu"], True, [("[train,cuda12]", False)]),
    "TPU v5e-1": ("/dev/vfio/0", ["tpu", "tpu"], True, [("[train]", True)]),
    "TPU without JAX": ("/dev/accel0", [None, "tpu"], True, [("[train,tpu]", False)]),
    "CPU": (None, ["cpu", "cpu"], True, [("[train]", True)]),
    "T4 that JAX does not find": ("/dev/nvidia0", ["cpu", "cpu"], True, "gpu"),
}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_first_cell(runtime, monkeypatch, tmp_path):
    """It leaves a JAX that works as it is, and a plugin of the device's own is only installed where there is none."""
    file, platforms, accepts, expected = RUNTIMES[runtime]
    platforms, installed = iter(platforms), []
    exists, find_spec = os.path.exists, importlib.util.find_spec

    def run(command, **options):
        done = subprocess.CompletedProcess(command, 0, stdout="")
        if command[1:2] == ["-c"]:
            found = next(platforms)
            done.returncode, done.stdout = int(found is None), f"{found}\n"
        elif "pip" in command:
            kept = "--constraint" in command
            (package,) = (word for word in command if word.startswith("./acestep-jax"))
            installed.append((package.removeprefix("./acestep-jax"), kept))
            assert not kept or "jax==" in (tmp_path / "constraints.txt").read_text()
            done.returncode = int(kept and not accepts)
        else:
            assert command[:2] == ["git", "clone"]
        return done

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(os.path, "exists", lambda path: path == file if "/dev/" in str(path) else exists(path))
    absent = iter([True])
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "acestep_jax" and next(absent, False) else find_spec(name),
    )
    source = code_cells(execute.read("03_lora_finetune"))[0].source
    if isinstance(expected, str):
        with pytest.raises(RuntimeError, match="has a GPU, JAX finds cpu; restart the session"):
            exec(source, {})
        return
    exec(source, found := {})
    assert installed == expected and os.getcwd() == str(tmp_path / "files-1") and found["FOLDER"].name == "files-1"


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
