"""Several processes on loopback, each with some CPU devices, and processes that are sent a signal."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest


def free_port():
    """Return a port of this machine that nobody uses."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(*arguments, program="acestep_jax.cli", code=None, devices=1, **environment):
    """Start a module with these arguments, or Python code that finds them in `sys.argv[1:]`."""
    begin = ["-m", program] if code is None else ["-c", code]
    return subprocess.Popen(
        [sys.executable, *begin, *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)} | cache() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def printed_rows(module, *arguments):
    """Return the rows of the table that a module of the benchmarks prints with these arguments, by column."""
    run = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    head, _, *rows = ([cell.strip() for cell in line.split("|")] for line in run.stdout.splitlines() if line[:1] == "|")
    return [dict(zip(head, row, strict=True)) for row in rows]


def cache():
    """Return the environment with which programs are compiled once for all tests."""
    return {"JAX_COMPILATION_CACHE_DIR": os.environ["ACESTEP_TEST_CACHE"]}


def same_programs():
    """Return the environment of a process whose programs are those of this one, so that either finds the other's."""
    return cache() | {"JAX_NUM_CPU_DEVICES": "8", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}


def together(*arguments, count=2, devices=4, timeout=300, **options):
    """Run the same command in several processes that know of each other; return (status, stdout, stderr) of each."""
    address = f"localhost:{free_port()}"
    processes = [
        start(*arguments, "--distributed", f"{address},{count},{i}", devices=devices, **options) for i in range(count)
    ]
    return ends(processes, timeout)


def ends(processes, timeout=300):
    """Wait for processes; return (status, stdout, stderr) of each. None is left behind."""
    try:
        found = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *outputs) for process, outputs in zip(processes, found, strict=True)]


def terminate_when(happened, process, all=(), timeout=240):
    """Send SIGTERM to a process as soon as `happened()` is true; fail if it, or one of all, ends before."""
    end = time.monotonic() + timeout
    while not happened():
        if time.monotonic() > end or any(one.poll() is not None for one in (process, *all)):
            pytest.fail(f"did not come so far: {ends(all or [process])}")
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
