"""The one list of options: checks of the fields, and that a field is found everywhere."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from acestep_jax import InputError, Request, Sampling
from acestep_jax.arguments import arguments, describe, flag, unknown_name
from acestep_jax.inputs.keywords import requests_of
from acestep_jax.request import KINDS

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]

NEW_FIELD = """    mood: float | None = argument(
        None, help="Mood of the song.", unit="smiles", minimum=1, maximum=5, meaning="calm"
    )
"""


def test_a_new_field_is_found_everywhere(tmp_path):
    """One line in request.py, added as it is imported: keywords, help, command line, JSONL, table, checks and job."""
    script = f"""
        import importlib.abc, importlib.machinery, inspect, json, sys

        class Loader(importlib.machinery.SourceFileLoader):
            def get_data(self, path):
                text = super().get_data(path)
                if not path.endswith("request.py"):
                    return text
                marker = b"    bpm: "
                assert text.count(marker) == 1
                return text.replace(marker, {NEW_FIELD!r}.encode() + marker)

            def path_stats(self, path):
                raise OSError  # so that bytecode of the file as it is stays unused

        class Finder(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "acestep_jax.request":
                    spec = importlib.machinery.PathFinder.find_spec(name, path)
                    spec.loader = Loader(name, spec.origin)
                    return spec

        sys.meta_path.insert(0, Finder())
        from acestep_jax import AceStepPipeline, InputError, Request, cli
        from acestep_jax.cli.parser import read_fields
        from acestep_jax.inputs.prepare import prepare
        from acestep_jax.io import checkpoint
        from acestep_jax.serve import jsonl

        assert "mood" in inspect.signature(AceStepPipeline.__call__).parameters
        assert "mood: Mood of the song. 1 to 5 smiles. Default: calm." in AceStepPipeline.__call__.__doc__
        options = cli.parser().parse_args(["generate", "x", "--mood", "2.5"]).generate
        assert read_fields(options, Request) == dict(prompt="x", mood=2.5)
        open("lines.jsonl", "w").write(json.dumps(dict(prompt="x", mood=3)))
        (line,), errors = jsonl.read("lines.jsonl", ".", {{}})
        assert line.request.mood == 3 and not errors
        configs = checkpoint.read_manifest(checkpoint.SMALL_MODEL).configs
        job = prepare(line.request, configs, checkpoint.load_tokenizer(checkpoint.SMALL_MODEL))
        assert job.request.mood == 3
        try:
            Request("x", mood=6)
        except InputError as error:
            assert str(error) == "mood: expected 1 to 5 smiles, found 6", error
        else:
            raise AssertionError
        from acestep_jax.arguments import table
        assert "| `mood` | `--mood` | number | calm | Mood of the song. 1 to 5 smiles. |" in table(Request)
        assert cli.main(["generate", "--help"]) == 0
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "--mood N" in done.stdout


def test_every_field_is_described():
    for kind in KINDS:
        for name, (_, about) in arguments(kind).items():
            assert about.help[0].isupper() and about.help.endswith("."), name
            assert describe(name, kind).startswith(about.help)


def test_values_of_other_kinds_are_taken():
    """Arrays of numbers, whole numbers for numbers, keys for seeds."""
    request = Request("x", repainting_start=np.array([1, 2.5]), repainting_end=[3, None], seed=np.int64(3), bpm=90)
    assert request.repainting_start == (1.0, 2.5) and request.repainting_end == (3, None)
    assert Request("x", seed=jax.random.key(0)).seed is not None
    assert Sampling(timesteps=np.array([0.9, 0.5])).timesteps == (0.9, 0.5)
    assert hash(Sampling(timesteps=[0.9, 0.5])) == hash(Sampling(timesteps=(0.9, 0.5)))


BAD = {
    "bpm: expected 30 to 300 beats per minute, found 301": dict(bpm=301),
    "bpm: expected 30 to 300 beats per minute, found True": dict(bpm=True),
    "seed: expected a whole number, found True": dict(seed=True),
    "timesignature: expected one of 2, 3, 4, 6, or a fraction such as 4/4, found 1.5": dict(timesignature=1.5),
    "keyscale: expected text, found 5": dict(keyscale=5),
    "vocal_language: expected text, found 5": dict(vocal_language=5),
    "max_lyric_length: expected a whole number, found 90.5": dict(max_lyric_length=90.5),
    "repainting_end: expected a number, found 'end'": dict(repainting_end=[1, "end"]),
    "max_lyric_length: expected at least 1, found 0": dict(max_lyric_length=0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values(message):
    with pytest.raises(InputError) as error:
        Request("x", **BAD[message])
    assert str(error.value) == message


READ = {
    "bpm": {"128": 128, 128.0: 128, "128 bpm": 128, "90.5": 90, np.float32(127.6): 128, "auto": None},
    "keyscale": {"f♯ minor": "F# minor", "Am": "A minor", "N/A": None},
    "timesignature": {4.0: "4", 3: "3", "6/8": "6", "": None},
    "vocal_language": {"English": "en", "zh-Hant": "zh", "auto": "unknown"},
}
# test_fields.py has what training data make of the same values.


@pytest.mark.parametrize("name", READ)
def test_a_field_has_one_reader(tmp_path, name):
    """In Python, for one song and for several; in JSONL; and on the command line."""
    from acestep_jax.cli import parser
    from acestep_jax.cli.parser import read_fields
    from acestep_jax.serve import jsonl

    option = flag(name, arguments(Request)[name][1])
    expected = list(READ[name].values())
    assert [getattr(Request("x", **{name: value}), name) for value in READ[name]] == expected
    songs, *_ = requests_of({"prompt": ["x"] * len(expected), name: list(READ[name])})
    assert [getattr(song, name) for song in songs] == expected
    plain = [float(value) if isinstance(value, np.floating) else value for value in READ[name]]
    (tmp_path / "songs.jsonl").write_text("\n".join(json.dumps({"prompt": "x", name: value}) for value in plain))
    lines, errors = jsonl.read(tmp_path / "songs.jsonl", tmp_path, {})
    assert [getattr(line.request, name) for line in lines] == expected and not errors
    for value, read in READ[name].items():
        options = parser().parse_args(["generate", "x", f"{option}={value}"]).generate
        assert getattr(Request(**read_fields(options, Request)), name) == read


def test_unknown_names():
    """The nearest name, what diffusers' names are called here, or the list."""
    assert unknown_name("audio_durations", ["audio_duration", "bpm"]) == (
        "audio_durations: unknown argument; did you mean audio_duration?"
    )
    assert unknown_name("generator", ["seed"]) == "generator: unknown argument; use seed=N"
    assert unknown_name("zzz", ["b", "a"], "key") == "zzz: unknown key; expected one of a, b"


def test_keywords_become_requests():
    requests, _, sampling = requests_of(
        dict(prompt=["a", "b"], lyrics=["x", "y"], bpm=[90, 91], seed=7, solver="heun", repainting_start=[1.0, 2.0])
    )
    assert [(r.prompt, r.lyrics, r.bpm, r.seed) for r in requests] == [("a", "x", 90, 7), ("b", "y", 91, 8)]
    assert all(r.repainting_start == (1.0, 2.0) for r in requests) and sampling == Sampling(solver="heun")
    own = Request("c", seed=3)
    assert requests_of(dict(prompt=[own, "d"]))[0] == [own, Request("d")]
    for values, message in (
        (dict(), "prompt: missing"),
        (dict(prompt=[]), "the list is empty"),
        (dict(prompt="a", seed="x"), "seed: expected whole numbers or a key"),
        (dict(prompt=["a", "b"], lyrics=["x"]), "lyrics: expected one or 2, one for each prompt, found 1"),
        (dict(prompt=[own], bpm=90), "bpm: prompt 0 is a Request, which has its own"),
    ):
        with pytest.raises(InputError, match=message):
            requests_of(values)


def test_requests_are_values():
    assert dataclasses.replace(Request("a"), prompt="b") == Request("b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request("a").prompt = "b"


def test_the_page_of_arguments_is_that_of_the_fields():
    spec = importlib.util.spec_from_file_location("arguments_page", ROOT / "docs" / "arguments.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text) == text, "run python docs/arguments.py"
    assert "| `bpm` | `--bpm` |" in text
