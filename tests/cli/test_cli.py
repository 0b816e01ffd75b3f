"""The command line, as a user calls it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from acestep_jax import cli
from acestep_jax.cli import options as lora_options
from acestep_jax.cli import runtime
from acestep_jax.diffusion import denoise
from acestep_jax.io import checkpoint
from acestep_jax.io.adapter import save_adapter
from tests.adapters import ATTENTION, random_adapter


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """The tests leave the user's cache folder alone."""
    monkeypatch.setattr(runtime, "use_compilation_cache", lambda: None)


def generate(tiny, *options):
    return cli.main(["generate", "piano", "--checkpoint", str(tiny[1]), "--duration", "10", *map(str, options)])


def test_generate(tiny, tmp_path, capsys):
    """The same seed gives the same file, by flags or from a file of lyrics; without one, the seed is printed."""
    lyrics = tmp_path / "lyrics.txt"
    lyrics.write_text("[verse]\nla la")
    options = ["--bpm", 90, "--key", "C major", "--time-signature", "4", "--language", "en", "--steps", 2]
    assert generate(tiny, "--out", tmp_path / "a.wav", "--seed", 5, "--lyrics", "[verse]\nla la", *options) == 0
    assert generate(tiny, "--out", tmp_path / "b.flac", "--seed", 5, "--lyrics", f"@{lyrics}", *options) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'a.wav'}: 10 s, seed 5" in out
    (a, rate), (b, _) = soundfile.read(tmp_path / "a.wav"), soundfile.read(tmp_path / "b.flac")
    assert rate == 48000 and a.shape == (480000, 2)
    assert np.abs(a - b).max() < 1e-4

    assert generate(tiny, "--out", tmp_path / "c.wav", *options) == 0
    seed = capsys.readouterr().out.split()[-1]
    again = [*options, "--overwrite", "--seed", seed]
    c = soundfile.read(tmp_path / "c.wav")[0]
    assert generate(tiny, "--out", tmp_path / "c.wav", *again) == 0
    assert np.abs(soundfile.read(tmp_path / "c.wav")[0] - c).max() < 1e-4


@pytest.mark.slow
def test_generate_on_a_mesh(tiny, tmp_path):
    """By default `tests/test_distributed_processes.py` shows it, of two processes."""
    for name, mesh in (("one", []), ("eight", ["--mesh", "data=2,tensor=4"])):
        assert generate(tiny, "--out", tmp_path / f"{name}.wav", "--seed", 5, "--steps", 2, *mesh) == 0
    one, eight = (soundfile.read(tmp_path / f"{name}.wav")[0] for name in ("one", "eight"))
    assert np.abs(one - eight).max() < 1e-4


@pytest.mark.slow
def test_adapters(tiny, tmp_path):
    """They change the song, unless their scale is zero; one scale is for all, several are one for each. By default
    `tests/test_adapters_pipeline.py` shows it without the command."""
    config = checkpoint.read_manifest(tiny[1]).configs["transformer"]
    for i, name in enumerate("ab"):
        save_adapter(tmp_path / name, random_adapter(config, ATTENTION, alpha=i + 1.0, seed=i))
    a, b = ["--lora", str(tmp_path / "a")], ["--lora", str(tmp_path / "b")]

    def song(*options):
        assert generate(tiny, "--out", tmp_path / "song.wav", "--overwrite", "--seed", 1, "--steps", 2, *options) == 0
        return soundfile.read(tmp_path / "song.wav")[0]

    plain = song()
    assert np.abs(song(*a) - plain).max() > 0.01
    assert np.abs(song(*a, *b, "--lora-scale", 0) - plain).max() < 1e-4

    def given(*options):
        return lora_options.lora_scales(cli.parser().parse_args(["generate", "x", *options]).generate)

    assert given() == ([], [])
    assert given(*a, *b) == ([a[1], b[1]], [1.0, 1.0])
    assert given(*b, *a, "--lora-scale", "-0.5", "--lora-scale", "1") == ([b[1], a[1]], [-0.5, 1.0])
    assert given(*a, *b, "--lora-scale=0.5") == ([a[1], b[1]], [0.5, 0.5])


def test_info(tiny, capsys):
    assert cli.main(["info", "--checkpoint", str(tiny[1])]) == 0
    out = capsys.readouterr().out
    assert "acestep-jax" in out and "turbo" in out and "condition_encoder" in out
    assert cli.main(["info"]) == 0


ERRORS = {
    "not a checkpoint": (["--checkpoint", "{tmp}"], "not a PyTorch checkpoint; expected model_index.json"),
    "no such checkpoint": (["--checkpoint", "{tmp}/absent"], "no such folder"),
    "not a model": (["--model", "{torch}/vae"], "only the autoencoder; expected the folder of the model"),
    "another variant": (["--model", "{torch}", "--variant", "base"], "holds the variant turbo, not base"),
    "unknown suffix": (["--out", "{tmp}/song.xyz"], "unknown kind of audio file"),
    "no such folder": (["--out", "{tmp}/absent/song.wav"], "create it first"),
    "duration": (["--duration", "5"], "--duration: expected 10 to 600 s, found 5"),
    "steps": (["--steps", "0"], "--steps: expected at least 1"),
    "shift": (["--shift", "0"], "--shift: expected a number above 0"),
    "dtype": (["--dtype", "int4"], "use one of float32, bfloat16, float16"),
    "mesh axis": (["--mesh", "model=8"], "expected AXIS=N"),
    "mesh size": (["--mesh", "data=3"], "needs 3 devices, but 8 are present"),
    "no adapter": (["--lora", "{tmp}/absent"], "absent: no such folder or file; expected the folder"),
    "a checkpoint": (["--lora", "{torch}"], "expected adapter_config.json and adapter_model.safetensors (PEFT)"),
    "scale of nothing": (["--lora-scale", "0.5"], "--lora-scale: "),
    "two scales": (["--lora", "x", "--lora-scale", "1", "--lora-scale", "2"], "--lora-scale: "),
    "infinite scale": (["--lora", "x", "--lora-scale", "inf"], "--lora-scale: expected a finite number"),
    "unknown option": (["--duraton", "10"], "--duraton: unknown option; did you mean --duration?"),
    "not a whole number": (["--steps", "1.5"], "--steps: expected a whole number, found '1.5'"),
    "not a number": (["--bpm", "fast"], "--bpm: expected 30 to 300 beats per minute, found 'fast'"),
    "not for the task": (["--start", "1"], "--start: the task text2music does not take it"),
    "lyrics file": (["--lyrics", "@{tmp}/absent.txt"], "absent.txt"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(tiny, tmp_path, capsys, case):
    options, message = ERRORS[case]
    filled = [option.format(tmp=tmp_path, torch=tiny[0]) for option in options]
    assert generate(tiny, "--out", tmp_path / "song.wav", *filled) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.err.startswith("acestep-jax: ")
    assert not list(tmp_path.iterdir())


def test_unknown_backend(tmp_path):
    """One line, also from a command that computes nothing."""
    code = "import json, sys; from acestep_jax.cli import main; print(list(map(main, json.loads(sys.argv[1]))))"
    words = json.dumps([["info"], ["generate", "x", "--out", str(tmp_path / "x.wav")]])
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    done = subprocess.run([sys.executable, "-c", code, words], capture_output=True, text=True, env=environment)
    assert done.stdout.endswith("[2, 2]\n"), done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all(
        line.startswith("acestep-jax: JAX_PLATFORMS: 'cuda' cannot be used") for line in lines
    )


def test_installed_command(tiny, tmp_path):
    """`acestep-jax` is on the path; an empty prompt ends it with status 2 and no traceback."""
    command = [sys.executable, "-m", "acestep_jax.cli", "generate", " ", "--checkpoint", str(tiny[1])]
    done = subprocess.run([*command, "--out", str(tmp_path / "x.wav")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "acestep-jax: PROMPT: it is empty; describe the music in a few words\n"


@pytest.mark.slow
def test_compiled_programs_are_kept(tiny, tmp_path):
    """The second run finds all programs of the first on disk."""
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "acestep_jax.cli", "generate", "piano", "--checkpoint", str(tiny[1])]
    command += ["--duration", "10", "--steps", "2", "--seed", "1", "--overwrite", "--out", str(tmp_path / "song.wav")]
    kept = []
    for _ in range(2):
        subprocess.run(command, check=True, env=environment)
        kept.append(
            {path.name for path in (tmp_path / "cache" / "acestep-jax").iterdir() if path.name.endswith("-cache")}
        )
    programs = {name.split("-")[0] for name in kept[0]}
    assert {"jit_encode", "jit__denoise", "jit_decode", "jit_normal"} <= programs
    assert kept[1] == kept[0]


def test_warm(tiny, tmp_path, capsys):
    """A later song of this duration with these options compiles no loop."""
    assert cli.main(["warm", "--durations", "10", "--checkpoint", str(tiny[1]), "--steps", "3"]) == 0
    assert "10 s: ready after" in capsys.readouterr().out
    before = denoise.denoise._cache_size()
    assert generate(tiny, "--out", tmp_path / "x.wav", "--lyrics", "[Instrumental]", "--steps", "3") == 0
    assert denoise.denoise._cache_size() == before
    assert generate(tiny, "--out", tmp_path / "y.wav", "--lyrics", "[Instrumental]", "--steps", "4") == 0
    assert denoise.denoise._cache_size() == before + 1


def test_warm_refuses_before_it_loads(tmp_path, capsys):
    assert cli.main(["warm", "--durations", "10", "9999", "--checkpoint", str(tmp_path)]) == 2
    assert "--durations: audio_duration: expected 10 to 600 s, found 9999" in capsys.readouterr().err
