"""What is learned from a batch: pure functions, float32 in everything that concerns times and the loss.

x_t = t * noise + (1 - t) * x0 with x0 from the autoencoder's posterior, target v = noise - x0, mean squared error over
the frames that are there. Everything random about an example, but for dropout in adapters, comes from its own number in
the run, so that it is the same whatever batch, device or process it is in.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from acestep_jax.train.config import ObjectiveConfig
from acestep_jax.train.data_folder import TASKS
from flax import nnx
from jax.scipy.special import ndtri

from acestep_jax.diffusion.schedule import schedule
from acestep_jax.inputs import tasks
from acestep_jax.models.audio_tokenizer import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer
from acestep_jax.models.condition_encoder import AceStepConditionEncoder
from acestep_jax.models.transformer import AceStepTransformer1DModel

TEXT2MUSIC, REPAINT, COVER = range(len(TASKS))


class Batch(NamedTuple):
    """Examples as the loader gives them; those of length 0 fill the batch up and count for nothing."""

    mean: jax.Array  # [B, T, 64] float32, of the posterior; silence from `lengths` on
    std: jax.Array  # [B, T, 64] float32, 0 there
    lengths: jax.Array  # [B] int32, frames
    text: jax.Array  # [B, S, 1024], hidden states of the prompt
    text_lengths: jax.Array  # [B] int32
    lyric_ids: jax.Array  # [B, S] int32
    lyric_lengths: jax.Array  # [B] int32
    tasks: jax.Array  # [B] int32, index into `TASKS`
    windows: jax.Array  # [B, 2] int32, first frame and the one after the last of what repaint makes anew
    numbers: jax.Array  # [B] uint32, of the examples in the run


class Frozen(NamedTuple):
    """The networks around the transformer, which do not learn."""

    condition_encoder: AceStepConditionEncoder
    embedding: jax.Array  # [vocabulary, 1024], the text encoder's
    audio_tokenizer: AceStepAudioTokenizer | None  # both None where the mixture has no covers
    audio_token_detokenizer: AceStepAudioTokenDetokenizer | None
    timbre: jax.Array  # [1, 1, D], of silence, the reference of all examples


class Draws(NamedTuple):
    """What is random about examples."""

    noise: jax.Array  # [B, T, 64] float32
    x0: jax.Array  # [B, T, 64] float32, a sample of the posterior
    t: jax.Array  # [B] float32
    dropped: jax.Array  # [B] bool, which are shown no condition


def logit_normal_pair(key: jax.Array, mu: float, sigma: float) -> jax.Array:
    """t = sigmoid(mu + sigma max(n1, n2)) with n1, n2 ~ N(0, 1); a float32 scalar. Source: ACE-Step 1.5's training."""
    return jax.nn.sigmoid(mu + sigma * jnp.max(jax.random.normal(key, (2,))))


def stratified_time(u: jax.Array, mu: float, sigma: float) -> jax.Array:
    """The same distribution by its quantiles: for u uniform in (0, 1), the greater of two normals is ndtri(sqrt(u))."""
    return jax.nn.sigmoid(mu + sigma * ndtri(jnp.sqrt(jnp.clip(u, 1e-7, 1.0 - 1e-7))))


def sample_times(key: jax.Array, numbers: jax.Array, step_size: int, config: ObjectiveConfig) -> jax.Array:
    """t [B] float32 of the examples with these numbers, of which a step has `step_size` with consecutive numbers."""
    mu, sigma = config.timestep_mu, config.timestep_sigma
    if config.timesteps == "logit_normal":
        return jax.vmap(lambda i: logit_normal_pair(jax.random.fold_in(key, i), mu, sigma))(numbers)
    if config.timesteps == "turbo":
        times = jnp.asarray(schedule(8, 3.0)[:-1])
        return jax.vmap(lambda i: jax.random.choice(jax.random.fold_in(key, i), times))(numbers)
    # One example in each of the step's strata, anywhere in it.
    offset = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(numbers)
    return stratified_time(((numbers % step_size).astype(jnp.float32) + offset) / step_size, mu, sigma)


def draw(batch: Batch, key: jax.Array, step_size: int, config: ObjectiveConfig) -> Draws:
    """Everything random about the examples of a batch, from the key of the run and their numbers."""
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
    batch: Batch,
    draws: Draws,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Squared errors of each example, added up over its valid frames and all channels, and how many they are.

    `dropout_key`: of the transformer's `attention_dropout`; without it there is none.
    Sums, so that parts of a batch add up: the loss is one over the other. [B] float32 each.
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


def encode_condition(frozen: Frozen, batch: Batch, dropped: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Condition tokens [B, S, D] and their lengths [B]; all of an example's are the null embedding where `dropped`."""
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


def context_latents(frozen: Frozen, batch: Batch, x0: jax.Array) -> jax.Array:
    """Source latents and chunk mask, [B, T, 128].

    text2music: silence, 1. repaint: x0 outside the window with mask 0, silence inside with mask 1. cover: x0 through
    the audio tokenizer and back, 1.
    """
    frames = x0.shape[1]
    silence = frozen.condition_encoder.silence(frames).astype(jnp.float32)
    task = batch.tasks[:, None]
    position = jnp.arange(frames)
    begin, end = batch.windows[:, 0, None], batch.windows[:, 1, None]
    kept = (task == REPAINT) & ((position < begin) | (position >= end))
    source, silent = x0, ~kept
    if frozen.audio_tokenizer is not None:
        quantized, _ = frozen.audio_tokenizer.tokenize(x0, frozen.condition_encoder.silence_latent[...])
        covered = frozen.audio_token_detokenizer(quantized)[:, :frames].astype(jnp.float32)
        source, silent = jnp.where((task == COVER)[:, :, None], covered, x0), silent & (task != COVER)
    return tasks.context_latents(source, silence, silent, ~kept)


def freeze(networks: dict[str, nnx.Module], embedding: jax.Array, reference_frames: int) -> Frozen:
    """`Frozen` of the networks of a checkpoint, by name."""
    encoder = networks["condition_encoder"]
    timbre = jax.jit(lambda encoder: encoder.timbre_encoder(encoder.silence(reference_frames)))(encoder)
    return Frozen(
        encoder,
        embedding,
        networks.get("audio_tokenizer"),
        networks.get("audio_token_detokenizer"),
        timbre[:, None],
    )
