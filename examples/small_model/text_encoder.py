"""The text encoder of the small model: a two-layer Qwen3 that learns to sum a prompt up in its last token.

Qwen3-Embedding, which the large models read prompts with, is trained to put what a text means into its last token. Here
a linear layer on that token tells the song's tempo, key, drums, style and instruments; it is dropped afterwards.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer
from tqdm import tqdm

from acestep_jax.config import TextEncoderConfig
from acestep_jax.models.text_encoder import Qwen3Model
from acestep_jax.prompt import MAX_PROMPT_TOKENS, Tokens, tokenize
from examples.small_model.requests import facts, song_and_prompt

FIRST_SEED = 2**40  # its songs are never composed, for training or as tests


def train_text_encoder(
    config: TextEncoderConfig, tokenizer: Tokenizer, *, steps: int, batch_size: int, seed: int = 0
) -> tuple[Qwen3Model, list[float]]:
    """Returns the network and the error of each step: the share of the facts' variance that it could not tell."""
    network = Qwen3Model(config, rngs=nnx.Rngs(seed))
    graph, params = nnx.split(network)
    known = np.stack([facts(song_and_prompt(FIRST_SEED + i)[0]) for i in range(1000)])
    mean, variance = known.mean(0), known.var(0) + 1e-4
    head = jnp.zeros((config.hidden_size, known.shape[1])), jnp.asarray(mean)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 20, steps, 1e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    state = (params, head), optimizer.init((params, head))

    def error(learned, ids, last, wanted):
        params, (kernel, bias) = learned
        hidden = nnx.merge(graph, params)(ids)
        summary = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return (jnp.square(summary @ kernel + bias - wanted) / variance).mean()

    @jax.jit
    def step(state, ids, last, wanted):
        learned, moments = state
        loss, gradients = jax.value_and_grad(error)(learned, ids, last, wanted)
        updates, moments = optimizer.update(gradients, moments, learned)
        return (optax.apply_updates(learned, updates), moments), loss

    losses = []
    for i in tqdm(range(steps), "text encoder", disable=None):
        tokens, wanted = batch(tokenizer, FIRST_SEED + (1 + i) * batch_size, batch_size)
        state, loss = step(state, tokens.ids, tokens.mask.sum(1) - 1, wanted)
        losses.append(float(loss))
    return nnx.merge(graph, state[0][0]), losses


def batch(tokenizer: Tokenizer, seed: int, size: int) -> tuple[Tokens, np.ndarray]:
    """Prompts of `size` songs, and their facts."""
    songs, prompts = zip(*(song_and_prompt(seed + i) for i in range(size)), strict=True)
    tokens = tokenize(tokenizer, list(prompts), max_length=MAX_PROMPT_TOKENS, multiple=32, what="prompt")
    return tokens, np.stack([facts(song) for song in songs])
