"""The grammar of the metadata, as lookup tables for a compiled program: one automaton for all songs.

    <think>
    bpm: 120
    caption: Warm lofi piano over a slow beat, with rain in the background and a voice
      that hums.
    duration: 120
    keyscale: F# minor
    language: en
    timesignature: 4
    </think>
    # Lyric ...

A state is a list of candidate tokens, each with its next state, or free text (caption, genres, lyrics), where the
characters in a token decide whether it is legal. Every field is written once, in this order and within its range.
Fields that are not requested are skipped; fields that the user gave are a chain of single candidates, separate for each
song. At the end of a line of the caption, one distribution decides between its indented continuation and the name of
the next field.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.errors import InputError
from acestep_jax.inputs import fields
from acestep_jax.planner.metadata import Known
from acestep_jax.planner.tokenizer import Mark, PlannerTokenizer
from acestep_jax.request import MAX_DURATION, MIN_DURATION

A = TypeVar("A")  # jax.Array within a program, np.ndarray outside

NOTES = [f"{letter}{accidental}" for letter in "ABCDEFG" for accidental in ("", "#", "b", "♯", "♭")]
# The fields in the order in which they are written, with their legal values; None: free text.
VALUES: dict[str, list[str] | None] = {
    "bpm": [str(n) for n in range(fields.MIN_BPM, fields.MAX_BPM + 1)],
    "caption": None,
    "duration": [str(n) for n in range(int(MIN_DURATION), int(MAX_DURATION) + 1)],
    "genres": None,
    "keyscale": [f"{note} {mode}" for note in NOTES for mode in ("major", "minor")],
    "language": list(fields.LANGUAGES),
    "timesignature": list(fields.TIME_SIGNATURES),
}
FIELDS = tuple(VALUES)
CAPTION_TOKENS, GENRES_TOKENS, LYRICS_TOKENS = 512, 64, 2048  # maximum lengths
CHAIN = 64  # maximum number of tokens in all values that the user gave

PADDING = -1  # no token, where a list of candidates or a chain is shorter than its row
# Kinds of states. Those of free text are states themselves; lists of candidates come after them.
DONE, CAPTION_START, CAPTION, CAPTION_LINE, GENRES_START, GENRES, LYRICS, LIST = range(8)

# Properties of a token's text.
NEWLINE, ENDS_LINE, INDENT, SOLID, UNFIT, MARK = 1, 2, 4, 8, 16, 32
# For each kind: properties that a legal token must have, and must not have unless it also has the third.
_LEGAL = np.array(
    [
        (0, 0, 0),
        (SOLID, NEWLINE | UNFIT | MARK, 0),
        (0, NEWLINE, ENDS_LINE),
        (INDENT, NEWLINE | UNFIT | MARK, 0),
        (SOLID, NEWLINE | UNFIT | MARK, 0),
        (0, NEWLINE, ENDS_LINE),
        (0, MARK, 0),
        (0, 0, 0),
    ],
    np.int32,
)


def place(g: Any) -> Any:
    """Return the state that stands for place g of a song, see `FixedFields`, or the place that a state stands for.

    g: an int or an int32 array.
    """
    return -1 - g


def is_place(state: jax.Array) -> jax.Array:
    """Return whether states stand for a place of the song, so that the song's own state comes instead."""
    return state < 0


class Tables(NamedTuple, Generic[A]):
    """The automaton of a tokenizer, S states and lists of at most C candidates.

    candidates: [S, C] int32 tokens, padded with `PADDING`.
    following: [S, C] int32, the state after each candidate; `place(g)` stands for place g of a song, see `FixedFields`.
    greedy: [S] bool, whether the likeliest candidate is taken.
    contents: [V] int32, the properties of each text token.
    newline, end_of_turn: int32, token ids.
    """

    candidates: A
    following: A
    greedy: A
    contents: A
    newline: A
    end_of_turn: A


class FixedFields(NamedTuple, Generic[A]):
    """The values that the user fixed for each of B songs.

    The states after a name and after a value are the same for all songs only up to a number g, the place; what state
    the place is depends on the song. With F fields:

        g = 0 .. F - 1        the name of field g, or of the next one that is written
        g = F                 what follows the last field
        g = F + 1 .. 2 F      the value of field g - F - 1: one of its legal values, or the user's in `chain`

        place(0)     name 0 -> place(F + 1)     value 0 -> place(1)     name 1 -> place(F + 2)     ...     place(F)

    places: [B, 2 F + 1] int32, the state of each place.
    chain: [B, R] int32, tokens of the values that the user gave; state S + r belongs to token r.
    after: [B, R] int32, the state after each token, as in `Tables.following`.
    lyrics: [B] int32, maximum number of tokens of lyrics.
    """

    places: A
    chain: A
    after: A
    lyrics: A


class State(NamedTuple):
    """The current state of each song, [B] int32, and the number of tokens in the current free text, [B] int32."""

    state: jax.Array
    count: jax.Array


class Grammar:
    """The automaton of a tokenizer, and the fixed values of songs in it.

    Attributes:
        tables: the tables, as numpy arrays.
        start: the first state of every song.

    Raises:
        InputError: if the tokenizer does not encode a field's name and value separately.
    """

    def __init__(self, tokenizer: PlannerTokenizer):
        self.tokenizer = tokenizer
        (newline,) = _single(tokenizer, "\n")
        self._lists: list[dict[int, int]] = [{} for _ in range(LIST)]
        self._greedy: set[int] = set()
        self._names, self._values = [], []
        for field, (name, values) in enumerate(VALUES.items()):
            if values is None:
                begin = CAPTION_START if name == "caption" else GENRES_START
            else:
                begin = self._trie([_value_ids(tokenizer, name, value) for value in values], place(field + 1))
            if name == "language":
                self._greedy.add(begin)
            self._values.append(begin)
            self._names.append(self._trie([_name_ids(tokenizer, name)], place(_value_place(field))))
        self._closing = self._trie([[tokenizer.mark(Mark.END_OF_THINK)]], LYRICS)
        self.start = self._trie([[tokenizer.mark(Mark.THINK), newline]], place(0))
        width = max(map(len, self._lists))
        candidates = np.full((len(self._lists), width), PADDING, np.int32)
        following = np.zeros_like(candidates)
        for state, edges in enumerate(self._lists):
            candidates[state, : len(edges)], following[state, : len(edges)] = list(edges), list(edges.values())
        self.tables: Tables[np.ndarray] = Tables(
            candidates=candidates,
            following=following,
            greedy=np.isin(np.arange(len(self._lists)), list(self._greedy)),
            contents=contents(tokenizer),
            newline=np.array(newline, np.int32),
            end_of_turn=np.array(tokenizer.mark(Mark.END_OF_TURN), np.int32),
        )

    def _trie(self, sequences: Sequence[Sequence[int]], end: int) -> int:
        """Add states that accept these sequences of tokens, and return the first of them."""
        root = len(self._lists)
        self._lists.append({})
        for sequence in sequences:
            state = root
            for token in sequence[:-1]:
                edges = self._lists[state]
                if token not in edges:
                    edges[token] = len(self._lists)
                    self._lists.append({})
                state = edges[token]
            self._lists[state][sequence[-1]] = end
        return root

    def fixed_fields(
        self, known: Sequence[Known], *, caption: bool, genres: bool, lyrics: bool, lyrics_tokens: int = LYRICS_TOKENS
    ) -> FixedFields[np.ndarray]:
        """Return the fixed values of songs, given by the user.

        Args:
            caption, genres: whether these are written.
            lyrics: whether `</think>` and lyrics follow; else the song is done after the last field.
            lyrics_tokens: maximum number of tokens of lyrics.
        """
        size = len(self._lists)
        written = [{"caption": caption, "genres": genres}.get(name, True) for name in FIELDS]
        begins = [self._closing if lyrics else DONE]
        for name, is_written in zip(reversed(self._names), reversed(written), strict=True):
            begins.insert(0, name if is_written else begins[0])
        places = np.array([begins + self._values] * len(known), np.int32)
        chain = np.full((len(known), CHAIN), PADDING, np.int32)
        after = np.zeros_like(chain)
        for i, song in enumerate(known):
            used = 0
            for field, name in enumerate(FIELDS):
                value = None if VALUES[name] is None else getattr(song, name)
                if value is None:
                    continue
                ids = _value_ids(self.tokenizer, name, str(int(value) if name == "duration" else value))
                places[i, _value_place(field)] = size + used
                chain[i, used : used + len(ids)] = ids
                after[i, used : used + len(ids)] = [*range(size + used + 1, size + used + len(ids)), place(field + 1)]
                used += len(ids)
        return FixedFields(places, chain, after, np.full(len(known), lyrics_tokens, np.int32))

    def longest(self, *, caption: bool, genres: bool, lyrics: bool, lyrics_tokens: int = LYRICS_TOKENS) -> int:
        """Return the maximum number of tokens of a song."""
        count = 2
        for name, values in VALUES.items():
            if {"caption": caption, "genres": genres}.get(name, True):
                count += len(_name_ids(self.tokenizer, name))
                free = (CAPTION_TOKENS if name == "caption" else GENRES_TOKENS) + 1
                count += max((len(_value_ids(self.tokenizer, name, v)) for v in values), default=0) if values else free
        return count + (lyrics_tokens + 2 if lyrics else 0)


def step(
    tables: Tables[jax.Array],
    fixed: FixedFields[jax.Array],
    now: State,
    logits: jax.Array,
    draw: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, State]:
    """Sample the next token of each song, [B] int32, and return it with the state after it; a finished song gets the
    end of the turn.

    Args:
        logits: [B, V] float32, of the text tokens.
        draw: function from logits [B, N], -inf where a token is illegal, and whether to take the likeliest, [B] bool,
            to indices [B] int32.
    """
    size = tables.candidates.shape[0]
    state, count = now
    rows = jnp.arange(state.shape[0])
    kind = jnp.minimum(state, LIST)
    in_chain = state >= size
    link = jnp.where(in_chain, state - size, 0)

    # One of a few candidates.
    listed = jnp.where(in_chain, 0, state)
    only = jnp.arange(tables.candidates.shape[1]) == 0
    candidates = tables.candidates[listed]  # [B, C]
    candidates = jnp.where(in_chain[:, None], jnp.where(only, fixed.chain[rows, link][:, None], PADDING), candidates)
    scores = jnp.where(candidates != PADDING, logits[rows[:, None], candidates], -jnp.inf)
    choice = draw(scores, tables.greedy[listed] & ~in_chain)
    of_list = candidates[rows, choice]
    after_list = jnp.where(in_chain, fixed.after[rows, link], tables.following[listed, choice])

    # Free text.
    next_name = fixed.places[rows, FIELDS.index("caption") + 1]  # the field after the caption is always written
    name, after_name = tables.candidates[next_name, 0], tables.following[next_name, 0]

    def free() -> jax.Array:
        legal = legal_tokens(tables, fixed, now, name)
        return draw(jnp.where(legal, logits, -jnp.inf), jnp.zeros(state.shape, bool))

    is_free = (kind != LIST) & (kind != DONE)
    of_text = jax.lax.cond(is_free.any(), free, lambda: jnp.zeros(state.shape, jnp.int32))
    ends_line = tables.contents[of_text] & NEWLINE != 0
    after_text = jnp.select(
        [
            kind == CAPTION_START,
            kind == CAPTION,
            kind == CAPTION_LINE,
            kind == GENRES_START,
            kind == GENRES,
        ],
        [
            jnp.full_like(state, CAPTION),
            jnp.where(ends_line, CAPTION_LINE, CAPTION),
            jnp.where(of_text == name, after_name, CAPTION),
            jnp.full_like(state, GENRES),
            jnp.where(ends_line, place(FIELDS.index("genres") + 1), GENRES),
        ],
        jnp.where(of_text == tables.end_of_turn, DONE, LYRICS),
    )

    token = jnp.where(kind == LIST, of_list, jnp.where(kind == DONE, tables.end_of_turn, of_text))
    following = jnp.where(kind == LIST, after_list, jnp.where(kind == DONE, DONE, after_text))
    following = jnp.where(is_place(following), fixed.places[rows, jnp.maximum(place(following), 0)], following)
    begins = (following == CAPTION_START) | (following == GENRES_START) | ((following == LYRICS) & (kind == LIST))
    return token, State(following, jnp.where(begins, 0, count + 1))


def legal_tokens(tables: Tables[jax.Array], fixed: FixedFields[jax.Array], now: State, name: jax.Array) -> jax.Array:
    """Return the mask of legal next tokens in free text, [B, V] bool.

    Args:
        name: [B] int32, the first token of the name of the field after the caption.
    """
    state, count = now
    kind = jnp.minimum(state, LIST)[:, None]
    contents, tokens = tables.contents, jnp.arange(tables.contents.shape[0])
    must, must_not, unless = jnp.moveaxis(jnp.asarray(_LEGAL)[jnp.minimum(state, LIST)], 1, 0)[:, :, None]
    refused = (contents & must_not != 0) & (contents & unless == 0)
    in_line = (kind == CAPTION) | (kind == GENRES)
    refused |= in_line & (contents & (UNFIT | MARK) != 0)
    legal = (contents & must == must) & ~refused
    limit = jnp.where(kind == GENRES, GENRES_TOKENS, jnp.where(kind == LYRICS, fixed.lyrics[:, None], CAPTION_TOKENS))
    legal &= count[:, None] < limit
    last = jnp.where(in_line, tables.newline, jnp.where(kind == LYRICS, tables.end_of_turn, name[:, None]))
    ends = in_line & (count[:, None] >= limit) | (kind == LYRICS) | (kind == CAPTION_LINE)
    return legal | (ends & (tokens == last))


def _value_place(field: int) -> int:
    return len(FIELDS) + 1 + field


def contents(tokenizer: PlannerTokenizer) -> np.ndarray:
    """Return the properties of each text token and mark, [V] int32."""
    found = np.full(tokenizer.first_code, MARK, np.int32)
    for i, token in enumerate(tokenizer.token_bytes):
        text = token.decode("utf-8", errors="replace")
        value = NEWLINE if "\n" in text or "\r" in text else 0
        value |= ENDS_LINE if text.endswith("\n") and text.count("\n") == 1 and "\r" not in text else 0
        value |= INDENT if text[:1] in (" ", "\t") else 0
        value |= SOLID if text.strip() else 0
        value |= UNFIT if "`" in text or any(c < " " and c not in "\n\r\t" or c == "\x7f" for c in text) else 0
        found[i] = value
    return found


def _single(tokenizer: PlannerTokenizer, text: str) -> list[int]:
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise InputError(f"tokenizer: expected {text!r} to be one token, found {len(ids)}; it is not a planner's")
    return ids


def _name_ids(tokenizer: PlannerTokenizer, name: str) -> list[int]:
    return tokenizer.encode(f"{name}:")


def _value_ids(tokenizer: PlannerTokenizer, name: str, value: str) -> list[int]:
    """Return the tokens of " {value}\\n" that follow the name's."""
    before, ids = _name_ids(tokenizer, name), tokenizer.encode(f"{name}: {value}\n")
    if ids[: len(before)] != before or ids[-1:] != tokenizer.encode("\n"):
        raise InputError(
            f"tokenizer: expected {name}: {value} to be the tokens of the name, the value and a line end, found "
            f"{ids}; it is not a planner's"
        )
    return ids[len(before) :]
