"""Captions as a listener would write them: style, mood, a word for the tempo, instruments, with or without drums."""

import dataclasses

import numpy as np

from examples.synthetic_music.compose import Song, draft
from examples.synthetic_music.styles import Style

MOODS = {"major": ("bright", "warm", "happy", "cheerful"), "minor": ("melancholic", "moody", "bittersweet", "brooding")}
TEMPOS = ((84, ("slow", "unhurried")), (108, ("mid-tempo", "relaxed")), (136, ("upbeat", "lively")))
FAST = ("fast", "high-energy")

# Names for an instrument, where they differ from its own name with an article.
WORDS = {
    "synth bass": ("a synth bass", "an analog bass line"),
    "sub bass": ("a deep sub bass", "sub bass"),
    "acid bass": ("a squelchy acid bass", "an acid bass line"),
    "saw bass": ("a buzzing saw bass", "a detuned synth bass"),
    "upright bass": ("an upright bass", "double bass"),
    "finger bass": ("a bass guitar", "a fingered electric bass"),
    "dub bass": ("a heavy dub bass", "a round bass line"),
    "triangle bass": ("a triangle-wave bass", "a simple 8-bit bass"),
    "reese bass": ("a reese bass", "a growling detuned bass"),
    "piano": ("piano", "piano chords"),
    "electric piano": ("electric piano", "Rhodes piano"),
    "organ": ("organ", "an electric organ"),
    "synth stab": ("synth stabs", "short synth chords"),
    "synth pluck": ("plucked synth", "a synth pluck sequence"),
    "soft pluck": ("soft plucks", "gentle synth plucks"),
    "acid lead": ("a resonant square sequence", "an acid synth sequence"),
    "muted guitar": ("muted guitar", "choppy rhythm guitar"),
    "nylon guitar": ("nylon guitar", "classical guitar"),
    "steel guitar": ("steel-string guitar", "acoustic guitar"),
    "vibraphone": ("vibraphone", "mellow vibes"),
    "bells": ("bells", "shimmering bells"),
    "chip arpeggio": ("pulse-wave arpeggios", "chip arpeggios"),
    "warm pad": ("a warm pad", "warm analog pads"),
    "dark pad": ("a dark pad", "murky synth pads"),
    "glass pad": ("a glassy pad", "crystalline pads"),
    "strings": ("strings", "a string ensemble"),
    "saw lead": ("a saw lead", "a bright synth lead"),
    "square lead": ("a square-wave lead", "a square lead melody"),
    "pulse lead": ("a pulse-wave lead", "a pulse lead melody"),
    "violin": ("violin", "a singing violin"),
    "cello lead": ("a cello melody", "solo cello"),
    "brass": ("brass", "a brass section"),
}
DRUMS = {
    "electronic": ("drum machine", "electronic drums", "a steady kick and hi-hats"),
    "acoustic": ("drums", "acoustic drums", "a live drum kit"),
    "dusty": ("dusty drums", "a boom-bap beat", "laid-back drums"),
    "gated": ("gated drums", "big 80s drums", "drum machine with a big snare"),
    "8-bit": ("8-bit drums", "noise-channel drums", "drums"),
    "brushes": ("soft drums", "brushed drums", "light percussion and drums"),
}
NO_DRUMS = ("no drums", "without drums", "drumless", "no percussion")
FORMS = (
    "{A} {style} track with {instruments}, {drums}",
    "{style}, {mood}, {tempo}, {instruments}, {drums}",
    "{A} instrumental {style} piece featuring {instruments}; {drums}",
    "{tempo} {style} with {instruments} and {a} mood, {drums}",
    "{instruments} in {a} {style} tune, {tempo}, {drums}",
    "{style} instrumental, {drums}, {instruments}. {tempo} and {mood}",
)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt: caption, bpm, keyscale ("F# minor") and timesignature ("4") as the model takes them, and has_drums."""

    caption: str
    bpm: int
    keyscale: str
    timesignature: str
    has_drums: bool


def request(seed: int, style: str | Style | None = None) -> Request:
    """Return the request that describes the song of a seed, without composing it. `style`: see `draft`."""
    song = draft(seed, style)
    return Request(caption(song), song.bpm, str(song.key), str(song.beats), song.has_drums)


def caption(song: Song) -> str:
    """Return a one-line caption in English, deterministic for each song."""
    rng = np.random.default_rng([song.seed, 3])

    def pick(options):
        return str(options[rng.integers(len(options))])

    moods = [song.mood, pick(MOODS[song.key.mode])]
    mood = pick(moods)
    tempo = pick(next((words for limit, words in TEMPOS if song.bpm < limit), FAST))
    style = pick(song.data.names)
    names = [track.instrument for track in song.tracks if track.role != "drums"]
    names = list(dict.fromkeys(names))  # a piano may play chords and melody
    instruments = [pick(WORDS.get(name, (_with_article(name),))) for name in rng.permutation(names)]
    drums = next((pick(DRUMS[track.instrument]) for track in song.tracks if track.role == "drums"), None)
    first = f"{tempo}, {mood}" if rng.random() < 0.5 else mood
    text = pick(FORMS).format(
        A=_with_article(first),
        a=_with_article(mood),
        style=style,
        mood=mood,
        tempo=tempo,
        instruments=_listed(instruments),
        drums=pick(NO_DRUMS) if drums is None else pick(("with {}", "{}")).format(drums),
    )
    facts = [f"{song.bpm} bpm"] * (rng.random() < 0.2) + [f"in {song.key}"] * (rng.random() < 0.2)
    return ", ".join([text[0].upper() + text[1:], *facts])


def few_words(song: Song, rng: np.random.Generator, told: bool = False) -> str:
    """Return a short prompt such as "lofi piano, 80 bpm". `told`: always state tempo, key and the absence of drums."""
    words = [str(rng.choice(song.data.names))]
    names = [track.instrument for track in song.tracks if track.role != "drums"]
    for name in rng.permutation(names)[: rng.integers(3)]:
        words.append(str(rng.choice(WORDS.get(name, (name,)))))
    text = (" " if rng.random() < 0.5 else ", ").join(words)
    if rng.random() < 0.5 or told:
        text += f", {song.bpm} bpm"
    if rng.random() < 0.3 or told:
        text += f", {song.key}"
    if (rng.random() < 0.3 or told) and not song.has_drums:
        text += ", no drums"
    return text


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
