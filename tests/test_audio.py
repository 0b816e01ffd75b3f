"""Audio files are written whole or not at all."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile

from acestep_jax import InputError, audio

SECONDS, RATE = 3, 48000


@pytest.fixture
def stereo():
    """Two tones, the second channel an octave higher and half as loud."""
    t = np.arange(SECONDS * RATE) / RATE
    return np.stack([0.8 * np.sin(2 * np.pi * 440 * t), 0.4 * np.sin(2 * np.pi * 880 * t)]).astype(np.float32)


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
        "import resource, signal, numpy as np; from acestep_jax import audio;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000));"
        f"audio.write({str(tmp_path / 'song.wav')!r}, np.zeros((2, 480000), np.float32), 48000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1].startswith("OSError")
    assert not list(tmp_path.iterdir())
