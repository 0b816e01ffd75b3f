"""Arguments of the command line that cannot be used end it with one line, before a network runs."""

import pytest

from acestep_jax import Sampling, cli
from acestep_jax.arguments import arguments
from acestep_jax.cli import generate, runtime
from acestep_jax.cli.parser import read_fields
from acestep_jax.request import KINDS

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """Keep the tests away from the user's cache folder."""
    monkeypatch.setattr(runtime, "use_compilation_cache", lambda: None)


ERRORS = {
    "kind of file": (["--out", "{tmp}/song.xyz"], "song.xyz"),
    "folder of the file": (["--out", "{tmp}/absent/song.wav"], "absent"),
    "duration": (["--duration", "5"], "--duration: expected 10 to 600 s, found 5"),
    "dtype": (["--dtype", "int4"], "use one of float32, bfloat16, float16"),
    "mesh axis": (["--mesh", "model=8"], "expected AXIS=N"),
    "mesh size": (["--mesh", "data=3"], "needs 3 devices, but 8 are present"),
    "adapter": (["--lora", "{tmp}/absent"], "absent: no such folder"),
    "lyrics file": (["--lyrics", "@{tmp}/absent.txt"], "absent.txt"),
    "vocals": (["--instrumental", "--lyrics", "la la"], "--instrumental, --lyrics: expected one of them, found both"),
    "checkpoint": (["--checkpoint", "{tmp}/absent"], "absent: no such folder"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(tmp_path, capsys, case):
    options, message = ERRORS[case]
    filled = [option.format(tmp=tmp_path) for option in options]
    assert cli.main(["generate", "piano", "--duration", "10", "--out", str(tmp_path / "song.wav"), *filled]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("acestep-jax: ")
    assert not list(tmp_path.iterdir())


def test_switches_that_have_no_fixed_default():
    """On or off by a word each, so that a prompt may follow."""
    for words, expected in ((["--dcw-enabled"], True), (["--no-dcw-enabled"], False), ([], None)):
        parsed = cli.parser().parse_args(["generate", *words, "piano"]).generate
        assert parsed.prompt == "piano"
        assert read_fields(parsed, Sampling).get("dcw_enabled") is expected


def test_instrumental(monkeypatch, capsys):
    """Of a song it is the lyrics that say so; of a plan, the planner is told. Not beside lyrics."""
    given = []
    monkeypatch.setattr(generate, "run_one", lambda options, values: given.append(values))
    assert cli.main(["generate", "piano", "--instrumental"]) == cli.main(["generate", "piano"]) == 0
    assert [values.get("lyrics") for values in given] == ["[Instrumental]", None]
    assert cli.main(["plan", "piano", "--instrumental", "--lyrics", "la"]) == 2
    assert "--instrumental, --lyrics: expected one of them, found both ('la')" in capsys.readouterr().err


def test_an_empty_prompt(tmp_path, capsys):
    assert cli.main(["generate", " ", "--out", str(tmp_path / "song.wav")]) == 2
    assert "PROMPT: it is empty" in capsys.readouterr().err


@pytest.mark.heavy
def test_info_without_a_checkpoint(capsys):
    assert cli.main(["info"]) == 0
    assert "acestep-jax" in capsys.readouterr().out


def test_help_texts_name_options_and_not_keywords_of_python(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "instead of --steps and --shift" in words or "instead of --steps and shift" in words
    assert "--compat diffusers" in words and "compat=" not in words
    assert not {field for kind in KINDS for field in arguments(kind) if "_" in field and field in words}
