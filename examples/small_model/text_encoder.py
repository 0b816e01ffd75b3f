"""The text encoder of the small model: a two-layer Qwen3 that learns to summarise a prompt.

Qwen3-Embedding, the text encoder of the large models, is trained to represent the meaning of a text in its last token.
Here linear layers predict the song's tempo, key, drums, style and instruments from the last token and from the mean of
all tokens, which is what an untrained cross-attention sees. These layers are discarded afterwards.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer
from tqdm import tqdm

from acestep_jax.inputs.collate import Tokens, pad_tokens
from acestep_jax.inputs.prompt import PAD, tokenize
from acestep_jax.models.config import TextEncoderConfig
from acestep_jax.models.qwen3 import Qwen3Model
from acestep_jax.request import MAX_PROMPT_TOKENS
from examples.small_model.requests import FACT_WEIGHTS, facts, song_and_prompt, tempo_facts

FIRST_SEED = 2**40  # songs from this seed on are never composed, neither for training nor for tests


def train_text_encoder(
    config: TextEncoderConfig, tokenizer: Tokenizer, *, steps: int, batch_size: int, seed: int = 0
) -> tuple[Qwen3Model, list[float]]:
    """Return the trained network and the error of each step, the fraction of the facts' variance left unexplained."""
    network = Qwen3Model(config, rngs=nnx.Rngs(seed))
    _relate_numbers(network, tokenizer, seed)
    graph, params = nnx.split(network)
    known = np.stack([facts(song_and_prompt(FIRST_SEED + i)[0]) for i in range(1000)])
    mean, scale = known.mean(0), FACT_WEIGHTS / (known.var(0) + 1e-4)
    # Two linear layers, on the last token and on the mean: kernels and biases.
    head = jnp.zeros((2, config.hidden_size, known.shape[1])), jnp.stack([mean, mean])
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 20, steps, 1e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    state = (params, head), optimizer.init((params, head))

    def error(learned, ids, mask, wanted):
        params, (kernels, biases) = learned
        hidden = nnx.merge(graph, params)(ids)
        last = jnp.take_along_axis(hidden, mask.sum(1)[:, None, None] - 1, axis=1)[:, 0]
        average = (hidden * mask[:, :, None]).sum(1) / mask.sum(1)[:, None]
        told = jnp.einsum("rbd,rdf->rbf", jnp.stack([last, average]), kernels) + biases[:, None]
        return (jnp.square(told - wanted) * scale).mean()

    @jax.jit
    def step(state, ids, mask, wanted):
        learned, moments = state
        loss, gradients = jax.value_and_grad(error)(learned, ids, mask, wanted)
        updates, moments = optimizer.update(gradients, moments, learned)
        return (optax.apply_updates(learned, updates), moments), loss

    losses = []
    for i in tqdm(range(steps), "text encoder", disable=None):
        tokens, wanted = batch(tokenizer, FIRST_SEED + (1 + i) * batch_size, batch_size)
        state, loss = step(state, tokens.ids, tokens.mask, wanted)
        losses.append(float(loss))
    return nnx.merge(graph, state[0][0]), losses


def _relate_numbers(network: Qwen3Model, tokenizer: Tokenizer, seed: int) -> None:
    """Initialise the embeddings of numbers from their `tempo_facts`, so that neighbouring numbers have similar ones."""
    words = {i: token.strip("Ġ") for token, i in tokenizer.get_vocab().items()}  # the tokenizer's sign for a space
    numbers = {i: int(word) for i, word in words.items() if word.isdecimal()}
    rows = np.array([i for i, n in numbers.items() if n > 0])
    facts = np.stack([tempo_facts(numbers[i]) for i in rows])
    table = network.embed_tokens.embedding
    mix = np.random.default_rng(seed).standard_normal((facts.shape[1], table.shape[1])) / facts.shape[1] ** 0.5
    size = np.std(table[...]) / np.std(facts @ mix)
    table.set_value(table[...].at[rows].set(size * (facts @ mix)))


def batch(tokenizer: Tokenizer, seed: int, size: int) -> tuple[Tokens, np.ndarray]:
    """Return the tokens of the prompts of `size` songs, and their facts."""
    songs, prompts = zip(*(song_and_prompt(seed + i) for i in range(size)), strict=True)
    rows = tokenize(tokenizer, list(prompts), max_length=MAX_PROMPT_TOKENS, what="prompt")
    tokens = pad_tokens(rows, 32, tokenizer.token_to_id(PAD))
    return tokens, np.stack([facts(song) for song in songs])
