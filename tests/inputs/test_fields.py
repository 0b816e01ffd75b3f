"""One normaliser for each field of a text, for songs that are generated and for training data."""

import pytest

from acestep_jax import InputError
from acestep_jax.inputs import fields
from acestep_jax.inputs.prompt import lyric_text, prompt_text
from acestep_jax.train.sidecars import Sidecars

pytestmark = pytest.mark.unit

KNOWN = {
    "keyscale": {
        **dict.fromkeys(("Am", "a minor", "A min", "A MINOR", " Am "), "A minor"),
        **dict.fromkeys(("F#m", "f# minor", "f♯ minor", "F sharp minor"), "F# minor"),
        **dict.fromkeys(("Bb", "B♭ Major", "b flat maj", "BbM"), "Bb major"),
        **dict.fromkeys(("", "N/A", "auto", "none"), None),
        "C": "C major",
    },
    "bpm": {"30": 30, "128 BPM": 128, "127.6": 128, "300": 300, 90: 90, "N/A": None, None: None},
    "timesignature": {"4/4": "4", "6/8": "6", "3": "3", "2.0": "2", 4: "4", "": None},
    "vocal_language": {
        **dict.fromkeys(("en", "EN", "en-US", "en_GB", "English"), "en"),
        **dict.fromkeys(("auto", "", "unknown", "N/A"), "unknown"),
        **{"Cantonese": "yue", "zh-Hant": "zh"},
    },
}
UNKNOWN = {
    "keyscale": ("banana", "8A", "H minor", "A minor or so", "Em7"),
    "bpm": ("29", "301", "fast", "-90", 0, "nan"),
    "timesignature": ("5/4", "12/8", "4/4/4", 5, "4.5"),
    "vocal_language": ("Klingon", "xx", "e"),
}
LISTED = {
    "keyscale": "A to G, with or without # or b, and major or minor",
    "bpm": "30 to 300",
    "timesignature": "2, 3, 4, 6",
    "vocal_language": "ar, az, bg, .*, yue, zh, unknown",
}


@pytest.mark.parametrize("name", KNOWN)
def test_values_are_brought_into_form(name):
    normalise = getattr(fields, name)
    assert {value: normalise(value) for value in KNOWN[name]} == KNOWN[name]
    for value in KNOWN[name].values():
        assert value is None or normalise(value) == value  # what is in form stays


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_values_are_an_error_that_lists_what_there_is(name):
    for value in UNKNOWN[name]:
        with pytest.raises(InputError, match=f"{name}: expected .*{LISTED[name]}.*, found '?{value}'?"):
            getattr(fields, name)(value)


def training_texts(folder, name, value):
    (folder / "song.txt").write_text(f"caption: a\n{name}: {value}")
    return Sidecars(folder, ["song.mp3"]).read("song.mp3")


@pytest.mark.parametrize("name", ["keyscale", "timesignature", "vocal_language"])
def test_a_song_and_training_data_are_read_alike(tmp_path, name):
    """The same text of every value, and the same error."""

    def text(value):
        if name == "vocal_language":
            return lyric_text("la", value)
        return prompt_text("a", audio_duration=10, **{name: value})

    for value in filter(None, KNOWN[name]):
        found = training_texts(tmp_path, name, value)
        assert text(value) == text(found.language if name == "vocal_language" else getattr(found, name))
    for value in UNKNOWN[name]:
        errors = []
        for attempt in (text, lambda value: training_texts(tmp_path, name, value)):
            with pytest.raises(InputError) as error:
                attempt(str(value))
            errors.append(str(error.value).removeprefix(f"{tmp_path / 'song.txt'}: "))
        assert errors[1] == f"{errors[0]}; correct or remove it"


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_lines_end_alike(tmp_path, end):
    """Lyrics and captions give the same text by Python, by JSON and by file."""
    lyrics = "[Verse]\nla\n\nla"
    assert lyric_text(lyrics.replace("\n", end), "en") == lyric_text(lyrics, "en")
    assert prompt_text(f"a{end}b", audio_duration=10) == prompt_text("a\nb", audio_duration=10)
    (tmp_path / "song.lyrics.txt").write_bytes(lyrics.replace("\n", end).encode())
    assert Sidecars(tmp_path, ["song.mp3"]).read("song.mp3").lyrics == lyrics
