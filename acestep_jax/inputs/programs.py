"""The compiled programs of a generation: encode, denoise, decode. Each is one call; weights are arguments.

`StepReporter` brings word of each step out of them.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.diffusion.guidance import GUIDANCE, Guided
from acestep_jax.diffusion.solvers import integrate
from acestep_jax.distributed import shard
from acestep_jax.inputs.prompt import Tokens
from acestep_jax.inputs.tasks import context_latents
from acestep_jax.models.audio_tokenizer import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer
from acestep_jax.models.autoencoder import AutoencoderOobleck
from acestep_jax.models.condition_encoder import AceStepConditionEncoder
from acestep_jax.models.qwen3 import Qwen3Model
from acestep_jax.models.transformer import AceStepTransformer1DModel, TimeEmbedding

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


class Condition(NamedTuple):
    """Condition tokens of a batch, and how many of each count."""

    tokens: jax.Array  # [B, S, E]
    lengths: jax.Array  # [B] int32


class Context(NamedTuple):
    """What the transformer is given for each frame, see `acestep_jax.inputs.tasks`."""

    source: jax.Array  # [B, T, 64] float32, source latents
    silent: jax.Array  # [B, T] bool, where silence stands in for them
    mask: jax.Array  # [B, T] bool, what is to be made anew


class Cover(NamedTuple):
    """Of covers that follow their source in part: what they turn to, text to music, and when or how much."""

    condition: Condition
    strength: jax.Array  # [B] float32


class Injection(NamedTuple):
    """Of repainting: what is put back where nothing is made anew, after each of the first steps and at their noise
    level."""

    made: jax.Array  # [B, T] bool, true in all of other songs
    noise: jax.Array  # [B, T, 64] float32
    source: jax.Array  # [B, T, 64] float32
    steps: jax.Array  # int32


class Program(NamedTuple):
    """What of the sampling is compiled."""

    solver: str = "euler"
    guidance: str | None = None  # None: none
    blend: bool = False  # a weak cover mixes velocities instead of turning from its source after some steps


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def encode_audio(vae: AutoencoderOobleck, audio: jax.Array, lengths: jax.Array) -> jax.Array:
    """[B, channels, samples] -> latents [B, samples // hop, 64] float32, the posterior's mean; `lengths` in samples."""
    return vae.encode(audio, lengths).mean.astype(jnp.float32)


@jax.jit
def tokenize(
    audio_tokenizer: AceStepAudioTokenizer,
    condition_encoder: AceStepConditionEncoder,
    latents: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """Latents [B, T, 64] -> codes [B, ceil(T / 5)] int32; those of an item's last window heed silence behind it."""
    size = audio_tokenizer.config.pool_window_size
    silence = condition_encoder.silence(size)[0].astype(latents.dtype)  # [5, 64]
    past = jnp.arange(latents.shape[1]) - lengths[:, None]  # [B, T], frames from the end on
    latents = jnp.where((past >= 0)[:, :, None], silence[jnp.clip(past, 0, size - 1)], latents)
    return audio_tokenizer.tokenize(latents, silence[None])[1][:, :, 0]


@jax.jit
def detokenize(
    audio_tokenizer: AceStepAudioTokenizer, audio_token_detokenizer: AceStepAudioTokenDetokenizer, codes: jax.Array
) -> jax.Array:
    """Codes [B, n] int32 -> latents [B, 5 n, 64] float32."""
    vectors = audio_tokenizer.quantizer.get_output_from_indices(codes[:, :, None])
    return audio_token_detokenizer(vectors).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="attend_to_padding", compiler_options=COMPILER_OPTIONS)
def encode(
    text_encoder: Qwen3Model,
    condition_encoder: AceStepConditionEncoder,
    tokens: Tokens,
    lyrics: Tokens,
    references: jax.Array | None = None,
    owners: jax.Array | None = None,
    *,
    attend_to_padding: bool = False,
) -> Condition:
    """The condition of B songs.

    Args:
        references: [N, 750, 64], latents of reference clips; None: there are none.
        owners: [B] int32, which of them is a song's, N for silence.
        attend_to_padding: whether padding counts as well, as it does in diffusers.
    """
    batch = tokens.ids.shape[0]
    clips = condition_encoder.silence(REFERENCE_FRAMES).astype(jnp.float32)
    if references is None:
        clips = jnp.broadcast_to(clips, (batch, *clips.shape[1:]))
    else:
        clips = jnp.concatenate([references, clips])[owners]
    condition, mask = condition_encoder(
        text_encoder(tokens.ids),
        tokens.mask,
        text_encoder.embed_tokens(lyrics.ids),
        lyrics.mask,
        clips,
        jnp.arange(batch),
    )
    lengths = jnp.full((batch,), mask.shape[1]) if attend_to_padding else mask.sum(1)
    return Condition(condition, lengths.astype(jnp.int32))


@functools.partial(jax.jit, static_argnames=("program", "report"), compiler_options=COMPILER_OPTIONS)
def denoise(
    transformer: AceStepTransformer1DModel,
    condition_encoder: AceStepConditionEncoder,
    x: jax.Array,  # [B, T, 64] at times[0]
    lengths: jax.Array,  # [B]
    condition: Condition,
    context: Context,
    times: jax.Array,  # [N + 1]
    guidance_scale: jax.Array,
    guided_steps: jax.Array,  # [N + 1] bool, of the times
    keys: jax.Array | None = None,  # [B], for solvers that draw noise
    cover: Cover | None = None,
    injection: Injection | None = None,
    *,
    program: Program,
    report: Callable | None,
) -> jax.Array:
    """The whole denoising loop, to latents [B, T, 64] float32; those from `lengths` on are padding.

    Keys and values of the conditions and the time embeddings are computed before it. Outside `guided_steps` the
    prediction without condition is computed and not used.
    """
    frames, steps = x.shape[1], times.shape[0] - 1
    silence = condition_encoder.silence(frames).astype(jnp.float32)
    given = context_latents(context.source, silence, context.silent, context.mask)  # [B, T, 128]
    embedded = transformer.embed_time(times, times)
    turns = cover is not None and not program.blend
    null = condition_encoder.null_condition_emb[...].astype(condition.tokens.dtype)

    def attend(first):
        """Keys, values and lengths for all branches of a step, which runs them at once: the condition, no condition,
        and what a blended cover is mixed with."""
        branches = [first]
        if program.guidance:
            branches.append(Condition(jnp.broadcast_to(null, first.tokens.shape), first.lengths))
        if cover is not None and program.blend:
            branches.append(cover.condition)
        tokens, counts = (jnp.concatenate(parts) for parts in zip(*branches, strict=True))
        return transformer.embed_condition(tokens), counts

    attended = attend(condition)
    count = attended[1].shape[0] // x.shape[0]
    tile = lambda y: jnp.concatenate([y] * count)  # noqa: E731
    if turns:
        turned = attend(cover.condition)
        plain = jnp.concatenate([silence, jnp.ones_like(silence)], axis=-1)
        first_turned = jnp.floor(steps * cover.strength + 1e-6)  # [B]

    def network(x, i):  # [B, T, 64] -> velocities [B, T, 64] float32, of the branches
        time = TimeEmbedding(*(array[i][None] for array in embedded))
        (keys_values, counts), context = attended, given
        if turns:
            turn = i >= first_turned
            rows = tile(turn)
            context = jnp.where(turn[:, None, None], plain, context)
            counts = jnp.where(rows, turned[1], counts)
            # Keys and values are [L, B, S, K, H].
            choose = lambda y, other: jnp.where(rows[:, None, None, None], other, y)  # noqa: E731
            keys_values = jax.tree.map(choose, keys_values, turned[0])
        v = transformer.velocity(
            tile(x), time, keys_values, tile(context), lengths=tile(lengths), encoder_lengths=counts
        )
        return jnp.split(v.astype(jnp.float32), count)

    def velocity(x, i, memory):
        v, *others = network(x, i)
        if program.guidance:
            rule = GUIDANCE["cfg" if memory is None else program.guidance]
            guided, new_memory = rule(Guided(v, others[0], x, times[i], memory), guidance_scale)
            v = jnp.where(guided_steps[i], guided, v)
            if memory is not None:
                memory = jnp.where(guided_steps[i], new_memory, memory)
        if cover is not None and program.blend:
            strength = cover.strength[:, None, None]
            v = strength * v + (1 - strength) * others[-1]
        return v, memory

    def after_step(x, i):
        if injection is not None:
            t = times[i + 1]
            outside = t * injection.noise + (1 - t) * injection.source
            x = jnp.where(injection.made[:, :, None] | (i >= injection.steps), x, outside)
        if report is not None:
            report(i, times[i], x)
        return x

    x = shard(x, "batch", "sequence", None)
    memory = jnp.zeros_like(x) if program.guidance == "apg" else jnp.float32(0)
    return integrate(velocity, x, times, solver=program.solver, memory=memory, keys=keys, after_step=after_step)


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def decode(vae: AutoencoderOobleck, latents: jax.Array, lengths: jax.Array, scaled: jax.Array) -> jax.Array:
    """[B, T, 64] -> audio [B, channels, samples] float32, silent from `lengths` [B] on, in latent frames.

    scaled: [B] bool, which are brought to a peak of -1 dBFS.
    """
    waveform = vae.decode(latents, lengths).astype(jnp.float32)
    ends = lengths[:, None, None] * vae.hop_length
    waveform = jnp.where(jnp.arange(waveform.shape[-1]) < ends, waveform, 0.0)
    peak = jnp.max(jnp.abs(waveform), axis=(1, 2), keepdims=True)
    return waveform * jnp.where(scaled[:, None, None], PEAK / jnp.maximum(peak, 1e-6), 1.0)


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
