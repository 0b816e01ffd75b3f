"""The options of `acestep-jax serve` about who makes the songs."""

import importlib.util
import types

import pytest

from acestep_jax import cli
from acestep_jax.cli import engines
from acestep_jax.errors import InputError
from acestep_jax.serve.local import LocalEngine
from tests.serve.fake import model

pytestmark = pytest.mark.unit


def options(*words):
    return cli.parser().parse_args(["serve", *words]).serve


@pytest.fixture
def has_ray(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: types.SimpleNamespace())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--replica-resources", "GPU=1"], "--replica-resources: without --replicas this process makes the songs"),
        (["--replicas", "0"], "--replicas: expected at least 1, found 0"),
        (["--replicas", "2", "--distributed"], "--replicas, --distributed: expected one of them, found both"),
        (["--replicas", "2", "--replica-resources", "GPU"], "expected NAME=N,... such as GPU=1, found 'GPU'"),
        (["--replicas", "2", "--replica-resources", "GPU=0"], "found 'GPU=0'"),
        (["--replicas", "2", "--replica-resources", "=1"], "found '=1'"),
        (["--replicas", "2", "--replica-resources", "GPU=nan"], "found 'GPU=nan'"),
    ],
)
def test_options_that_do_not_go_together(words, message, has_ray):
    with pytest.raises(InputError, match=message.replace("...", r"\.\.\.")):
        engines.check_engine(options(*words))


def test_what_replicas_take_of_the_cluster(has_ray):
    engines.check_engine(options("--replicas", "2", "--replica-resources", "TPU=4,CPU=0.5"))
    assert engines._resources("TPU=4,CPU=0.5") == {"TPU": 4.0, "CPU": 0.5}
    assert engines._resources(None) == {"CPU": 1.0}


def test_ray_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--replicas: ray is not installed; run pip install 'acestep-jax\[ray\]'"):
        engines.check_engine(options("--replicas", "2"))


def test_one_process_makes_songs_itself():
    engine = engines.open_engine(options(), [model(None)], {"jazz": "/nowhere"}, lambda *_: None, max_batch=2)
    assert type(engine) is LocalEngine and engine.max_batch == 2 and list(engine.adapters) == ["jazz"]
    with engines.ended(engine):
        pass
    assert not engine.ready


def test_paths_hold_where_a_replica_is_started(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["--model", "mine=run", "--model", "run", "--model", "ACE-Step/Ace-Step1.5", "--lora", "jazz=run"]
    given = options(*words, "--planner", "run")
    found = engines._absolute(given)
    here = str(tmp_path / "run")
    assert found.checkpoint == [f"mine={here}", here, "ACE-Step/Ace-Step1.5"] and found.lora == [f"jazz={here}"]
    assert found.planner == here and engines._absolute(options("--planner", "none")).planner == "none"
    assert given.checkpoint[0] == "mine=run"
