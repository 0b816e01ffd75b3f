"""The files beside songs, in every form, and the precedence of several forms."""

import json

import pytest

from acestep_jax import InputError
from acestep_jax.train.sidecars import Sidecars, Texts

pytestmark = pytest.mark.unit

LYRICS = "[Verse]\nla: la\n\n[Chorus]\nand on"


def read(folder, files, source="song.mp3", sources=None):
    """The texts of `source` in a folder of `files` (name to text or to JSON), and the warnings."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    sidecars = Sidecars(folder, sources or [source])
    return sidecars.read(source), sidecars.warnings


def texts(**values):
    known = dict(lyrics="[Instrumental]", language="en", bpm=None, keyscale=None, timesignature=None, repeat=1)
    return Texts(**known | dict(fallback=False) | values)


ALL = dict(caption="dream pop", lyrics=LYRICS, language="fr", bpm=96, keyscale="A minor", timesignature="3", repeat=4)
SIDE_STEP = f"""Caption: dream pop
genre: pop

tempo: 96
scale: Am
signature: 3/4
lang: fr-FR
repeat: 4
lyrics: {LYRICS}
"""
SAMPLE = dict(caption="dream pop", genre="pop", lyrics=LYRICS, bpm=96, keyscale="A minor", timesignature="3")
SAMPLE |= dict(language="fr", is_instrumental=False, repeat=4, id="1a2b", duration=200, labeled=True)
DATASET = {"metadata": {"name": "mine", "tag_position": "prepend", "all_instrumental": True}, "samples": [SAMPLE]}
FORMS = {
    "caption and lyrics": (
        {"song.caption.txt": "dream\n pop\n", "song.lyrics.txt": f"\n{LYRICS}\n"},
        texts(caption="dream pop", lyrics=LYRICS),
    ),
    "key: value": ({"song.txt": SIDE_STEP}, texts(**ALL)),
    "byte order mark, CRLF": (
        {"song.txt": b"\xef\xbb\xbf" + SIDE_STEP.replace("\n", "\r\n").encode()},
        texts(**ALL),
    ),
    "key: value without lyrics": ({"song.txt": "caption: a: b\nis_instrumental: true"}, texts(caption="a: b")),
    "bare lyrics": ({"song.txt": LYRICS}, texts(caption="song", lyrics=LYRICS, fallback=True)),
    "lyrics like a pair": (
        {"song.txt": "Baby: I know\nCaption: no"},
        texts(caption="song", lyrics="Baby: I know\nCaption: no", fallback=True),
    ),
    "json": ({"song.json": SAMPLE}, texts(**ALL)),
    "dataset by file name": (
        {"mine.json": DATASET | {"samples": [SAMPLE | {"filename": "song.mp3", "audio_path": "C:\\music\\song.mp3"}]}},
        texts(**ALL),
    ),
    "table": (
        {"my.csv": 'File;BPM;Key;Caption\nother.mp3;70;C;no\nsong.mp3;96.0;Am;"dream; pop"\n'},
        texts(caption="dream; pop", bpm=96, keyscale="A minor"),
    ),
    "table, quoted line break": (
        {"my.csv": 'file,caption\nsong.mp3,"dream\npop, slow"\n'},
        texts(caption="dream\npop, slow"),
    ),
    "genre": ({"song.txt": "genre: synthwave"}, texts(caption="synthwave")),
    "genre asked for": ({"song.json": SAMPLE | {"prompt_override": "genre"}}, texts(**ALL | {"caption": "pop"})),
    "genre of all": (
        {"d.json": DATASET | {"metadata": {"genre_ratio": 100}, "samples": [SAMPLE | {"filename": "song.mp3"}]}},
        texts(**ALL | {"caption": "pop"}),
    ),
    "tag": ({"song.txt": "caption: dream pop\ntrigger: zxq"}, texts(caption="zxq, dream pop")),
    "tag alone": ({"song.txt": "tags: zxq"}, texts(caption="zxq")),
    "tag of all, appended": (
        {
            "d.json": {
                "metadata": {"custom_tag": "zxq", "tag_position": "append"},
                "samples": [{"filename": "song.mp3", "caption": "dream pop"}],
            }
        },
        texts(caption="dream pop, zxq"),
    ),
    "tag instead": (
        {"song.json": {"caption": "no", "custom_tag": "zxq", "tag_position": "replace"}},
        texts(caption="zxq"),
    ),
    "all instrumental": (
        {
            "d.json": {
                "metadata": {"all_instrumental": True},
                "samples": [{"filename": "song.mp3", "caption": "dream pop"}],
            }
        },
        texts(caption="dream pop"),
    ),
    "instrumental by its lyrics": ({"song.txt": "caption: a\nlyrics: [instrumental]"}, texts(caption="a")),
    "empty files": ({"song.caption.txt": "", "song.lyrics.txt": " \n"}, texts(caption="song", fallback=True)),
    "says nothing": (
        {"song.json": {"caption": "a", "bpm": None, "key": "N/A", "language": ""}},
        texts(caption="a"),
    ),
    "any language": ({"song.txt": "caption: a\nlanguage: auto"}, texts(caption="a", language="unknown")),
    "unknown language": ({"song.txt": "caption: a\nlanguage: unknown"}, texts(caption="a", language="unknown")),
}


@pytest.mark.parametrize("case", FORMS)
def test_forms(tmp_path, case):
    files, expected = FORMS[case]
    found, warnings = read(tmp_path, files, sources=["song.mp3", "other.mp3"])
    assert found == expected
    assert not warnings


def test_order_of_precedence(tmp_path):
    """Each value from the first file that has it; with every file that goes, the next one counts."""
    files = {
        "song.caption.txt": "one",
        "song.txt": "caption: two\nbpm: 102\nkey: D major",
        "song.json": {"caption": "three", "bpm": 103, "timesignature": 3},
        "mine.json": {"samples": [{"filename": "song.mp3", "caption": "four", "bpm": 104, "language": "de"}]},
        "my.csv": "file,caption,bpm,key\nsong.mp3,five,105,E minor\n",
    }
    found, _ = read(tmp_path, files)
    assert found == texts(caption="one", bpm=102, keyscale="D major", timesignature="3", language="de")
    for name, caption in zip(list(files)[:-1], ("two", "three", "four", "five"), strict=True):
        (tmp_path / name).unlink()
        assert read(tmp_path, {})[0].caption == caption
    assert found.bpm == 102 and read(tmp_path, {})[0].keyscale == "E minor"


def test_lyrics_beside_a_song_count_more_than_a_dataset_that_calls_it_instrumental(tmp_path):
    entry = {"filename": "song.mp3", "is_instrumental": True}
    found, _ = read(tmp_path, {"song.lyrics.txt": LYRICS, "d.json": {"samples": [entry]}})
    assert found.lyrics == LYRICS
    (tmp_path / "song.lyrics.txt").unlink()
    assert read(tmp_path, {"song.json": {"lyrics": LYRICS}})[0].lyrics == LYRICS
    found, warnings = read(tmp_path, {"song.json": {"lyrics": LYRICS, "is_instrumental": True}})
    assert found.lyrics == "[Instrumental]" and "song.json: is_instrumental is true" in warnings[0]


def test_entries_find_their_songs(tmp_path):
    """By as much of the path as both have; what may be any of several songs is nobody's, and so is what is none."""
    names = ["/else/where/a/song.mp3", "b/song.mp3", "song.mp3", "gone.mp3", "one.mp3", "two.mp3"]
    rows = "".join(f"{name},caption {i}\n" for i, name in enumerate(names))
    sources = ["a/song.mp3", "b/song.mp3", "c/one.mp3", "c/two.mp3", "d/two.mp3"]
    (tmp_path / "my.csv").write_text(f"file,caption\n{rows}")
    sidecars = Sidecars(tmp_path, sources)
    captions = [sidecars.read(source).caption for source in sources]
    assert captions == ["caption 0", "caption 1", "caption 4", "two", "two"]
    heard = "\n".join(sidecars.warnings)
    assert "song.mp3 may be any of 2 files" in heard and "no audio file gone.mp3" in heard
    assert "two.mp3 may be any of 2 files" in heard and len(sidecars.warnings) == 3


@pytest.mark.parametrize(
    "name, words",
    [("01 - My_Song (v2)", "My Song v2"), ("Œuvre nº 3", "Œuvre nº"), ("12-34", "12-34"), ("a.b.c", "a b c")],
)
def test_no_caption(tmp_path, name, words):
    found, _ = read(tmp_path, {}, f"{name}.mp3")
    assert found == texts(caption=words, fallback=True)


@pytest.mark.parametrize(
    "line, message",
    [
        ("bpm: 900", "bpm: expected 30 to 300 beats per minute, found '900'"),
        ("key: banana", "keyscale: expected A to G, .* major or minor, .* found 'banana'"),
        ("signature: 5/4", "timesignature: expected one of 2, 3, 4, 6, .* found '5/4'"),
        ("language: Klingon", "vocal_language: expected one of ar, az, .* found 'Klingon'"),
        ("repeat: 0", "repeat: expected a whole number from 1 to 1000, found '0'"),
    ],
)
def test_what_the_model_does_not_know_is_an_error_of_the_song(tmp_path, line, message):
    with pytest.raises(InputError, match=f"song.txt: {message}; correct or remove it"):
        read(tmp_path, {"song.txt": f"caption: a\n{line}"})


def test_unknown_keys_are_reported(tmp_path):
    found, warnings = read(tmp_path, {"song.txt": "caption: a\nmood: sad"})
    assert found == texts(caption="a")
    assert len(warnings) == 1 and "song.txt: unknown key 'mood'" in warnings[0]


def test_what_is_in_a_table_or_dataset_and_not_used_is_reported(tmp_path):
    """But for what the dataset builder always writes."""
    files = {
        "my.csv": "file,caption,mood\nsong.mp3,a,sad\n,b,gay\n",
        "d.json": {"samples": [SAMPLE | {"filename": "song.mp3", "mood": "sad"}]},
    }
    found, warnings = read(tmp_path, files)
    assert found.caption == "dream pop"
    assert [warning.partition(f"{tmp_path}/")[2].partition(";")[0] for warning in warnings] == [
        "d.json: unknown key 'mood', ignored",
        "my.csv: unknown key 'mood', ignored",
        "my.csv: a row without a name in the column `file`",
    ]


NAMES = {
    "upper case": ({"SONG.TXT": "caption: dream pop\nlyrics: la"}, ["SONG.TXT"]),
    "mixed case": ({"Song.Caption.txt": "dream pop", "song.LYRICS.Txt": "la"}, ["Song.Caption.txt", "song.LYRICS.Txt"]),
    "version 1": ({"song_prompt.txt": "dream pop", "song_lyrics.txt": "la"}, ["song_prompt.txt", "song_lyrics.txt"]),
    "version 1, upper case": ({"SONG_LYRICS.TXT": "la", "song.JSON": {"caption": "dream pop"}}, None),
    "table": ({"SONGS.CSV": "file,caption\nsong.mp3,dream pop", "song_Lyrics.txt": "la"}, None),
    "own case first": ({"song.txt": "caption: dream pop\nlyrics: la", "SONG.txt": "caption: no"}, ["song.txt"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_any_case_and_of_version_1(tmp_path, case):
    files, used = NAMES[case]
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    sidecars = Sidecars(tmp_path, ["song.mp3"])
    found = sidecars.read("song.mp3")
    assert (found.caption, found.lyrics) == ("dream pop", "la")
    assert sorted(file.name for file in sidecars.used) == sorted(used or files)


ERRORS = {
    "no UTF-8": ({"song.txt": b"caf\xe9"}, "song.txt: not UTF-8 text .* at byte 3"),
    "json": ({"song.json": "{"}, "song.json: not valid JSON"),
    "json list": ({"song.json": "[1]"}, "song.json: expected a JSON object"),
    "pairs and more": (
        {"song.txt": "caption: a\n[Verse]\nla"},
        r"song.txt: begins .* '\[Verse\]' is not one; put lyrics last",
    ),
    "dataset": ({"d.json": '{"samples": ['}, "d.json: not valid JSON"),
    "dataset entries": ({"d.json": {"samples": ["song.mp3"]}}, "d.json: expected JSON objects"),
    "genre ratio": ({"d.json": {"metadata": {"genre_ratio": "all"}, "samples": []}}, "genre_ratio: .* found 'all'"),
    "two datasets": ({"d.json": DATASET, "e.json": DATASET}, "d.json, e.json are all datasets"),
    "table no UTF-8": ({"my.csv": b"file\n\xe9"}, "my.csv: not UTF-8"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(tmp_path, case):
    files, message = ERRORS[case]
    with pytest.raises(InputError, match=message):
        read(tmp_path, files)
