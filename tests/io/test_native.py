"""`from_pretrained` of every kind of source: the arrays of `convert from-torch`, made once, without PyTorch."""

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from acestep_jax import AceStepPipeline, InputError
from acestep_jax.cli import main
from acestep_jax.io import cache, checkpoint, conversion
from acestep_jax.io.native import native_folder
from tests.folders import (
    MODEL,
    SILENCE,
    TEXT_ENCODER,
    VAE,
    edit_json,
    remove,
    write_comfyui,
    write_published,
)
from tests.processes import same_programs


@pytest.fixture(scope="module")
def published(standard, tmp_path_factory):
    return write_published(standard[0], tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def comfyui(published, tmp_path_factory):
    """The same in one file, with the small files beside it."""
    file = write_comfyui(published, tmp_path_factory.mktemp("comfyui"), whole=True)
    shutil.copy(published / SILENCE, file.parent)
    shutil.copy(published / TEXT_ENCODER / "tokenizer.json", file.parent)
    return file


def arrays(folder):
    """Every stored array of a native checkpoint, by name."""
    manifest = checkpoint.read_manifest(folder)
    stored = checkpoint.network_leaves(folder, manifest)
    return {
        f"{network}.{name}": value
        for network, shapes in stored.items()
        for name, value in checkpoint.read_leaves(folder, network, shapes).items()
    }


def assert_same_checkpoint(found, expected):
    """Fail unless two native checkpoints hold the same files and arrays, but for the note of the cache."""
    names = [{path.name for path in folder.iterdir()} for folder in (found, expected)]
    assert names[0] == names[1] | {cache.SOURCE}
    for name in ("config.json", "tokenizer.json", conversion.WEIGHT_NORM):
        assert (found / name).read_bytes() == (expected / name).read_bytes()
    a, b = arrays(found), arrays(expected)
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in b)


@pytest.mark.parametrize("kind", ["diffusers", "original", "comfyui"])
def test_the_result_is_that_of_from_torch(tiny, published, comfyui, tmp_path, kind):
    """Bit for bit, in any dtype; the second time it is there, and a changed source is another one."""
    source = {"diffusers": tiny[0], "original": published, "comfyui": comfyui}[kind]
    for dtype in (None, "bfloat16") if kind == "original" else (None,):
        conversion.from_torch(source, tmp_path / f"expected-{dtype}", dtype=dtype)
        found = native_folder(source, dtype=dtype, cache_dir=tmp_path / "cache")
        assert_same_checkpoint(found, tmp_path / f"expected-{dtype}")
        before = (found / "config.json").stat().st_mtime_ns
        assert native_folder(source, dtype=dtype, cache_dir=tmp_path / "cache") == found
        assert (found / "config.json").stat().st_mtime_ns == before
    assert len(cache.entries(tmp_path / "cache")) == (2 if kind == "original" else 1)


def test_a_source_that_changes_is_converted_again(published, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(published, source)
    first = native_folder(source, cache_dir=tmp_path / "cache")
    os.utime(source / MODEL / "model.safetensors", (1, 1))
    second = native_folder(source / MODEL, cache_dir=tmp_path / "cache")
    assert second != first and native_folder(source / MODEL / "model.safetensors", cache_dir=tmp_path / "cache")
    assert len(cache.entries(tmp_path / "cache")) >= 2


def test_native_checkpoints_are_read_where_they_are(tiny, tmp_path):
    assert native_folder(tiny[1], cache_dir=tmp_path / "cache") == tiny[1]
    assert native_folder(tiny[1], "turbo", cache_dir=tmp_path / "cache") == tiny[1]
    assert native_folder(checkpoint.SMALL_MODEL) == checkpoint.SMALL_MODEL
    assert not (tmp_path / "cache").exists()
    for source, variant in ((tiny[1], "base"), (checkpoint.SMALL_MODEL, "turbo")):
        with pytest.raises(InputError, match=f"variant: {source} holds the variant .*, not {variant}; leave"):
            native_folder(source, variant)
    with pytest.raises(InputError, match="revision: 'main' is of a repository of the hub"):
        native_folder(tiny[1], revision="main")
    with pytest.raises(InputError, match="dtype: 'int4' is not a dtype"):
        native_folder(tiny[1], dtype="int4")


def test_repositories_of_the_hub(tiny, published, hub, tmp_path):
    """By id; a transformer alone takes the rest from the repository that has all; what is there is not asked for."""
    for name in (MODEL, VAE, TEXT_ENCODER):
        shutil.copytree(published / name, tmp_path / "unified" / name)
    shutil.copytree(published / MODEL, tmp_path / "alone")
    edit_json(tmp_path / "alone" / "config.json", is_turbo=False, model_version="base")
    hub.add("ACE-Step/Ace-Step1.5", tmp_path / "unified")
    hub.add("ACE-Step/acestep-v15-base", tmp_path / "alone")
    hub.add("someone/native", tiny[1])
    conversion.from_torch(published, tmp_path / "turbo")
    edit_json(published / MODEL / "config.json", is_turbo=False, model_version="base")
    conversion.from_torch(published, tmp_path / "base")
    edit_json(published / MODEL / "config.json", is_turbo=True, model_version="turbo")
    for variant, downloads in (("turbo", True), ("base", True), ("base", False)):
        asked = len(hub.downloads)
        found = native_folder("ACE-Step/Ace-Step1.5", variant, cache_dir=tmp_path / "cache")
        assert_same_checkpoint(found, tmp_path / variant)
        assert (len(hub.downloads) > asked) == downloads
    assert json.loads((found / cache.SOURCE).read_text())["source"] == "ACE-Step/Ace-Step1.5"
    assert checkpoint.read_manifest(native_folder("someone/native", cache_dir=tmp_path / "cache")).configs


# Run in a process of its own, as a person without PyTorch has it.
WITHOUT_TORCH = """
    import sys
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("torch", "diffusers", "transformers", "accelerate", "peft"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Absent())
    import jax, numpy
    from acestep_jax import AceStepPipeline
    from acestep_jax.cli import main
    for source in sys.argv[3:]:
        pipe = AceStepPipeline.from_pretrained(source, "turbo", cache_dir=sys.argv[1] + "/cache")
    song = pipe("piano", audio_duration=10.0, num_inference_steps=1, seed=3)
    numpy.save(sys.argv[1] + "/song.npy", song.audios)
    assert song.audios.std() > 0.01
    assert main(["convert", "from-torch", sys.argv[3], sys.argv[1] + "/made"]) == 0
    assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
    assert not any(name.startswith("acestep_jax.convert.") for name in sys.modules)
"""


def test_without_torch_to_a_song(tiny, published, comfyui, tmp_path):
    """The original layout and a file of ComfyUI load, diffusers' to a song; `convert from-torch` needs no torch either.

    That all three are the same arrays is in `test_the_result_is_that_of_from_torch`.
    """
    command = [sys.executable, "-c", textwrap.dedent(WITHOUT_TORCH), tmp_path, "", published, comfyui, tiny[0]]
    environment = os.environ | same_programs()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    pipe = AceStepPipeline.from_pretrained(tiny[1])
    expected = pipe("piano", audio_duration=10.0, num_inference_steps=1, seed=3).audios
    np.testing.assert_allclose(np.load(tmp_path / "song.npy"), expected, atol=1e-4)
    assert_same_checkpoint(native_folder(published, "turbo", cache_dir=tmp_path / "cache"), tmp_path / "made")


CONVERT = """
    import sys, time
    from pathlib import Path
    from acestep_jax.io import conversion
    from acestep_jax.io.native import native_folder
    convert = conversion.convert
    def slow(*arguments):
        Path(sys.argv[3]).touch()
        while sys.argv[4] == "hold":
            time.sleep(0.01)
        convert(*arguments)
    conversion.convert = slow
    print(native_folder(sys.argv[1], cache_dir=sys.argv[2]))
"""


def converting(source, folder, started, mode="go"):
    """Start a process that converts into the cache `folder`, and with mode "hold" never finishes."""
    arguments = [str(source), str(folder), str(started), mode]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CONVERT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path):
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.slow
def test_two_processes_and_one_that_is_killed(published, tmp_path):
    """One holds the lock and is killed in its conversion; of two that wait, one converts, and both have the result."""
    folder = tmp_path / "cache"
    killed = converting(published, folder, tmp_path / "started", "hold")
    wait_for(tmp_path / "started")
    left = folder / f".{next(folder.glob('.*.lock')).name[1:-5]}-left"  # as a process that is killed midway leaves it
    left.mkdir()
    waiting = [converting(published, folder, tmp_path / f"started {i}") for i in range(2)]
    time.sleep(2)
    assert not list(tmp_path.glob("started ?")) and all(process.poll() is None for process in waiting)
    killed.kill()
    killed.communicate()
    outputs = [process.communicate() for process in waiting]
    assert [process.returncode for process in waiting] == [0, 0], outputs
    assert len({out for out, _ in outputs}) == 1 and len(list(tmp_path.glob("started ?"))) == 1
    assert sum("another process is converting the same model; waiting" in error for _, error in outputs) >= 1
    conversion.from_torch(published, tmp_path / "expected")
    assert_same_checkpoint(native_folder(published, cache_dir=folder), tmp_path / "expected")
    assert not left.exists()


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGES = {
    "weights": lambda folder: largest(folder / "weights").unlink(),
    "weights, cut": lambda folder: os.truncate(largest(folder / "weights"), 10),
    "all weights": remove("weights"),
    "config": remove("config.json"),
    "note, cut": lambda folder: os.truncate(folder / cache.SOURCE, 20),
}


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    """A cache with the conversion, and its arrays."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, arrays(native_folder(published, cache_dir=folder))


@pytest.mark.parametrize("case", DAMAGES)
def test_an_entry_that_was_half_deleted_is_made_again(published, converted, tmp_path, caplog, case):
    folder, expected = converted
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    found = native_folder(published, cache_dir=tmp_path)
    assert not caplog.records
    DAMAGES[case](found)
    assert native_folder(published, cache_dir=tmp_path) == found
    again = arrays(found)
    assert all(np.array_equal(again[name], value) for name, value in expected.items())
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("acestep_jax")]
    assert len(messages) == 1 and f"{found}: incomplete, so it is made again from {published}" in messages[0]


def test_disk_full(published, tmp_path, monkeypatch):
    """No room, found before; and really full midway. Nothing is left, and later it works."""
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=8_000_000))
        with pytest.raises(InputError, match="GB to write, but the disk has 0.01 GB free; make room"):
            native_folder(published, cache_dir=tmp_path / "cache")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(InputError, match="the disk is full, nothing was kept"):
            native_folder(published, cache_dir=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == []
    assert native_folder(published, cache_dir=tmp_path / "cache").is_dir()


def test_a_cache_that_cannot_be_written(published, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="the cache cannot be created .*choose another cache_dir"):
        native_folder(published, cache_dir=tmp_path / "file")


def gguf(path):
    path.write_bytes(b"GGUF" + bytes(60))
    return path


def pickled(path):
    import torch

    torch.save({"a": torch.zeros(2)}, path)
    return path


def tensors_of(path, **arrays):
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays, path)
    return path


def folder_of(path, **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    tensors_of(path / "model.safetensors", x=np.zeros(1))
    return path


PLANNER = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=217204)
ENCODER = dict(architectures=["Qwen3Model"], model_type="qwen3", vocab_size=151669)
EMBEDDING = "model.embed_tokens.weight"
FOREIGN = {
    "gguf": (lambda at: gguf(at / "x.gguf"), "x.gguf: a GGUF file, quantised"),
    "folder of gguf": (lambda at: gguf(at / "x.gguf").parent, "a GGUF file, quantised"),
    "ckpt": (lambda at: pickled(at / "x.ckpt"), "x.ckpt: a PyTorch pickle, which can hold code and is not read"),
    "bin": (lambda at: pickled(at / "pytorch_model.bin").parent, "holds pytorch_model.bin, a PyTorch pickle"),
    "text": (lambda at: gguf(at / "x.gguf").with_name("n.txt").write_text("x") and at / "n.txt", "of an unknown kind"),
    "adapter": (
        lambda at: tensors_of(at / "x.safetensors", **{"a.lora_A.weight": np.zeros(1)}),
        "x.safetensors: an adapter, not a model; load it with load_lora",
    ),
    "adapter folder": (
        lambda at: tensors_of(at / "adapter_model.safetensors", x=np.zeros(1)).parent,
        "an adapter, not a model",
    ),
    "planner": (lambda at: folder_of(at / "lm", **PLANNER), "the 5 Hz language model, which plans songs"),
    "planner file": (
        lambda at: tensors_of(at / "x.safetensors", **{EMBEDDING: np.zeros((217204, 1), np.float16)}),
        "x.safetensors: holds only the 5 Hz language model, which plans songs",
    ),
    "text encoder": (lambda at: folder_of(at / "qwen", **ENCODER), "only the text encoder; expected the folder of"),
    "vae": (lambda at: folder_of(at / "v", _class_name="AutoencoderOobleck"), "only the autoencoder; expected"),
    "other model": (
        lambda at: tensors_of(at / "x.safetensors", **{"unet.weight": np.zeros(1, np.float32)}),
        "x.safetensors: no tensors of ACE-Step 1.5; expected the diffusion model",
    ),
    "empty folder": (lambda at: at, "not a PyTorch checkpoint; expected model_index.json"),
    "nothing": (
        lambda at: at / "absent",
        "absent: no such folder; expected a PyTorch checkpoint, a native one, or",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_no_checkpoint_is_named(tmp_path, case):
    (tmp_path / "x").mkdir()
    make, message = FOREIGN[case]
    source = make(tmp_path / "x")
    with pytest.raises(InputError, match=f"{source}: .*{message.rpartition(': ')[2]}") as error:
        AceStepPipeline.from_pretrained(source, cache_dir=tmp_path / "cache")
    assert message in str(error.value) and not (tmp_path / "cache").exists()


def test_a_pickle_with_code_in_it(published, tmp_path):
    """In place of the latents of silence: refused, not run, nothing converted."""
    from tests.io.test_torch_file import evil, write

    shutil.copytree(published, tmp_path / "source")
    write(tmp_path / "source" / SILENCE, evil(tmp_path / "ran"))
    with pytest.raises(InputError, match="silence_latent.pt: refused, because it is more than a tensor"):
        native_folder(tmp_path / "source", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "cache").exists()


def test_unknown_arguments_are_named():
    with pytest.raises(InputError, match="varient: .*variant"):
        AceStepPipeline.from_pretrained(varient="turbo")
    assert AceStepPipeline.from_checkpoint.__func__ is AceStepPipeline.from_pretrained.__func__


def test_the_cache_is_listed_and_cleared(published, tmp_path, capsys, monkeypatch):
    """Conversions are listed with their sizes and deleted; what else is in the folder stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "acestep-jax" / "models"
    assert cache.cache_folder() == folder
    assert main(["info", "--cache"]) == 0
    assert capsys.readouterr().out == f"    0.00 GB  in the cache, 0 converted checkpoints: {folder}\n"
    found = native_folder(published, "turbo", dtype="bfloat16")
    assert found.parent == folder and found.name.startswith(f"{published.name}-turbo-bfloat16-")
    (folder / "models--ACE-Step--x").mkdir()
    (folder / f".{found.name}-left").mkdir()
    (found / "tokenizer.json").unlink()
    assert main(["info", "--cache"]) == 0
    out = capsys.readouterr().out
    assert f"{found.name}  ({published}, turbo, bfloat16, incomplete)" in out and "1 converted checkpoint:" in out
    assert main(["info", "--clear"]) == 0
    assert "deleted, 1 converted checkpoint:" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir() if path.suffix != ".lock"] == ["models--ACE-Step--x"]


def test_generate_by_model(tiny, tmp_path, capsys, monkeypatch):
    """`--model` with `--variant`, also as `--checkpoint`; a wrong request is an error before anything is converted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("acestep_jax.cli.runtime.use_compilation_cache", lambda: None)
    options = ["--out", str(tmp_path / "song.wav"), "--variant", "turbo", "--steps", "1"]
    assert main(["generate", "piano", "--model", str(tiny[0]), *options, "--duration", "5"]) == 2
    assert "--duration: expected 10 to 600 s, found 5" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    assert main(["generate", "piano", "--checkpoint", str(tiny[0]), *options, "--duration", "10"]) == 0
    assert (tmp_path / "song.wav").is_file()
    assert main(["info", "--model", str(tiny[0]), "--variant", "turbo"]) == 0
    assert "turbo" in capsys.readouterr().out and len(cache.entries(cache.cache_folder())) == 1
