"""Audio files are written whole or not at all."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile

from acestep_jax import InputError
from acestep_jax.io import audio

unit = pytest.mark.unit

SECONDS, RATE = 3, 48000


@pytest.fixture
def stereo():
    """Two tones, the second channel an octave higher and half as loud."""
    t = np.arange(SECONDS * RATE) / RATE
    return np.stack([0.8 * np.sin(2 * np.pi * 440 * t), 0.4 * np.sin(2 * np.pi * 880 * t)]).astype(np.float32)


@unit
@pytest.mark.parametrize(
    "suffix, limit", [(".wav", 1e-4), (".flac", 1e-6), (".ogg", 0.05), (".mp3", 0.05), (".WAV", 1e-4)]
)
def test_every_kind_of_file(tmp_path, stereo, suffix, limit):
    path = tmp_path / f"song{suffix}"
    audio.write(path, stereo, RATE)
    found, rate = soundfile.read(path, always_2d=True)
    assert rate == RATE and found.shape[1] == 2
    inner = slice(RATE, 2 * RATE)  # lossy coders may shift the ends
    error = found.T[:, inner] - stereo[:, inner]
    assert np.sqrt(np.mean(error**2)) < limit
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_minutes_of_vorbis(tmp_path):
    noise = 0.1 * np.random.default_rng(0).standard_normal((2, 120 * RATE), dtype=np.float32)
    audio.write(tmp_path / "long.ogg", noise, RATE)
    assert soundfile.info(tmp_path / "long.ogg").frames == 120 * RATE


@unit
@pytest.mark.parametrize(
    "name, message",
    [
        ("song.aac", "unknown kind of audio file"),
        ("song", "unknown kind of audio file"),
        ("absent/song.wav", "does not exist; create it first"),
    ],
)
def test_bad_paths(tmp_path, stereo, name, message):
    with pytest.raises(InputError, match=message):
        audio.write(tmp_path / name, stereo, RATE)
    assert not list(tmp_path.iterdir())


@unit
def test_nothing_is_overwritten_unasked(tmp_path, stereo):
    path = tmp_path / "song.wav"
    path.write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        audio.write(path, stereo, RATE)
    assert path.read_text() == "mine"
    audio.write(path, stereo, RATE, overwrite=True)
    assert soundfile.info(path).frames == SECONDS * RATE


def test_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files stands in for a full disk."""
    code = (
        "import resource, signal, numpy as np; from acestep_jax.io import audio;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000));"
        f"audio.write({str(tmp_path / 'song.wav')!r}, np.zeros((2, 480000), np.float32), 48000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1].startswith("OSError")
    assert not list(tmp_path.iterdir())


@unit
def test_a_wav_keeps_what_exceeds_full_scale(tmp_path, stereo, caplog):
    """As 32-bit floating point, bit for bit, and it is said; a song that stays within is written as before."""
    loud = 2 * stereo
    audio.write(tmp_path / "loud.wav", loud, RATE)
    over = int((np.abs(loud) > 1).sum())
    assert f"loud.wav: {over} of {loud.size} samples exceed full scale, up to 1.60; written as 32-bit" in caplog.text
    assert soundfile.info(tmp_path / "loud.wav").subtype == "FLOAT"
    np.testing.assert_array_equal(audio.read(tmp_path / "loud.wav", RATE), loud)
    caplog.clear()
    audio.write(tmp_path / "full.wav", stereo / np.abs(stereo).max(), RATE)
    assert soundfile.info(tmp_path / "full.wav").subtype == "PCM_16" and not caplog.text


@unit
@pytest.mark.parametrize("suffix", [".flac", ".ogg", ".mp3"])
def test_clipping_is_counted_and_said(tmp_path, stereo, suffix, caplog):
    audio.write(tmp_path / f"loud{suffix}", 2 * stereo, RATE)
    over = int((np.abs(2 * stereo) > 1).sum())
    assert f"{over} of {stereo.size} samples exceed full scale, up to 1.60, and are clipped; a .wav" in caplog.text


@unit
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_written(tmp_path, stereo, value):
    stereo[1, 5:8] = value
    with pytest.raises(InputError, match=r"song.wav: 3 of \d+ values of the audio are NaN or infinite"):
        audio.write(tmp_path / "song.wav", stereo, RATE)
    assert not list(tmp_path.iterdir())


def sine(rate, hertz=1000.0, seconds=1.0):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


@unit
@pytest.mark.parametrize(
    "name, kind, limit",
    [
        ("song.wav", {"subtype": "PCM_24"}, 1e-6),
        ("song.WAV", {"subtype": "FLOAT"}, 1e-7),
        ("song.flac", {}, 1e-4),
        ("song.aiff", {}, 1e-4),
        ("song.mp3", {}, 0.01),
        ("song.ogg", {}, 0.02),
        ("song.opus", {"format": "OGG", "subtype": "OPUS"}, 0.02),
    ],
)
def test_read_every_kind(tmp_path, name, kind, limit):
    """The two channels stay apart and in order."""
    left, right = sine(RATE), sine(RATE, 500.0)
    soundfile.write(tmp_path / name, np.stack([left, right], 1), RATE, **kind)
    found = audio.read(tmp_path / name, RATE)
    assert found.dtype == np.float32 and found.shape == (2, RATE) and found.flags.c_contiguous
    inner = slice(RATE // 4, RATE // 2)
    assert np.abs(found[:, inner] - np.stack([left, right])[:, inner]).max() <= limit


@unit
@pytest.mark.parametrize("rate", [8000, 32000, 44100, 96000])
def test_read_resamples(tmp_path, rate):
    """A tone is the same tone at another rate, in time and level."""
    soundfile.write(tmp_path / "song.wav", sine(rate), rate, subtype="FLOAT")
    found = audio.read(tmp_path / "song.wav", RATE)
    assert found.shape == (2, RATE)
    inner = slice(RATE // 8, -RATE // 8)
    assert np.abs(found[:, inner] - sine(RATE)[inner]).max() <= 1e-4
    assert np.array_equal(found[0], found[1])


@unit
def test_read_removes_what_is_above_the_new_rate(tmp_path):
    soundfile.write(tmp_path / "song.wav", sine(96000, 30000.0), 96000, subtype="FLOAT")
    assert np.abs(audio.read(tmp_path / "song.wav", RATE)[:, RATE // 8 : -RATE // 8]).max() <= 1e-4


@unit
def test_read_keeps_what_is_too_loud(tmp_path):
    soundfile.write(tmp_path / "song.wav", 4 * sine(RATE), RATE, subtype="FLOAT")
    assert np.abs(audio.read(tmp_path / "song.wav", RATE)).max() == pytest.approx(2.0)


def with_nan(path):
    broken = sine(RATE)
    broken[7] = np.nan
    broken[9] = np.inf
    soundfile.write(path, broken, RATE, subtype="FLOAT")


UNREADABLE = {
    "corrupt": ("song.mp3", lambda path: path.write_bytes(b"garbage" * 99), "not a sound file .*Format not recognised"),
    "nothing": ("song.wav", lambda path: path.write_bytes(b""), "not a sound file"),
    "cut": ("song.flac", None, "not a sound file .*decoder lost sync.*if it is another kind, convert it"),
    "no header": ("song.raw", lambda path: path.write_bytes(b"ab" * 99), "not a sound file"),
    "no samples": ("song.wav", lambda path: soundfile.write(path, np.zeros((0, 2)), RATE), "holds no samples"),
    "nan": ("song.wav", with_nan, "2 of 48000 samples are NaN or infinite; expected finite numbers"),
    "surround": (
        "song.wav",
        lambda path: soundfile.write(path, np.zeros((99, 6)), RATE),
        "6 channels, expected 1 or 2; mix it down first",
    ),
}


@unit
@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable(tmp_path, stereo, case):
    name, make, message = UNREADABLE[case]
    path = tmp_path / name
    if make is None:
        audio.write(path, stereo, RATE)
        path.write_bytes(path.read_bytes()[:-9999])
    else:
        make(path)
    with pytest.raises(InputError, match=message) as error:
        audio.read(path, RATE)
    assert str(error.value).startswith(f"{path}: ")


@unit
def test_absent(tmp_path):
    with pytest.raises(FileNotFoundError, match="song.wav"):
        audio.read(tmp_path / "song.wav", RATE)
