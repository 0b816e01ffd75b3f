"""Keys, scales and chords. Pitches are MIDI numbers (60 is middle C, 69 is 440 Hz), degrees count from the tonic, 0."""

import dataclasses

SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
NAMES = {
    "major": ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"),
    "minor": ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "G#", "A", "Bb", "B"),
}
# Degrees of the chords, counted from the tonic. None is diminished, so that every bass can play the fifth.
PROGRESSIONS = {
    "major": ((0, 4, 5, 3), (0, 5, 3, 4), (0, 3, 0, 4), (0, 2, 3, 4), (0, 3, 5, 4), (0, 1, 4, 0), (0, 5, 1, 4)),
    "minor": ((0, 5, 2, 6), (0, 3, 5, 4), (0, 6, 5, 6), (0, 5, 3, 4), (0, 3, 0, 4), (0, 2, 6, 3), (0, 3, 6, 0)),
}


@dataclasses.dataclass(frozen=True)
class Key:
    """tonic: 0 for C to 11 for B; mode: "major" or (natural) "minor"."""

    tonic: int
    mode: str

    def __str__(self) -> str:
        """Return the name as in prompts, such as "F# minor"."""
        return f"{NAMES[self.mode][self.tonic]} {self.mode}"

    @property
    def pitch_classes(self) -> tuple[int, ...]:
        """The seven pitch classes of the scale from the tonic on, each 0 to 11."""
        return tuple((self.tonic + step) % 12 for step in SCALES[self.mode])

    def pitch(self, degree: int, lowest: int = 60) -> int:
        """Return the pitch of a degree: 0 is the first tonic at or above `lowest`, and 7 degrees are an octave."""
        octave, step = divmod(degree, 7)
        return lowest + (self.tonic - lowest) % 12 + 12 * octave + SCALES[self.mode][step]

    def chord(self, degree: int, size: int = 3, centre: int = 60) -> tuple[int, ...]:
        """Return the chord on a degree, of 3 notes (triad) or 4 (seventh), inverted around `centre`, ascending."""
        lowest = centre - 6
        return tuple(sorted(lowest + (self.pitch(degree + 2 * i) - lowest) % 12 for i in range(size)))


def parse_key(text: str) -> Key:
    """Parse the name of a key, the inverse of `str`. Raises ValueError if it is not one."""
    name, _, mode = text.partition(" ")
    if name not in NAMES.get(mode, ()):
        raise ValueError(f'{text!r}: expected a key such as "F# minor" or "Bb major"')
    return Key(NAMES[mode].index(name), mode)


def hertz(pitch: float) -> float:
    return 440.0 * 2.0 ** ((pitch - 69) / 12)
