"""Small stand-ins for the planner's parts: a tokenizer trained here, and language models without a transformer."""

import functools
import json
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from acestep_jax.inputs.fields import LANGUAGES
from acestep_jax.planner.grammar import Grammar
from acestep_jax.planner.tokenizer import Mark, Pieces, PlannerTokenizer
from tests.qwen import SPLIT

CODES = 40  # in the codebook of the models
TEXT = """
bpm: 120
caption: Warm lofi piano over a slow beat, with rain. A soft voice hums.
  It goes on, and ends.
duration: 180
genres: lofi
keyscale: F# minor
language: en
timesignature: 4
bpm: 30
caption: An energetic synth-pop track with driving bass.
  And a soaring female vocal.

keyscale: B major
# Lyric
[Verse]
We sing. We dance.

"""


@functools.cache
def vocabulary():
    """Return ids and merges of a small byte-level vocabulary, in which line ends are fused to stops as in Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 20 + ["\n".join(f"language: {code}" for code in LANGUAGES)], trainer)
    content = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in content["merges"]]
    return content["vocab"], merges


@functools.cache
def tokenizer():
    """Return the small tokenizer."""
    return PlannerTokenizer(*vocabulary())


@functools.cache
def grammar():
    """Return its grammar."""
    return Grammar(tokenizer())


def config():
    """Return what the planner reads of a model's config."""
    ours = tokenizer()
    return SimpleNamespace(
        first_code=ours.first_code, num_codes=CODES, eos_token_id=ours.mark(Mark.END_OF_TURN), vocab_size=None
    )


def _dataclass(*static):
    def register(cls):
        cls = dataclass(frozen=True)(cls)
        names = [name for name in cls.__dataclass_fields__ if name not in static]
        return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=list(static))

    return register


class _Model:
    """What the stand-ins share: a small vocabulary, and heads that nothing gathers."""

    @property
    def planner(self):
        return config()

    def text_head(self):
        return None

    def code_head(self):
        return None

    def grow(self, cache, window):
        return cache


@_dataclass()
class Recurrent(_Model):
    """A recurrent network with the interface of `Qwen3ForCausalLM`: its state is its cache."""

    embedding: jax.Array  # [V, D]
    kernel: jax.Array  # [D, D]
    text: jax.Array  # [D, V]
    code: jax.Array  # [D, C]

    @classmethod
    def random(cls, seed=0, size=16):
        rng = np.random.default_rng(seed)
        ids = config().first_code

        def normal(*shape):
            return rng.standard_normal(shape, dtype=np.float32)

        return cls(normal(ids + CODES, size), normal(size, size) / 3, normal(size, ids), normal(size, CODES))

    def init_cache(self, batch, slots, window=None):
        return jnp.zeros((batch, self.kernel.shape[0])), jnp.zeros((batch, slots), jnp.int32)

    def prefill(self, tokens, start, cache):
        def read(hidden, i):
            new = self._next(hidden, tokens[:, i])
            return jnp.where((i >= start)[:, None], new, hidden), None

        hidden, _ = jax.lax.scan(read, cache[0], jnp.arange(tokens.shape[1]))
        return hidden, (hidden, jax.lax.dynamic_update_slice(cache[1], tokens, (0, 0)))

    def decode(self, token, position, start, cache, *, window):
        hidden = self._next(cache[0], token)
        return hidden, (hidden, jax.lax.dynamic_update_slice(cache[1], token[:, None], (0, position)))

    def _next(self, hidden, token):
        return jnp.tanh(jnp.einsum("bd,de->be", hidden, self.kernel) + self.embedding[token])

    def text_logits(self, hidden, head):
        return 3 * jnp.einsum("bd,dv->bv", hidden, self.text)

    def code_logits(self, hidden, head):
        logits = 3 * jnp.einsum("bd,dc->bc", hidden, self.code)
        edge = jnp.full((hidden.shape[0], 7), -jnp.inf)
        return jnp.concatenate([jnp.full((hidden.shape[0], 1), 50.0), logits, edge], -1)  # most of all, it would stop


@_dataclass()
class Scripted(_Model):
    """A model that wants to write a given text, [B, n] ids, whatever it reads; one text for each row of the batch."""

    script: jax.Array

    @classmethod
    def of(cls, texts):
        """Write these pieces, one list for each song."""
        rows = [tokenizer().encode_pieces([*pieces, Mark.END_OF_TURN]) for pieces in texts]
        width = -(-(max(map(len, rows)) + 1) // 128) * 128  # of few sizes, so that scripts share programs
        script = np.full((len(rows), width), tokenizer().mark(Mark.END_OF_TURN), np.int32)
        for row, ids in zip(script, rows, strict=True):
            row[: len(ids)] = ids
        return cls(script)

    def init_cache(self, batch, slots, window=None):
        return jnp.zeros((batch, 1), jnp.int32)

    def prefill(self, tokens, start, cache):
        return cache.astype(jnp.float32), cache

    def decode(self, token, position, start, cache, *, window):
        cache = cache + 1
        return cache.astype(jnp.float32), cache

    def text_logits(self, hidden, head):
        step = jnp.minimum(hidden[:, 0].astype(jnp.int32), self.script.shape[1] - 1)
        wanted = self.script[jnp.arange(hidden.shape[0]), step]
        return 30.0 * jax.nn.one_hot(wanted, config().first_code)

    def code_logits(self, hidden, head):
        wanted = 1 + jnp.zeros(hidden.shape[0], jnp.int32)
        return 30.0 * jax.nn.one_hot(wanted, CODES + 8)


def render(pieces: Pieces) -> str:
    """Return a prompt as text."""
    shown = []
    for piece in pieces:
        if isinstance(piece, tuple):
            shown += [f"<|audio_code_{code}|>" for code in piece]
        else:
            shown.append(piece.value if isinstance(piece, Mark) else piece)
    return "".join(shown)
