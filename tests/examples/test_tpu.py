"""The scripts for a TPU slice, with a stand-in for `gcloud` that notes what it is asked to do."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from acestep_jax import cli

pytestmark = pytest.mark.unit
FOLDER = Path(__file__).parents[2] / "examples" / "tpu"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.sh"))
GCLOUD = """#!/usr/bin/env bash
printf '%s\\0' "$@" "" >> "$NOTES"
case "$*" in *describe*) echo ACTIVE ;; esac
"""
SETTINGS = dict(PROJECT="my-project", BUCKET="gs://my-music", ZONE="us-west4-a")


@pytest.fixture
def run(tmp_path):
    """Run a script; return the arguments of each call of `gcloud`."""
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)

    def run(script, **environment):
        notes = tmp_path / "notes"
        notes.write_text("")
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment = {"PATH": path, "NOTES": str(notes), "HOME": str(tmp_path)} | environment
        subprocess.run([FOLDER / script], env=environment, check=True, capture_output=True)
        return [call.split("\0") for call in notes.read_text().removesuffix("\0\0").split("\0\0")]

    return run


def check(text):
    """Parse every acestep-jax command of a shell script as the program does; return how many there are."""
    found = re.findall(r"\bacestep-jax [a-z](?:\\\n|[^;\n])*", os.path.expandvars(text))
    for command in found:
        cli.parser().parse_args(shlex.split(command, comments=True)[1:])
    return len(found)


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_reads_them(script):
    subprocess.run(["bash", "-n", FOLDER / script], check=True)


@pytest.mark.parametrize(
    ("script", "options"), [("preprocess", {}), ("train", {}), ("train", dict(METHOD="lora")), ("generate", {})]
)
def test_commands_run_on_all_hosts_and_are_understood(run, script, options):
    ((*words, command),) = run(f"{script}.sh", **SETTINGS, **options)
    assert words[:5] == ["compute", "tpus", "tpu-vm", "ssh", "acestep"] and "--worker=all" in words
    assert check(command) == 1 and "--distributed" in command and "gs://my-music/turbo" in command


def test_a_slice_is_requested_and_deleted(run):
    create, describe = run("create.sh", **SETTINGS, SPOT="1", ACCELERATOR="v6e-16")
    assert {"--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--spot"} < set(create)
    assert describe[3] == "describe"
    (install,) = run("install.sh", **SETTINGS)
    assert "acestep-jax[tpu,train,gcs] @ git+https://" in install[-1]
    (delete,) = run("delete.sh", **SETTINGS)
    assert delete[3:5] == ["delete", "acestep"]


def test_settings_that_are_missing_are_named(run):
    with pytest.raises(subprocess.CalledProcessError) as found:
        run("create.sh", PROJECT="my-project")
    assert b"set BUCKET to a bucket" in found.value.stderr


def test_commands_of_the_page_are_understood(monkeypatch):
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert sum(map(check, blocks)) == 3
