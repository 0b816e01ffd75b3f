"""Several processes: two of four CPU devices each, on loopback, against one process."""

import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from acestep_jax import InputError
from acestep_jax.distributed import join_processes
from tests.processes import free_port


def command(tiny, out, *options):
    run = [sys.executable, "-m", "acestep_jax.cli", "generate", "piano", "--checkpoint", str(tiny[1])]
    return [*run, "--duration", "10", "--steps", "2", "--out", str(out), *options]


@pytest.mark.parametrize(
    "mesh", ["data=2,tensor=4", pytest.param("fsdp=2,tensor=2,sequence=2", marks=pytest.mark.slow)]
)
def test_two_processes_make_the_song_of_one(tiny, tmp_path, mesh):
    """Each holds a part of the weights, and process 0 alone writes."""
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
    subprocess.run(command(tiny, tmp_path / "one.wav", "--seed", "5"), env=environment, check=True)
    together, rate = soundfile.read(tmp_path / "0.wav")
    alone, _ = soundfile.read(tmp_path / "one.wav")
    assert together.shape == (10 * rate, 2) and not (tmp_path / "1.wav").exists()
    assert np.abs(together - alone).max() <= 1e-4  # 16 bits in the file: 3e-5


@pytest.mark.unit
@pytest.mark.parametrize("text", ["localhost", "localhost:1,2", "localhost:1,2,x", "localhost:1,2,2"])
def test_bad_addresses(text):
    with pytest.raises(InputError, match="distributed: .* found '"):
        join_processes(text)
