"""The language model's loop: a token of every song of a batch in each step, as one compiled program.

    state = begin(...)                     the prompts are read
    state = advance(..., state, until, W)  steps up to `until`, while they lie within the first W slots of the cache
    tokens = state.tokens

`write` is all of it, the usual case: it chains loops over windows that grow, so that short songs do not pay for the
cache of long ones. To watch or stop it, `write_in_pieces` runs the same functions as programs of their own, some steps
at a time. What is written is metadata and lyrics under the grammar, or audio codes.

Prompts are padded at the left: all rows write the same slot in each step. With guidance the rows are [conditional...,
unconditional...], of which the second half reads the tokens that the first half drew.
"""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.distributed import on_host, shard
from acestep_jax.errors import Cancelled
from acestep_jax.models.kernels.compiler import COMPILER_OPTIONS
from acestep_jax.models.qwen3 import Qwen3ForCausalLM
from acestep_jax.planner import grammar, loops
from acestep_jax.planner.sampling import Drawing, draw, guide, penalise, step_keys

A = TypeVar("A")  # jax.Array within a program; np.ndarray before it is called

FIRST_WINDOW = 512  # slots; the next ones are twice as long each
PIECE = 32  # steps between two reports; divides every window, so that pieces attend to what one call does


class Prompts(NamedTuple, Generic[A]):
    """What is read: [R, P] int32 tokens, padded at the left, and where each begins, [R] int32."""

    tokens: A
    start: A


class TextInputs(NamedTuple, Generic[A]):
    """What metadata of B songs are written from."""

    prompts: Prompts[A]
    tables: grammar.Tables[A]
    songs: grammar.Songs[A]
    first: A  # int32, the first state
    targets: A  # [B] int32, steps at most: 0 for a row that only fills the batch
    keys: jax.Array  # [B]
    drawing: Drawing[A]


class CodeInputs(NamedTuple, Generic[A]):
    """What audio codes of B songs are written from; R is B, or 2 B with guidance."""

    prompts: Prompts[A]
    targets: A  # [B] int32, how many codes; 0 for a row that only fills the batch
    keys: jax.Array  # [B]
    drawing: Drawing[A]
    ends_in_loop: A  # bool, whether a song ends early where its codes repeat themselves, for it is to be drawn again


class State(NamedTuple):
    """Where the loop is.

    step: int32, how many tokens there are.
    hidden: [R, D], what the next token is drawn from.
    cache: of the model.
    tokens: [B, N] int32, what is written: ids of text, or audio codes.
    lengths: [B] int32, how many of them are the song's.
    done: [B] bool.
    seen: [B, V] bool, which have been written.
    place: in the grammar; None for audio codes.
    repeats: [B, PERIODS] int32, see `loops`; None for text.
    """

    step: jax.Array
    hidden: jax.Array
    cache: Any
    tokens: jax.Array
    lengths: jax.Array
    done: jax.Array
    seen: jax.Array
    place: grammar.State | None
    repeats: jax.Array | None


def windows(prompt: int, slots: int) -> tuple[int, ...]:
    """Return the windows of a prompt bucket and a number of slots: powers of two above the prompt, then all slots."""
    found, size = [], FIRST_WINDOW
    while size < slots:
        found += [size] if size > prompt else []
        size *= 2
    return (*found, slots)


def begin(model: Qwen3ForCausalLM, inputs: TextInputs | CodeInputs, *, slots: int) -> State:
    """Read the prompts into a cache of `slots` slots."""
    tokens, start = shard(inputs.prompts.tokens, "batch", None), shard(inputs.prompts.start, "batch")
    songs = inputs.targets.shape[0]
    hidden, cache = model.prefill(tokens, start, model.init_cache(tokens.shape[0], slots))
    place, size = None, model.planner.num_codes
    repeats = jnp.zeros((songs, loops.PERIODS), jnp.int32)
    if isinstance(inputs, TextInputs):
        repeats = None
        place = grammar.State(jnp.full(songs, inputs.first, jnp.int32), jnp.zeros(songs, jnp.int32))
        size = model.planner.first_code
    return State(
        step=jnp.int32(0),
        hidden=hidden,
        cache=cache,
        tokens=shard(jnp.zeros((songs, slots - tokens.shape[1]), jnp.int32), "batch", None),
        lengths=jnp.zeros(songs, jnp.int32),
        done=inputs.targets <= 0,
        seen=shard(jnp.zeros((songs, size), bool), "batch", None),
        place=place,
        repeats=repeats,
    )


def advance(
    model: Qwen3ForCausalLM, inputs: TextInputs | CodeInputs, state: State, until: jax.Array, *, window: int
) -> State:
    """Write tokens up to number `until`, as long as some song is not done and the slots lie within the window."""
    prompt = inputs.prompts.tokens.shape[1]
    head = model.text_head() if isinstance(inputs, TextInputs) else model.code_head()
    most = jnp.minimum(until, window - prompt)

    def unfinished(state: State) -> jax.Array:
        return (state.step < most) & ~state.done.all()

    def one(state: State) -> State:
        if isinstance(inputs, TextInputs):
            token, place = _next_text(inputs, state, model.text_logits(state.hidden, head))
            fed = token
        else:
            token, place = _next_code(inputs, state, model.code_logits(state.hidden, head)), None
            fed = model.planner.first_code + token
        rows = jnp.arange(token.shape[0])
        tokens = jax.lax.dynamic_update_slice(state.tokens, token[:, None], (jnp.int32(0), state.step))
        lengths = jnp.where(state.done, state.lengths, state.step + 1)
        done = state.done | (lengths >= inputs.targets)
        repeats = state.repeats
        if isinstance(inputs, CodeInputs):
            assert repeats is not None
            repeats = loops.count_repeats(repeats, state.tokens, token, state.step)
            done |= inputs.ends_in_loop & loops.is_loop(repeats)
        if place is not None:
            done |= place.state == grammar.DONE
        fed = jnp.concatenate([fed] * (state.hidden.shape[0] // fed.shape[0]))
        hidden, cache = model.decode(fed, prompt + state.step, inputs.prompts.start, state.cache, window=window)
        seen = state.seen.at[rows, token].set(True)
        return State(state.step + 1, hidden, cache, tokens, lengths, done, seen, place, repeats)

    return jax.lax.while_loop(unfinished, one, state)


def _next_text(inputs: TextInputs, state: State, logits: jax.Array) -> tuple[jax.Array, grammar.State]:
    """Return the next token of each song, [B] int32, and the place after it, of logits [B, V]."""
    assert state.place is not None
    keys = step_keys(inputs.keys, state.step)
    logits = penalise(logits, state.seen, inputs.drawing.repetition_penalty)

    def choose(scores: jax.Array, greedy: jax.Array) -> jax.Array:
        return draw(scores, keys, inputs.drawing, greedy)

    return grammar.step(inputs.tables, inputs.songs, state.place, logits, choose)


def _next_code(inputs: CodeInputs, state: State, logits: jax.Array) -> jax.Array:
    """Return the next code of each song, [B] int32, of logits [R, 1 + C + padding]. A song ends with its last code: the
    token that ends a turn, which is the first column, is never drawn."""
    songs, codes = state.seen.shape
    logits = logits[:, 1 : 1 + codes]
    if logits.shape[0] > songs:
        logits = guide(logits[:songs], logits[songs:], inputs.drawing.cfg_scale)
    logits = penalise(logits, state.seen, inputs.drawing.repetition_penalty)
    return draw(logits, step_keys(inputs.keys, state.step), inputs.drawing)


def _write(model: Qwen3ForCausalLM, inputs: TextInputs | CodeInputs, *, slots: int) -> tuple[jax.Array, jax.Array]:
    """Return what is written, [B, slots - P] int32, and how many tokens of each row are the song's, [B] int32."""
    state = begin(model, inputs, slots=slots)
    for window in windows(inputs.prompts.tokens.shape[1], slots):
        state = advance(model, inputs, state, jnp.max(inputs.targets), window=window)
    return state.tokens, state.lengths


write = jax.jit(_write, static_argnames="slots", compiler_options=COMPILER_OPTIONS)
begin_program = jax.jit(begin, static_argnames="slots", compiler_options=COMPILER_OPTIONS)
advance_program = jax.jit(advance, static_argnames="window", donate_argnames="state", compiler_options=COMPILER_OPTIONS)


def write_in_pieces(
    model: Qwen3ForCausalLM,
    inputs: TextInputs | CodeInputs,
    *,
    slots: int,
    on_progress: Callable[[int, int], object] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Write `PIECE` tokens at a time, so that it can be watched and stopped; the result is that of `write`.

    Args:
        on_progress: called after each piece with the number of steps made, and of steps at most.
        should_stop: asked before each piece.

    Raises:
        Cancelled: if `should_stop` said so.
    """
    prompt, most = inputs.prompts.tokens.shape[1], int(np.max(inputs.targets))
    state = begin_program(model, inputs, slots=slots)
    made = 0
    while made < most and not on_host(state.done).all():
        if should_stop is not None and should_stop():
            raise Cancelled(f"stopped before step {made} of {most}")
        window = next(size for size in windows(prompt, slots) if size > prompt + made)
        made = min(made + PIECE, most)
        state = advance_program(model, inputs, state, np.int32(made), window=window)
        made = int(state.step)
        if on_progress is not None:
            on_progress(made, most)
    return state.tokens, state.lengths
