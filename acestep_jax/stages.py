"""The compiled programs of a generation: encode, denoise, decode. Each is one call; weights are arguments.

`StepReporter` brings word of each step out of them.
"""

import contextlib
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.flow_matching import apg, euler
from acestep_jax.models.autoencoder import AutoencoderOobleck
from acestep_jax.models.condition_encoder import AceStepConditionEncoder
from acestep_jax.models.text_encoder import Qwen3Model
from acestep_jax.models.transformer import AceStepTransformer1DModel, TimeEmbedding
from acestep_jax.prompt import Tokens
from acestep_jax.sharding import shard

REFERENCE_FRAMES = 750  # of the timbre reference (30 s), silence where there is none
PEAK = 10.0 ** (-1.0 / 20.0)  # -1 dBFS, the loudest sample of every song

StepCallback = Callable[[int, float, np.ndarray], None]  # step, t, latents


# On a CPU, XLA's default order of operations prefers concurrency: it copies the weights of all layers of a scan's body
# out of their stacks before the first of them runs, which takes ten times the memory. Other backends ignore this.
COMPILER_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@functools.partial(jax.jit, static_argnums=1)
def noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, *shape] float32, each song from its own key, so that it does not depend on the others."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def encode(
    text_encoder: Qwen3Model, condition_encoder: AceStepConditionEncoder, tokens: Tokens, lyrics: Tokens
) -> tuple[jax.Array, jax.Array]:
    """Condition tokens [B, S, E] and how many of them count, [B] int32."""
    batch = tokens.ids.shape[0]
    reference = condition_encoder.silence(REFERENCE_FRAMES)
    condition, mask = condition_encoder(
        text_encoder(tokens.ids),
        tokens.mask,
        text_encoder.embed_tokens(lyrics.ids),
        lyrics.mask,
        jnp.broadcast_to(reference, (batch, *reference.shape[1:])),
        jnp.arange(batch),
    )
    return condition, mask.sum(1, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames=("guided", "report"), compiler_options=COMPILER_OPTIONS)
def denoise(
    transformer: AceStepTransformer1DModel,
    condition_encoder: AceStepConditionEncoder,
    noise: jax.Array,  # [B, T, 64]
    condition: jax.Array,  # [B, S, E]
    condition_lengths: jax.Array,  # [B]
    lengths: jax.Array,  # [B]
    times: jax.Array,  # [N + 1]
    guidance_scale: jax.Array,
    guided_steps: jax.Array,  # [N] bool
    *,
    guided: bool,
    report: Callable | None,
) -> jax.Array:
    """The whole denoising loop, to latents [B, T, 64] float32; those from `lengths` on are padding.

    Keys and values of the condition and the time embeddings are computed before it. Outside `guided_steps` the
    prediction without condition is computed and not used.
    """
    batch, frames, channels = noise.shape
    if guided:  # the batch becomes [with condition, without]
        null = jnp.broadcast_to(condition_encoder.null_condition_emb[...].astype(condition.dtype), condition.shape)
        condition = jnp.concatenate([condition, null])
        condition_lengths, lengths = jnp.tile(condition_lengths, 2), jnp.tile(lengths, 2)
    silence = condition_encoder.silence(frames)
    context = jnp.concatenate([silence, jnp.ones_like(silence)], axis=-1)  # generate every frame
    context = jnp.broadcast_to(context, (condition.shape[0], *context.shape[1:]))
    keys_values = transformer.embed_condition(condition)
    embedded = transformer.embed_time(times[:-1], times[:-1])

    def network(x, i):
        time = TimeEmbedding(*(array[i][None] for array in embedded))
        v = transformer.velocity(x, time, keys_values, context, lengths=lengths, encoder_lengths=condition_lengths)
        return v.astype(jnp.float32)

    def velocity(x, i, momentum):
        if not guided:
            return network(x, i), momentum
        with_condition, without = jnp.split(network(jnp.concatenate([x, x]), i), 2)
        v, new_momentum = apg(with_condition, without, guidance_scale, momentum)
        active = guided_steps[i]
        return jnp.where(active, v, with_condition), jnp.where(active, new_momentum, momentum)

    noise = shard(noise, "batch", "sequence", None)
    return euler(velocity, noise, times, jnp.zeros_like(noise) if guided else None, report)


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def decode(vae: AutoencoderOobleck, latents: jax.Array, lengths: jax.Array) -> jax.Array:
    """[B, T, 64] -> audio [B, channels, samples] float32 with a peak of -1 dBFS, silent from `lengths` [B] on."""
    waveform = vae.decode(latents, lengths).astype(jnp.float32)
    ends = lengths[:, None, None] * vae.hop_length
    waveform = jnp.where(jnp.arange(waveform.shape[-1]) < ends, waveform, 0.0)
    peak = jnp.max(jnp.abs(waveform), axis=(1, 2), keepdims=True)
    return waveform * (PEAK / jnp.maximum(peak, 1e-6))


class StepReporter:
    """Brings steps out of the compiled loop. One object serves all calls of a pipeline: its method is part of the
    program, which a new function for every call would compile again."""

    def __init__(self):
        self._callback: StepCallback | None = None
        self._frames = 0
        self._error: Exception | None = None

    @contextlib.contextmanager
    def watching(self, callback: StepCallback | None, frames: int):
        """Gives the function that the loop is to call, None if nobody watches; then raises what the callback raised.

        JAX's persistent cache does not take programs that call back, so without a callback there is no such function.
        """
        self._callback, self._frames, self._error = callback, frames, None
        try:
            yield None if callback is None else self._step
        finally:
            jax.effects_barrier()
            error, self._callback, self._error = self._error, None, None
        if error is not None:
            raise error

    def _step(self, i, t, x):
        jax.debug.callback(self._call, i, t, x)

    def _call(self, i, t, x):
        if self._error is None:
            try:
                self._callback(int(i), float(t), np.asarray(x)[:, : self._frames])
            except Exception as error:  # it must not unwind through the runtime
                self._error = error
