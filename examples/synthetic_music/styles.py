"""Styles as data: instruments, tempi and rhythms.

A rhythm has a character for each sixteenth of one or more bars. "." is silence, "-" holds the note before it, and the
characters that start a note depend on the part. Drums: "x", or "o" for a soft hit. Bass: degrees above the root of the
chord, 1, 5 or 8. Chords: "x". Arpeggios: the index of a note in the chord. Leads: "x", the composer finds the pitch.
"""

import dataclasses
from typing import NamedTuple


class Part(NamedTuple):
    """One instrument and one rhythm are drawn for a song; `chance` is the probability that the song has the part."""

    instruments: tuple[str, ...]
    rhythms: tuple[str, ...]
    chance: float = 1.0


@dataclasses.dataclass(frozen=True)
class Style:
    """names: in captions. bpm: tempi to draw from. beats: per bar. minor, drums: probabilities. kit: see `synth.KITS`.

    beat: rhythms by drum, one set of which is drawn. swing: how far every second eighth is late, in beats.
    bars: per chord. size: notes of a chord. reverb: time in seconds to decay by 60 dB. echo: level, 0 to 1.
    duck: attenuation of all other tracks by the kick, 0 to 1. tone: cutoff of the mix in Hz.
    """

    names: tuple[str, ...]
    moods: tuple[str, ...]
    bpm: tuple[int, ...]
    kit: str
    beat: tuple[dict[str, str], ...]
    parts: dict[str, Part]
    drums: float = 0.95
    beats: int = 4
    minor: float = 0.5
    swing: float = 0.0
    bars: int = 1
    size: int = 3
    reverb: float = 1.2
    echo: float = 0.0
    duck: float = 0.0
    tone: float = 16000.0


# All tempi are 1500 / n: a beat is a whole number of latent frames (25 per second), so that repetitions are identical.
STYLES = {
    "house": Style(
        ("house", "deep house", "club house"),
        ("groovy", "uplifting", "sunny"),
        (115, 125),
        "electronic",
        (
            dict(kick="x...x...x...x...", clap="....x.......x...", open="..x...x...x...x.", hat="o.o.o.o.o.o.o.o."),
            dict(kick="x...x...x...x...", clap="....x.......x...", hat="oooooooooooooooo", open="..x...x...x...x."),
        ),
        dict(
            bass=Part(("synth bass", "sub bass"), ("..1...1...1...1.", "..1-..1-..1-..8-")),
            chords=Part(("piano", "organ"), ("x--x--x-..x--x..", "x-..x-..x-..x-..", "..x-..x-..x-..x-")),
            pad=Part(("strings", "warm pad"), ("x---------------",), 0.5),
            lead=Part(("flute", "saw lead"), ("x--.x---x--.x-x-", "x---..x-x---....x---x---x-------"), 0.4),
        ),
        duck=0.5,
    ),
    "techno": Style(
        ("techno", "driving techno", "warehouse techno"),
        ("hypnotic", "dark", "relentless"),
        (125, 136),
        "electronic",
        (
            dict(kick="x...x...x...x...", open="..x...x...x...x.", clap="............x..."),
            dict(kick="x...x...x...x...", hat="o.x.o.x.o.x.o.x.", rim="....x.......x..."),
        ),
        dict(
            bass=Part(("acid bass", "synth bass"), (".111.111.111.111", "1.111.111.111.18")),
            arp=Part(("synth pluck", "acid lead"), ("0.1.2.1.0.1.2.3.", "0..1..2.0..1..2.", "2.0.1.0.2.0.1.0."), 0.8),
            pad=Part(("dark pad", "warm pad"), ("x---------------",), 0.8),
            chords=Part(("synth stab",), ("x.....x.........", "x.......x......."), 0.5),
        ),
        drums=1.0,
        minor=0.85,
        echo=0.3,
        duck=0.6,
    ),
    "lo-fi hip hop": Style(
        ("lo-fi hip hop", "lofi", "chillhop"),
        ("mellow", "nostalgic", "cozy"),
        (75, 79, 83, 88),
        "dusty",
        (
            dict(kick="x.......x.x.....", snare="....x.......x...", hat="x.o.x.o.x.o.x.o."),
            dict(kick="x.....x...x.....", snare="....x.......x...", hat="x.o.x.o.x.o.x.o."),
        ),
        dict(
            bass=Part(("upright bass", "sub bass"), ("1-----..5-..1-..", "1---....1-..5---")),
            chords=Part(("electric piano", "piano"), ("x---x---x---x---", "x-------x---x---")),
            lead=Part(("vibraphone", "flute"), ("x---x-x-x-------", "..x-x---x-x-x---"), 0.6),
        ),
        drums=0.9,
        swing=0.08,
        size=4,
        tone=7000.0,
    ),
    "ambient": Style(
        ("ambient", "ambient soundscape", "drone ambient"),
        ("peaceful", "spacious", "meditative"),
        (75, 79, 83, 88),
        "electronic",
        (),
        dict(
            pad=Part(("warm pad", "glass pad", "strings"), ("x---------------",)),
            arp=Part(("bells", "harp", "soft pluck"), ("0---2---1---3---", "0---1---2---1---", "0-1-2-1-3-1-2-1-")),
            bass=Part(("sub bass",), ("1---------------",), 0.6),
            lead=Part(("flute",), ("x-------x-------", "x-----------x---"), 0.3),
        ),
        drums=0.0,
        reverb=3.5,
        echo=0.15,
    ),
    "synthwave": Style(
        ("synthwave", "retrowave", "80s synthwave"),
        ("nostalgic", "neon-lit", "cinematic"),
        (88, 94, 100, 107, 115),
        "gated",
        (
            dict(kick="x.......x.......", snare="....x.......x...", hat="x.x.x.x.x.x.x.x."),
            dict(kick="x...x...x...x...", snare="....x.......x...", hat="xoxoxoxoxoxoxoxo"),
        ),
        dict(
            bass=Part(("synth bass", "saw bass"), ("1.1.1.1.1.1.1.1.", "1.8.1.8.1.8.1.8.", "11.111.111.111.1")),
            pad=Part(("strings", "warm pad"), ("x---------------",)),
            arp=Part(("synth pluck", "saw lead"), ("0123012301230123", "0.1.2.3.2.1.0.1.", "0210021002100210"), 0.6),
            lead=Part(("saw lead", "square lead"), ("x-----x-x---x---", "x---x---x-------"), 0.6),
        ),
        minor=0.7,
        reverb=1.8,
        echo=0.2,
    ),
    "reggae": Style(
        ("reggae", "dub reggae", "roots reggae"),
        ("laid-back", "sunny", "easygoing"),
        (75, 79, 83, 88),
        "acoustic",
        (
            dict(kick="........x.......", rim="........x.......", hat="x.o.x.o.x.o.x.o."),
            dict(kick="x...x...x...x...", rim="....x.......x...", hat="x.o.x.o.x.o.x.o."),
        ),
        dict(
            bass=Part(("dub bass", "sub bass"), ("1---5-1-....5-8-", "1-..1-5-8---....")),
            chords=Part(("organ", "muted guitar"), ("....x.......x...", "..x...x...x...x.")),
            lead=Part(("melodica", "flute"), ("x---x-x-........", "x-x-x---..x-x---"), 0.5),
        ),
        minor=0.4,
        echo=0.5,
    ),
    "chiptune": Style(
        ("chiptune", "8-bit game music", "retro video game"),
        ("playful", "adventurous", "cheerful"),
        (125, 136, 150),
        "8-bit",
        (
            dict(kick="x...x...x...x...", snare="....x.......x...", hat="..x...x...x...x."),
            dict(kick="x.....x.x.......", snare="....x.......x...", hat="x.x.x.x.x.x.x.x."),
        ),
        dict(
            bass=Part(("triangle bass",), ("1.1.1.1.1.1.1.1.", "1.8.1.8.1.8.1.8.", "1-..1-..5-..8-..")),
            arp=Part(("chip arpeggio",), ("0120120120120120", "0.1.2.1.0.1.2.1."), 0.8),
            lead=Part(("square lead", "pulse lead"), ("x-x-x---x-x-x---", "x---x-x-x---x-x-", "x-x-x-x-x---....")),
        ),
        minor=0.4,
        reverb=0.5,
    ),
    "waltz": Style(
        ("waltz", "ballroom waltz", "romantic waltz"),
        ("romantic", "graceful", "dreamy"),
        (88, 94, 100, 107, 115, 125),
        "brushes",
        (dict(kick="x...........", snare="....o...o...", hat="....x...x..."),),
        dict(
            bass=Part(("upright bass", "cello"), ("1---........", "1---....5---")),
            chords=Part(("piano", "accordion", "nylon guitar"), ("....x-..x-..", "....x...x...")),
            lead=Part(("violin", "flute", "music box"), ("x-------x---", "x---x---x---", "x-----x-x---"), 0.8),
            pad=Part(("strings",), ("x-----------",), 0.3),
        ),
        drums=0.55,
        beats=3,
        reverb=2.0,
    ),
    "lullaby": Style(
        ("lullaby", "music box lullaby", "bedtime lullaby"),
        ("tender", "sleepy", "innocent"),
        (79, 83, 88, 94, 100),
        "brushes",
        (),
        dict(
            arp=Part(("music box", "harp", "bells"), ("0---1---2---", "0-1-2-3-2-1-")),
            pad=Part(("glass pad", "strings"), ("x-----------",), 0.7),
            lead=Part(("flute", "vibraphone"), ("x-------x---", "x---x---x---"), 0.5),
        ),
        drums=0.0,
        beats=3,
        minor=0.25,
        reverb=2.5,
    ),
    "drum and bass": Style(
        ("drum and bass", "liquid drum and bass", "jungle"),
        ("energetic", "urgent", "soaring"),
        (167,),
        "acoustic",
        (
            dict(kick="x.........x.....", snare="....x.......x...", hat="x.x.x.x.x.x.x.x."),
            dict(kick="x.x.......x.....", snare="....x..o....x...", hat="x.x.x.x.x.x.x.x."),
        ),
        dict(
            bass=Part(("reese bass", "sub bass"), ("1-----------5---", "1-----1-..1-....")),
            pad=Part(("strings", "warm pad"), ("x---------------",)),
            arp=Part(("electric piano", "bells"), ("0.1.2.3.2.1.0.1.", "0---2---1---3---"), 0.6),
            lead=Part(("flute", "saw lead"), ("x-------x---x---",), 0.3),
        ),
        drums=1.0,
        minor=0.7,
        bars=2,
        reverb=1.8,
    ),
    "folk": Style(
        ("acoustic folk", "folk", "fingerpicked folk"),
        ("intimate", "wistful", "hopeful"),
        (88, 94, 100, 107, 115),
        "brushes",
        (
            dict(kick="x.......x.......", snare="....x.......x...", shaker="x.x.x.x.x.x.x.x."),
            dict(kick="x...x...x...x...", shaker="x.o.x.o.x.o.x.o."),
        ),
        dict(
            bass=Part(("upright bass",), ("1---....5---....", "1-------5-------"), 0.7),
            arp=Part(("nylon guitar", "steel guitar"), ("0-2-1-2-3-2-1-2-", "0-1-2-3-2-1-2-1-")),
            lead=Part(("violin", "flute", "harmonica"), ("x---x---x-------", "x-------x---x---"), 0.6),
            pad=Part(("strings",), ("x---------------",), 0.2),
        ),
        drums=0.55,
        minor=0.4,
    ),
    "disco funk": Style(
        ("disco", "disco funk", "nu disco"),
        ("funky", "glamorous", "joyful"),
        (107, 115),
        "acoustic",
        (
            dict(kick="x...x...x...x...", snare="....x.......x...", open="..x...x...x...x.", hat="x...x...x...x..."),
            dict(kick="x...x...x...x...", clap="....x.......x...", hat="xoxoxoxoxoxoxoxo"),
        ),
        dict(
            bass=Part(("finger bass", "synth bass"), ("1.8.1.8.1.8.1.8.", "1..11.8.1..15.8.")),
            chords=Part(("muted guitar", "electric piano"), ("x.xxx.x.x.xxx.x.", "..x...x...x...x.")),
            pad=Part(("strings",), ("x---------------",), 0.7),
            lead=Part(("brass", "flute"), ("x-x---..x-x-x---", "x---..x-x---...."), 0.5),
        ),
        minor=0.5,
        size=4,
        duck=0.2,
    ),
    "piano ballad": Style(
        ("piano ballad", "piano", "neoclassical piano"),
        ("emotional", "reflective", "tender"),
        (75, 79, 83, 88, 94, 100),
        "acoustic",
        (dict(kick="x.......x.......", snare="....x.......x...", hat="x.x.x.x.x.x.x.x."),),
        dict(
            chords=Part(("piano",), ("x---x---x---x---", "x-------x---x---")),
            bass=Part(("cello", "upright bass"), ("1-------5-------", "1---------------")),
            lead=Part(("violin", "piano", "cello lead"), ("x---x---x-------", "x-----x-x---x---"), 0.8),
            pad=Part(("strings",), ("x---------------",), 0.3),
        ),
        drums=0.5,
        minor=0.5,
        reverb=2.2,
    ),
}
