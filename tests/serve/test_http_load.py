"""Load, with figures: `pytest -m slow -s tests/serve/test_http_load.py`."""

import io
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from acestep_jax.io.checkpoint import SMALL_MODEL
from acestep_jax.pipeline import AceStepPipeline
from acestep_jax.serve.local import LocalEngine
from acestep_jax.serve.models import Model
from tests.serve.fake import FakePipeline, wait_until
from tests.serve.test_http_native import SONG, wav

pytestmark = pytest.mark.slow
STEPS = 4


def mixed(number):
    """Return the request of a song, and its upload: lengths, tasks, seeds, and every tenth one is bad."""
    choose = random.Random(number)
    values = dict(prompt=f"song {number}", seed=number, num_inference_steps=STEPS)
    values["audio_duration"] = choose.choice([10.0, 10.2, 20.0])
    if number % 10 == 7:
        return values | dict(bpm=1000), None
    if number % 5 == 3:
        del values["audio_duration"]
        return values | dict(task_type="repaint", repainting_start=1.0, repainting_end=2.0), wav(4.0)
    return values, None


def test_fifty_songs_from_ten_clients(http):
    """All are answered; each is the song that it is alone, to 1e-5 and the 24 bits of FLAC; compilations are few."""
    import json

    import httpx

    pipe = AceStepPipeline.from_pretrained()
    engine = LocalEngine([Model("small", SMALL_MODEL, load=lambda: pipe)], max_batch=4)
    client = http(engine=engine)
    answers = {}

    def ask(numbers):
        with httpx.Client(base_url=client.base_url, timeout=60) as own:
            for number in numbers:
                values, upload = mixed(number)
                if upload is None:
                    answers[number] = own.post("/v1/songs", json=values)
                else:
                    body = dict(data=dict(request=json.dumps(values)), files=dict(src_audio=("a.wav", upload)))
                    answers[number] = own.post("/v1/songs", **body)

    began = time.monotonic()
    threads = [threading.Thread(target=ask, args=(range(first, 50, 10),)) for first in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    good = {number: answer.json()["id"] for number, answer in answers.items() if answer.status_code == 202}
    assert sorted(good) == [number for number in range(50) if number % 10 != 7]
    assert {answer.status_code for number, answer in answers.items() if number not in good} == {400}
    records = client.service.records
    wait_until(lambda: all(records[record_id].final for record_id in good.values()), 900)
    together = time.monotonic() - began
    assert {records[record_id].status for record_id in good.values()} == {"done"}
    shapes, programs = {program.shape for program in engine.compiled}, len(engine.compiled)
    worst, alone = 0.0, 0.0
    for number, record_id in good.items():
        values, upload = mixed(number)
        if upload is not None:
            values["src_audio"] = str(client.service.store.songs / record_id / "src_audio")
        start = time.monotonic()
        (song,) = pipe(**values)
        alone += time.monotonic() - start
        found, _ = soundfile.read(io.BytesIO(client.get(f"/v1/songs/{record_id}/0.flac").content), dtype="float32")
        worst = max(worst, float(np.abs(found.T - song.audio).max()))
    print(f"\n50 songs from 10 clients: {together:.1f} s, one at a time {alone:.1f} s, ratio {alone / together:.2f};")
    print(f"{programs} programs of {len(shapes)} shapes, largest difference {worst:.2e}")
    assert worst < 1e-5 + 2**-23
    assert programs <= 3 * 2 * len(shapes)


POLLING = """
import sys, threading, time
import httpx
url, rate, threads = sys.argv[1], 1000.0, 4
count, lock = [0], threading.Lock()
def poll(number):
    with httpx.Client() as own:
        due = time.monotonic() + number * threads / rate / threads
        while True:
            assert own.get(url).status_code == 200
            with lock:
                count[0] += 1
            due = max(due + threads / rate, time.monotonic() - 0.1)  # what was missed is not made up for
            time.sleep(max(0.0, due - time.monotonic()))
for number in range(threads):
    threading.Thread(target=poll, args=(number,), daemon=True).start()
print("polling", flush=True)
sys.stdin.readline()
print(count[0], flush=True)
"""


def test_a_thousand_polls_a_second_beside_a_batch(http):
    """Seconds of a batch of the small model, with and without another process that polls, and what a poll costs."""
    pipe = AceStepPipeline.from_pretrained()
    engine = LocalEngine([Model("small", SMALL_MODEL, load=lambda: pipe)], max_batch=2)
    client = http(engine=engine)

    def batch():
        record_id = client.post("/v1/songs", json=SONG | dict(num_inference_steps=30, variations=2)).json()["id"]
        record = client.service.records[record_id]
        wait_until(lambda: record.final, 300)
        return record.finished - record.started, record_id

    batch()
    times, counted, record_id = {True: [], False: []}, [], batch()[1]

    def polling():
        command = [sys.executable, "-c", POLLING, f"{str(client.base_url).rstrip('/')}/v1/songs/{record_id}"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "polling\n"
        return process, time.monotonic()

    def stop(process, began):
        told, _ = process.communicate("\n")
        counted.append(int(told) / (time.monotonic() - began))

    for _ in range(5):  # in turn: other work on the machine comes and goes
        times[False].append(batch()[0])
        process = polling()
        times[True].append(batch()[0])
        stop(*process)
    process, before = polling(), time.process_time()
    time.sleep(3.0)
    used = time.process_time() - before
    stop(*process)
    quiet, busy = (statistics.median(times[on]) for on in (False, True))
    print(f"\n{counted[-1]:.0f} polls a second without a batch, {statistics.median(counted[:-1]):.0f} beside one;")
    print(f"a poll takes {1e6 * used / (3.0 * counted[-1]):.0f} us of the server's processor")
    print(f"a batch takes {quiet:.2f} s without and {busy:.2f} s with them, {busy / quiet:.3f} times as long")
    assert {client.service.records[one].status for one in client.service.records} == {"done"}


def test_an_upload_of_300_mb_and_a_flac_of_three_hours(http):
    """Both are refused, with memory that does not grow with them."""
    client = http(started=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def pieces():
        yield b'--b\r\nContent-Disposition: form-data; name="src_audio"; filename="a.wav"\r\n\r\n'
        for _ in range(300):
            yield bytes(2**20)

    kind = {"content-type": "multipart/form-data; boundary=b"}
    assert client.post("/v1/songs", content=pieces(), headers=kind).status_code == 413
    long = io.BytesIO()
    with soundfile.SoundFile(long, "w", 8000, 1, format="FLAC") as file:
        for _ in range(3 * 60):
            file.write(np.zeros(60 * 8000, np.int16))
    body = dict(data=dict(request='{"prompt": "x", "task_type": "cover"}'))
    response = client.post("/v1/songs", **body, files=dict(src_audio=("a.flac", long.getvalue())))
    assert response.status_code == 400 and "expected at most 600 s" in response.json()["detail"]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"\nan upload of 300 MB and {len(long.getvalue()) / 1e6:.1f} MB of FLAC with three hours: {grown:.0f} MB more"
    )
    assert grown < 100


def test_schemathesis_finds_no_error_of_the_server(http, tmp_path):
    program = shutil.which("st") or str(Path(sys.executable).parent / "st")
    if not Path(program).exists():
        pytest.skip("needs pip install schemathesis")
    client = http(pipe=FakePipeline(), planner="acestep-5Hz-lm-tiny")
    command = [program, "run", f"{str(client.base_url).rstrip('/')}/openapi.json", "--checks", "not_a_server_error"]
    command += ["--exclude-path-regex", "^/(vae|v1/transcribe)$"]  # which answer 501, always
    done = subprocess.run(
        [*command, "--max-examples", "150", "--no-color"], capture_output=True, text=True, cwd=tmp_path
    )
    summary = done.stdout[-3000:]
    print(summary)
    cases = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) generated", summary)]
    assert not client.service.dead and cases and sum(cases) >= 2000, summary
    assert "Server error" not in done.stdout, done.stdout
