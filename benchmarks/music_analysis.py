"""Blind analysis of audio: its tempo, its pitch classes, whether it has drums.

The threshold for drums was tuned on songs from `examples.synthetic_music`; see `DRUMS_FRACTION`.
"""

import dataclasses

import librosa
import numpy as np
import soxr

RATE = 22050  # Hz
TEMPO_TOLERANCE = 0.04
MIN_IN_KEY = 0.7
# Threshold for the percussive fraction of the energy above 3 kHz. Among 60 songs by the composer (seeds from 500000,
# 10 s), it was at most 0.24 without drums and at least 0.74 with drums; through the small model's autoencoder, 0.30 and
# 0.48.
DRUMS_FRACTION = 0.4
DRUMS_WINDOW = 1024  # samples, 46 ms; in longer ones, a drum hit blurred by an autoencoder counts as harmonic
DRUMS_FROM = 3000.0  # Hz: above the attacks of most instruments, below what an autoencoder might lose
DRUMS_FLOOR = 1e-4  # fraction of the total energy: if the high band is weaker than this, there are no drums

MAJOR_SCALE = (0, 2, 4, 5, 7, 9, 11)


@dataclasses.dataclass(frozen=True)
class Heard:
    """The analysis of one song.

    tempo: beats per minute, often double or half the perceived tempo.
    pitch_classes: [12], the fractions of C to B in the energy of the harmonic part, which sum to 1.
    percussive: the percussive fraction of the energy above `DRUMS_FROM`, 0 to 1.
    """

    tempo: float
    pitch_classes: np.ndarray
    percussive: float

    def has_tempo(self, bpm: float) -> bool:
        """Return whether the tempo is within 4 % of `bpm`, its double or its half."""
        return any(abs(self.tempo / (bpm * factor) - 1) <= TEMPO_TOLERANCE for factor in (0.5, 1, 2))

    def in_key_fraction(self, pitch_classes: tuple[int, ...]) -> float:
        """Return the fraction of the harmonic energy in these pitch classes, 0 for C to 11 for B."""
        return float(self.pitch_classes[list(pitch_classes)].sum())

    def has_key(self, pitch_classes: tuple[int, ...]) -> bool:
        """Return whether the seven pitch classes of a scale have 70 % of the energy.

        Seven random pitch classes have 58 %, and a scale that shares five or six with the true one often passes, so
        compare with chance; see `has_best_key`.
        """
        return self.in_key_fraction(pitch_classes) >= MIN_IN_KEY

    def has_best_key(self, pitch_classes: tuple[int, ...]) -> bool:
        """Return whether this scale has the most energy of the twelve major scales (each with its relative minor)."""
        scales = [{(root + step) % 12 for step in MAJOR_SCALE} for root in range(12)]
        return max(scales, key=lambda scale: self.in_key_fraction(tuple(scale))) == set(pitch_classes)

    @property
    def has_drums(self) -> bool:
        return self.percussive > DRUMS_FRACTION


def listen(audio: np.ndarray, rate: int) -> Heard:
    """Analyse the mono sum of audio [channels, samples], float, at `rate` Hz; a tempo needs a few seconds."""
    sound = soxr.resample(np.asarray(audio, np.float32).mean(axis=0), rate, RATE)
    # Frames of 256 samples: with librosa's default of 512, neighbouring lags are 6 % apart at 160 bpm.
    onsets = librosa.onset.onset_strength(y=sound, sr=RATE, hop_length=256)
    tempo = librosa.feature.tempo(onset_envelope=onsets, sr=RATE, hop_length=256)[0]
    harmonic, _ = librosa.decompose.hpss(librosa.stft(sound, n_fft=2048))
    pitches = _pitch_classes(librosa.istft(harmonic, n_fft=2048, length=len(sound)))
    spectrum = librosa.stft(sound, n_fft=DRUMS_WINDOW)
    high = librosa.fft_frequencies(sr=RATE, n_fft=DRUMS_WINDOW) >= DRUMS_FROM
    held, beaten = (_energy(part[high]) for part in librosa.decompose.hpss(spectrum))
    whole = _energy(spectrum)
    return Heard(float(tempo), pitches, beaten / (beaten + held + DRUMS_FLOOR * whole + 1e-12))


def _pitch_classes(sound: np.ndarray) -> np.ndarray:
    """Return the fractions of energy of the pitch classes, [12].

    Each bin counts only for the nearest semitone: librosa's chroma gives a fifth of a note's energy to its neighbours,
    which are mostly out of the key. The range starts at 250 Hz, since lower semitones are too close for short notes,
    and ends at 2100 Hz, above which there are mostly overtones.
    """
    size = 16384
    energy = np.square(np.abs(librosa.stft(sound, n_fft=size, hop_length=size // 4))).sum(axis=1)
    frequency = librosa.fft_frequencies(sr=RATE, n_fft=size)
    middle = (frequency >= 250) & (frequency <= 2100)
    pitches = np.round(librosa.hz_to_midi(frequency[middle])).astype(int)
    shares = np.bincount(pitches % 12, energy[middle], 12)
    return shares / max(shares.sum(), 1e-12)


def _energy(spectrum: np.ndarray) -> float:
    return float(np.square(np.abs(spectrum)).sum())
