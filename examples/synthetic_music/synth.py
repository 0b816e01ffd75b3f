"""Render notes to audio: band-limited wavetables with envelopes, drums of sines and filtered noise, echo, reverb.

A pitched note is e(t) (w(t) s_open(f t) + (1 - w(t)) s_closed(f t)): one period with and one without its high partials,
crossfaded by the decaying exponential w, which imitates a closing filter. Equal notes are computed once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from examples.synthetic_music.compose import DRUMS, ROLES, Song, Track
from examples.synthetic_music.theory import hertz

SAMPLE_RATE = 48000  # Hz
PEAK = 10 ** (-1 / 20)  # -1 dBFS
LOUDNESS = 10 ** (-17 / 20)  # root mean square before the limiter
TABLE = 2048  # points of a period
TOP = 16000.0  # Hz, the highest partial
FADE_IN, FADE_OUT = 0.002, 0.05  # seconds, of the whole


@dataclasses.dataclass(frozen=True)
class Instrument:
    """shape: of `SHAPES`. closed, open: cutoffs in Hz; sweep: seconds in which the filter closes.

    attack, decay, release: seconds; sustain: level after the decay. detune: cents between the left and right voice,
    0 for one voice. vibrato: cents. level: relative to the other instruments.
    """

    shape: str
    closed: float
    open: float = 0.0
    sweep: float = 0.15
    attack: float = 0.006
    decay: float = 0.5
    sustain: float = 0.0
    release: float = 0.08
    detune: float = 0.0
    vibrato: float = 0.0
    level: float = 1.0


# Amplitudes of partials n = 1, 2, ...
SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sine": lambda n: (n == 1) * 1.0,
    "saw": lambda n: 1 / n,
    "square": lambda n: (n % 2) / n,
    "triangle": lambda n: (n % 2) / n**2,
    "pulse": lambda n: np.abs(np.sin(np.pi * n / 4)) / n,
    "string": lambda n: np.abs(np.sin(np.pi * n / 6)) / n**1.2,  # plucked at a sixth of its length
    "organ": lambda n: _drawbars(n, {1: 1.0, 2: 0.8, 3: 0.35, 4: 0.4, 8: 0.15}),
    "tine": lambda n: _drawbars(n, {1: 1.0, 2: 0.3, 3: 0.1, 4: 0.12, 8: 0.04}),
    "bar": lambda n: _drawbars(n, {1: 1.0, 4: 0.3, 8: 0.05}),
    "bell": lambda n: _drawbars(n, {1: 1.0, 2: 0.25, 3: 0.2, 4: 0.3, 6: 0.15, 8: 0.12}),
    "glass": lambda n: _drawbars(n, {1: 1.0, 2: 0.5, 4: 0.35, 6: 0.08, 8: 0.15}),
    "pipe": lambda n: _drawbars(n, {1: 1.0, 2: 0.35, 3: 0.12, 4: 0.06}),
}

INSTRUMENTS = {
    # basses
    "synth bass": Instrument("saw", 400, 2500, sustain=0.6, decay=0.25),
    "sub bass": Instrument("triangle", 250, 600, attack=0.012, decay=1.5, sustain=0.7, level=1.2),
    "acid bass": Instrument("saw", 350, 3000, sweep=0.09, decay=0.3, sustain=0.4),
    "saw bass": Instrument("saw", 900, 3000, sustain=0.7, detune=10),
    "upright bass": Instrument("string", 500, 1800, decay=0.7, sustain=0.1, release=0.12, level=1.3),
    "finger bass": Instrument("string", 700, 3000, sweep=0.1, decay=0.5, sustain=0.3, level=1.2),
    "dub bass": Instrument("triangle", 300, 800, attack=0.01, decay=0.9, sustain=0.5, level=1.3),
    "triangle bass": Instrument("triangle", 6000, decay=1.0, sustain=0.8, release=0.03),
    "reese bass": Instrument("saw", 500, attack=0.02, sustain=1.0, detune=24, level=1.1),
    "cello": Instrument("saw", 900, attack=0.05, sustain=0.9, decay=1.0, release=0.15, vibrato=8),
    # keys, guitars and other struck or plucked instruments
    "piano": Instrument("saw", 900, 4500, sweep=0.25, decay=0.9, release=0.15, level=1.1),
    "electric piano": Instrument("tine", 900, 5000, sweep=0.2, decay=1.1, release=0.15, level=1.1),
    "organ": Instrument("organ", 5000, attack=0.01, sustain=1.0, release=0.05, level=0.7),
    "accordion": Instrument("pulse", 2000, attack=0.04, sustain=1.0, release=0.12, detune=12, level=0.7),
    "synth stab": Instrument("saw", 500, 5000, decay=0.25, detune=14),
    "synth pluck": Instrument("saw", 500, 5000, sweep=0.08, decay=0.3, release=0.12),
    "soft pluck": Instrument("triangle", 1500, 6000, decay=0.6, release=0.3, level=1.3),
    "acid lead": Instrument("square", 500, 4000, sweep=0.07, decay=0.25, level=0.9),
    "muted guitar": Instrument("string", 900, 4000, sweep=0.05, decay=0.12, release=0.04, level=1.3),
    "nylon guitar": Instrument("string", 900, 3500, sweep=0.12, decay=0.7, release=0.2, level=1.3),
    "steel guitar": Instrument("string", 1800, 7000, sweep=0.2, decay=0.8, release=0.2, level=1.2),
    "harp": Instrument("string", 1200, 3500, decay=1.0, release=0.5, level=1.2),
    "vibraphone": Instrument("bar", 2500, 8000, decay=1.2, release=0.3, vibrato=5),
    "bells": Instrument("bell", 2500, 9000, sweep=0.3, decay=1.2, release=0.6, level=0.9),
    "music box": Instrument("bell", 3000, 10000, sweep=0.2, decay=0.7, release=0.4, level=0.9),
    "chip arpeggio": Instrument("pulse", 9000, decay=0.4, sustain=0.4, release=0.02, level=0.6),
    # pads
    "warm pad": Instrument("saw", 900, attack=0.15, sustain=1.0, release=0.35, detune=14),
    "dark pad": Instrument("saw", 450, attack=0.15, sustain=1.0, release=0.35, detune=18, level=1.2),
    "glass pad": Instrument("glass", 5000, attack=0.2, sustain=1.0, release=0.5, detune=8, level=0.8),
    "strings": Instrument("saw", 2200, attack=0.1, sustain=1.0, release=0.25, detune=16, vibrato=5, level=0.8),
    # leads
    "flute": Instrument("pipe", 4000, attack=0.05, sustain=0.9, release=0.1, vibrato=10),
    "saw lead": Instrument("saw", 1800, 6000, attack=0.01, sustain=0.7, release=0.1, detune=10, vibrato=5, level=0.8),
    "square lead": Instrument("square", 9000, sustain=0.7, release=0.03, vibrato=6, level=0.6),
    "pulse lead": Instrument("pulse", 9000, sustain=0.7, release=0.03, vibrato=6, level=0.6),
    "melodica": Instrument("pulse", 2500, attack=0.03, sustain=1.0, release=0.05, vibrato=6, level=0.7),
    "harmonica": Instrument("pulse", 3500, attack=0.04, sustain=1.0, release=0.06, vibrato=14, level=0.7),
    "violin": Instrument("saw", 3000, attack=0.06, sustain=1.0, release=0.12, vibrato=14, level=0.75),
    "cello lead": Instrument("saw", 1300, attack=0.06, sustain=1.0, release=0.15, vibrato=12),
    "brass": Instrument("saw", 1500, 4000, sweep=0.3, attack=0.03, sustain=0.9, release=0.08, level=0.8),
}


@dataclasses.dataclass(frozen=True)
class Drum:
    """A sine that sweeps from `top` to `bottom` Hz within `fall` seconds, and noise in a frequency band.

    tone, noise: levels; decay, hiss: seconds in which they decay to 1/e; attack: seconds of the noise.
    """

    tone: float = 0.0
    top: float = 0.0
    bottom: float = 0.0
    fall: float = 0.03
    decay: float = 0.1
    noise: float = 0.0
    band: tuple[float, float] = (1000.0, 8000.0)
    hiss: float = 0.05
    attack: float = 0.001
    pan: float = 0.0


_KICK = Drum(tone=1.0, top=180, bottom=48, decay=0.14, noise=0.15, band=(500, 4000), hiss=0.008)
_SNARE = Drum(tone=0.35, top=260, bottom=185, decay=0.06, noise=0.55, band=(900, 9000), hiss=0.09)
_KIT = {
    "kick": _KICK,
    "snare": _SNARE,
    "clap": Drum(noise=0.6, band=(900, 6000), hiss=0.09, attack=0.004, pan=-0.1),
    "rim": Drum(tone=0.4, top=900, bottom=820, decay=0.02, noise=0.4, band=(1500, 7000), hiss=0.02, pan=0.15),
    "hat": Drum(noise=0.3, band=(6000, 13000), hiss=0.03, pan=0.25),
    "open": Drum(noise=0.28, band=(6000, 13000), hiss=0.13, pan=0.25),
    "shaker": Drum(noise=0.3, band=(4500, 11000), hiss=0.05, attack=0.02, pan=-0.3),
}
KITS = {
    "electronic": _KIT,
    "acoustic": _KIT
    | {"kick": dataclasses.replace(_KICK, top=130, bottom=58, decay=0.09, noise=0.25)}
    | {"snare": dataclasses.replace(_SNARE, noise=0.7, hiss=0.07, band=(1200, 11000))},
    "dusty": _KIT
    | {"kick": dataclasses.replace(_KICK, top=120, bottom=52, decay=0.1)}
    | {"snare": dataclasses.replace(_SNARE, band=(700, 5000), hiss=0.06)}
    | {"hat": Drum(noise=0.3, band=(4000, 9000), hiss=0.035, pan=0.2)},
    "gated": _KIT | {"snare": dataclasses.replace(_SNARE, tone=0.5, noise=0.7, hiss=0.16, decay=0.1)},
    "8-bit": _KIT
    | {"kick": dataclasses.replace(_KICK, top=300, bottom=60, decay=0.07, noise=0.1)}
    | {"snare": Drum(noise=0.6, band=(600, 8000), hiss=0.06), "hat": Drum(noise=0.35, band=(4000, 12000), hiss=0.02)},
    "brushes": _KIT
    | {"kick": dataclasses.replace(_KICK, tone=0.8, top=110, bottom=60, decay=0.1, noise=0.1)}
    | {"snare": Drum(noise=0.5, band=(1500, 9000), hiss=0.1, attack=0.012), "hat": Drum(0, noise=0.3, hiss=0.04)},
}


def render(song: Song, seconds: float) -> np.ndarray:
    """Render a song to audio [2, samples] float32 at `SAMPLE_RATE`, with a peak of -1 dBFS."""
    size = round(seconds * SAMPLE_RATE)
    style, rng = song.data, np.random.default_rng([song.seed, 2])
    dry, wet = np.zeros((2, 2, size), np.float32)
    pushed = _ducking(song, size, style.duck)
    for track in song.tracks:
        sound = _drums(song, track, rng, size) if track.role == "drums" else _pitched(song, track, size) * pushed
        sound *= ROLES[track.role][1]
        if not song.has_drums and track.role == "arp":
            sound *= 1.6  # it carries the beat where there are no drums
        if style.echo and track.role in ("chords", "arp", "lead"):
            _add_echo(sound, round(0.75 * 60 / song.bpm * SAMPLE_RATE), style.echo)
        dry += sound
        wet += ROLES[track.role][2] * sound
    return _mastered(_filtered(dry, wet, style.reverb, style.tone, rng))


def _pitched(song: Song, track: Track, size: int) -> np.ndarray:
    """[2, size] float32."""
    instrument, beat = INSTRUMENTS[track.instrument], 60 / song.bpm * SAMPLE_RATE
    sound, made = np.zeros((2, size), np.float32), {}
    sides = _sides(track.pan)
    for note in track.notes:
        what = note.pitch, round(note.length * beat)
        if what not in made:
            made[what] = _note(instrument, *what)
        _add(sound, made[what] * sides, round(note.start * beat), note.velocity)
    return sound


def _drums(song: Song, track: Track, rng: np.random.Generator, size: int) -> np.ndarray:
    """Render drums to [2, size] float32. All hits of a drum sound the same."""
    kit, beat = KITS[track.instrument], 60 / song.bpm * SAMPLE_RATE
    made = {name: _drum(kit[name], rng) * _sides(kit[name].pan) for name in DRUMS}
    sound = np.zeros((2, size), np.float32)
    for hit in track.notes:
        _add(sound, made[DRUMS[hit.pitch]], round(hit.start * beat), hit.velocity)
    return sound


def _note(instrument: Instrument, pitch: int, held: int) -> np.ndarray:
    """Render a note that is held for `held` samples and then released, [1 or 2, samples] float32."""
    size = held + round(instrument.release * SAMPLE_RATE)
    t = np.arange(size, dtype=np.float32) / SAMPLE_RATE
    envelope = _rise(t, instrument.attack)
    envelope *= instrument.sustain + (1 - instrument.sustain) * np.exp(-t / instrument.decay)
    envelope[held:] *= 0.5 + 0.5 * np.cos(np.linspace(0, np.pi, size - held, dtype=np.float32))
    envelope *= instrument.level
    voices = (-0.5, 0.5) if instrument.detune else (0,)
    result = np.empty((len(voices), size), np.float32)
    for voice, side in zip(result, voices, strict=True):
        frequency = hertz(pitch + side * instrument.detune / 100)
        # In periods. In double precision: after seconds, single is off by hundredths of a period.
        phase = np.arange(size) * (frequency / SAMPLE_RATE) + 0.25 * side
        if instrument.vibrato:  # 5 Hz, which sets in slowly
            cents = instrument.vibrato * np.minimum(t / 0.4, 1) / 1200 * math.log(2)
            phase -= frequency * cents / (10 * np.pi) * np.cos(10 * np.pi * t)
        place = (phase % 1) * TABLE
        index = place.astype(np.int32)
        voice[:] = _read(_table(instrument.shape, pitch, instrument.closed), index, place - index)
        if instrument.open:
            opened = _read(_table(instrument.shape, pitch, instrument.open), index, place - index)
            voice += np.exp(-t / instrument.sweep) * (opened - voice)
        voice *= envelope
    return result


def _read(table: np.ndarray, index: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    low = table[index]
    return low + fraction.astype(np.float32) * (table[index + 1] - low)


@functools.cache
def _table(shape: str, pitch: int, cutoff: float) -> np.ndarray:
    """[TABLE + 1] float32: a period of the shape through a low-pass of 12 dB an octave, its first point again last."""
    frequency = hertz(pitch)
    n = np.arange(1, max(2, min(TABLE // 4, int(TOP / frequency))))
    spectrum = np.zeros(TABLE // 2 + 1, complex)
    spectrum[n] = -0.5j * SHAPES[shape](n) / np.sqrt(1 + (n * frequency / cutoff) ** 4)
    period = np.fft.irfft(spectrum) * TABLE
    # Equally loud to the ear: lower notes get more, and rich ones less.
    period *= 0.3 / np.sqrt(np.mean(period**2)) * (220 / frequency) ** 0.2
    return np.append(period, period[0]).astype(np.float32)


def _drawbars(n: np.ndarray, levels: dict[int, float]) -> np.ndarray:
    return np.array([levels.get(int(i), 0.0) for i in n])


def _drum(drum: Drum, rng: np.random.Generator) -> np.ndarray:
    """Render a drum to [samples] float32. Noise is drawn even if its level is 0, so that drums are independent."""
    size = round(max(7 * drum.decay * (drum.tone > 0), 7 * drum.hiss) * SAMPLE_RATE)
    t = np.arange(size) / SAMPLE_RATE
    low, high = drum.band
    frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    with np.errstate(divide="ignore"):
        band = 1 / np.sqrt((1 + (low / frequency) ** 6) * (1 + (frequency / high) ** 8))
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(size)) * band, size)
    noise *= drum.noise * 0.35 / np.sqrt(np.mean(noise**2))
    sound = noise * _rise(t, drum.attack) * np.exp(-t / drum.hiss)
    if drum.tone:
        # The integral of the frequency, bottom + (top - bottom) exp(-t / fall).
        phase = drum.bottom * t + (drum.top - drum.bottom) * drum.fall * (1 - np.exp(-t / drum.fall))
        sound += drum.tone * np.sin(2 * np.pi * phase) * _rise(t, 0.002) * np.exp(-t / drum.decay)
    return sound.astype(np.float32)


def _rise(t: np.ndarray, attack: float) -> np.ndarray:
    """Return a rise from 0 to 1 within `attack` seconds, half a cosine."""
    return 0.5 - 0.5 * np.cos(np.pi * np.minimum(t / attack, 1))


def _sides(pan: float) -> np.ndarray:
    """Return the gains left and right [2, 1], with constant power and 1 in the centre."""
    angle = (pan + 1) * np.pi / 4
    return np.array([[math.cos(angle)], [math.sin(angle)]], np.float32) * math.sqrt(2)


def _add(sound: np.ndarray, note: np.ndarray, start: int, gain: float) -> None:
    """Add the part of a note that lies within the sound, in place; there is none if the note begins after its end."""
    note = note[..., : max(0, sound.shape[-1] - start)]
    sound[:, start : start + note.shape[-1]] += np.float32(gain) * note


def _ducking(song: Song, size: int, depth: float) -> np.ndarray:
    """Return a gain [size] float32 that dips with each kick and recovers within a quarter of a second."""
    gain = np.ones(size, np.float32)
    t = np.arange(round(0.25 * SAMPLE_RATE), dtype=np.float32) / SAMPLE_RATE
    dip = -depth * _rise(t, 0.01) * (0.5 + 0.5 * np.cos(np.pi * t / 0.25))
    for track in song.tracks if depth else ():
        for hit in track.notes if track.role == "drums" else ():
            if DRUMS[hit.pitch] == "kick":
                start = round(hit.start * 60 / song.bpm * SAMPLE_RATE)
                part = gain[start : start + len(dip)]
                np.minimum(part, 1 + dip[: len(part)], out=part)
    return gain


def _add_echo(sound: np.ndarray, delay: int, level: float) -> None:
    """Add three repeats on alternating sides, in place."""
    source = sound.copy()
    for i in range(1, 4):
        if i * delay < sound.shape[-1]:
            side = source if i % 2 == 0 else source[::-1]
            sound[:, i * delay :] += np.float32(0.7 * level**i) * side[:, : sound.shape[-1] - i * delay]


def _filtered(dry: np.ndarray, wet: np.ndarray, reverb: float, tone: float, rng: np.random.Generator) -> np.ndarray:
    """Return dry plus wet in a room (decaying noise), band-passed from the limit of hearing to `tone`."""
    tail = rng.standard_normal((2, round(reverb * SAMPLE_RATE)), np.float32)
    t = np.arange(tail.shape[-1], dtype=np.float32) / SAMPLE_RATE
    tail *= _rise(t, 0.02) * np.exp(-6.9 / reverb * t)
    tail /= np.sqrt(np.sum(tail**2, axis=-1, keepdims=True))
    size = _fast_length(dry.shape[-1] + tail.shape[-1])
    frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE).astype(np.float32)
    room = 1 / np.sqrt((1 + (frequency / 4000) ** 4) * (1 + (200 / np.maximum(frequency, 1)) ** 4))
    response = 1 / np.sqrt((1 + (frequency / tone) ** 8) * (1 + (25 / np.maximum(frequency, 1)) ** 8))
    result = np.empty_like(dry)
    for channel in range(2):
        spectrum = np.fft.rfft(wet[channel], size) * np.fft.rfft(tail[channel], size) * room
        spectrum += np.fft.rfft(dry[channel], size)
        result[channel] = np.fft.irfft(spectrum * response, size)[: dry.shape[-1]]
    return result


def _fast_length(size: int) -> int:
    """Return the smallest FFT length of at least `size` that is 1, 3, 5, 9 or 15 times a power of two."""
    return min(factor * 2 ** max(0, math.ceil(math.log2(size / factor))) for factor in (1, 3, 5, 9, 15))


def _mastered(sound: np.ndarray) -> np.ndarray:
    """Normalise to the loudness `LOUDNESS` and the peak `PEAK`, with a gain that decreases smoothly ahead of peaks."""
    sound *= LOUDNESS / max(np.sqrt(np.mean(sound**2)), 1e-9)
    block = 240  # samples, 5 ms
    peaks = np.abs(np.pad(sound, ((0, 0), (0, -sound.shape[-1] % block)))).max(0).reshape(-1, block).max(1)
    gains = np.minimum(1, PEAK / np.maximum(peaks, PEAK))
    # The lowest of 25 blocks and then the mean of 21: no block's is above its own gain, nor its neighbours'.
    lowest = np.lib.stride_tricks.sliding_window_view(np.pad(gains, 12, mode="edge"), 25).min(1)
    smooth = np.convolve(np.pad(lowest, 10, mode="edge"), np.full(21, 1 / 21), "valid")
    at = np.arange(sound.shape[-1])
    sound *= np.interp(at, (np.arange(len(smooth)) + 0.5) * block, smooth).astype(np.float32)
    for fade, part in ((FADE_IN, sound), (FADE_OUT, sound[:, ::-1])):
        size = round(fade * SAMPLE_RATE)
        part[:, :size] *= np.linspace(0, 1, size, dtype=np.float32)
    return sound * np.float32(PEAK / max(np.abs(sound).max(), 1e-9))
