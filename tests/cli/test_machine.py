"""The doctor's probes on described machines, and what it says to each."""

import logging
from types import SimpleNamespace

import jax
import pytest

from acestep_jax import cli, memory
from acestep_jax.cli import info, machine, runtime
from acestep_jax.cli.machine import Machine, advice, cuda_extra, probe

pytestmark = pytest.mark.unit

SMI = "| NVIDIA-SMI {0}    Driver Version: {0}    CUDA Version: {1}     |"
NVRM = "NVRM version: NVIDIA UNIX {}x86_64 Kernel Module  {}  Tue Mar  5 22:23:56 UTC 2024\nGCC version: gcc 11.4.0"


def root(folder, **files):
    """Return a root folder with these files, their names with slashes as double underscores."""
    for name, text in files.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def pci(vendor, device, kind):
    return {f"sys__bus__pci__devices__0__{name}": f"{value}\n" for name, value in
            dict(vendor=vendor, device=device, **{"class": kind}).items()}  # fmt: skip


def smi(driver, cuda, *capabilities):
    """Return a stand-in for `machine.run` in which nvidia-smi works."""

    def command(*words):
        assert words[0] == "nvidia-smi"
        return SMI.format(driver, cuda) if len(words) == 1 else "".join(f"{c}\n" for c in capabilities)

    return command


def absent(*words):
    return ""


def refused(*words):
    raise AssertionError("no command is run in a machine without GPU")


def test_probe_of_a_plain_machine(tmp_path):
    text = "MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:   12000000 kB\n"
    found = probe(root(tmp_path, proc__meminfo=text, **pci("0x1af4", "0x1000", "0x020000")), {}, refused)
    assert found == Machine(memory=24_576_000_000, free=12_288_000_000)
    assert probe(tmp_path / "nothing", {}, refused) == Machine()


def test_probe_of_gpus(tmp_path):
    card = pci("0x10de", "0x1eb8", "0x030200")
    found = probe(root(tmp_path / "a", **card), {}, smi("550.54.15", "12.4", 7.5, 7.5))
    assert found == Machine(nvidia=True, driver="550.54.15", cuda="12.4", capabilities=(7.5, 7.5))
    # Without nvidia-smi, as in many containers.
    found = probe(root(tmp_path / "b", proc__driver__nvidia__version=NVRM.format("", "535.161.07")), {}, absent)
    assert found == Machine(nvidia=True, driver="535.161.07")
    open_kernel = NVRM.format("Open Kernel Module for ", "580.65.06").replace("x86_64 Kernel Module", "x86_64 ")
    assert probe(root(tmp_path / "c", proc__driver__nvidia__version=open_kernel), {}, absent).driver == "580.65.06"
    # A card that no driver is loaded for; the sound device of a card is no card.
    assert probe(root(tmp_path / "d", **card), {}, absent) == Machine(nvidia=True)
    assert probe(root(tmp_path / "e", **pci("0x10de", "0x10f8", "0x040300")), {}, refused) == Machine()
    # Windows' subsystem for Linux, with NVIDIA's driver and without.
    wsl = root(tmp_path / "f", dev__dxg="")
    assert probe(wsl, {}, smi("581.10", "13.0", 8.9)).nvidia and not probe(wsl, {}, absent).nvidia


def test_probe_of_tpus(tmp_path):
    assert probe(root(tmp_path / "a", dev__accel0=""), {}, refused).tpu
    assert probe(root(tmp_path / "b", **pci("0x1ae0", "0x0063", "0xff0000")), {}, refused).tpu  # v5e
    assert not probe(root(tmp_path / "c", **pci("0x1ae0", "0x0042", "0x020000")), {}, refused).tpu  # a network card
    assert probe(tmp_path, {"TPU_ACCELERATOR_TYPE": "v5litepod-8"}, refused).tpu
    assert not probe(root(tmp_path / "d", dev__accel__accel0=""), {}, refused).tpu  # another maker's


def test_extra():
    """CUDA 13 needs driver 580 and compute capability 7.5; else CUDA 12, which newer drivers run as well."""
    assert cuda_extra(Machine(nvidia=True, driver="550.54.15", capabilities=(7.5,))) == "cuda12"
    assert cuda_extra(Machine(nvidia=True, driver="580.65.06", capabilities=(9.0, 9.0))) == "cuda13"
    assert cuda_extra(Machine(nvidia=True, driver="580.65.06")) == "cuda13"
    assert cuda_extra(Machine(nvidia=True, driver="580.65.06", capabilities=(7.0,))) == "cuda12"  # V100


OLD = Machine(nvidia=True, driver="550.54.15", capabilities=(7.5,))
NEW = Machine(nvidia=True, driver="580.65.06", capabilities=(9.0,))
PLUGIN_13, PLUGIN_12 = {"jax-cuda13-plugin": "0.11.1"}, {"jax-cuda12-plugin": "0.11.1"}
ADVICE = {
    "no plugin, old driver": (OLD, {}, {}, ["has an NVIDIA GPU", "run: pip install 'acestep-jax[cuda12]'"]),
    "no plugin, new driver": (NEW, {}, {}, ["run: pip install 'acestep-jax[cuda13]'"]),
    "wrong plugin": (OLD, PLUGIN_13, {}, ["CUDA 13 needs", "550.54.15", "pip uninstall", "'acestep-jax[cuda12]'"]),
    "no driver": (Machine(nvidia=True), {}, {}, ["no NVIDIA driver is loaded", "--gpus all"]),
    "ancient driver": (Machine(nvidia=True, driver="470.1"), {}, {}, ["470.1 is too old", "525"]),
    "told so": (NEW, PLUGIN_13, {"JAX_PLATFORMS": "cpu"}, ["JAX_PLATFORMS is 'cpu'", "unset JAX_PLATFORMS"]),
    "library path": (NEW, PLUGIN_12, {"LD_LIBRARY_PATH": "/x"}, ["unset LD_LIBRARY_PATH", "jax.devices"]),
    "unknown": (NEW, PLUGIN_12, {}, ["to see why, run: python -c 'import jax; jax.devices(\"cuda\")'"]),
    "TPU": (Machine(tpu=True), {}, {}, ["has a TPU", "run: pip install 'acestep-jax[tpu]'"]),
    "busy TPU": (Machine(tpu=True), {"libtpu": "0.0.42"}, {}, ["another process may hold the TPU"]),
}


@pytest.mark.parametrize("case", ADVICE)
def test_advice(case):
    found, packages, environment, parts = ADVICE[case]
    said = advice(found, "cpu", packages, environment)
    assert said and "JAX computes on the CPU" in said
    for part in parts:
        assert part in said


def test_no_advice():
    assert advice(Machine(), "cpu", {}, {}) is None
    assert advice(NEW, "gpu", PLUGIN_13, {}) is None and advice(Machine(tpu=True), "tpu", {}, {}) is None


def test_info_warns(monkeypatch, capsys):
    """Loudly, with the command that mends it, and with exit status 0."""
    monkeypatch.setattr(machine, "probe", lambda: OLD)
    monkeypatch.setattr(machine, "installed", dict)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "WARNING: this machine has an NVIDIA GPU" in out and "pip install 'acestep-jax[cuda12]'" in out
    assert "550.54.15" in out and "float32 (exact" in out
    for size in memory.SIZES:
        assert f"{size} turbo" in out


def test_start_warns_once(monkeypatch, caplog):
    monkeypatch.setattr(machine, "probe", lambda: NEW)
    monkeypatch.setattr(machine, "installed", dict)
    monkeypatch.setattr(runtime, "use_compilation_cache", lambda: None)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with caplog.at_level(logging.WARNING):
        runtime.start()
    (record,) = caplog.records
    assert "'acestep-jax[cuda13]'" in record.getMessage()


def test_devices_are_described(monkeypatch):
    """A device like a T4's: its kind, capability and memory."""
    t4 = SimpleNamespace(
        device_kind="Tesla T4",
        compute_capability="7.5",
        memory_stats=lambda: {"bytes_limit": 11_800_000_000, "bytes_in_use": 800_000_000},
    )
    monkeypatch.setattr(info, "default_precision", lambda: "mixed_float16")
    (_, line), (_, precision) = info.device_lines([t4])
    assert line == "Tesla T4, compute capability 7.5, JAX may take 11.8 GB, 11.0 GB of them free"
    assert precision.startswith("mixed_float16 (fast products in float16")
    assert next(iter(info.device_lines(jax.devices())))[1] == "cpu"


def test_fits():
    whole, turns = [10, 20, 30], [5, 15, 25]
    assert info.fits(whole, turns, 30, in_turn=True) == "fits"
    assert info.fits(whole, turns, 25, in_turn=True) == "fits in turn, with the networks on the host"
    assert info.fits(whole, turns, 16, in_turn=True).endswith("on the host, up to 240 s")
    assert info.fits(whole, turns, 4, in_turn=True) == "does not fit 0.0 GB"
    assert info.fits(whole, turns, 25, in_turn=False) == "does not fit 0.0 GB"
