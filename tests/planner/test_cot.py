"""The YAML of metadata: the values that PyYAML gives, and our parser against PyYAML's."""

import numpy as np
import pytest
import yaml

from acestep_jax.planner import cot
from acestep_jax.planner.parsing import parse_fields

pytestmark = pytest.mark.unit

FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

LONG = (
    "An energetic synth-pop track with driving bass, bright arpeggios and a soaring female vocal over a "
    "four-on-the-floor beat, ending on a fade."
)


def test_all_fields():
    assert (
        cot.dump(bpm=120, caption=LONG, duration=180.7, keyscale="F# minor", language="en", timesignature="4")
        == """bpm: 120
caption: An energetic synth-pop track with driving bass, bright arpeggios and a soaring
  female vocal over a four-on-the-floor beat, ending on a fade.
duration: 180
keyscale: F# minor
language: en
timesignature: 4"""
    )
    assert cot.dump(genres="lofi") == "genres: lofi"


@pytest.mark.parametrize(
    "field, value, line",
    [
        ("language", "no", "language: 'no'"),
        ("timesignature", "6/8", "timesignature: 6/8"),
        ("keyscale", "B♭ major", "keyscale: B♭ major"),
        ("caption", "Mood: dark ambient", "caption: 'Mood: dark ambient'"),
        ("caption", "It's: a 'test'", "caption: 'It''s: a ''test'''"),
        ("caption", "1:30", "caption: '1:30'"),
        ("caption", "120", "caption: 120"),
        ("caption", "雨 🎹", "caption: 雨 🎹"),
        ("caption", "", "{}"),
    ],
)
def test_golden_lines(field, value, line):
    assert cot.dump(**{field: value}) == line


@pytest.mark.parametrize("column, is_folded", [(80, False), (81, True)])
def test_lines_are_folded_after_column_80(column, is_folded):
    """The first space at a column above 80, which counts characters and the field's name."""
    word = "é" * (column - len("caption: "))
    assert ("\n  end" in cot.dump(caption=f"{word} end")) == is_folded


def captions(count):
    rng = np.random.default_rng(0)
    text = (
        "warm lofi piano beat, drums. voice; energy synth-pop it's 'quoted' \"double\" no yes true null ~ 12 1:30 0x1f"
    )
    odd = "café 雨の音 🎹 B♭ a: b #1 -x ? : | > % @ ` {x} [y] & * ! = << ... --- - . .5 1_0 2024-01-01 \\n C:\\x"
    words = [*text.split(), *odd.split(), "", " ", "x" * 40, "\t", "\u00a0", "\u2028", "\x07"]
    for _ in range(count):
        yield " ".join(rng.choice(words, rng.integers(1, 30))) + rng.choice(["", " ", ":", "\nmore", ".\n\nmore"])


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_captions(count):
    """Our parser reads what the dumper wrote as PyYAML does."""
    for caption in captions(count):
        text = cot.dump(caption=caption, keyscale="C major")
        theirs = yaml.load(text, FAST)
        assert set(theirs) <= {"caption", "keyscale"} and theirs.get("caption", caption) in (caption, _number(caption))
        ours = parse_fields(text)
        assert ours["keyscale"] == "C major"
        assert ours.get("caption", "").strip() == str(theirs.get("caption", "")).strip(), text


def _number(caption):
    return int(caption) if caption.isascii() and caption.isdecimal() else None


def test_scalars_that_are_no_yaml_stay():
    assert cot.scalar("'tis the season: 'hey'") == "'tis the season: 'hey'"
    assert cot.scalar('"open') == '"open'
    assert cot.scalar("a: b # c") == "a: b # c"
    assert cot.scalar("|\n  a\n  b") == "a b"
    assert cot.scalar("'a: b'") == "a: b"
