"""`acestep-jax serve`: what is checked before anything is loaded, and a server of its own process."""

import io
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from acestep_jax import AceStepPipeline, cli
from acestep_jax.cli import runtime, serve
from tests.processes import free_port, start


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--host: everyone who can reach 0.0.0.0 could use this server"),
        (["--host", "example.com"], "--host: everyone who can reach example.com"),
        (["--api-key", ""], "--api-key: is empty"),
        (["--api-key", "schlüssel"], "--api-key: expected ASCII"),
        (["--warm", "soon"], "--warm: expected seconds such as 30,60"),
        (["--max-batch", "0"], "--max-batch: expected at least 1, found 0"),
        (["--lora", "run/adapter"], "--lora: expected NAME=DIR"),
        (["--variant", "a", "--variant", "b"], "--variant: expected one or 1"),
        (["--model", "a=/nowhere/at/all"], "/nowhere/at/all"),
        (["--planner", "/nowhere/planner"], "/nowhere/planner: no such folder"),
        (["--inputs", "/nowhere/inputs"], "--inputs: /nowhere/inputs is not a folder"),
    ],
)
def test_options_that_cannot_be_used(options, message, capsys, monkeypatch, tmp_path):
    pytest.importorskip("fastapi", reason="needs pip install 'acestep-jax[serve]'")
    monkeypatch.delenv(serve.KEY, raising=False)
    monkeypatch.setattr(runtime, "use_compilation_cache", lambda: None)
    assert cli.main(["serve", "--data", str(tmp_path / "data"), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.unit
def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(serve, "PACKAGES", ("fastapi_that_is_not_there",))
    assert cli.main(["serve"]) == 2
    assert "run pip install 'acestep-jax[serve]'" in capsys.readouterr().err


@pytest.mark.unit
def test_a_key_comes_from_an_option_a_file_or_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv(serve.KEY, raising=False)
    (tmp_path / "key").write_text("from-file\n")
    assert serve._key(None) is None and serve._key("given") == "given"
    assert serve._key(f"@{tmp_path / 'key'}") == "from-file"
    monkeypatch.setenv(serve.KEY, "from-environment")
    assert serve._key(None) == "from-environment"


@pytest.mark.unit
def test_the_planner_of_a_model(tmp_path):
    """The small model has none; what was named must be there."""
    from acestep_jax.io.checkpoint import SMALL_MODEL

    small = Path(SMALL_MODEL)
    assert serve._planner(None, str(small), small, None) is None
    assert serve._planner("none", str(small), small, None) is None and serve._planner_name(None) is None
    assert serve._planner_name(str(tmp_path / "acestep-5Hz-lm-4B")) == "acestep-5Hz-lm-4B"
    (tmp_path / "source.json").write_text('{"source": "ACE-Step/acestep-5Hz-lm-0.6B"}')
    assert serve._planner_name(str(tmp_path)) == "acestep-5Hz-lm-0.6B"


def test_a_server_makes_the_songs_of_the_library_and_ends_with_sigterm(tiny, tmp_path):
    """A batch of two: each song is the one that the library makes alone, to 1e-5 and 24 bits."""
    pytest.importorskip("fastapi", reason="needs pip install 'acestep-jax[serve]'")
    import httpx

    port = free_port()
    process = start("serve", "--model", tiny[1], "--port", port, "--data", tmp_path / "data", "--grace", "20")
    url = f"http://127.0.0.1:{port}"
    asked = dict(prompt="deep house", audio_duration=10.0, seed=3, num_inference_steps=2)
    try:
        end = time.monotonic() + 120
        while True:
            try:
                assert httpx.get(f"{url}/ready").status_code in (200, 503)
                break
            except httpx.TransportError:
                assert time.monotonic() < end and process.poll() is None, process.communicate()
                time.sleep(0.1)
        record_id = httpx.post(f"{url}/v1/songs", json=asked | dict(variations=2)).json()["id"]
        while (record := httpx.get(f"{url}/v1/songs/{record_id}").json())["status"] in ("queued", "running"):
            assert time.monotonic() < end
            time.sleep(0.1)
        assert record["status"] == "done", record
        sent = [httpx.get(url + song["audio"]).content for song in record["songs"]]
        waiting = httpx.post(f"{url}/v1/songs", json=asked | dict(seed=9)).json()["id"]
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, log
    assert "batch of 2 (size 2, 256 frames)" in log and "Traceback" not in log
    assert (tmp_path / "data" / "songs" / waiting / "request.json").exists()
    alone = AceStepPipeline.from_pretrained(tiny[1])(**asked | dict(seed=4))
    found, rate = soundfile.read(io.BytesIO(sent[1]), dtype="float32")
    assert rate == alone[0].sample_rate and np.abs(found.T - alone[0].audio).max() < 1e-5 + 2**-23
