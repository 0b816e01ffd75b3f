"""Several processes: two of four CPU devices each, on loopback, against one process."""

import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file, save_file

from acestep_jax import InputError, cli
from acestep_jax.cli import runtime
from acestep_jax.distributed import join_processes, run_in_subprocess
from acestep_jax.errors import check_text
from tests.processes import free_port, together


def command(tiny, out, *options):
    run = [sys.executable, "-m", "acestep_jax.cli", "generate", "piano", "--checkpoint", str(tiny[0])]
    return [*run, "--duration", "10", "--steps", "2", "--out", str(out), *options]


# Forty seconds of both cores; `.ci/run` runs the first. By default two processes preprocess and train.
@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,tensor=4", "fsdp=2,tensor=2,sequence=2"])
def test_two_processes_make_the_song_of_one(tiny, tmp_path, mesh, monkeypatch):
    """Each holds a part of the weights, and process 0 alone writes. One converts the weights, for all."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    four = environment | {"JAX_NUM_CPU_DEVICES": "4"}
    address = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            command(tiny, tmp_path / f"{i}.wav", "--seed", "5", "--mesh", mesh, "--distributed", f"{address},2,{i}"),
            env=four,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    ends = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert len(list(tmp_path.glob("cache/acestep-jax/models/*/source.json"))) == 1
    monkeypatch.setattr(runtime, "use_compilation_cache", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cli.main(command(tiny, tmp_path / "one.wav", "--seed", "5")[3:]) == 0
    together, rate = soundfile.read(tmp_path / "0.wav")
    alone, _ = soundfile.read(tmp_path / "one.wav")
    assert together.shape == (10 * rate, 2) and not (tmp_path / "1.wav").exists()
    assert np.abs(together - alone).max() <= 1e-4  # 16 bits in the file: 3e-5


@pytest.mark.slow  # by default `tests/io/test_native.py` shows two processes, of which one ends within a conversion
def test_a_conversion_that_fails_ends_all_processes(tiny, tmp_path):
    """With what is wrong, as in one process, and nothing is left of it."""
    shutil.copytree(tiny[0], tmp_path / "torch")
    weights = tmp_path / "torch/transformer/diffusion_pytorch_model.safetensors"
    arrays = load_file(weights)
    lost = min(arrays)
    del arrays[lost]
    save_file(arrays, weights)
    words = ["generate", "x", "--checkpoint", tmp_path / "torch", "--mesh", "data=2", "--out", tmp_path / "x.wav"]
    made = together(*words, devices=1, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert [status for status, *_ in made] == [2, 2], made
    for _, _, error in made:
        assert "transformer: the tensors do not match the config" in error and f"missing: {lost} " in error
        assert "Traceback" not in error
    assert not [path for path in tmp_path.glob("cache/acestep-jax/models/*") if path.is_dir()]


def test_a_function_in_a_process_of_its_own():
    assert run_in_subprocess(math.hypot, 3.0, 4.0) == 5.0
    with pytest.raises(InputError, match="name: expected text, found 5"):
        run_in_subprocess(check_text, "name", 5)


@pytest.mark.unit
@pytest.mark.parametrize("text", ["localhost", "localhost:1,2", "localhost:1,2,x", "localhost:1,2,2"])
def test_bad_addresses(text):
    with pytest.raises(InputError, match="distributed: .* found '"):
        join_processes(text)
