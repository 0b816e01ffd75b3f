"""The language model's decoding loop as one compiled program: each step writes one token for every song of a batch.

    state = begin(...)                     prefill the prompts
    state = advance(..., state, until, W)  steps up to `until`, as long as they fit in the first W slots of the cache
    tokens = state.tokens

`write`, the usual case, does all of this: it chains loops over growing windows, so that short songs do not pay for the
cache of long ones. To watch or stop it, `write_in_pieces` runs the same functions as separate programs, several steps
at a time. They write metadata and lyrics under the grammar, or audio codes.

Prompts are padded on the left, so that all rows write the same slot in each step. With guidance the rows are
[conditional..., unconditional...], and the second half reads the tokens sampled by the first half.
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

A = TypeVar("A")  # jax.Array within a program, np.ndarray outside

FIRST_WINDOW = 512  # slots; each further window is twice as long
PIECE = 32  # steps between reports; it divides every window, so that pieces attend to the same slots as one call


class Prompts(NamedTuple, Generic[A]):
    """The prompts: [R, P] int32 tokens, padded on the left, and the start of each, [R] int32."""

    tokens: A
    start: A


class TextInputs(NamedTuple, Generic[A]):
    """The inputs to write the metadata of B songs."""

    prompts: Prompts[A]
    tables: grammar.Tables[A]
    fixed: grammar.FixedFields[A]
    first: A  # int32, the first state
    targets: A  # [B] int32, maximum number of steps; 0 for a padding row of the batch
    keys: jax.Array  # [B]
    drawing: Drawing[A]


class CodeInputs(NamedTuple, Generic[A]):
    """The inputs to write the audio codes of B songs; R is B, or 2 B with guidance."""

    prompts: Prompts[A]
    targets: A  # [B] int32, number of codes; 0 for a padding row of the batch
    keys: jax.Array  # [B]
    drawing: Drawing[A]
    ends_in_loop: A  # bool, whether a song ends as soon as its codes loop, because it will be sampled again


class State(NamedTuple):
    """The state of the loop.

    step: int32, number of tokens so far.
    hidden: [R, D], hidden state that the next token is sampled from.
    cache: KV cache of the model.
    tokens: [B, N] int32, tokens written so far: ids of text, or audio codes.
    lengths: [B] int32, number of tokens that belong to each song.
    done: [B] bool.
    seen: [B, V] bool, whether a token has been written.
    place: state of the grammar; None for audio codes.
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
    """Return the windows for a prompt bucket and a number of slots: powers of two above the prompt, then all slots."""
    found, size = [], FIRST_WINDOW
    while size < slots:
        found += [size] if size > prompt else []
        size *= 2
    return (*found, slots)


def begin(model: Qwen3ForCausalLM, inputs: TextInputs | CodeInputs, *, slots: int) -> State:
    """Prefill a cache of `slots` slots with the prompts; return the first state."""
    tokens, start = shard(inputs.prompts.tokens, "batch", None), shard(inputs.prompts.start, "batch")
    songs = inputs.targets.shape[0]
    empty = model.init_cache(tokens.shape[0], slots, windows(tokens.shape[1], slots)[0])
    hidden, cache = model.prefill(tokens, start, empty)
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
    """Write up to `until` tokens, until all songs are done or the window is full."""
    prompt = inputs.prompts.tokens.shape[1]
    head = model.text_head() if isinstance(inputs, TextInputs) else model.code_head()
    limit = jnp.minimum(until, window - prompt)

    def unfinished(state: State) -> jax.Array:
        return (state.step < limit) & ~state.done.all()

    def body(state: State) -> State:
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

    return jax.lax.while_loop(unfinished, body, state._replace(cache=model.grow(state.cache, window)))


def _next_text(inputs: TextInputs, state: State, logits: jax.Array) -> tuple[jax.Array, grammar.State]:
    """Sample from logits [B, V]; return the next token of each song, [B] int32, and the grammar's state after it."""
    assert state.place is not None
    keys = step_keys(inputs.keys, state.step)
    logits = penalise(logits, state.seen, inputs.drawing.repetition_penalty)

    def choose(scores: jax.Array, greedy: jax.Array) -> jax.Array:
        return draw(scores, keys, inputs.drawing, greedy)

    return grammar.step(inputs.tables, inputs.fixed, state.place, logits, choose)


def _next_code(inputs: CodeInputs, state: State, logits: jax.Array) -> jax.Array:
    """Sample from logits [R, 1 + C + padding]; return the next code of each song, [B] int32. A song ends with its last
    code: the end of the turn, which is the first column, is never sampled."""
    songs, codes = state.seen.shape
    logits = logits[:, 1 : 1 + codes]
    if logits.shape[0] > songs:
        logits = guide(logits[:songs], logits[songs:], inputs.drawing.cfg_scale)
    logits = penalise(logits, state.seen, inputs.drawing.repetition_penalty)
    return draw(logits, step_keys(inputs.keys, state.step), inputs.drawing)


def _write(model: Qwen3ForCausalLM, inputs: TextInputs | CodeInputs, *, slots: int) -> tuple[jax.Array, jax.Array]:
    """Return the tokens, [B, slots - P] int32, and how many of each row belong to the song, [B] int32."""
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
    """Write `PIECE` tokens at a time, so that it can be watched and stopped; the result is the same as of `write`.

    Args:
        on_progress: called after each piece with the number of steps so far and the maximum number of steps.
        should_stop: called before each piece.

    Raises:
        Cancelled: if `should_stop` returned true.
    """
    prompt, limit = inputs.prompts.tokens.shape[1], int(np.max(inputs.targets))
    state = begin_program(model, inputs, slots=slots)
    step = 0
    while step < limit and not on_host(state.done).all():
        if should_stop is not None and should_stop():
            raise Cancelled(f"stopped before step {step} of {limit}")
        window = next(size for size in windows(prompt, slots) if size > prompt + step)
        step = min(step + PIECE, limit)
        # Not in the program: it is donated its state, of which a cache that grows is no part.
        state = state._replace(cache=model.grow(state.cache, window))
        state = advance_program(model, inputs, state, np.int32(step), window=window)
        step = int(state.step)
        if on_progress is not None:
            on_progress(step, limit)
    return state.tokens, state.lengths
