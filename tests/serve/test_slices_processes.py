"""Two processes of four CPU devices that serve as one: `pytest -m slow tests/serve/test_slices_processes.py`."""

import io
import json
import signal
import time

import numpy as np
import pytest
import soundfile

from acestep_jax.pipeline import AceStepPipeline
from tests.processes import ends, free_port, start
from tests.serve.fake import wait_until
from tests.serve.test_http_native import wav

pytestmark = pytest.mark.slow  # each start compiles in two processes
httpx = pytest.importorskip("httpx", reason="needs pip install httpx")

SONG = dict(prompt="piano", audio_duration=10.0, seed=3, num_inference_steps=4)


class Slice:
    """Two processes, and a client of the first."""

    def __init__(self, data, *options, mesh="data=2,tensor=4"):
        address, self.port = f"localhost:{free_port()}", free_port()
        command = ["serve", "--mesh", mesh, "--port", self.port, "--data", data, *options]
        self.processes = [start(*command, "--distributed", f"{address},2,{i}", devices=4) for i in range(2)]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)
        wait_until(self.ready, 240)

    def ready(self):
        if any(process.poll() is not None for process in self.processes):
            pytest.fail(f"did not start: {self.ends()}")
        try:
            return self.client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def ends(self, timeout=60):
        return ends(self.processes, timeout)

    def status(self, record):
        return self.client.get(f"/v1/songs/{record}").json()

    def finished(self, record, seconds=300):
        wait_until(lambda: self.status(record)["status"] in ("done", "failed", "cancelled"), seconds)
        return self.status(record)

    def audio(self, record, index):
        answer = self.client.get(f"/v1/songs/{record}/{index}.flac")
        return soundfile.read(io.BytesIO(answer.content), dtype="float32")[0].T


@pytest.fixture
def slices(tmp_path):
    """Return a function that starts a slice on one folder; no process is left."""
    made = []

    def make(*options, **keywords):
        made.append(Slice(tmp_path / "songs", *options, **keywords))
        return made[-1]

    yield make
    for one in made:
        for process in one.processes:
            process.kill()


def test_two_processes_serve_as_one(slices, tmp_path):
    """Songs, a source that only the first has, cancelling and the end are those of one process."""
    one = slices()
    record = one.client.post("/v1/songs", json=SONG | dict(variations=2)).json()["id"]
    assert one.finished(record)["status"] == "done"
    body = dict(prompt="drums", task_type="repaint", repainting_start=1.0, repainting_end=2.0, seed=5)
    body = dict(data=dict(request=json.dumps(body | dict(num_inference_steps=4))))
    repainted = one.client.post("/v1/songs", **body, files=dict(src_audio=("a.wav", wav(4.0)))).json()["id"]
    assert one.finished(repainted)["status"] == "done"
    long = one.client.post("/v1/songs", json=SONG | dict(num_inference_steps=200)).json()["id"]
    wait_until(lambda: one.status(long)["step"] > 2, 120)
    assert one.client.post(f"/v1/songs/{long}/cancel").status_code < 300
    began = time.monotonic()
    after = one.client.post("/v1/songs", json=SONG).json()["id"]
    assert one.finished(after)["status"] == "done"
    print(f"\na song after one that was cancelled: {time.monotonic() - began:.1f} s")
    pipe = AceStepPipeline.from_pretrained()
    differences = []
    for index in range(2):
        (song,) = pipe(**SONG | dict(seed=3 + index))
        differences.append(np.abs(one.audio(record, index) - song.audio).max())
    (tmp_path / "a.wav").write_bytes(wav(4.0))
    (song,) = pipe(
        "drums",
        task_type="repaint",
        repainting_start=1.0,
        repainting_end=2.0,
        seed=5,
        num_inference_steps=4,
        src_audio=str(tmp_path / "a.wav"),
    )
    differences.append(np.abs(one.audio(repainted, 0) - song.audio).max())
    print(f"largest difference to one process: {max(differences):.1e}")
    assert max(differences) <= 1e-4
    one.processes[1].send_signal(signal.SIGTERM)  # as schedulers do: to all, in any order
    one.processes[0].send_signal(signal.SIGTERM)
    made = one.ends()
    assert [status for status, *_ in made] == [0, 0], made


def test_a_slice_ends_with_a_process_and_resumes_when_it_is_started_again(slices):
    one = slices()
    record = one.client.post("/v1/songs", json=SONG | dict(num_inference_steps=150)).json()["id"]
    wait_until(lambda: one.status(record)["step"] > 2, 240)
    one.processes[1].kill()
    leader, follower = one.ends()
    assert leader[0] == 1 and follower[0] == -signal.SIGKILL
    assert "the slice is broken: process 1 is gone" in leader[2], leader[2]
    again = slices()
    assert again.finished(record)["status"] == "done"
    (song,) = AceStepPipeline.from_pretrained()(**SONG | dict(num_inference_steps=150))
    assert np.abs(again.audio(record, 0) - song.audio).max() <= 1e-4
    again.processes[0].kill()
    _, (status, _, errors) = again.ends()
    assert status == 1 and "process 0 is gone" in errors, errors


def test_processes_that_differ_do_not_start(tmp_path):
    address = f"localhost:{free_port()}"
    command = ["serve", "--mesh", "data=2,tensor=4", "--port", free_port(), "--data", tmp_path / "songs"]
    processes = [
        start(*command, *dtype, "--distributed", f"{address},2,{i}", devices=4)
        for i, dtype in enumerate([(), ("--dtype", "bfloat16")])
    ]
    for status, _, errors in ends(processes, 120):
        assert status == 2 and "dtype of process 1 differs" in errors and "Traceback" not in errors, errors
