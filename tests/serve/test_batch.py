"""`acestep-jax generate --batch`: many songs from a file of requests; and codes on the command line."""

import dataclasses
import errno
import json
import os
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import soundfile

from acestep_jax import AceStepPipeline, Request, Sampling, cli
from acestep_jax.arguments import arguments as about
from acestep_jax.cli import generate, runtime
from acestep_jax.cli.parser import read_fields
from acestep_jax.diffusion import denoise
from acestep_jax.io.files import as_path, upload
from acestep_jax.serve import jsonl
from tests import cloud
from tests.parity import normal
from tests.processes import together


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """The tests leave the user's cache folder alone."""
    monkeypatch.setattr(runtime, "use_compilation_cache", lambda: None)


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")


def run(tiny, tmp_path, *options):
    places = ["--batch", tmp_path / "requests.jsonl", "--out-dir", tmp_path / "out", "--checkpoint", tiny[1]]
    return cli.main(["generate", *map(str, [*places, "--steps", "1", *options])])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def source(tmp_path):
    soundfile.write(tmp_path / "source.wav", 0.1 * normal(48_000 * 2, 2), 48_000)
    return "source.wav"


def test_songs_and_settings_failures_and_a_second_run(tiny, tmp_path, capsys, source, monkeypatch):
    """Packed by length; one line that cannot be read and one that cannot be made stop nothing; finished ones stay."""
    write_lines(
        tmp_path / "requests.jsonl",
        dict(prompt="piano", audio_duration=10, seed=1),
        "{not json",
        "",
        dict(name="take.flac", prompt="drums", audio_duration=10.2, seed=2, lyrics="la"),
        dict(name="cover", prompt="flute", task_type="cover", src_audio=source, seed=3),
        dict(name="gone", prompt="flute", task_type="cover", src_audio="gone.wav"),
        dict(prompt="long", audio_duration=21, seed=4, retake_variance=0.5),
    )
    sizes = []
    whole = denoise.denoise

    def counted(transformer, condition_encoder, inputs, *, method):
        sizes.append(inputs.x.shape)
        return whole(transformer, condition_encoder, inputs, method=method)

    monkeypatch.setattr(denoise, "denoise", counted)
    assert run(tiny, tmp_path, "--batch-size", 2) == 1
    captured = capsys.readouterr()
    assert sizes == [(2, 256, 8), (1, 256, 8), (1, 768, 8)]  # 10 and 10.2 s, the cover of 2 s, 21 s
    made = ["00001", "take", "cover", "00007"]
    assert names(tmp_path / "out") == sorted(
        [f"{name}.json" for name in made] + ["00001.wav", "take.flac", "cover.wav", "00007.wav"]
    )
    assert len(captured.out.splitlines()) == 4
    failures = [line for line in captured.err.splitlines() if line.startswith("acestep-jax: ")]
    assert len(failures) == 2
    assert "requests.jsonl:2: not JSON" in failures[0] and "requests.jsonl:6: " in failures[1]
    assert "gone.wav" in failures[1]

    settings = json.loads((tmp_path / "out" / "take.json").read_text())
    assert settings["seed"] == 2 and settings["request"]["prompt"] == "drums" and settings["seconds"] == 10.2
    assert settings["retake_seed"] is None
    assert json.loads((tmp_path / "out" / "00007.json").read_text())["retake_seed"] in range(2**32)
    assert settings["request"]["num_inference_steps"] == 1 and settings["checkpoint"] == str(tiny[1])
    pipe = AceStepPipeline.from_checkpoint(tiny[1])
    alone = pipe("drums", lyrics="la", audio_duration=10.2, seed=2, num_inference_steps=1)
    found, rate = soundfile.read(tmp_path / "out" / "take.flac")
    assert rate == 48_000 and found.shape == (alone.samples[0], 2)
    assert np.abs(found.T - alone.audios[0]).max() < 1e-4

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "cover.json").unlink()
    (tmp_path / "out" / "cover.wav").unlink()
    sizes.clear()
    assert run(tiny, tmp_path) == 1
    assert sizes == [(1, 256, 8)]
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert after.keys() == before.keys()
    assert {path.stem for path in after if after[path] != before[path]} == {"cover"}


def test_a_song_with_other_settings_is_not_overwritten(tiny, tmp_path, capsys):
    write_lines(tmp_path / "requests.jsonl", dict(prompt="piano", audio_duration=10, name="a"))
    assert run(tiny, tmp_path) == 0
    first = (tmp_path / "out" / "a.wav").read_bytes()
    write_lines(tmp_path / "requests.jsonl", dict(prompt="drums", audio_duration=10, name="a"))
    assert run(tiny, tmp_path) == 1
    assert "a.json: already exists, made with other settings" in capsys.readouterr().err
    assert (tmp_path / "out" / "a.wav").read_bytes() == first
    assert run(tiny, tmp_path, "--overwrite") == 0
    assert (tmp_path / "out" / "a.wav").read_bytes() != first
    (tmp_path / "out" / "a.json").rename(tmp_path / "kept.json")
    assert run(tiny, tmp_path) == 1
    assert "a.wav: already exists; remove it" in capsys.readouterr().err
    # Stopped between the settings and the sound: made again.
    (tmp_path / "kept.json").rename(tmp_path / "out" / "a.json")
    (tmp_path / "out" / "a.wav").unlink()
    assert run(tiny, tmp_path) == 0 and (tmp_path / "out" / "a.wav").exists()
    # Somebody else's file.
    (tmp_path / "out" / "a.wav").unlink()
    (tmp_path / "out" / "a.json").write_text('{"mine": 1}')
    assert run(tiny, tmp_path) == 1
    assert (tmp_path / "out" / "a.json").read_text() == '{"mine": 1}'


def test_one_song_of_a_batch_that_fails(tiny, tmp_path, monkeypatch):
    """The others are made alone."""
    write_lines(tmp_path / "requests.jsonl", *(dict(prompt=name, audio_duration=10, name=name) for name in "abc"))
    songs, errors = jsonl.read(tmp_path / "requests.jsonl", tmp_path, dict(num_inference_steps=1))
    assert not errors
    pipe = AceStepPipeline.from_checkpoint(tiny[1])
    run = AceStepPipeline.run

    def fail(self, jobs, sampling):
        if any(job.request.prompt == "b" for job in jobs):
            raise ValueError("no b")
        return run(self, jobs, sampling)

    monkeypatch.setattr(AceStepPipeline, "run", fail)
    results = {song.request.prompt: error for song, error in jsonl.generate(pipe, songs, 3, {})}
    assert results == {"a": None, "b": "ValueError: no b", "c": None}
    assert (tmp_path / "c.wav").exists() and not (tmp_path / "b.wav").exists()


def test_a_song_that_is_not_finite_is_reported_and_not_written(tiny, tmp_path):
    """The others of its batch are."""
    write_lines(tmp_path / "requests.jsonl", *(dict(prompt=name, audio_duration=10, name=name) for name in "abc"))
    songs, _ = jsonl.read(tmp_path / "requests.jsonl", tmp_path, dict(num_inference_steps=1))
    noise = normal(250, 8)
    noise[3, 2] = np.nan
    songs[1] = dataclasses.replace(songs[1], request=dataclasses.replace(songs[1].request, latents=noise))
    pipe = AceStepPipeline.from_checkpoint(tiny[1])
    results = {song.request.prompt: error for song, error in jsonl.generate(pipe, songs, 3, {})}
    assert results["a"] is results["c"] is None
    assert "song 'b': " in results["b"] and "of the latents, after denoising, are NaN or infinite" in results["b"]
    assert names(tmp_path) == ["a.json", "a.wav", "c.json", "c.wav", "requests.jsonl"]


HOPELESS = {
    "name: 305 bytes": dict(prompt="x", name="n" * 300),
    "name: 259 bytes": dict(prompt="x", name="é" * 127),  # each is two bytes
    "name: holds half a character": '{"prompt": "x", "name": "\\ud83d"}',
    "instruction: not valid text": '{"prompt": "x", "instruction": "\\ud83d"}',
    "lyrics: not valid text": '{"prompt": "x", "lyrics": "\\ud83d"}',
    "src_audio": dict(prompt="x", task_type="cover", src_audio="s" * 300),
    "embedded null byte": dict(prompt="x", task_type="cover", src_audio="a\0b"),
    "'\\ud83d.wav'": '{"prompt": "x", "task_type": "cover", "src_audio": "\\ud83d.wav"}',
    "a/b": dict(prompt="x", name="a/b"),
}


def test_nothing_that_is_wrong_with_a_line_stops_the_others(tiny, tmp_path, capsys):
    lines = list(HOPELESS.values())
    write_lines(tmp_path / "requests.jsonl", *lines, dict(prompt="y", audio_duration=10, name="y"))
    assert run(tiny, tmp_path) == 1
    failures = [line for line in capsys.readouterr().err.splitlines() if line.startswith("acestep-jax: ")]
    assert [line.partition("requests.jsonl:")[2].partition(":")[0] for line in sorted(failures)] == [
        str(i) for i in range(1, 1 + len(lines))
    ]
    assert names(tmp_path / "out") == ["y.json", "y.wav"]


def no_new_files(monkeypatch, folder):
    """Let the folder take no new file, as one that belongs to somebody else."""
    make = tempfile.mkstemp

    def refuse(*args, dir=None, **options):
        if Path(dir) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", f"{dir}/.temporary-x7")
        return make(*args, dir=dir, **options)

    monkeypatch.setattr(tempfile, "mkstemp", refuse)


OUTPUTS = {
    "generate": ["generate", "x", "--out", "OUT/song.wav"],
    "batch": ["generate", "--batch", "REQUESTS", "--out-dir", "OUT"],
    "tokenize": ["tokenize", "SOURCE", "--out", "OUT/codes.txt"],
    "detokenize": ["detokenize", "<|audio_code_1|>" * 5, "--out", "OUT/song.wav"],
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs_are_probed_before_weights_are_loaded(tiny, tmp_path, capsys, source, monkeypatch, case):
    (tmp_path / "out").mkdir()
    write_lines(tmp_path / "requests.jsonl", dict(prompt="x"))
    no_new_files(monkeypatch, tmp_path / "out")
    monkeypatch.setattr(AceStepPipeline, "from_pretrained", None)
    places = dict(OUT=tmp_path / "out", REQUESTS=tmp_path / "requests.jsonl", SOURCE=tmp_path / source)
    words = OUTPUTS[case]
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    assert cli.main([*words, "--checkpoint", str(tiny[1])]) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error and f"{tmp_path / 'out'} takes no new file (Permission denied)" in error
    assert "temporary" not in error and "Traceback" not in error


LINES = {
    "expected a JSON object, found [1]": "[1]",
    "bmp: unknown key; did you mean bpm?": dict(prompt="x", bmp=90),
    "latents: unknown key": dict(prompt="x", latents=[0]),
    "prompt: missing; describe the music": dict(seed=1),
    "prompt: expected text, found None": dict(prompt=None),
    "name: expected the name of a file, without folders, found 'a/b'": dict(prompt="x", name="a/b"),
    "name: first is already used by": dict(prompt="x", name="first.flac"),
    "name: expected the name of a file, without folders, found '..'": dict(prompt="x", name=".."),
    "keyscale: expected text, found 5": dict(prompt="x", keyscale=5),
    "noise: expected text, found None": dict(prompt="x", noise=None),
    "timesteps: expected a list of numbers, found {'a': 1}": dict(prompt="x", timesteps={"a": 1}),
    "lyrics: expected text, found None": dict(prompt="x", lyrics=None),
    "audio_duration: expected a number, found 'long'": dict(prompt="x", audio_duration="long"),
    "seed: expected a whole number, found 1.5": dict(prompt="x", seed=1.5),
    "solver: expected one of euler": dict(prompt="x", solver="dpm"),
    "repaint_injection_ratio: expected a number, found 'half'": dict(prompt="x", repaint_injection_ratio="half"),
    "src_audio: expected the name of a file, found 3": dict(prompt="x", src_audio=3),
}


@pytest.mark.unit
@pytest.mark.parametrize("message", LINES)
def test_bad_lines(tmp_path, message):
    write_lines(tmp_path / "requests.jsonl", dict(prompt="x", name="first"), LINES[message])
    songs, errors = jsonl.read(tmp_path / "requests.jsonl", tmp_path, {})
    assert len(songs) == 1 and len(errors) == 1
    assert errors[0].startswith(f"{tmp_path / 'requests.jsonl'}:2: {message}")


@pytest.mark.unit
def test_one_line_in_another_encoding_stops_no_other(tmp_path):
    lines = [b'\xef\xbb\xbf{"prompt": "x"}', '{"prompt": "café"}'.encode("latin-1"), '{"prompt": "café"}'.encode()]
    (tmp_path / "requests.jsonl").write_bytes(b"\r\n".join(lines))
    songs, errors = jsonl.read(tmp_path / "requests.jsonl", tmp_path, {})
    assert [song.request.prompt for song in songs] == ["x", "café"]
    assert len(errors) == 1 and errors[0].startswith(f"{tmp_path / 'requests.jsonl'}:2: not UTF-8 text")


@pytest.mark.unit
def test_lines_end_at_line_feeds_alone(tmp_path):
    """Not at what else Unicode takes for an end of line, which JSON may hold as it is; names with dots are names."""
    line = json.dumps(dict(prompt="x", lyrics="one\u2028two\x85", name="No. 5"), ensure_ascii=False)
    write_lines(tmp_path / "requests.jsonl", line, dict(prompt="y"))
    songs, errors = jsonl.read(tmp_path / "requests.jsonl", tmp_path, {})
    assert not errors and [song.path.name for song in songs] == ["No. 5.wav", "00002.wav"]
    assert songs[0].request.lyrics == "one\u2028two\x85"


def test_sources_are_not_overwritten(tiny, tmp_path, capsys, source):
    """Neither by a song of a batch nor by one alone, even when asked to overwrite."""
    wave = tmp_path / source
    before = wave.read_bytes()
    options = [
        "--task",
        "cover",
        "--source",
        str(wave),
        "--out",
        str(wave),
        "--overwrite",
        "--checkpoint",
        str(tiny[1]),
    ]
    assert cli.main(["generate", "x", *options]) == 2
    assert "source.wav is the --source itself; choose another name" in capsys.readouterr().err
    write_lines(tmp_path / "requests.jsonl", dict(prompt="x", name=source, src_audio=source, task_type="cover"))
    _, errors = jsonl.read(tmp_path / "requests.jsonl", tmp_path, {})
    assert "is a source or reference of the song itself" in errors[0] and wave.read_bytes() == before


VALUES = {
    "tasks": dict(task_type="repaint", src_audio="source.wav", repainting_start=5, repainting_end=4),
}


@pytest.mark.parametrize("case", VALUES)
def test_bad_values(tiny, tmp_path, capsys, source, case):
    """Of the right form, but nothing that can be made; the song after it is."""
    write_lines(
        tmp_path / "requests.jsonl", dict(prompt="x") | VALUES[case], dict(prompt="y", audio_duration=10, name="y")
    )
    assert run(tiny, tmp_path, "--batch-size", 4) == 1
    captured = capsys.readouterr()
    assert f"{tmp_path / 'requests.jsonl'}:1: " in captured.err and "Traceback" not in captured.err
    assert names(tmp_path / "out") == ["y.json", "y.wav"]


def test_bad_options(tiny, tmp_path, capsys):
    write_lines(tmp_path / "requests.jsonl", dict(prompt="x"))
    assert run(tiny, tmp_path, "--batch-size", "0") == 2
    assert cli.main(["generate", "--batch", str(tmp_path / "requests.jsonl"), "--checkpoint", str(tiny[1])]) == 2
    assert cli.main(["generate", "x", "--batch", "y", "--out-dir", "z", "--checkpoint", str(tiny[1])]) == 2
    assert cli.main(["generate", "--checkpoint", str(tiny[1])]) == 2
    assert cli.main(["generate", "x", "--batch-size", "2", "--checkpoint", str(tiny[1])]) == 2
    assert run(tiny, tmp_path, "--out", "song.wav") == 2
    (tmp_path / "requests.jsonl").write_text("\n\n")
    assert run(tiny, tmp_path) == 2
    (tmp_path / "requests.jsonl").write_bytes(b"\xff\xfe")
    assert run(tiny, tmp_path) == 2
    errors = capsys.readouterr().err.splitlines()
    expected = ("--batch-size: expected", "--out-dir: missing", "PROMPT, --batch: expected one", "PROMPT: missing")
    expected += ("--batch-size: for the songs of --batch only", "--out: for one song only", "no request", "UTF-8")
    for line, message in zip(errors, expected, strict=True):
        assert message in line


def test_codes_and_back(tiny, tmp_path, capsys, source):
    """Printed or in a file; as audio again; and a cover of them."""
    checkpoint = ["--checkpoint", str(tiny[1])]
    assert cli.main(["tokenize", str(tmp_path / source), *checkpoint]) == 0
    text = capsys.readouterr().out.strip()
    assert text.startswith("<|audio_code_") and text.count("<|") == 10
    out = tmp_path / "codes.txt"
    assert cli.main(["tokenize", str(tmp_path / source), *checkpoint, "--out", str(out)]) == 0
    assert out.read_text().strip() == text
    assert cli.main(["tokenize", str(tmp_path / source), *checkpoint, "--out", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    made = tmp_path / "made.wav"
    assert cli.main(["detokenize", f"@{out}", *checkpoint, "--out", str(made)]) == 0
    assert soundfile.info(made).frames == 96_000
    cover = ["--codes", f"@{out}", "--steps", "1", "--seed", "0", "--out", str(tmp_path / "cover.wav")]
    assert cli.main(["generate", "x", *checkpoint, *cover]) == 0
    assert soundfile.info(tmp_path / "cover.wav").frames == 96_000


def test_tasks_on_the_command_line(tiny, tmp_path, source, capsys, monkeypatch):
    """Every option arrives as the argument that it stands for."""
    seen = []

    class Seen(Exception):
        pass

    def prepared(request, *about):
        seen.append(request)
        raise Seen

    monkeypatch.setattr(generate, "prepare", prepared)

    def arguments(*options):
        with pytest.raises(Seen):
            cli.main(["generate", "x", "--checkpoint", str(tiny[1]), "--out", str(tmp_path / "x.wav"), *options])
        return {
            name: value
            for name, (field, _) in about(Request).items()
            if (value := getattr(seen[-1], name)) != field.default and name != "prompt"
        }

    assert arguments() == {}
    found = arguments(*"--task repaint --source a.wav --start -1 --end 2 --start 5 --end 6".split())
    assert found == dict(
        task_type="repaint", src_audio="a.wav", repainting_start=(-1.0, 5.0), repainting_end=(2.0, 6.0)
    )
    found = arguments(*"--task complete --source a.wav --track drums --track bass --reference b.mp3".split())
    assert found == dict(task_type="complete", src_audio="a.wav", track_name=("drums", "bass"), reference_audio="b.mp3")
    assert arguments("--task", "lego", "--source", "a.wav", "--track", "fx")["track_name"] == "fx"
    found = arguments(*"--task cover --codes <|audio_code_1|> --cover-strength 0.5".split())
    assert found == dict(task_type="cover", audio_codes="<|audio_code_1|>", audio_cover_strength=0.5)
    words = "--solver heun --guidance-rule adg --noise torch:A100 --cover-noise 0.2 --timestep 0.9 --timestep 0.4"
    parsed = cli.parser().parse_args(["generate", "x", *words.split(), "--attend-to-padding"]).generate
    assert read_fields(parsed, Sampling) == dict(
        solver="heun",
        guidance="adg",
        noise="torch:A100",
        cover_noise_strength=0.2,
        timesteps=[0.9, 0.4],
        attend_to_padding=True,
    )


def test_sigterm_ends_after_the_batch_in_flight(tiny, tmp_path, monkeypatch, capsys):
    """With the status of a process that the signal has killed; the same command makes the rest."""
    write_lines(tmp_path / "requests.jsonl", *[dict(prompt="piano", audio_duration=10, seed=i) for i in range(3)])
    whole = AceStepPipeline.run

    def terminated(pipe, jobs, sampling):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(pipe, jobs, sampling)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(AceStepPipeline, "run", terminated)
    assert run(tiny, tmp_path) == 143
    assert names(tmp_path / "out") == ["00001.json", "00001.wav"] and signal.getsignal(signal.SIGTERM) is before
    assert "SIGTERM; the same command resumes" in capsys.readouterr().err
    first = (tmp_path / "out" / "00001.wav").stat().st_mtime_ns
    monkeypatch.setattr(AceStepPipeline, "run", whole)
    assert run(tiny, tmp_path) == 0
    assert len(names(tmp_path / "out")) == 6 and (tmp_path / "out" / "00001.wav").stat().st_mtime_ns == first


@pytest.mark.slow
def test_two_processes_make_a_share_each(tiny, tmp_path, capsys):
    """Each with a copy of the model on its two devices, and its own songs; both at once on its devices.

    By default `test_a_process_makes_its_share` shows which lines a process takes.
    """
    songs = [dict(name=name, prompt="piano", audio_duration=10, seed=i) for i, name in enumerate("abcd")]
    write_lines(tmp_path / "requests.jsonl", *songs, "{not json")
    places = ["--batch", tmp_path / "requests.jsonl", "--out-dir", tmp_path / "two", "--checkpoint", tiny[1]]
    made = together("generate", *places, "--steps", 1, devices=2, JAX_DEFAULT_MATMUL_PRECISION="highest")
    assert [status for status, *_ in made] == [1, 1], made
    shares = [sorted(Path(line).stem for line in out.splitlines() if line.endswith(".wav")) for _, out, _ in made]
    assert shares == [["a", "c"], ["b", "d"]]
    assert ["requests.jsonl:5: not JSON" in error for *_, error in made] == [True, False]
    assert run(tiny, tmp_path) == 1
    for name in "abcd":
        both = [soundfile.read(tmp_path / folder / f"{name}.wav")[0] for folder in ("two", "out")]
        assert both[0].shape == both[1].shape and np.abs(both[0] - both[1]).max() <= 1e-4


def test_a_process_makes_its_share(tmp_path, monkeypatch):
    """Of processes that share no mesh, each takes every n-th line."""
    write_lines(tmp_path / "requests.jsonl", *(dict(name=name, prompt="x") for name in "abcd"))
    songs, _ = jsonl.read(tmp_path / "requests.jsonl", tmp_path, {})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    shares = []
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        without_networks = SimpleNamespace(mesh=None, prepare=lambda *_: 1 / 0)
        shares.append([song.path.stem for song, _ in jsonl.generate(without_networks, songs, 1, {})])
    assert shares == [["a", "c"], ["b", "d"]]


def test_requests_and_songs_in_cloud_storage(tiny, tmp_path, monkeypatch, source):
    bucket = cloud.use(monkeypatch)
    upload(tmp_path / source, as_path("gs://music/sources/a.wav"))
    cover = dict(name="b", prompt="flute", task_type="cover", src_audio="sources/a.wav", seed=1)
    as_path("gs://music/r.jsonl").write_text("\ufeff" + json.dumps(cover) + "\n")
    command = ["generate", "--batch", "gs://music/r.jsonl", "--out-dir", "gs://music/out", "--checkpoint", tiny[1]]
    for _ in range(2):
        before = dict(bucket)
        assert cli.main([*map(str, command), "--steps", "1"]) == 0
    assert bucket == before and {"/music/out/b.json", "/music/out/b.wav"} < {*bucket}
