"""Compose a song from a seed: notes in beats and MIDI pitches, all in the key of the song, at one tempo."""

import dataclasses
import math

import numpy as np

from examples.synthetic_music.styles import STYLES, Style
from examples.synthetic_music.theory import PROGRESSIONS, Key

STEPS = 4  # per beat
DRUMS = ("kick", "snare", "clap", "rim", "hat", "open", "shaker")
PHRASES = "AABA"

# For a role: lowest pitch of bass, or the centre of the chord; level; send to the reverb.
ROLES = {
    "drums": (0, 1.0, 0.06),
    "bass": (31, 0.8, 0.0),
    "chords": (60, 0.5, 0.15),
    "pad": (62, 0.35, 0.3),
    "arp": (66, 0.48, 0.25),
    "lead": (74, 0.5, 0.3),
}


@dataclasses.dataclass(frozen=True)
class Note:
    """start, length: beats. pitch: MIDI, or an index into `DRUMS`. velocity: 0 to 1."""

    start: float
    length: float
    pitch: int
    velocity: float


@dataclasses.dataclass(frozen=True)
class Track:
    """role: one of `ROLES`. instrument: of `synth.INSTRUMENTS`, or of drums one of `synth.KITS`. pan: -1 left to 1."""

    role: str
    instrument: str
    rhythms: dict[str, str] | str
    pan: float
    notes: tuple[Note, ...] = ()


@dataclasses.dataclass(frozen=True)
class Song:
    """style: its name in `STYLES`, or the first of its own names; data: the style itself. progression: degrees of the
    chords. Tracks have notes only after `compose`."""

    seed: int
    style: str
    data: Style
    mood: str
    bpm: int
    key: Key
    progression: tuple[int, ...]
    tracks: tuple[Track, ...]

    @property
    def beats(self) -> int:
        return self.data.beats

    @property
    def has_drums(self) -> bool:
        return any(track.role == "drums" for track in self.tracks)


def draft(seed: int, style: str | Style | None = None) -> Song:
    """Draft a song without its notes: everything that a caption states, independently of the length.

    Args:
        seed: at least 0.
        style: the name of one of `STYLES`, or a style of your own; None: drawn from `STYLES`.
    """
    rng = np.random.default_rng([seed, 0])
    drawn = str(rng.choice(list(STYLES)))
    name, data = (style.names[0], style) if isinstance(style, Style) else (style or drawn, STYLES[style or drawn])
    mode = "minor" if rng.random() < data.minor else "major"
    tracks = []
    if rng.random() < data.drums:
        tracks.append(Track("drums", data.kit, data.beat[rng.integers(len(data.beat))], 0.0))
    side = float(rng.choice([-1, 1]))
    for role, part in data.parts.items():
        there, instrument, rhythm = rng.random() < part.chance, _pick(rng, part.instruments), _pick(rng, part.rhythms)
        if there:
            pan = 0.0 if role in ("bass", "pad") else side * float(rng.uniform(0.15, 0.4))
            side = side if pan == 0 else -side
            tracks.append(Track(role, instrument, rhythm, round(pan, 2)))
    return Song(
        seed=seed,
        style=name,
        data=data,
        mood=_pick(rng, data.moods),
        bpm=int(rng.choice(data.bpm)),
        key=Key(int(rng.integers(12)), mode),
        progression=_pick(rng, PROGRESSIONS[mode]),
        tracks=tuple(tracks),
    )


def compose(seed: int, seconds: float, style: str | Style | None = None) -> Song:
    """Compose the notes of `draft` that begin within `seconds`; a shorter song is the beginning of a longer one."""
    song = draft(seed, style)
    bars = math.ceil(seconds * song.bpm / 60 / song.beats)
    tracks = []
    for number, track in enumerate(song.tracks):
        rng = np.random.default_rng([seed, 1, number])
        notes = _drums(song, track, bars) if track.role == "drums" else _pitched(song, track, bars, rng)
        notes = (_swung(note, song.data.swing) for note in notes)
        tracks.append(dataclasses.replace(track, notes=tuple(notes)))
    return dataclasses.replace(song, tracks=tuple(tracks))


def onsets(rhythm: str, bar: int, beats: int) -> list[tuple[int, int, str]]:
    """Return the onsets in a bar of a repeating rhythm: (step in the bar, length in steps, character)."""
    size = beats * STEPS
    begin = bar * size % len(rhythm)
    text = rhythm[begin : begin + size]
    starts = [i for i, character in enumerate(text) if character not in ".-"]
    return [(i, len(text[i + 1 :]) - len(text[i + 1 :].lstrip("-")) + 1, text[i]) for i in starts]


def _drums(song: Song, track: Track, bars: int) -> list[Note]:
    """Every eighth bar ends in a fill of snare or clap, during which the kick continues."""
    notes = []
    fill = next(drum for drum in ("snare", "clap", "rim", "shaker") if drum in track.rhythms)
    for bar in range(bars):
        for drum, rhythm in track.rhythms.items():
            for step, _, character in onsets(rhythm, bar, song.beats):
                velocity = {"x": 0.9, "o": 0.5}[character] * (1.0 if step % STEPS == 0 or drum != "hat" else 0.8)
                notes.append(Note(bar * song.beats + step / STEPS, 0.25, DRUMS.index(drum), velocity))
        if bar % 8 == 7:
            start = (bar + 1) * song.beats - 1
            notes += [Note(start + i / STEPS, 0.25, DRUMS.index(fill), 0.5 + 0.1 * i) for i in range(1, STEPS)]
    return notes


def _pitched(song: Song, track: Track, bars: int, rng: np.random.Generator) -> list[Note]:
    style, notes = song.data, []
    centre = ROLES[track.role][0]
    phrase = len(song.progression) * style.bars  # bars
    if track.role == "lead":
        melodies = {name: _melody(song, track, rng, phrase) for name in "AB"}
    for bar in range(bars):
        degree = song.progression[bar // style.bars % len(song.progression)]
        start = bar * song.beats
        if track.role == "lead":
            melody = melodies[PHRASES[bar // phrase % len(PHRASES)]][bar % phrase]
            notes += [dataclasses.replace(note, start=start + note.start) for note in melody]
            continue
        chord = song.key.chord(degree, style.size, centre)
        for step, length, character in onsets(track.rhythms, bar, song.beats):
            if track.role == "bass":
                pitches = (_bass(song.key, degree, character, centre),)
            elif track.role == "arp":
                octave, place = divmod(int(character), len(chord))
                pitches = (chord[place] + 12 * octave,)
            else:
                pitches = chord
            velocity = 0.95 if step == 0 else 0.85 if step % STEPS == 0 else 0.7
            notes += [Note(start + step / STEPS, length / STEPS, pitch, velocity) for pitch in pitches]
    return notes


def _bass(key: Key, degree: int, character: str, lowest: int) -> int:
    """Return the root, less than an octave above `lowest`, or the fifth or octave above it."""
    root = lowest + (key.pitch(degree) - lowest) % 12
    if character == "5":
        return root + (key.pitch(degree + 4) - root) % 12
    return root + 12 if character == "8" else root


def _melody(song: Song, track: Track, rng: np.random.Generator, bars: int) -> list[list[Note]]:
    """Return a random walk over the scale for each bar of a phrase, with chord tones on strong beats."""
    style = song.data
    tonic = song.key.pitch(0, ROLES["lead"][0] - 9)
    place, melody = int(rng.choice([0, 2, 4])), []
    for bar in range(bars):
        root = song.progression[bar // style.bars % len(song.progression)]
        notes = []
        for step, length, _ in onsets(track.rhythms, bar, song.beats):
            place += int(rng.choice([-2, -1, -1, 1, 1, 2]))
            place = place - 4 if place > 9 else place + 4 if place < -2 else place
            if step % (2 * STEPS) == 0 or length > STEPS:
                place = min((place, place + 1, place - 1), key=lambda p: (p - root) % 7 not in (0, 2, 4))
            degree = place
            if bar == bars - 1 and step + length >= song.beats * STEPS - STEPS and (0 - root) % 7 in (0, 2, 4):
                degree = 0 if place < 4 else 7  # phrases come to rest on the tonic
            pitch = tonic + song.key.pitch(degree) - song.key.pitch(0)
            notes.append(Note(step / STEPS, length / STEPS, pitch, 0.9 if step % STEPS == 0 else 0.75))
        melody.append(notes)
    return melody


def _swung(note: Note, swing: float) -> Note:
    """Delay a note by `swing` beats if it starts on the second eighth of a beat."""
    return dataclasses.replace(note, start=note.start + swing) if swing and note.start % 1 == 0.5 else note


def _pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]
