"""Scores of how well the audio codes of a plan match its text, judged by the language model.

    pmi(words) = mean log p(words | codes) - mean log p(words),   score = 1 / (1 + exp(-pmi / 0.1))

for the caption and the lyrics, as the language model would write them in `understand`. For metadata, which are short
and have few values, the score is the mean over their tokens of 1 - (rank - 1) / 10 if the rank is at most ten, else 0.

Source: ACE-Step 1.5, acestep/core/scoring/lm_score.py.
"""

import contextlib
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.distributed import on_host
from acestep_jax.errors import InputError
from acestep_jax.models.kernels.compiler import COMPILER_OPTIONS
from acestep_jax.models.qwen3 import Qwen3ForCausalLM
from acestep_jax.planner import cot, prompts
from acestep_jax.planner.metadata import Known
from acestep_jax.planner.plan import Plan
from acestep_jax.planner.tokenizer import Mark, Pieces
from acestep_jax.planner.writer import Planner

PMI_SCALE = 0.1
RANKS = 10  # number of likeliest tokens that count
WEIGHTS = {"caption": 0.5, "lyrics": 0.3, "metadata": 0.2}
METADATA = ("bpm", "duration", "genres", "keyscale", "language", "timesignature")
TOKENS_BUCKET, TARGETS_BUCKET = 256, 64  # rows and their targets are padded to multiples of these
POSITIONS = 64  # number of positions whose logits, over the whole vocabulary, are held at once; divides the latter


def pmi_score(planner: Planner, plan: Plan) -> float:
    """Return how well the codes of a plan match its caption, lyrics and metadata, from 0 to 1.

    Raises:
        InputError: see `pmi_scores`.
    """
    return total_score(pmi_scores(planner, plan))


def pmi_scores(planner: Planner, plan: Plan) -> dict[str, float]:
    """Return how well the codes of a plan match each of its other parts, from 0 to 1, by name.

    Raises:
        InputError: if the plan has no codes, or only codes.
    """
    if not plan.audio_codes:
        raise InputError("score: the plan has no audio codes to compare its words with; plan with codes")
    targets = {name: pieces for name, pieces in _targets(plan).items() if pieces}
    if not targets:
        raise InputError("score: the plan has neither caption nor lyrics nor metadata to compare its codes with")
    encode = planner.tokenizer.encode_pieces
    understand = prompts.metadata_prompt("understand", Known(codes=plan.audio_codes))
    texts = [name for name in targets if name not in METADATA]
    rows = {name: (encode(understand), encode(pieces)) for name, pieces in targets.items()}
    nothing = encode(prompts.unconditional_understand_prompt())
    with contextlib.nullcontext() if planner.mesh is None else jax.set_mesh(planner.mesh):
        given = dict(zip(rows, score_tokens(planner.model, list(rows.values())), strict=True))
        plain = score_tokens(planner.model, [(nothing, rows[name][1]) for name in texts]) if texts else []
    found = {}
    for name, (log_p, _) in zip(texts, plain, strict=True):
        pmi = float(np.mean(given[name][0], dtype=np.float64) - np.mean(log_p, dtype=np.float64))
        found[name] = sigmoid(pmi / PMI_SCALE)
    for name in targets.keys() - set(texts):
        found[name] = rank_score(given[name][1])
    return {name: found[name] for name in targets}


def total_score(scores: dict[str, float]) -> float:
    """Return the weighted mean over the available parts; metadata are one part, the mean of its fields."""
    fields = [value for name, value in scores.items() if name in METADATA]
    parts = {name: value for name, value in scores.items() if name not in METADATA}
    if fields:
        parts["metadata"] = float(np.mean(fields))
    weight = sum(WEIGHTS[name] for name in parts)
    return sum(WEIGHTS[name] * value for name, value in parts.items()) / weight


def sigmoid(x: float) -> float:
    """Return 1 / (1 + exp(-x)), for any finite x."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def rank_score(ranks: np.ndarray) -> float:
    """Return the mean of 1 - (rank - 1) / 10 over tokens, 0 for those beyond the first ten. ranks: [n], from 1."""
    return float(np.mean(np.where(ranks <= RANKS, 1 - (ranks - 1) / RANKS, 0.0)))


def _targets(plan: Plan) -> dict[str, Pieces]:
    """Return the target text for the language model, by part of the plan; without parts that the plan lacks."""

    def thoughts(name: str, value: object) -> Pieces:
        if value is None or value == "":
            return ()
        return Mark.THINK, f"\n{cot.dump(**{name: value})}\n", Mark.END_OF_THINK, "\n"  # pyright: ignore

    values = {
        "bpm": plan.bpm,
        "duration": plan.audio_duration,
        "keyscale": plan.keyscale,
        "language": plan.vocal_language,
        "timesignature": plan.timesignature,
    }
    found: dict[str, Pieces] = {"caption": thoughts("caption", plan.caption.strip()), "lyrics": ()}
    if plan.lyrics.strip():
        found["lyrics"] = (Mark.THINK, "\n", Mark.END_OF_THINK, f"\n# Lyric\n{plan.lyrics}\n")
    return found | {name: thoughts(name, value) for name, value in values.items()}


def score_tokens(
    model: Qwen3ForCausalLM, rows: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the log-probability and the rank, from 1, of the target tokens of each row, [n] each.

    Args:
        rows: token ids of the context and of the target that follows it.
    """
    size = -(-max(len(context) + len(target) for context, target in rows) // TOKENS_BUCKET) * TOKENS_BUCKET
    last = -(-max(len(target) for _, target in rows) // TARGETS_BUCKET) * TARGETS_BUCKET
    size = max(size, last + 1)
    tokens, start = np.zeros((len(rows), size), np.int32), np.zeros(len(rows), np.int32)
    for i, (context, target) in enumerate(rows):
        ids = np.concatenate([context, target])
        start[i] = size - len(ids)
        tokens[i, start[i] :] = ids
    log_p, ranks = map(on_host, _score(model, tokens, start, last=last))
    return [(log_p[i, last - len(t) :], ranks[i, last - len(t) :]) for i, (_, t) in enumerate(rows)]


@functools.partial(jax.jit, static_argnames="last", compiler_options=COMPILER_OPTIONS)
def _score(model: Qwen3ForCausalLM, tokens: jax.Array, start: jax.Array, *, last: int) -> tuple[jax.Array, jax.Array]:
    """Return log-probability, float32, and rank of the last tokens, [R, last] each, in chunks of positions."""
    hidden = model.hidden_states(tokens, start)[:, -last - 1 : -1]

    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states, ids = chunk
        logits = model.logits(states)  # [POSITIONS, V]
        own = jnp.take_along_axis(logits, ids[:, None], -1)
        return own[:, 0] - jax.nn.logsumexp(logits, -1), 1 + (logits > own).sum(-1, dtype=jnp.int32)

    chunks = hidden.reshape(-1, POSITIONS, hidden.shape[-1]), tokens[:, -last:].reshape(-1, POSITIONS)
    found = jax.lax.map(of_chunk, chunks)
    log_p, ranks = (x.reshape(tokens.shape[0], last) for x in found)
    return log_p, ranks
