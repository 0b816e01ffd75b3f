"""The planner from what is known of songs to metadata and codes: with a model that is scripted, and with one that is
random, whose songs must not depend on what they are written together with."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from acestep_jax import InputError, make_mesh
from acestep_jax.errors import Cancelled
from acestep_jax.planner import generate
from acestep_jax.planner.metadata import Known, Metadata
from acestep_jax.planner.sampling import LanguageSampling
from acestep_jax.planner.tokenizer import Mark
from acestep_jax.planner.writer import Planner
from tests.planner import small

YAML = """
bpm: 120
caption: Warm lofi piano.
  It goes on.
duration: 183
{genres}keyscale: F# minor
language: en
timesignature: 4
"""
WISH = Known(caption="a sad song", lyrics="[Verse]\nRain")
WRITTEN = Metadata("Warm lofi piano. It goes on.", "[Verse]\nRain", 120, "F# minor", "4", 183, "en")
SAMPLING = LanguageSampling(temperature=1.0)
SONGS = [WISH, Known(caption="techno", bpm=128, language="de"), Known(caption="y " * 150, instrumental=True)]


def scripted(*texts, genres=""):
    """Return a planner whose model wants to write these lyrics after the metadata."""
    pieces = [[Mark.THINK, YAML.format(genres=genres), Mark.END_OF_THINK, text] for text in texts]
    return Planner(small.Scripted.of(pieces), small.tokenizer())


@pytest.fixture(scope="module")
def planner():
    return Planner(small.Recurrent.random(), small.tokenizer())


def test_generate():
    """Lyrics are the user's; what the user gave of the rest is, too, and the model writes on from it."""
    forced = dataclasses.replace(WISH, bpm=130, duration=130.5)  # of as many tokens: the script goes by steps
    one, two = scripted("", "").write_metadata([WISH, forced], seeds=[0, 0])
    assert one == WRITTEN
    assert two == dataclasses.replace(WRITTEN, bpm=130, duration=130.5)


def test_caption_that_is_not_written_anew():
    pieces = [Mark.THINK, YAML.format(genres="").replace("caption: Warm lofi piano.\n  It goes on.\n", "")]
    plain = Planner(small.Scripted.of([pieces]), small.tokenizer())
    (found,) = plain.write_metadata([WISH], seeds=[0], rewrite_caption=False)
    assert found == dataclasses.replace(WRITTEN, caption="a sad song")


@pytest.mark.unit
def test_nothing_is_written_for_songs_that_are_complete():
    complete = dataclasses.replace(WISH, bpm=90, keyscale="C major", timesignature=3, duration=30)
    nobody = Planner(small.Scripted.of([[Mark.THINK]]), small.tokenizer())
    nobody._write = None
    (found,) = nobody.write_metadata([complete], seeds=[0], rewrite_caption=False)
    assert found == Metadata("a sad song", WISH.lyrics, 90, "C major", "3", 30)
    assert nobody.write_metadata([], seeds=[]) == []


@pytest.mark.parametrize(
    "mode, known, lyrics",
    [
        ("inspire", Known(caption="a sad song"), "[Chorus]\nSea"),
        ("inspire", Known(caption="a sad song", instrumental=True), "[Instrumental]"),
        ("inspire", WISH, WISH.lyrics),
        ("format", WISH, "[Chorus]\nSea"),
        ("understand", Known(codes=[1, 2, 3]), "[Chorus]\nSea"),
    ],
)
def test_modes_that_write_lyrics(mode, known, lyrics):
    model = scripted("\n\n# Lyric\n[Chorus]\nSea\n", genres="genres: lofi\n")
    (found,) = model.write_metadata([known], mode=mode, seeds=[0])
    assert found == dataclasses.replace(WRITTEN, lyrics=lyrics, genres="lofi")


def metadata_of(song):
    return dataclasses.replace(WRITTEN, duration=10.3 if song is WISH else 12, lyrics=song.lyrics)


def test_a_song_does_not_depend_on_its_batch(planner):
    seeds = [3, 4, 5]
    together = planner.write_metadata(SONGS, seeds=seeds, sampling=SAMPLING)
    known = [metadata_of(song) for song in SONGS]
    codes = planner.write_codes(SONGS, known, seeds=seeds, sampling=SAMPLING)
    assert [len(one) for one in codes] == [52, 60, 60]
    # The second: not the first row, and padded, as its prompt fits a smaller bucket.
    assert planner.write_metadata(SONGS[1:2], seeds=seeds[1:2], sampling=SAMPLING) == together[1:2]
    (alone,) = planner.write_codes(SONGS[1:2], known[1:2], seeds=seeds[1:2], sampling=SAMPLING)
    np.testing.assert_array_equal(alone, codes[1])
    assert len(set(together)) == 3 and together[1].bpm == 128 and together[1].language == "de"


@pytest.mark.slow
def test_on_a_mesh(planner):
    """By default `test_generate.py` shows it of codes."""
    known, seeds = [metadata_of(song) for song in SONGS], [3, 4, 5]
    mesh = Planner(planner.model, planner.tokenizer, make_mesh(data=4, fsdp=2))
    for model in (planner, mesh):
        written = model.write_metadata(SONGS, seeds=seeds, sampling=SAMPLING)
        codes = model.write_codes(SONGS, known, seeds=seeds, sampling=SAMPLING)
        if model is planner:
            expected = written, codes
    assert written == expected[0]
    for ours, theirs in zip(codes, expected[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_seeds(planner):
    known = [metadata_of(WISH)] * 2
    first = planner.write_codes([WISH] * 2, known, seeds=[1, 2], sampling=SAMPLING)
    assert (first[0] != first[1]).any()
    again = planner.write_codes([WISH] * 2, known, seeds=[2, 1], sampling=SAMPLING)
    np.testing.assert_array_equal(again[0], first[1])


def test_codes_are_of_the_codebook_and_as_many_as_the_duration_wants(planner):
    """Although the model would rather end the turn at once."""
    known = [dataclasses.replace(WRITTEN, duration=duration) for duration in (10, 33.3, 51)]
    found = planner.write_codes([WISH] * 3, known, seeds=[0, 1, 2], sampling=SAMPLING)
    assert [len(codes) for codes in found] == [50, 167, 255]
    for codes in found:
        assert codes.dtype == np.int32 and codes.min() >= 0 and codes.max() < small.CODES


def test_guidance(planner):
    known = [metadata_of(WISH)]

    def codes(**values):
        values = dict(temperature=0.0) | values
        return planner.write_codes([WISH], known, seeds=[0], sampling=LanguageSampling(**values))[0]

    guided = codes(cfg_scale=3.0)
    assert (guided != codes(cfg_scale=1.0)).any()
    np.testing.assert_array_equal(codes(cfg_scale=1.0), codes(cfg_scale=1.0, negative_prompt="noise"))
    np.testing.assert_array_equal(guided, codes(cfg_scale=3.0, negative_prompt="NO USER INPUT"))


def test_repetition_penalty(planner):
    known = [metadata_of(WISH)]
    plain, penalised = (
        planner.write_codes([WISH], known, seeds=[0], sampling=LanguageSampling(repetition_penalty=penalty))[0]
        for penalty in (1.0, 1e6)
    )
    assert len(set(plain.tolist())) < len(set(penalised.tolist()))


def test_loops_are_told_and_drawn_again(caplog):
    """The scripted model writes code 0 for ever. An attempt that is not the last ends where the loop is found."""
    stuck = scripted("")
    known, steps = [dataclasses.replace(WRITTEN, duration=40)], []
    with caplog.at_level(logging.WARNING):
        (codes,) = stuck.write_codes(
            [WISH], known, seeds=[0], attempts=2, on_progress=lambda made, most: steps.append(made)
        )
    assert codes.tolist() == [0] * 200
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "codes: one code repeated for 10.2 s from 0 s on" in said[0]
    assert "codes: one code repeated for 40 s from 0 s on" in said[1]
    assert said[0].endswith("sampling them again") and said[1].endswith("try another seed, or more attempts")
    assert steps[:3] == [32, 51, 32] and steps[-1] == 200


def test_another_attempt_draws_other_codes(planner, monkeypatch):
    """Only of the songs that repeat themselves."""
    known, seeds = [metadata_of(WISH)] * 2, [1, 2]
    first = planner.write_codes([WISH] * 2, known, seeds=seeds, sampling=SAMPLING)
    from acestep_jax.planner import writer

    find = writer.find_loop
    monkeypatch.setattr(
        writer, "find_loop", lambda codes: writer.Loop(0, 60, 1, 1) if np.array_equal(codes, first[1]) else find(codes)
    )
    again = planner.write_codes([WISH] * 2, known, seeds=seeds, sampling=SAMPLING, attempts=3)
    np.testing.assert_array_equal(again[0], first[0])
    assert len(again[1]) == len(first[1]) and (again[1] != first[1]).any()


def test_pieces_write_what_one_call_does(planner):
    """With reports of progress. Across the edges of windows, `test_generate.py` has it."""
    song = dataclasses.replace(WRITTEN, duration=12)
    reports = []
    (whole,) = planner.write_codes([WISH], [song], seeds=[7], sampling=SAMPLING)
    (pieces,) = planner.write_codes(
        [WISH], [song], seeds=[7], sampling=SAMPLING, on_progress=lambda made, most: reports.append((made, most))
    )
    np.testing.assert_array_equal(pieces, whole)
    assert reports == [(32, 60), (60, 60)]
    ended = []
    text = planner.write_metadata([WISH], seeds=[7], sampling=SAMPLING)
    assert (
        planner.write_metadata([WISH], seeds=[7], sampling=SAMPLING, on_progress=lambda *now: ended.append(now)) == text
    )
    assert ended


def test_cancel(planner):
    asked = []

    def should_stop():
        asked.append(0)
        return len(asked) > 1

    with pytest.raises(Cancelled, match="stopped before step 32 of 52"):
        planner.write_codes([WISH], [metadata_of(WISH)], seeds=[0], should_stop=should_stop)


def test_one_program_serves_a_bucket(planner):
    songs = [dataclasses.replace(WISH, caption=f"{i} songs", bpm=100 + i) for i in range(4)]
    planner.write_metadata(songs[:1], seeds=[0])
    planner.write_codes(songs[:1], [metadata_of(WISH)], seeds=[0])
    before = generate.write._cache_size()
    for i, song in enumerate(songs):
        sampling = LanguageSampling(
            temperature=0.5 + i / 10, top_k=i, top_p=0.8, cfg_scale=2 + i, repetition_penalty=1.1
        )
        planner.write_metadata([song], seeds=[i], sampling=sampling)
        wanted = dataclasses.replace(metadata_of(WISH), duration=10 + i)
        planner.write_codes([song], [wanted], seeds=[i], sampling=sampling)
    assert generate.write._cache_size() == before


def test_other_settings_of_the_process_change_nothing(planner):
    known = [metadata_of(WISH)]
    expected = planner.write_codes([WISH], known, seeds=[0])[0]
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(planner.write_codes([WISH], known, seeds=[0])[0], expected)


def test_bad_input(planner):
    with pytest.raises(InputError, match=r"caption, lyrics: \d+ tokens with the instruction, but .* at most 3072"):
        planner.write_metadata([Known(caption="q7" * 5000)], seeds=[0])
    with pytest.raises(InputError, match=r"codes: 30\d\d tokens with the instruction"):
        planner.write_metadata([Known(codes=[1] * 3000)], mode="understand", seeds=[0])
    with pytest.raises(InputError, match="codes: this planner knows those from 0 to 39, found 40"):
        planner.write_metadata([Known(codes=[39, 40])], mode="understand", seeds=[0])
    with pytest.raises(InputError, match="duration: unknown"):
        planner.write_codes([WISH], [Metadata("x")], seeds=[0])
    with pytest.raises(InputError, match="seeds: expected 1, one for each song, found 2"):
        planner.write_metadata([WISH], seeds=[0, 1])
    with pytest.raises(InputError, match="metadata: expected 1, one for each song, found 0"):
        planner.write_codes([WISH], [], seeds=[0])
    with pytest.raises(InputError, match="attempts: expected at least 1, found 0"):
        planner.write_codes([WISH], [WRITTEN], seeds=[0], attempts=0)
    with pytest.raises(InputError, match="different checkpoints"):
        tokenizer = type(planner.tokenizer)(*small.vocabulary())
        tokenizer.first_code += 1
        Planner(planner.model, tokenizer)
