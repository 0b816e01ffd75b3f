"""What the language model wrote, read as fields."""

import pytest

from acestep_jax.planner.metadata import Metadata
from acestep_jax.planner.parsing import parse, parse_fields, parse_lyrics
from acestep_jax.planner.tokenizer import Mark
from tests.planner import small

pytestmark = pytest.mark.unit

YAML = """
bpm: 120
caption: 'Mood: dark'
duration: 183
genres: lofi
keyscale: F♯ minor
language: 'no'
timesignature: 4/4
"""
SONG = Metadata("Mood: dark", "[Verse]\nRain", 120, "F# minor", "4", 183.0, "no", "lofi")


def read(*pieces):
    return parse(small.tokenizer(), small.tokenizer().encode_pieces(pieces).tolist())


@pytest.mark.parametrize(
    "pieces",
    [
        (Mark.THINK, YAML, Mark.END_OF_THINK, "\n\n# Lyric\n[Verse]\nRain\n", Mark.END_OF_TURN),
        (Mark.THINK, YAML, Mark.END_OF_THINK, "\n\n# Lyrics\n[Verse]\nRain"),
        (YAML, Mark.END_OF_THINK, "# lyric\n[Verse]\nRain\n", Mark.END_OF_TURN, "more"),
        (Mark.THINK, YAML, Mark.END_OF_THINK, "# Languages\nen\n\n# Lyric\n[Verse]\nRain"),
        (Mark.THINK, YAML, Mark.END_OF_THINK, "[Verse]\nRain", (1, 2)),
    ],
)
def test_whole_songs(pieces):
    assert read(*pieces) == SONG


def test_missing_end_of_thoughts():
    """Then everything before the first audio code is thought."""
    assert read(Mark.THINK, YAML, (5, 6)) == Metadata("Mood: dark", "", 120, "F# minor", "4", 183.0, "no", "lofi")


def test_values_that_say_nothing():
    text = "\nbpm: N/A\ncaption: x\nduration: N/A\nkeyscale: n/a\ntimesignature: N/A\nlanguage: unknown\n"
    assert read(Mark.THINK, text, Mark.END_OF_THINK) == Metadata("x", language="unknown")
    assert read(Mark.THINK, "\nbpm: fast\nduration: 7\nkeyscale: H\nlanguage: xx\n") == Metadata("")
    assert read() == Metadata("")


def test_marks_that_a_caption_spells_out_end_nothing():
    text = "\ncaption: a </think> b <|im_end|> c\nbpm: 99\n"
    found = read(Mark.THINK, text, Mark.END_OF_THINK, "\nx </think> y")
    assert found.caption == "a </think> b <|im_end|> c" and found.bpm == 99 and found.lyrics == "x </think> y"


def test_fields():
    assert parse_fields("Caption: a\n  b\n\tc\nnonsense\nbpm: 1\nkey") == {"caption": "a b c", "bpm": "1"}
    assert parse_fields("caption: a: b\nempty:\n") == {"caption": "a: b"}


@pytest.mark.parametrize("text", ["# Lyric\nRain", "#Lyrics \n\nRain\n", "# LYRIC\nRain", "Rain", "\n\nRain"])
def test_titles_of_lyrics(text):
    assert parse_lyrics(text) == "Rain"
    assert parse_lyrics("# Lyric of mine\nRain") == "# Lyric of mine\nRain"
    assert parse_lyrics("# Lyric") == ""
