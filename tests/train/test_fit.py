"""`acestep-jax train fit` from end to end: what a run writes, how it resumes, its result, bad input."""

import dataclasses
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import soundfile
import torch
from diffusers import AceStepTransformer1DModel as TorchTransformer
from huggingface_hub import constants
from safetensors.numpy import load_file

from acestep_jax import AceStepPipeline, InputError, cli
from acestep_jax.cli import parser as program
from acestep_jax.convert.to_torch import to_torch
from acestep_jax.io import checkpoint
from acestep_jax.io.adapter import load_adapter
from acestep_jax.models.registry import FAMILY
from acestep_jax.train import config_file
from acestep_jax.train.checkpoints import Checkpoints
from acestep_jax.train.config import TrainConfig
from acestep_jax.train.export import export
from acestep_jax.train.finetune import FineTuning as Trainer
from acestep_jax.train.finetune import fit, located, warn_of_settings
from acestep_jax.train.run import DivergedError
from tests.folders import tensors
from tests.parity import as_torch, assert_close, normal, relative_error
from tests.processes import ends, free_port, start, terminate_when, together
from tests.training import ENDLESS, SMALL, error_of, run_command, settings, write_songs


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "songs"
    write_songs(folder, tiny[1])
    return folder


INEFFECTIVE = [
    (dict(method="full", lora__rank=8, lora__alpha=8.0), ["lora.rank", "lora.alpha"]),
    (dict(method="lora", lora__rank=8), []),
    (dict(objective__timesteps="turbo", objective__timestep_mu=0.0), ["objective.timestep_mu"]),
    (dict(objective__timestep_mu=0.0), []),
    (dict(report__sample_every=5, report__sample_seconds=20.0), ["report.sample_every", "report.sample_seconds"]),
    (dict(report__sample_every=5, report__sample_prompts=("x",)), []),
    (dict(report__validate_every=5, examples__validation_fraction=0.0), ["report.validate_every"]),
    (dict(report__validate_every=5, examples__validation_fraction=0.1), []),
]


@pytest.mark.parametrize("given, named", INEFFECTIVE)
def test_settings_without_effect_warn(given, named, caplog):
    sections = {}
    for name, value in given.items():
        section, _, field = name.partition("__")
        sections.setdefault(section, {}).update({field: value} if field else {})
    plain = TrainConfig(data="d", checkpoint="c", out="o")
    values = {
        name: dataclasses.replace(getattr(plain, name), **fields) if fields else given[name]
        for name, fields in sections.items()
    }
    warn_of_settings(dataclasses.replace(plain, **values))
    assert [message.partition(":")[0] for message in caplog.messages] == named


@pytest.mark.slow
def test_a_run_of_a_hub_id_resumes_elsewhere(tiny, data, tmp_path, hub, monkeypatch):
    """Its folder keeps the id and the commit, not the cache; what it did not train is found on another machine, too."""
    repository = hub.add("someone/native", tiny[1])
    first = settings(data, "someone/native", tmp_path / "run", method="full", steps=2, save_every=2, **SMALL)
    fit(first)
    kept = config_file.read(tmp_path / "run" / "config.yaml")
    assert kept == dataclasses.replace(first, revision=repository.commit)
    assert str(hub.cache) not in (tmp_path / "run" / "config.yaml").read_text()

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    repository.revisions.discard("main")  # which is another commit now
    found, again = located(dataclasses.replace(first, steps=3))
    assert found.checkpoint.startswith(str(tmp_path / "another")) and again.revision == repository.commit
    export(tmp_path / "run", tmp_path / "exported")
    assert sorted(checkpoint.read_manifest(tmp_path / "exported").configs) == sorted(
        checkpoint.read_manifest(tiny[1]).configs
    )
    with pytest.raises(InputError, match="revision: someone/native has no 'main'"):
        located(dataclasses.replace(first, out=str(tmp_path / "other"), revision="main"))


@pytest.fixture(scope="module")
def finished(tiny, data, tmp_path_factory):
    """An undisturbed run of six steps, with everything that a run can leave: (folder, result)."""
    out = tmp_path_factory.mktemp("run") / "run"
    samples = dict(report__sample_prompts=("a song",), report__sample_seconds=10.0, report__sample_every=4)
    return out, fit(settings(data, tiny[1], out, **ENDLESS, **samples))


def weights(folder):
    return load_file(folder / "adapter.safetensors")


def rows(folder, *names):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: [(row["step"], row[name]) for row in found if name in row] for name in names}


def test_what_a_run_writes(finished, tiny, data):
    folder, result = finished
    assert result == folder / "adapter"
    names = {path.name for path in folder.iterdir() if path.name != ".lock"}
    assert names == {
        *("config.yaml", "checkpoints", "metrics.jsonl", "tensorboard", "loss.png", "samples"),
        *("adapter", "adapter-ema"),
    }
    assert config_file.read(folder / "config.yaml").lora.rank == 4
    found = rows(folder, "loss", "gradient_norm", "learning_rate", "audio_seconds_per_second", "memory_gb")
    for name, values in found.items():
        assert [step for step, _ in values] == list(range(1, 7)), name
        assert all(np.isfinite(value) and value > 0 for _, value in values), name
    # At checkpoints as well, so that the best can be told.
    assert [step for step, _ in rows(folder, "validation_loss")["validation_loss"]] == [2, 3, 4, 6]
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert len([name for name in last if name.startswith("validation_loss_t_")]) == 8
    assert any((folder / "tensorboard").iterdir())
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    for step in (4, 6):
        song, rate = soundfile.read(folder / "samples" / f"step-00000{step}-0.wav")
        assert song.shape == (480_000, 2) and rate == 48_000 and np.abs(song).max() > 0.5


def test_the_latest_checkpoints_and_the_best_stay(finished, tmp_path):
    with Checkpoints(finished[0] / "checkpoints", 2) as saved:
        losses = dict(rows(finished[0], "validation_loss")["validation_loss"])
        best = min((2, 4, 6), key=losses.get)
        assert saved.steps == sorted({4, 6, best}) and saved.best == best
    state = {"w": np.arange(3.0)}  # any tree will do
    with Checkpoints(tmp_path / "checkpoints", 2) as saved:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 4.0)):
            saved.save(step, state, {}, loss)
    with Checkpoints(tmp_path / "checkpoints", 2) as saved:
        assert saved.steps == [2, 4, 5] and saved.best == 2


def test_the_adapter_changes_the_song_and_the_average_is_another(finished, tiny):
    folder, result = finished
    adapter, average = load_adapter(result), load_adapter(folder / "adapter-ema")
    assert adapter.config == config_file.read(folder / "config.yaml").lora
    assert all(np.abs(adapter.leaves[k]).max() > 0 for k in adapter.leaves)
    assert all(not np.array_equal(adapter.leaves[k], average.leaves[k]) for k in adapter.leaves)
    pipe = AceStepPipeline.from_checkpoint(tiny[1])
    arguments = dict(audio_duration=10.0, seed=0, lyrics="[Instrumental]")
    plain = pipe("a song", output_type="latent", **arguments)
    pipe.load_lora(result)
    tuned = pipe("a song", **arguments)
    assert relative_error(tuned.latents, plain.latents) > 1e-3
    # The last sample of the run is this song, with the adapter beside the weights instead of in them.
    sample, _ = soundfile.read(folder / "samples" / "step-000006-0.wav")
    assert np.abs(sample.T - tuned.audios[0]).max() <= 2e-3


def test_export_of_a_step(finished, tmp_path, capsys):
    """The best by default, here the last; another step; averages; and what is not there."""
    folder, result = finished
    run = lambda *options: run_command("export", folder, *options)  # noqa: E731
    assert run(tmp_path / "best") == run(tmp_path / "6", "--step", 6) == run(tmp_path / "4", "--step", 4) == 0
    with Checkpoints(folder / "checkpoints", 2, writes=False) as saved:
        assert f"{tmp_path}/best: step {saved.best}\n" in capsys.readouterr().out
    assert run(tmp_path / "ema", "--ema", "--step", 6) == 0
    assert weights(tmp_path / "best").keys() == weights(result).keys()
    for name, other in (("6", "adapter"), ("ema", "adapter-ema")):
        found, expected = weights(tmp_path / name), weights(folder / other)
        assert all(np.array_equal(found[leaf], value) for leaf, value in expected.items())
    assert not np.array_equal(*(weights(tmp_path / n)["layers.self_attn.to_q.lora_b"] for n in ("4", "6")))
    assert run(tmp_path / "best") == 2 and "already exists" in capsys.readouterr().err
    assert run(tmp_path / "3", "--step", 3) == 2
    assert f"{folder}: no checkpoint of step 3; there are " in capsys.readouterr().err
    assert run(tmp_path / "0", "--step", 0) == 2
    assert f"{folder}: no checkpoint of step 0; there are " in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "plain")
    text = (folder / "config.yaml").read_text()
    assert "ema_decay: 0.9" in text
    (tmp_path / "plain" / "config.yaml").write_text(text.replace("ema_decay: 0.9", "ema_decay: 0"))
    assert "has no moving averages" in error_of(capsys, "export", tmp_path / "plain", tmp_path / "none", "--ema")
    assert "config.yaml" in error_of(capsys, "export", tmp_path, tmp_path / "none")


class Stopped(Exception):
    pass


@pytest.mark.slow
def test_a_stopped_run_resumes_bit_for_bit(finished, tiny, data, tmp_path, monkeypatch, caplog):
    """Stopped in step 5, after the checkpoint of step 4; then finished with other numbers of workers and reports."""
    out = tmp_path / "run"
    steps = Trainer.step

    def stop(trainer, batch):
        if int(trainer.state.step) == 4:
            raise Stopped
        return steps(trainer, batch)

    monkeypatch.setattr(Trainer, "step", stop)
    with pytest.raises(Stopped):
        fit(settings(data, tiny[1], out, **ENDLESS))
    assert not (out / "adapter").exists()
    monkeypatch.setattr(Trainer, "step", steps)
    caplog.set_level(logging.INFO, "acestep_jax.train")
    with jax.log_compiles():
        fit(settings(data, tiny[1], out, **ENDLESS, examples__workers=0, keep=1))
    assert "resuming from step 4" in caplog.text
    compiled = [m for m in caplog.messages if m.startswith("Finished XLA compilation of jit(step)")]
    assert len(compiled) == 1
    for name in ("adapter", "adapter-ema"):
        assert (out / name / "adapter.safetensors").read_bytes() == (
            finished[0] / name / "adapter.safetensors"
        ).read_bytes()
    for name in ("loss", "validation_loss", "gradient_norm"):
        assert rows(out, name) == rows(finished[0], name)


def command(data, native, out, *options):
    run = [sys.executable, "-m", "train", "fit", "--data", str(data), "--checkpoint", str(native), "--out", str(out)]
    lora = ["--lora.rank", "4", "--lora.alpha", "8", "--lora.dropout", "0.1", "--optimizer.learning-rate", "0.01"]
    examples = ["--examples.batch-size", "2", "--examples.crop-seconds", "[8]", "--optimizer.accumulation", "2"]
    examples += ["--examples.validation-fraction", "0.2", "--optimizer.ema-decay", "0.9", "--report.log_every", "1"]
    examples += ["--examples.cover", "0"]  # two networks less to compile
    return [*run, *lora, *examples, "--optimizer.warmup_steps", "1", *options]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [10])
def test_killed_at_any_moment(tiny, data, tmp_path, kills):
    """SIGKILL at random moments, checkpoints every other step: the weights are those of an undisturbed run."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    options = ["--steps", str(4 * kills + 4), "--save_every", "2", "--report.validate_every", "4"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    subprocess.run(command(data, tiny[1], whole, *options), env=environment, check=True, capture_output=True)
    rng = random.Random(kills)
    killed = []
    for _ in range(kills):
        before = max((int(path.name) for path in out.glob("checkpoints/*") if path.name.isdecimal()), default=0)
        process = subprocess.Popen(
            command(data, tiny[1], out, *options), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        # From the first new line of the metrics on, steps and saves follow each other within milliseconds.
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            found = rows(out, "loss")["loss"] if (out / "metrics.jsonl").exists() else []
            if found and found[-1][0] > before:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed.append(process.returncode)
    assert killed.count(-signal.SIGKILL) >= kills - 1  # the last may have been faster
    subprocess.run(command(data, tiny[1], out, *options), env=environment, check=True, capture_output=True)
    for name in ("adapter", "adapter-ema"):
        expected = (whole / name / "adapter.safetensors").read_bytes()
        assert (out / name / "adapter.safetensors").read_bytes() == expected
    assert rows(out, "loss", "validation_loss") == rows(whole, "loss", "validation_loss")


def test_sigterm_saves_and_the_run_resumes_bit_for_bit(finished, tiny, data, tmp_path, monkeypatch, capsys):
    """In step 3, of which there is no checkpoint otherwise.

    That other processes end so is in `test_sigterm_of_one_process_stops_both_at_one_step` and, by default, of a server
    in `tests/cli/test_serve.py`.
    """
    out = tmp_path / "run"
    config_file.write(tmp_path / "run.yaml", settings(data, tiny[1], out, **ENDLESS))

    def terminate(trainer, batch):
        if int(trainer.state.step) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr("acestep_jax.cli.runtime.use_compilation_cache", lambda: None)
        before_step(patched, terminate)
        assert cli.main(["train", "fit", "--config", str(tmp_path / "run.yaml")]) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    error = capsys.readouterr().err
    assert error.endswith("acestep-jax: SIGTERM; the same command resumes from what was written\n")
    with Checkpoints(out / "checkpoints", 2) as saved:
        assert saved.steps[-1] == 3
    assert not (out / "adapter").exists()
    fit(settings(data, tiny[1], out, **ENDLESS))
    for name in ("adapter", "adapter-ema"):
        ours, theirs = (folder / name / "adapter.safetensors" for folder in (out, finished[0]))
        assert ours.read_bytes() == theirs.read_bytes()
    for name in ("loss", "gradient_norm"):
        assert rows(out, name) == rows(finished[0], name)
    # That of step 3 was due, but there was no time left.
    assert [step for step, _ in rows(out, "validation_loss")["validation_loss"]] == [2, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "devices", "tolerance"), [("data=2", 1, 0.0), ("data=8", 4, 1e-5), ("data=2,fsdp=1,tensor=4", 4, 1e-5)]
)
def test_two_processes_train_as_one(tiny, data, tmp_path, mesh, devices, tolerance):
    """On one mesh, each process with its own part of the batches, against one process with all devices.

    Bit for bit with one device each: two numbers have the same sum in either order. More are added up in another order
    between processes than within one.
    """
    size = dict(part.split("=") for part in mesh.split(","))["data"]
    options = ["--steps", "3", "--report.validate_every", "3", "--save_every", "2", "--mesh", mesh]
    options += ["--optimizer.accumulation", "1", "--examples.batch-size", size, "--lora.dropout", "0"]
    highest = dict(JAX_DEFAULT_MATMUL_PRECISION="highest")
    words = command(data, tiny[1], tmp_path / "two", *options)[3:]
    made = together(*words, program="train", devices=devices, **highest)
    assert [status for status, *_ in made] == [0, 0], made
    words = command(data, tiny[1], tmp_path / "one", *options)[3:]
    ((status, *output),) = ends([start(*words, program="train", devices=2 * devices, **highest)])
    assert status == 0, output
    found, expected = (rows(tmp_path / name, "loss", "validation_loss") for name in ("two", "one"))
    for name, values in expected.items():
        assert len(values) == {"loss": 3, "validation_loss": 2}[name]
        np.testing.assert_allclose(found[name], values, rtol=tolerance / 10)
    one, two = weights(tmp_path / "one" / "adapter"), weights(tmp_path / "two" / "adapter")
    for leaf, value in one.items():
        assert np.linalg.norm(two[leaf] - value) <= tolerance * np.linalg.norm(value), leaf
    with Checkpoints(tmp_path / "two" / "checkpoints", 2) as saved:
        assert saved.steps[-2:] == [2, 3]


@pytest.mark.slow
def test_two_processes_train_all_weights_as_one_device(tiny, data, tmp_path):
    """With weights and moments split over the devices of both."""
    options = ["--method", "full", "--steps", "3", "--report.log_every", "1", "--examples.validation_fraction", "0"]
    options += ["--optimizer.accumulation", "1", "--examples.batch-size", "4", "--optimizer.learning-rate", "1e-4"]
    highest = dict(JAX_DEFAULT_MATMUL_PRECISION="highest")
    words = command(data, tiny[1], tmp_path / "two", *options, "--mesh", "data=2,fsdp=2")[3:]
    made = together(*words, program="train", devices=2, **highest)
    assert [status for status, *_ in made] == [0, 0], made
    words = command(data, tiny[1], tmp_path / "one", *options)[3:]
    ((status, *output),) = ends([start(*words, program="train", devices=1, **highest)])
    assert status == 0, output
    found, expected = (rows(tmp_path / name, "loss", "gradient_norm") for name in ("two", "one"))
    for name, values in expected.items():
        assert len(values) == 3
        np.testing.assert_allclose(found[name], values, rtol=1e-5)


@pytest.mark.slow
def test_sigterm_of_one_process_stops_both_at_one_step(tiny, data, tmp_path):
    options = ["--steps", "400", "--save_every", "400", "--mesh", "data=2,fsdp=1,tensor=4"]
    address, out = f"localhost:{free_port()}", tmp_path / "run"
    processes = [
        start(
            *command(data, tiny[1], out, *options)[3:], "--distributed", f"{address},2,{i}", program="train", devices=4
        )
        for i in range(2)
    ]
    terminate_when(lambda: (out / "metrics.jsonl").exists() and rows(out, "loss")["loss"], processes[1], all=processes)
    found = ends(processes)
    assert [status for status, *_ in found] == [143, 143], found
    with Checkpoints(out / "checkpoints", 2) as saved:
        assert saved.steps and saved.steps[-1] < 400


# Forty seconds; `.ci/run` runs it. By default `test_full_step_matches_torch` shows the step.
@pytest.mark.slow
def test_full_fine_tuning_goes_back_to_torch(tiny, data, tmp_path):
    """`model/` is a whole checkpoint: the transformer is another, everything else the same, and diffusers runs it.

    This run learns covers as well.
    """
    whole = dict(method="full", steps=2, examples__validation_fraction=0.0)
    result = fit(settings(data, tiny[1], tmp_path / "run", **whole))
    assert result == tmp_path / "run" / "model"
    to_torch(result, tmp_path / "torch", layout="diffusers")
    found, expected = tensors(tmp_path / "torch"), tensors(tiny[0])
    assert found.keys() == expected.keys()
    changed = {name.partition("/")[0] for name in found if found[name] != expected[name]}
    assert changed == {"transformer"}
    theirs = TorchTransformer.from_pretrained(tmp_path / "torch", subfolder="transformer").eval()
    (ours,) = checkpoint.load(result, names=["transformer"]).values()
    (before,) = checkpoint.load(tiny[1], names=["transformer"]).values()
    channels, width = ours.config.audio_acoustic_hidden_dim, ours.config.encoder_hidden_size or ours.config.hidden_size
    t = np.array([0.7], np.float32)
    inputs = normal(1, 61, channels), t, t, normal(1, 9, width), normal(1, 61, 2 * channels)
    with torch.no_grad():
        expected = theirs(*map(as_torch, inputs), return_dict=False)[0]
    assert_close(ours(*inputs), expected)
    assert relative_error(before(*inputs), expected) > 1e-3


@pytest.mark.slow
def test_no_other_program_than_the_compiled_one(tiny, data, tmp_path):
    """A batch of another shape or dtype is an error, not a compilation.

    By default `test_a_stopped_run_resumes_bit_for_bit` counts the compilations of a run.
    """
    config = settings(data, tiny[1], tmp_path / "run", **SMALL)
    trainer = Trainer(config, None)
    from tests.training import random_batch

    manifest = checkpoint.read_manifest(tiny[1])
    batch = jax.tree.map(lambda x: np.stack([x, x]), random_batch(manifest.configs))
    trainer.step(batch)
    with pytest.raises(TypeError, match="types differ from the types for which this computation was compiled"):
        trainer.step(batch._replace(text=batch.text.astype(np.float16)))


def before_step(monkeypatch, change):
    """Calls `change(trainer, batch)` before each step, which takes the batch that it returns."""
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda trainer, batch: step(trainer, change(trainer, batch)))


@pytest.mark.slow
def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(tiny, data, tmp_path, monkeypatch):
    """Two good steps, then songs that are no numbers: two bad steps, and the weights are those of step 2."""
    expected = {}

    def change(trainer, batch):
        if int(trainer.state.step) < 2:
            return batch
        expected.update({leaf: np.array(value) for leaf, value in trainer.state.params.items()})
        return batch._replace(mean=np.full_like(batch.mean, np.nan))

    before_step(monkeypatch, change)
    config = settings(data, tiny[1], tmp_path / "run", max_bad_steps=2, **SMALL, keep=5)
    with pytest.raises(
        DivergedError, match=r"run: the loss or its gradient is non-finite since step 3, 2 consecutive steps\. .*rate"
    ):
        fit(config)
    trainer = Trainer(config, None)
    with Checkpoints(tmp_path / "run" / "checkpoints", 5) as saved:
        assert saved.steps[:1] == [2] and saved.steps[-1] <= 4
        trainer.restore(saved, saved.steps[-1])
    for leaf, value in expected.items():
        np.testing.assert_array_equal(trainer.state.params[leaf], value)


def test_a_checkpoint_of_other_settings_names_the_leaf(finished, tiny, data, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    other = settings(data, tiny[1], tmp_path / "run", **ENDLESS, lora__rank=8)
    with pytest.raises(InputError, match=r"run: holds a run with other settings \(lora.rank was 4, now 8\); use those"):
        fit(other)
    fewer = settings(data, tiny[1], tmp_path / "run", **ENDLESS, steps=5)
    with pytest.raises(InputError, match=r"run: has made 6 steps already, more than steps \(5\)"):
        fit(fewer)
    config_file.write(tmp_path / "run" / "config.yaml", other)
    with pytest.raises(InputError, match=r"6: ema\.layers\.\S+lora_a is float32\[.*\], expected float32\[.*8\]; "):
        fit(dataclasses.replace(other, steps=9))
    gone = settings(data, tiny[1], tmp_path / "run", **ENDLESS, lora__targets=("to_q",), steps=9)
    config_file.write(tmp_path / "run" / "config.yaml", gone)
    with pytest.raises(InputError, match=r"ema\.layers\.\S+ is not part of this run"):
        fit(gone)


@pytest.mark.slow
def test_a_full_disk(tiny, data, tmp_path, monkeypatch):
    """From step 3 on no file may grow beyond 20 kB, which a checkpoint needs: what was there before stays."""
    out = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def change(trainer, batch):
        if int(trainer.state.step) == 2:
            deadline = time.monotonic() + 60
            while not (out / "checkpoints" / "2").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        return batch

    before_step(monkeypatch, change)
    try:
        with pytest.raises(InputError, match="disk is full, so a checkpoint could not be written; step 2 is the last"):
            fit(settings(data, tiny[1], out, save_every=1, **SMALL))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


BAD = {
    "rank": (["--lora.rank", "0"], "lora.rank: expected a positive integer, found 0"),
    "targets": (["--lora.targets", '["to_z"]'], "lora.targets: 'to_z' matches no linear layer; there are"),
    "unknown": (["--rank", "4"], "--rank: unknown option; did you mean --lora.rank?"),
    "spelling": (["--optimiser.learning-rte", "1"], "unknown option; did you mean --optimizer.learning-rate?"),
    "argument": (["4"], "unexpected argument 4; `acestep-jax train fit --help` lists all options"),
    "value": (["--steps"], "--steps: expected one argument"),
    "kind": (["--steps", "many"], "--steps: expected a whole number, found many"),
    "list": (["--lora.targets", "to_q"], '--lora.targets: expected a list such as \'["one", "two"]\', found to_q'),
    "choice": (["--dtype", "fp8"], "dtype: expected one of float32, bfloat16, found fp8"),
    "sample": (
        ["--report.sample_prompts", "[a]", "--report.sample_seconds", "5"],
        "--report.sample-seconds: expected 10 to 600",
    ),
    "steps": (["--steps", "0"], "steps: expected a number of at least 1, found 0"),
    "warmup": (
        ["--optimizer.warmup_steps", "9", "--steps", "9"],
        "--optimizer.warmup-steps: expected less than steps (9), found 9",
    ),
    "rate": (["--optimizer.learning-rate", "0"], "--optimizer.learning-rate: expected a number above 0"),
    "mixture": (["--examples.text2music", "0", "--examples.repaint", "0", "--examples.cover", "0"], "above 0, found 0"),
    "crops": (
        ["--examples.crop_seconds", "[9]"],
        "--examples.crop-seconds: .* was prepared for [8.0, 10.0], found [9.0]",
    ),
    "mesh": (
        ["--mesh", "fsdp=8", "--examples.batch_size", "4"],
        "--examples.batch-size: 4 does not divide by the mesh's data and",
    ),
    "axis": (["--mesh", "model=8"], "--mesh: expected AXIS=N"),
    "held out": (
        ["--examples.validation_fraction", "0.9"],
        "--examples.validation-fraction: 0.9 holds out all of 5 song(s)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(tiny, data, tmp_path, capsys, case):
    options, message = BAD[case]
    paths = ["--data", data, "--checkpoint", tiny[1], "--out", tmp_path / "run"]
    error = error_of(capsys, "fit", *paths, *options)
    for part in message.split(".* "):
        assert part in error
    assert not (tmp_path / "run").exists()


def test_bad_places(tiny, tiny_base, data, tmp_path, capsys):
    """Of the data, the checkpoint and the run."""
    arguments = dict(data=data, checkpoint=tiny[1], out=tmp_path / "run")

    def error(**changes):
        return error_of(capsys, "fit", *(part for k, v in (arguments | changes).items() for part in (f"--{k}", v)))

    assert f"{tmp_path / 'none'}: no such folder; expected training data" in error(data=tmp_path / "none")
    assert f"{tmp_path / 'none'}: no such folder" in error(checkpoint=tmp_path / "none")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert "mine: already exists and holds no run" in error(out=tmp_path / "mine")
    assert "file: is a file; choose another --out" in error(out=tmp_path / "mine" / "file")
    assert f"the folder {tmp_path / 'none'} does not exist" in error(out=tmp_path / "none" / "run")
    other = tmp_path / "other"
    write_songs(other, tiny[1])
    index = json.loads((other / "index.json").read_text())
    (other / "index.json").write_text(json.dumps(index | {"checkpoint": "0" * 64}))
    assert "was made with another autoencoder or text encoder (000000000000)" in error(data=other)


def parse(*arguments):
    """The settings of a command line."""
    return config_file.instantiate(program().parse_args(["train", "fit", *arguments]).train.fit, TrainConfig)


def test_dashes_and_underscores(tiny, data, tmp_path):
    """Options have dashes, and take underscores as before."""
    paths = ["--data", str(data), "--checkpoint", str(tiny[1]), "--out", str(tmp_path / "run")]
    dashed = parse(*paths, "--optimizer.max-grad-norm", "3", "--save-every=7", "--lora.use-dora", "true")
    assert dashed == parse(*paths, "--optimizer.max_grad_norm", "3", "--save_every=7", "--lora.use_dora", "true")
    assert (dashed.optimizer.max_grad_norm, dashed.save_every, dashed.lora.use_dora) == (3.0, 7, True)


def test_help_has_dashes_and_defaults(capsys):
    with pytest.raises(SystemExit):
        run_command("fit", "--help")
    text = capsys.readouterr().out
    assert not re.findall(r"--[a-z0-9.-]*_", text)
    assert "--optimizer.learning-rate" in text and "(type: int, default: 2000)" in text


def test_missing_arguments(capsys):
    assert error_of(capsys, "fit", "--data", "d").startswith("--checkpoint, --out: missing; ")
    assert error_of(capsys, "export", "run").startswith("DST: missing; ")


def test_yaml_file(tiny, data, tmp_path, capsys):
    """Sections as in `config.yaml`; the command line wins; an unknown key is an error that names it."""
    file = tmp_path / "run.yaml"
    file.write_text(f"data: {data}\ncheckpoint: {tiny[1]}\nout: {tmp_path}/run\nlora: {{rank: 3}}\nsteps: 7\n")
    found = parse("--config", str(file), "--steps", "5")
    assert (found.lora.rank, found.steps, found.data) == (3, 5, str(data))
    config_file.write(tmp_path / "again.yaml", found)
    assert config_file.read(tmp_path / "again.yaml") == found
    for text, name in (
        ("lora: {rnak: 3}", "lora.rnak: unknown setting; did you mean lora.rank?"),
        ("stpes: 3", "stpes: unknown setting; did you mean steps?"),
        ("lora: [", ""),
    ):
        file.write_text(text + "\n")
        error = error_of(capsys, "fit", "--config", file)
        assert name in error and f"settings come from {file} and the command line" in error
        assert error.count("\n") == 1


def test_covers_need_the_audio_tokenizer(tiny, data, tmp_path):
    native = tmp_path / "native"
    shutil.copytree(tiny[1], native)
    values = json.loads((native / "config.json").read_text())
    for name in FAMILY.optional:
        del values[name]
    (native / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="has no audio_tokenizer and audio_token_detokenizer, which covers need; set"):
        Trainer(settings(data, native, tmp_path / "run"), None)


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "grain", None)
    for name in ("finetune", "dataset"):
        monkeypatch.delitem(sys.modules, f"acestep_jax.train.{name}", raising=False)
        monkeypatch.delattr(f"acestep_jax.train.{name}", raising=False)
    error = error_of(capsys, "fit", "--data", "d", "--checkpoint", "c", "--out", "o")
    assert "grain is not installed; run pip install 'acestep-jax[train]'" in error
