"""The grammar on the device against a slow one on the host, with logits that want everything but what is legal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from acestep_jax import InputError
from acestep_jax.diffusion import noise
from acestep_jax.inputs.fields import LANGUAGES
from acestep_jax.planner import grammar
from acestep_jax.planner.metadata import Known
from acestep_jax.planner.parsing import parse
from acestep_jax.planner.sampling import Drawing, LanguageSampling, draw
from acestep_jax.planner.tokenizer import Mark, PlannerTokenizer
from tests.planner import small

pytestmark = pytest.mark.unit

ours = small.tokenizer()
TEXTS = [token.decode("utf-8", errors="replace") for token in ours.token_bytes]
VOCABULARY = ours.first_code
FORCED = Known(bpm=77, keyscale="f♯m", timesignature="3/4", duration=61.5, language="Norwegian")
SONGS = [Known(), FORCED, Known(duration=10, language="yue"), Known(bpm=300)]
KINDS = {
    "generate": dict(caption=True, genres=False, lyrics=False),
    "no caption": dict(caption=False, genres=False, lyrics=False),
    "text": dict(caption=True, genres=True, lyrics=True, lyrics_tokens=40),
}


def fit(text):
    return "`" not in text and not any(c < " " and c not in "\n\t\r" or c == "\x7f" for c in text)


@functools.cache
def tokens_where(kind):
    """Legal tokens of free text, told from what they say."""
    tests = {
        "start": lambda t: fit(t) and t.strip() and not set(t) & set("\r\n"),
        "in": lambda t: (
            fit(t) and (not set(t) & set("\r\n") or t.endswith("\n") and t.count("\n") == 1 and "\r" not in t)
        ),
        "line": lambda t: fit(t) and t[:1] in (" ", "\t") and not set(t) & set("\r\n"),
        "lyrics": lambda t: True,
    }
    return frozenset(i for i, text in enumerate(TEXTS) if tests[kind](text))


def slow_grammar(song, caption, genres, lyrics, lyrics_tokens=None):
    """Yield which tokens may come next, and take the one that does."""
    newline, stop = ours.encode("\n")[0], ours.mark(Mark.END_OF_TURN)
    yield {ours.mark(Mark.THINK)}
    yield {newline}
    used = 0  # tokens of the name that a free text has read
    for name, values in grammar.VALUES.items():
        if not {"caption": caption, "genres": genres}.get(name, True):
            continue
        for token in ours.encode(f"{name}:")[used:]:
            yield {token}
        used = 0
        if values is not None:
            given = getattr(song, name)
            given = int(given) if name == "duration" and given else given
            values = values if given is None else [given]
            left = [ours.encode(f"{name}: {value}\n")[len(ours.encode(f"{name}:")) :] for value in values]
            while left != [[]]:
                token = yield {rest[0] for rest in left}
                left = [rest[1:] for rest in left if rest[0] == token]
            continue
        limit = 512 if name == "caption" else 64
        token = yield tokens_where("start")
        count = 1
        while True:
            token = yield tokens_where("in") if count < limit else {newline}
            count += 1
            if "\n" in TEXTS[token]:
                if name == "genres":
                    break
                (next_name, *_) = ours.encode("duration:")
                token = yield ({next_name} | (tokens_where("line") if count < limit else set()))
                count += 1
                if token == next_name:
                    used = 1
                    break
    if lyrics:
        yield {ours.mark(Mark.END_OF_THINK)}
        for _ in range(lyrics_tokens):
            token = yield tokens_where("lyrics") | {stop}
            if token == stop:
                return
        yield {stop}


@functools.cache
def in_order(choices):
    return np.array(sorted(choices))


@jax.jit
def step(tables, songs, now, logits):
    return grammar.step(tables, songs, now, logits, lambda scores, greedy: jnp.argmax(scores, -1).astype(jnp.int32))


def walk(kinds, logits_of, steps):
    """Walk both grammars, taking the likeliest legal token; return what each song wrote."""
    found = small.grammar()
    tables, songs = jax.device_put((found.tables, found.fixed_fields(SONGS, **kinds)))
    now = grammar.State(jnp.full(len(SONGS), found.start, jnp.int32), jnp.zeros(len(SONGS), jnp.int32))
    slow = [slow_grammar(song, **kinds) for song in SONGS]
    legal = [next(one) for one in slow]
    written = [[] for _ in SONGS]
    for i in range(steps):
        logits = logits_of(i)
        token, now = step(tables, songs, now, logits)
        token = np.asarray(token)
        for b, choices in enumerate(legal):
            if choices is None:
                assert token[b] == ours.mark(Mark.END_OF_TURN)
                continue
            choices = in_order(frozenset(choices))
            expected = int(choices[np.argmax(logits[b][choices])])
            assert int(token[b]) == expected, (b, i, ours.decode(written[b]))
            written[b].append(expected)
            try:
                legal[b] = slow[b].send(expected)
            except StopIteration:
                legal[b] = None
        if all(choices is None for choices in legal):
            assert (np.asarray(now.state) == grammar.DONE).all()
            return written
    raise AssertionError(f"not done after {steps} steps: {[ours.decode(ids)[-80:] for ids in written]}")


def wanting(texts=(), marks=()):
    """Logits that want these tokens more than any other."""
    bonus = np.zeros(VOCABULARY, np.float32)
    bonus[[ours.encode(text)[0] for text in texts] + [ours.mark(mark) for mark in marks]] = 20

    def logits_of(i):
        return np.random.default_rng(i).standard_normal((len(SONGS), VOCABULARY), dtype=np.float32) + bonus

    return logits_of


WISHES = {
    "nothing": wanting(),
    "line ends": wanting(["\n", ".\n", "\n\n"]),
    "stops": wanting([".\n"]),
    "marks": wanting(marks=list(Mark)),
    "spaces": wanting([" ", "  ", "\t", "\u00a0"]),
    "names": wanting(["bpm", "duration", "caption", ":", "\n"]),
    "no line ends": wanting(["a", "b", " "]),
    "backticks": wanting(["`", "\r", "\x07"]),
}


@pytest.mark.parametrize(
    "kinds, wish", [*((kinds, wish) for kinds in ("generate", "text") for wish in WISHES), ("no caption", "nothing")]
)
def test_every_output_is_legal(kinds, wish):
    asked = KINDS[kinds]
    most = small.grammar().longest(**asked)
    for song, ids in zip(SONGS, walk(asked, WISHES[wish], most), strict=True):
        if ids[-1] != ours.mark(Mark.END_OF_TURN):
            ids = [*ids, ours.mark(Mark.END_OF_THINK)]
        text = ours.decode(ids[2 : ids.index(ours.mark(Mark.END_OF_THINK))])
        names = [line.partition(":")[0] for line in text.split("\n") if line[:1] not in ("", " ", "\t")]
        left_out = {"caption": asked["caption"], "genres": asked["genres"]}
        assert names == [name for name in grammar.FIELDS if left_out.get(name, True)]
        made = parse(ours, ids)
        assert made.bpm == (song.bpm or made.bpm) and 30 <= made.bpm <= 300
        assert made.duration == int(song.duration or made.duration) and 10 <= made.duration <= 600
        assert made.keyscale == (song.keyscale or made.keyscale) is not None
        assert made.timesignature == (song.timesignature or made.timesignature) in ("2", "3", "4", "6")
        assert made.language == (song.language or made.language) in LANGUAGES
        assert bool(made.caption) == asked["caption"] and "`" not in made.caption


def test_captions_end_after_512_tokens():
    (ids, *_) = walk(KINDS["generate"], WISHES["no line ends"], 700)
    begin, end = ids.index(ours.encode("caption")[0]), ids.index(ours.encode("duration")[0])
    name = len(ours.encode("caption:"))
    assert end - begin - name == 512 + 1  # and a line end


def test_every_value_can_be_written():
    found = small.grammar()
    counts = {}
    for place, (name, values) in enumerate(grammar.VALUES.items()):
        before = ours.encode(f"{name}:")
        for value in values or ():
            state = found.fixed_fields([Known()], caption=True, genres=True, lyrics=False).places[0, 8 + place]
            for token in ours.encode(f"{name}: {value}\n")[len(before) :]:
                (choice,) = np.flatnonzero(found.tables.candidates[state] == token)
                state = found.tables.following[state, choice]
            assert state == -1 - (place + 1)
            counts[name] = counts.get(name, 0) + 1
    assert counts == {"bpm": 271, "duration": 591, "keyscale": 70, "language": 51, "timesignature": 4}


def test_values_are_drawn_as_the_model_has_them():
    """The first token of a key: frequencies are those of the logits among the legal ones."""
    rows, found = 20_000, small.grammar()
    songs = found.fixed_fields([Known()] * rows, caption=True, genres=False, lyrics=False)
    place = len(grammar.FIELDS) + 1 + grammar.FIELDS.index("keyscale")
    now = grammar.State(jnp.asarray(songs.places[:, place]), jnp.zeros(rows, jnp.int32))
    logits = np.random.default_rng(0).standard_normal(VOCABULARY, dtype=np.float32)
    keys = jax.random.split(noise.key(1), rows)
    drawing = Drawing.of(LanguageSampling(temperature=1.0, top_p=1.0), rows)
    program = jax.jit(
        lambda tables, songs, now, keys: grammar.step(
            tables,
            songs,
            now,
            jnp.broadcast_to(logits, (rows, VOCABULARY)),
            lambda scores, greedy: draw(scores, keys, drawing, greedy),
        )
    )
    tokens = np.asarray(program(found.tables, songs, now, keys)[0])
    legal = found.tables.candidates[songs.places[0, place]]
    legal = legal[legal >= 0]
    assert set(tokens) <= set(legal.tolist()) and len(legal) > 1
    expected = np.exp(logits[legal].astype(np.float64))
    counts = np.array([(tokens == token).sum() for token in legal])
    assert stats.chisquare(counts, rows * expected / expected.sum()).pvalue > 1e-3


def test_a_vocabulary_that_the_grammar_cannot_use_is_refused():
    """One that joins the colon and the space after it."""
    vocabulary, merges = small.vocabulary()
    merges = [pair for pair in merges if pair != ("Ċ", "Ċ")]
    plain = {token: i for token, i in vocabulary.items()}
    joined = PlannerTokenizer({**plain, "4Ċ": len(plain)}, [*merges, ("4", "Ċ")])
    grammar.Grammar(joined)  # Qwen's splitting keeps digits and line ends apart, whatever is merged
    broken = PlannerTokenizer({**plain, ":x": len(plain)}, merges)
    broken.encode = lambda text: [0] * 3 if text == "\n" else ours.encode(text)
    with pytest.raises(InputError, match=r"expected '\\n' to be one token, found 3"):
        grammar.Grammar(broken)
