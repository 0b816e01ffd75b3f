"""Songs made by rule are what their captions say, and what judges generated ones hears that."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from acestep_jax import AceStepPipeline, AudioPipelineOutput, InputError, Song
from acestep_jax.train.sidecars import Sidecars
from benchmarks import prompt_adherence
from benchmarks.music_analysis import RATE, Heard, listen
from examples.synthetic_music import __main__ as command
from examples.synthetic_music.caption import NO_DRUMS, WORDS, caption, few_words, request
from examples.synthetic_music.compose import DRUMS, ROLES, compose, draft, onsets
from examples.synthetic_music.styles import STYLES
from examples.synthetic_music.synth import INSTRUMENTS, KITS, PEAK, SAMPLE_RATE, render
from examples.synthetic_music.theory import NAMES, Key, hertz, parse_key
from examples.synthetic_music.write import SETTINGS, write_songs


@pytest.mark.parametrize("style", STYLES)
def test_styles_are_complete(style):
    data = STYLES[style]
    rhythms = [rhythm for part in data.parts.values() for rhythm in part.rhythms]
    for beat in data.beat:
        assert set(beat) <= set(DRUMS) and data.kit in KITS
        assert set("".join(beat.values())) <= set("xo.")
        rhythms += beat.values()
    assert all(len(rhythm) % (4 * data.beats) == 0 for rhythm in rhythms)
    assert all(set(part.instruments) <= set(INSTRUMENTS) for part in data.parts.values())
    assert bool(data.beat) == (data.drums > 0) and set(data.parts) <= set(ROLES)
    assert data.bpm and data.bpm == tuple(sorted(set(data.bpm)))
    assert all(70 <= bpm <= 170 and bpm == round(1500 / round(1500 / bpm)) for bpm in data.bpm)


def test_words_and_keys_are_known():
    assert set(WORDS) <= set(INSTRUMENTS)
    keys = [Key(tonic, mode) for mode in NAMES for tonic in range(12)]
    assert [parse_key(str(key)) for key in keys] == keys
    assert str(Key(6, "minor")) == "F# minor" and str(Key(10, "major")) == "Bb major"
    with pytest.raises(ValueError, match="expected a key"):
        parse_key("H minor")


def test_chords_of_a_key():
    assert Key(0, "major").chord(0) == (55, 60, 64)  # the C major triad in the inversion around middle C
    assert Key(9, "minor").pitch_classes == (9, 11, 0, 2, 4, 5, 7)
    assert Key(9, "minor").pitch(0) == 69 and Key(9, "minor").pitch(-7) == 57
    assert hertz(69) == 440


def test_onsets_of_a_rhythm_that_goes_round():
    assert onsets("x--.o...x..." * 2, 3, 3) == [(0, 3, "x"), (4, 1, "o"), (8, 1, "x")]
    assert onsets("1...............8---............", 3, 4) == [(0, 4, "8")]


def test_notes_are_in_key_and_in_time():
    for seed in range(60):
        song = compose(seed, 30)
        end = 30 * song.bpm / 60
        for track in song.tracks:
            assert track.notes and min(note.start for note in track.notes) < song.beats * STYLES[song.style].bars
            assert all(0 <= note.start < end + song.beats and note.length > 0 for note in track.notes)
            assert all(0 < note.velocity <= 1 for note in track.notes)
            if track.role != "drums":
                assert {note.pitch % 12 for note in track.notes} <= set(song.key.pitch_classes)
                assert all(28 <= note.pitch <= 100 for note in track.notes)
        bass = [note for track in song.tracks if track.role == "bass" for note in track.notes]
        assert not bass or bass[0].pitch % 12 == song.key.tonic
        if song.has_drums:
            hits = [note.start % 1 for note in song.tracks[0].notes if DRUMS[note.pitch] in ("kick", "snare", "hat")]
            assert np.mean(np.isin(hits, [0, 0.5, 0.5 + STYLES[song.style].swing])) > 0.5


def test_a_longer_song_begins_as_a_shorter_one():
    for seed in range(20):
        for long, short in zip(compose(seed, 20).tracks, compose(seed, 10).tracks, strict=True):
            assert set(short.notes) <= set(long.notes)


def test_captions_say_what_sounds():
    requests = [request(seed) for seed in range(1000)]
    assert 0.2 <= np.mean([not asked.has_drums for asked in requests]) <= 0.33
    assert 0.05 <= np.mean([asked.timesignature == "3" for asked in requests]) <= 0.25
    assert len({asked.keyscale for asked in requests}) == 24
    assert len({asked.caption for asked in requests}) > 950
    for seed, asked in enumerate(requests):
        song, text = draft(seed), asked.caption.lower()
        assert (song.bpm, str(song.key), song.has_drums) == (asked.bpm, asked.keyscale, asked.has_drums)
        assert any(words in text for words in NO_DRUMS) == (not song.has_drums), text
        assert any(name.lower() in text for name in STYLES[song.style].names)
        assert "\n" not in text and "  " not in text and "{" not in text
        for track in song.tracks:
            if track.role != "drums":
                assert any(word.lower() in text for word in WORDS.get(track.instrument, (track.instrument,))), text
    assert caption(compose(7, 12)) == requests[7].caption == request(7).caption


def test_few_words():
    texts = [few_words(draft(seed), np.random.default_rng(seed)) for seed in range(200)]
    assert 0.4 < np.mean([f", {draft(seed).bpm} bpm" in text for seed, text in enumerate(texts)]) < 0.6
    assert all(len(text) < 100 for text in texts)
    for seed in range(200):
        song, text = draft(seed), few_words(draft(seed), np.random.default_rng(seed), told=True)
        assert text.startswith(texts[seed].split(", ")[0]) and text.startswith(song.data.names)
        assert f", {song.bpm} bpm, {song.key}" in text and text.endswith(", no drums") != song.has_drums


@pytest.mark.parametrize("style", STYLES)
def test_sound(style):
    song = compose(3, 4, style)
    sound = render(song, 4)
    assert sound.shape == (2, 4 * SAMPLE_RATE) and sound.dtype == np.float32
    assert np.isfinite(sound).all()
    assert np.isclose(np.abs(sound).max(), PEAK)
    assert -22 < 10 * np.log10(np.mean(sound**2)) < -11
    assert np.abs(sound[:, [0, -1]]).max() < 1e-3
    assert np.abs(sound[0] - sound[1]).max() > 1e-3  # stereo
    assert np.array_equal(sound, render(compose(3, 4, style), 4))


def test_a_style_of_ones_own(tmp_path):
    style = dataclasses.replace(STYLES["lullaby"], names=("glockenspiel polka",), bpm=(180, 190, 200))
    assert list(write_songs(tmp_path / "songs", 2, 2, seed=5, style=style)) == [0, 1, 2]
    for i in range(2):
        song, text = draft(5 + i, style), (tmp_path / "songs" / f"0000{i}.txt").read_text()
        assert song.style == "glockenspiel polka" and song.data == style and song.bpm in (180, 190, 200)
        assert "glockenspiel polka" in text.lower() and f"bpm: {song.bpm}\n" in text
    sound, _ = soundfile.read(tmp_path / "songs" / "00000.flac", dtype="float32")
    np.testing.assert_allclose(sound.T, render(compose(5, 2, style), 2), atol=1e-6)
    assert list(write_songs(tmp_path / "songs", 2, 2, seed=5, style=style)) == [2]
    with pytest.raises(InputError, match="holds songs of"):
        next(write_songs(tmp_path / "songs", 2, 2, seed=5, style=dataclasses.replace(style, bpm=(180, 190))))


def test_instruments_neither_click_nor_alias():
    """A note that starts, is held and ends alone: no jump, and next to nothing between the partials of a high note."""
    for name in INSTRUMENTS:
        song = compose(5, 2, "chiptune")
        track = next(track for track in song.tracks if track.role == "lead")
        note = dataclasses.replace(track.notes[0], start=0.5, length=1.0, pitch=93)  # 1760 Hz
        track = dataclasses.replace(track, instrument=name, notes=(note,))
        sound = render(dataclasses.replace(song, tracks=(track,)), 2)[0]
        spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)))) ** 2
        frequency = np.fft.rfftfreq(len(sound), 1 / SAMPLE_RATE)
        off = np.abs(frequency / 1760 - np.round(frequency / 1760)) > 0.1
        assert spectrum[off].sum() < 1e-3 * spectrum.sum(), name


def test_command_line_writes_what_preprocess_reads(tmp_path, capsys):
    arguments = [str(tmp_path / "songs"), "--seconds", "2", "--seed", "40", "--workers", "1", "--songs"]
    assert command.main([*arguments, "2"]) == 0
    assert "2 of 2 songs" in capsys.readouterr().out
    first = {path.name: path.read_bytes() for path in (tmp_path / "songs").iterdir()}
    assert set(first) == {"00000.flac", "00000.txt", "00001.flac", "00001.txt", SETTINGS}
    info = soundfile.info(tmp_path / "songs" / "00000.flac")
    assert (info.samplerate, info.channels, info.frames) == (SAMPLE_RATE, 2, 2 * SAMPLE_RATE)

    sidecars = Sidecars(tmp_path / "songs", ["00000.flac", "00001.flac"])
    for i in range(2):
        texts, asked = sidecars.read(f"0000{i}.flac"), request(40 + i)
        assert (texts.caption, texts.bpm, texts.keyscale) == (asked.caption, asked.bpm, asked.keyscale)
        assert (texts.timesignature, texts.lyrics, texts.fallback) == (asked.timesignature, "[Instrumental]", False)
    assert not sidecars.warnings

    # Again, with one song gone and one more to make, by two processes and as a user calls it: the same bytes.
    (tmp_path / "songs" / "00001.flac").unlink()
    arguments[arguments.index("--workers") + 1] = "2"
    subprocess.run([sys.executable, "-m", "examples.synthetic_music", *arguments, "3"], check=True)
    again = {path.name: path.read_bytes() for path in (tmp_path / "songs").iterdir()}
    assert set(again) - set(first) == {"00002.flac", "00002.txt"}
    assert {name: again[name] for name in first} == first


def test_texts_that_tell_less(tmp_path):
    list(write_songs(tmp_path / "songs", 12, 1, untold=0.5, brief=0.5))
    texts = [(tmp_path / "songs" / f"{i:05}.txt").read_text() for i in range(12)]
    whole = [f"caption: {request(i).caption}\n" in text for i, text in enumerate(texts)]
    told = ["keyscale: " in text for text in texts]
    assert {(True, True), (True, False), (False, False)} == set(zip(whole, told, strict=True))


def test_command_line_bad_input(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "song.flac").write_bytes(b"")
    assert command.main([str(tmp_path / "mine"), "--songs", "1"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert command.main([str(tmp_path / "new"), "--songs", "1", "--seconds", "1", "--workers", "1"]) == 0
    assert command.main([str(tmp_path / "new"), "--songs", "1", "--seconds", "2"]) == 2
    assert '"seconds": 1.0' in capsys.readouterr().err
    for option, value in (("--songs", "0"), ("--seconds", "0.5"), ("--seconds", "nan"), ("--seed", "-1")):
        assert command.main([str(tmp_path / "other"), option, value]) == 2
        assert option in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "other"), "--style", "polka"])
    assert prompt_adherence.main(["--composer", "--prompts", "1"]) == 2
    assert prompt_adherence.main(["--composer", "--seconds", "1"]) == 2
    assert prompt_adherence.main(["--composer", "--few-words"]) == 2
    assert prompt_adherence.main(["--checkpoint", str(tmp_path / "none")]) == 2


def test_listening_to_known_signals():
    t = np.arange(8 * RATE) / RATE
    noise = np.random.default_rng(0).standard_normal(len(t))
    clicks = noise * np.exp(-(t % 0.5) / 0.01)
    triads = sum(np.sin(2 * np.pi * hertz(pitch) * t) for pitch in (60, 64, 67))
    heard = listen(np.stack([clicks, clicks]), RATE)
    assert heard.has_tempo(120) and heard.has_tempo(61) and heard.has_tempo(236)
    assert not heard.has_tempo(126) and not heard.has_tempo(90) and heard.has_drums
    heard = listen(np.stack([triads, triads]), RATE)
    assert not heard.has_drums
    np.testing.assert_allclose(heard.pitch_classes[[0, 4, 7]], 1 / 3, atol=0.02)
    assert heard.has_key(Key(0, "major").pitch_classes) and not heard.has_key(Key(6, "major").pitch_classes)
    silence = listen(np.zeros((2, 4 * RATE)), RATE)
    assert not silence.has_drums and not silence.has_key(Key(0, "major").pitch_classes)


def test_score_against_other_requests():
    requests = [dataclasses.replace(request(0), bpm=bpm) for bpm in (70, 100, 170)]
    heard = [Heard(bpm, np.full(12, 1 / 12), 0.0) for bpm in (140, 100, 100)]
    check = prompt_adherence.CHECKS["tempo within 4 %, or its double or half"]
    assert prompt_adherence.score(check, heard, requests) == (2 / 3, 1 / 6)


@pytest.mark.slow
def test_prompt_adherence_asks_the_model(monkeypatch, capsys):
    """With the composer in the model's place, which knows the songs by their captions."""
    seeds = {
        request(seed).caption: seed for seed in range(prompt_adherence.FIRST_SEED, prompt_adherence.FIRST_SEED + 3)
    }

    def pipe(prompt, *, lyrics, audio_duration, seed, **fields):
        song = compose(seeds[prompt] if fields else prompt_adherence.FIRST_SEED + seed, audio_duration)
        facts = dict(bpm=song.bpm, keyscale=str(song.key), timesignature=str(song.beats))
        assert fields == facts or (not fields and f"{song.bpm} bpm, {song.key}" in prompt)
        assert lyrics == "[Instrumental]" and seed < 3
        audio = render(song, audio_duration)
        return AudioPipelineOutput([Song(audio, np.zeros((0, 64), np.float32), SAMPLE_RATE, seed)])

    monkeypatch.setattr(AceStepPipeline, "from_checkpoint", lambda path: pipe)
    for options in ([], ["--few-words"]):
        assert prompt_adherence.main(["--checkpoint", "there", "--prompts", "3", *options]) == 0
        printed = capsys.readouterr().out
        assert printed.count(" bpm: ") == 3
        assert all(f"| {name} | 100% |" in printed for name in prompt_adherence.CHECKS)
