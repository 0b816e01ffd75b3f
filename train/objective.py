"""The objective of fine-tuning: pure functions, with timesteps and the loss in float32.

x_t = t * noise + (1 - t) * x0 with x0 from the autoencoder's posterior, target v = noise - x0, mean squared error over
the valid frames. All random numbers of an example, except for dropout in adapters, are derived from its index in the
run, so they do not depend on the batch, device or process.
"""

from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from acestep_jax.diffusion import denoise
from acestep_jax.diffusion.schedule import schedule
from acestep_jax.distributed import batch_shards, shard
from acestep_jax.inputs import tasks
from acestep_jax.models.audio_tokenizer import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer
from acestep_jax.models.condition_encoder import AceStepConditionEncoder
from acestep_jax.models.transformer import AceStepTransformer1DModel
from acestep_jax.train.config import TASKS, ObjectiveConfig

_TABLE = [tasks.TASKS[name] for name in TASKS]
TOKENIZED = np.array([task.tokenized for task in _TABLE])
SILENT_SOURCE = np.array([task.silent_source for task in _TABLE])
HAS_REGIONS = np.array([task.has_regions for task in _TABLE])
SILENT_REGIONS = np.array([task.silent_regions for task in _TABLE])


A = TypeVar("A")  # jax.Array, or np.ndarray in the loader


class Batch(NamedTuple, Generic[A]):
    """Examples as the loader yields them; examples of length 0 are padding and have no weight."""

    mean: A  # [B, T, 64] float32, mean of the posterior; silence from `lengths` on
    std: A  # [B, T, 64] float32, standard deviation of the posterior; 0 from `lengths` on
    lengths: A  # [B] int32, frames
    text: A  # [B, S, 1024], hidden states of the prompt
    text_lengths: A  # [B] int32
    lyric_ids: A  # [B, S] int32
    lyric_lengths: A  # [B] int32
    tasks: A  # [B] int32, index into `TASKS`
    windows: A  # [B, 2] int32, start and end (exclusive) of the region to regenerate, in frames
    numbers: A  # [B] uint32, index of each example in the run


class Frozen(NamedTuple):
    """The frozen networks around the transformer."""

    condition_encoder: AceStepConditionEncoder
    embedding: jax.Array  # [vocabulary, 1024], the text encoder's
    audio_tokenizer: AceStepAudioTokenizer | None  # both None if no task in the mixture is tokenized
    audio_token_detokenizer: AceStepAudioTokenDetokenizer | None
    timbre: jax.Array  # [1, 1, D], timbre of silence, the reference of all examples


class Draws(NamedTuple):
    """The random numbers of examples."""

    noise: jax.Array  # [B, T, 64] float32
    x0: jax.Array  # [B, T, 64] float32, a sample of the posterior
    t: jax.Array  # [B] float32
    dropped: jax.Array  # [B] bool, whether the condition is dropped


def logit_normal_pair(key: jax.Array, mu: float, sigma: float) -> jax.Array:
    """Draw t = sigmoid(mu + sigma max(n1, n2)) with n1, n2 ~ N(0, 1), a float32 scalar. Source: ACE-Step 1.5."""
    return jax.nn.sigmoid(mu + sigma * jnp.max(jax.random.normal(key, (2,))))


def stratified_time(u: jax.Array, mu: float, sigma: float) -> jax.Array:
    """Return the quantile u of the distribution of `logit_normal_pair`.

    For u uniform in (0, 1), ndtri(sqrt(u)) is distributed as the greater of two normals.
    """
    return jax.nn.sigmoid(mu + sigma * ndtri(jnp.sqrt(jnp.clip(u, 1e-7, 1.0 - 1e-7))))


def sample_times(key: jax.Array, numbers: jax.Array, step_size: int, config: ObjectiveConfig) -> jax.Array:
    """Draw t [B] float32 of the examples with these indices; a step has `step_size` examples with consecutive ones."""
    mu, sigma = config.timestep_mu, config.timestep_sigma
    if config.timesteps == "logit_normal":
        return jax.vmap(lambda i: logit_normal_pair(jax.random.fold_in(key, i), mu, sigma))(numbers)
    if config.timesteps == "turbo":
        times = jnp.asarray(schedule(8, 3.0)[:-1])
        return jax.vmap(lambda i: jax.random.choice(jax.random.fold_in(key, i), times))(numbers)
    # One example in each of the step's strata, uniformly distributed within it.
    offset = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(numbers)
    return stratified_time(((numbers % step_size).astype(jnp.float32) + offset) / step_size, mu, sigma)


def draw(batch: Batch[jax.Array], key: jax.Array, step_size: int, config: ObjectiveConfig) -> Draws:
    """Draw the random numbers of the examples of a batch from the run's key and the examples' indices."""
    time_key, example_key = jax.random.split(key)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(example_key, i), 3))(batch.numbers)  # [B, 3]
    shape = batch.mean.shape[1:]
    noise = jax.vmap(lambda k: jax.random.normal(k, shape))(keys[:, 0])
    x0 = batch.mean + batch.std * jax.vmap(lambda k: jax.random.normal(k, shape))(keys[:, 1])
    dropped = jax.vmap(lambda k: jax.random.bernoulli(k, config.condition_dropout))(keys[:, 2])
    return Draws(noise, x0, sample_times(time_key, batch.numbers, step_size, config), dropped)


def velocity_losses(
    transformer: AceStepTransformer1DModel,
    frozen: Frozen,
    batch: Batch[jax.Array],
    draws: Draws,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return, for each example, the sum of squared errors over its valid frames and all channels, and their count.

    Both are [B] float32. They are sums so that accumulated batches add up; the loss is their quotient. `dropout_key` is
    the key of the transformer's `attention_dropout`; without it there is no dropout.
    """
    noise, x0, t, dropped = draws
    condition, condition_lengths = encode_condition(frozen, batch, dropped)
    context = jax.lax.stop_gradient(context_latents(frozen, batch, x0))
    x_t = t[:, None, None] * noise + (1.0 - t[:, None, None]) * x0
    velocity = transformer(
        x_t,
        t,
        t,
        condition,
        context,
        lengths=batch.lengths,
        encoder_lengths=condition_lengths,
        dropout_key=dropout_key,
    )
    frames, channels = x0.shape[1:]
    valid = (jnp.arange(frames) < batch.lengths[:, None])[:, :, None]  # [B, T, 1]
    error = jnp.where(valid, jnp.square(velocity.astype(jnp.float32) - (noise - x0)), 0.0)
    return error.sum((1, 2)), batch.lengths.astype(jnp.float32) * channels


def encode_condition(frozen: Frozen, batch: Batch[jax.Array], dropped: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return condition tokens [B, S, D] and their lengths [B]; where `dropped`, all tokens are the null embedding."""
    encoder = frozen.condition_encoder
    size, references = batch.lengths.shape[0], frozen.timbre.shape[1]

    def mask(ids, lengths):
        return jnp.arange(ids.shape[1]) < lengths[:, None]

    condition, valid = encoder.combine(
        batch.text,
        mask(batch.text, batch.text_lengths),
        jnp.take(frozen.embedding, batch.lyric_ids, axis=0),
        mask(batch.lyric_ids, batch.lyric_lengths),
        jnp.broadcast_to(frozen.timbre, (size, *frozen.timbre.shape[1:])),
        jnp.ones((size, references), bool),
    )
    null = encoder.null_condition_emb[...].astype(condition.dtype)
    condition = jnp.where(dropped[:, None, None], null, condition)
    return jax.lax.stop_gradient(condition), valid.sum(1, dtype=jnp.int32)


def context_latents(frozen: Frozen, batch: Batch[jax.Array], x0: jax.Array) -> jax.Array:
    """Return the transformer's context for the task of each example: source latents and chunk mask, [B, T, 128].

    The source is x0 (for tokenized tasks, tokenized and detokenized), replaced with silence everywhere or in the window
    as `Task` defines. The mask is 1 everywhere or, for tasks with regions, in the window.
    """
    frames = x0.shape[1]
    silence = frozen.condition_encoder.silence(frames).astype(jnp.float32)
    position = jnp.arange(frames)
    window = (position >= batch.windows[:, :1]) & (position < batch.windows[:, 1:])  # [B, T]

    def of_task(flags: np.ndarray) -> jax.Array:
        return jnp.asarray(flags)[batch.tasks][:, None]  # [B, 1]

    source = _tokenized(frozen, batch.tasks, x0)
    silent = of_task(SILENT_SOURCE) | (of_task(SILENT_REGIONS) & window)
    return denoise.context_latents(source, silence, silent, ~of_task(HAS_REGIONS) | window)


def _tokenized(frozen: Frozen, task: jax.Array, x0: jax.Array) -> jax.Array:
    """Return x0 [B, T, 64] with the examples of tokenized tasks, [B], as they come out of the audio tokenizer and back.

    In the usual mixture those are one in five. They are computed in groups of a quarter of the batch, as many as it
    needs, so that the time of the tokenizer is that of one group, or of none.
    """
    tokenizer, detokenizer = frozen.audio_tokenizer, frozen.audio_token_detokenizer
    if tokenizer is None or detokenizer is None:
        return x0
    needed = jnp.asarray(TOKENIZED)[task]
    order = jnp.argsort(~needed, stable=True)  # those first
    shards = batch_shards(len(x0))
    size = shards * -(-len(x0) // (4 * shards))

    def compute(i: jax.Array, source: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(order, i * size, size)
        quantized, _ = tokenizer.tokenize(
            shard(x0[rows], "batch", None, None), frozen.condition_encoder.silence_latent[...]
        )
        return source.at[rows].set(detokenizer(quantized)[:, : x0.shape[1]].astype(x0.dtype))

    groups = -(-needed.sum(dtype=jnp.int32) // size)
    source = shard(jax.lax.fori_loop(0, groups, compute, x0), "batch", None, None)
    return jnp.where(needed[:, None, None], source, x0)  # a group may hold others, too


def freeze(networks: dict[str, Any], embedding: jax.Array, reference_frames: int) -> Frozen:
    """Return `Frozen` for the networks of a checkpoint, by name."""
    encoder = networks["condition_encoder"]
    timbre = jax.jit(lambda encoder: encoder.timbre_encoder(encoder.silence(reference_frames)))(encoder)
    return Frozen(
        encoder,
        embedding,
        networks.get("audio_tokenizer"),
        networks.get("audio_token_detokenizer"),
        timbre[:, None],
    )
