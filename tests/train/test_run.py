"""The folder of a run: what may be resumed, the lock, results in place of earlier ones, divergence."""

import re

import pytest

from acestep_jax import InputError
from acestep_jax.io.files import as_path, files_below
from acestep_jax.train import config_file, run
from acestep_jax.train.config import AutoencoderTrainConfig, ObjectiveConfig
from acestep_jax.train.finetune import FineTuning
from acestep_jax.train.report import Report, read_metrics
from tests import cloud
from tests.training import settings


@pytest.fixture
def folder(tmp_path):
    """A run of six steps whose last checkpoint is of step 4, and its settings."""
    config = settings("data", "checkpoint", tmp_path / "run")
    with run.opened(tmp_path / "run", config) as folder:
        (folder / run.CHECKPOINTS / "4").mkdir(parents=True)
    return folder, config


def test_settings_are_read_as_they_were_written(folder, tmp_path):
    path, config = folder
    assert config_file.read(path / run.CONFIG) == config
    other = AutoencoderTrainConfig(data="songs", out="run")
    config_file.write(tmp_path / "other.yaml", other)
    assert config_file.read(tmp_path / "other.yaml") == other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=9, save_every=1, keep=1, mesh="data=1", remat="full", report__log_every=3), None),
        (dict(examples__workers=0, max_bad_steps=2, report__sample_prompts=("a",)), None),
        (dict(seed=1), r"holds a run with other settings \(seed was 0, now 1\); use those, or another --out"),
        (
            dict(optimizer__ema_decay=0.5, lora__rank=8),
            r"\(lora.rank was 4, now 8, optimizer.ema_decay was None, now 0.5",
        ),
        (dict(examples__crop_seconds=(10.0,)), r"\(examples.crop_seconds was \(8.0,\), now \(10.0,\)\)"),
        (dict(steps=3), r"has made 4 steps already, more than steps \(3\); `acestep-jax train export`"),
    ],
)
def test_what_a_resumed_run_may_change(folder, changes, message):
    path, _ = folder
    config = settings("data", "checkpoint", path, **changes)
    if message is None:
        run.check_folder(path, config)
    else:
        with pytest.raises(InputError, match=message):
            run.check_folder(path, config)


def test_a_run_of_another_kind(folder):
    path, _ = folder
    with pytest.raises(InputError, match="run: holds a run of another kind of training; choose another --out"):
        run.check_folder(path, AutoencoderTrainConfig(data="songs", out=str(path)))


def test_a_run_without_checkpoints_may_change(folder):
    path, _ = folder
    (path / run.CHECKPOINTS / "4").rmdir()
    run.check_folder(path, settings("data", "checkpoint", path, seed=1))


def test_two_commands_on_one_run(folder):
    path, config = folder
    with run.opened(path, config):
        with pytest.raises(InputError, match="run: another process is training this run; wait for its end or stop it"):
            with run.opened(path, config):
                pass
    with run.opened(path, config):
        pass


def test_a_result_replaces_an_earlier_one(tmp_path):
    """And what a killed process has left of it."""
    target, left = tmp_path / "adapter", tmp_path / ".adapter-new"

    def write(text):
        def write(path):
            path.mkdir()
            (path / text).touch()

        return write

    for text in ("one", "two"):
        left.mkdir()
        run.replace(target, write(text))
        assert [path.name for path in target.iterdir()] == [text] and not left.exists()

    def fails(path):
        raise InputError("full")

    with pytest.raises(InputError, match="full"):
        run.replace(target, fails)
    assert [path.name for path in target.iterdir()] == ["two"]


def test_sources_that_changed():
    before = {"data": "1", "checkpoint": "2"}
    run.check_unchanged("run", before, dict(before))
    with pytest.raises(
        InputError, match="run: the data and the checkpoint of this run changed after its last checkpoint"
    ):
        run.check_unchanged("run", before, {"data": "3", "checkpoint": "4"})


def test_divergence(folder):
    config = settings("data", "checkpoint", "out", max_bad_steps=3)
    run.check_finite(config, 7, 2)
    with pytest.raises(
        run.DivergedError, match="out: the loss or its gradient is non-finite since step 5, 3 consecutive"
    ):
        run.check_finite(config, 7, 3)


def test_a_run_in_cloud_storage(monkeypatch):
    """Nothing is renamed or appended there; metrics arrive with each checkpoint, and at the end."""
    bucket = cloud.use(monkeypatch)
    folder = as_path("gs://music/runs/one")
    config = settings("data", "checkpoint", folder)
    run.check_folder(folder, config)
    with run.opened(folder, config):
        assert config_file.read(folder / run.CONFIG) == config
        report = Report(folder, 0, config, 25.0, lambda details: {}, FineTuning.panels)
        with report:
            report.write(1, {"loss": 2.0})
            assert "/music/runs/one/metrics.jsonl" not in bucket
            report.publish()
            assert read_metrics(folder) == [{"step": 1, "loss": 2.0}]
            report.write(2, {"loss": 1.0})
    assert len(read_metrics(folder)) == 2 and (folder / "loss.png").exists()
    with Report(folder, 1, config, 25.0, lambda details: {}, FineTuning.panels):  # resumed from step 1
        pass
    assert read_metrics(folder) == [{"step": 1, "loss": 2.0}]
    for text in ("one", "two"):
        run.replace(folder / "adapter", lambda path, text=text: (path / text).write_text(text))
        assert files_below(folder / "adapter") == [text]
    (folder / run.CHECKPOINTS / "4" / "x").write_text("")
    with pytest.raises(InputError, match="gs://music/runs/one: holds a run with other settings"):
        run.check_folder(folder, settings("data", "checkpoint", folder, seed=1))


@pytest.mark.parametrize("name", ["steps_of_warmup", "mesh_rules", "checkpoint_every", "examples.workers_more"])
def test_a_name_that_only_begins_like_one_may_not_change(name):
    assert not run._is_changeable(name)
    assert run._is_changeable("report.log_every") and run._is_changeable("steps")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: settings("d", "c", "o", method="LoRA"), "method: 'LoRA' is unknown; did you mean lora?"),
        (lambda: settings("d", "c", "o", dtype="float16"), "dtype: 'float16' is unknown; did you mean bfloat16?"),
        (lambda: settings("d", "c", "o", remat="some"), "remat: 'some' is unknown; expected one of none, dots, full"),
        (
            lambda: ObjectiveConfig(timesteps="logit-normal"),
            "timesteps: 'logit-normal' is unknown; did you mean logit_",
        ),  # type: ignore[arg-type]
    ],
)
def test_unknown_choices_are_refused_from_python_too(make, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        make()
    assert settings("d", "c", "o", dtype=None).dtype is None
