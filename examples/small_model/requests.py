"""Prompts for composed music, as users would write them, and the facts that they state."""

from collections.abc import Sequence

import numpy as np

from acestep_jax.inputs import tasks
from acestep_jax.inputs.prompt import prompt_text
from examples.small_model.start import CONFIGS
from examples.synthetic_music.caption import caption, few_words
from examples.synthetic_music.compose import Song, draft
from examples.synthetic_music.styles import STYLES

INSTRUMENTS = tuple(
    dict.fromkeys(name for style in STYLES.values() for p in style.parts.values() for name in p.instruments)
)
TURNS = (0.5, 1, 2, 4)  # tempo as angles, in turns per octave, so that similar tempi have similar angles
BEATS = (1, 2, 4)  # how far back the transformer has to attend to keep the tempo
LATENTS_PER_SECOND = 25
ANGLES = 12  # the fastest angles of the transformer's rotary embedding; slower ones hardly distinguish a few beats


def song_and_prompt(seed: int) -> tuple[Song, str]:
    """Return a song and one of many prompts that describe it. Tempo, key and time signature are stated more often than
    not, in a field or in the caption; the caption is a full one or a few words."""
    song, rng = draft(seed), np.random.default_rng([seed, 5])
    text = caption(song) if rng.random() < 0.7 else few_words(song, rng)
    told = rng.random(3) < (0.0 if rng.random() < 0.25 else 0.9)
    if rng.random() < 0.2:
        text = text.lower()
    return song, prompt_text(
        text,
        audio_duration=int(rng.integers(10, 61)),
        bpm=song.bpm if told[0] else None,
        keyscale=str(song.key) if told[1] else None,
        timesignature=song.beats if told[2] else None,
        instruction=tasks.instruction(str(rng.choice(["text2music", "repaint", "cover"]))),
    )


def facts(song: Song) -> np.ndarray:
    """Return audible properties as float32 numbers: tempo, tonic, scale, mode, drums, style, instruments."""
    instruments = {track.instrument for track in song.tracks}
    return np.array(
        [
            *tempo_facts(song.bpm),
            *_which(range(12), [song.key.tonic]),
            *_which(range(12), song.key.pitch_classes),
            song.key.mode == "minor",
            song.has_drums,
            *_which(STYLES, [song.style]),
            *_which(INSTRUMENTS, instruments),
        ],
        np.float32,
    )


def tempo_facts(bpm: float) -> np.ndarray:
    """Return numbers from which a linear layer can determine the tempo to a few per cent, and the angles by which the
    rotary embedding turns a key some beats away: a query that is a linear function of them attends to that place."""
    config = CONFIGS["transformer"]
    octave = np.log2(bpm / 110)
    tokens = 60 / bpm * LATENTS_PER_SECOND / config.patch_size * np.array(BEATS)
    rates = config.rope_theta ** (-2 * np.arange(ANGLES) / config.head_dim)  # radians for each token
    angles = np.concatenate([2 * np.pi * octave * np.array(TURNS), np.outer(tokens, rates).ravel()])
    return np.concatenate([[octave], np.sin(angles), np.cos(angles)])


# The most audible properties should be predicted best: tempo and key have a larger weight than single instruments.
_SIZES = {"tempo": (1 + 2 * (len(TURNS) + len(BEATS) * ANGLES), 1.0), "key": (25, 2.0), "drums": (1, 5.0)}
FACT_WEIGHTS = np.concatenate(
    [np.full(size, weight) for size, weight in _SIZES.values()] + [np.full(len(STYLES) + len(INSTRUMENTS), 1.0)]
).astype(np.float32)


def _which(names: Sequence, chosen: Sequence) -> list[bool]:
    return [name in chosen for name in names]
