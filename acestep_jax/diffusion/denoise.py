"""The denoising loop: from x_1 = noise to x_0 = latents along dx/dt = v(x, t), with v from the transformer.

    fixed, state = begin(...)            computes keys and values, context and times, which are the same for all steps
    state = advance(..., state, i, n=n)  runs steps i, ..., i + n - 1
    latents = finish(fixed, state)

`denoise` runs all three as one compiled program, the usual case. To watch or to stop the loop, `denoise_in_pieces` runs
them as separate programs, one step at a time. The programs have no callbacks, because JAX's persistent compilation
cache does not store programs with callbacks.
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.diffusion import dcw, flow_edit, solvers
from acestep_jax.diffusion.guidance import GUIDANCE, Guided
from acestep_jax.distributed import on_host, shard
from acestep_jax.errors import Cancelled
from acestep_jax.models.attention import KeysValues
from acestep_jax.models.condition_encoder import AceStepConditionEncoder
from acestep_jax.models.kernels.compiler import COMPILER_OPTIONS
from acestep_jax.models.transformer import AceStepTransformer1DModel, TimeEmbedding

StepCallback = Callable[[int, float, np.ndarray], None]  # step, t, latents [B, frames, C]

A = TypeVar("A")  # jax.Array within a program; np.ndarray as well, before it is called


class Condition(NamedTuple):
    """Condition tokens of a batch, and the number of valid tokens of each song."""

    tokens: jax.Array  # [B, S, E]
    lengths: jax.Array  # [B] int32


class Inputs(NamedTuple, Generic[A]):
    """The inputs of denoising a batch. Optional fields are None if no song of the batch needs them."""

    x: A  # [B, T, C] float32, at times[0]
    lengths: A  # [B] int32, frames; the rest is padding
    condition: Condition
    source: A  # [B, T, C] float32, source latents
    silent: A  # [B, T] bool, true where silence replaces them
    mask: A  # [B, T] bool or float32, the chunk mask: 1 where the song is generated
    times: A  # [N + 1] float32, decreasing to 0
    guided: A  # [N + 1] bool, whether guidance is applied at each time; a solver may evaluate at the end of a step
    guidance_scale: A  # float32
    keys: jax.Array | None = None  # [B], one for each song, for solvers that draw noise
    # Partial covers follow their source in part, and otherwise this condition for text2music.
    plain_condition: Condition | None = None
    cover_strength: A | None = None  # [B] float32
    # Injection: after each of the first steps, kept frames are set to the source with noise of that level.
    kept: A | None = None  # [B, T] bool
    clean: A | None = None  # [B, T, C] float32, the source's latents as the autoencoder gives them
    noise: A | None = None  # [B, T, C] float32
    injected_steps: A | None = None  # int32
    made: A | None = None  # [B, T] float32, weight of the result in the final latents; `clean` has the rest
    dcw: A | None = None  # [N, 2] float32, the scales of both bands in each step, see `diffusion.dcw`
    velocity_norm: A | None = None  # float32, bound of a velocity's norm, relative to that of x
    velocity_ema: A | None = None  # float32, see `solvers.Step.ema`
    # FlowEdit: x is the latents of the source, `clean`, and keys are given.
    edited: Condition | None = None  # from the texts that describe the source
    edit_window: A | None = None  # [2] int32, see `flow_edit`


class Method(NamedTuple):
    """The static settings of sampling: a program is compiled for each.

    guidance: the guidance rule; None: no guidance.
    blend: whether partial covers blend velocities; otherwise they switch to text2music after some steps.
    euler_end: whether the last step is Euler's.
    edit_draws: noises in each step of FlowEdit; 0: no editing.
    """

    solver: str = "euler"
    guidance: str | None = None
    blend: bool = False
    euler_end: bool = False
    wavelet: str = "haar"
    edit_draws: int = 0


class Fixed(NamedTuple):
    """Values that `begin` computes once for all steps. R branches are evaluated together, along the batch axis."""

    inputs: Inputs[jax.Array]
    context: jax.Array  # [B, T, 2 C]
    time: TimeEmbedding  # for all times, [N + 1, ...]
    condition: tuple[KeysValues, jax.Array]  # [L, R * B, S, K, H] each, or lists of L, and lengths [R * B]
    plain_context: jax.Array | None  # [B, T, 2 C], that partial covers switch to
    plain_condition: tuple[KeysValues, jax.Array] | None
    edited: tuple[KeysValues, jax.Array] | None


def context_latents(source: jax.Array, silence: jax.Array, silent: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the transformer's context, [B, T, 2 C].

    Args:
        source: [B, T, C], source latents.
        silence: [1, T, C], latents of silence.
        silent: [B, T] bool, true where silence replaces the source.
        mask: [B, T], the chunk mask, which is repeated for every channel.
    """
    source = jnp.where(silent[:, :, None], silence, source)
    return jnp.concatenate([source, jnp.broadcast_to(mask[:, :, None], source.shape).astype(source.dtype)], axis=-1)


def begin(
    transformer: AceStepTransformer1DModel,
    condition_encoder: AceStepConditionEncoder,
    inputs: Inputs[jax.Array],
    *,
    method: Method,
) -> tuple[Fixed, solvers.State]:
    """Compute the values that do not depend on the step, and the state before the first step."""
    frames = inputs.x.shape[1]
    silence = condition_encoder.silence(frames).astype(jnp.float32)
    null = condition_encoder.null_condition_emb[...].astype(inputs.condition.tokens.dtype)

    def branch_keys_values(first: Condition) -> tuple[KeysValues, jax.Array]:
        """Keys, values and lengths of all branches: with the condition, without it, and with text2music's to blend."""
        branches = [first]
        if method.guidance:
            branches.append(Condition(jnp.broadcast_to(null, first.tokens.shape), first.lengths))
        if inputs.plain_condition is not None and method.blend:
            branches.append(inputs.plain_condition)
        tokens, counts = (jnp.concatenate(parts) for parts in zip(*branches, strict=True))
        return transformer.embed_condition(tokens), counts

    changed_to = None if method.blend else inputs.plain_condition  # where partial covers switch
    plain_context = None
    if changed_to is not None:
        everywhere = jnp.ones_like(inputs.silent)
        plain_context = context_latents(inputs.source, silence, everywhere, inputs.mask)
    fixed = Fixed(
        inputs=inputs,
        context=context_latents(inputs.source, silence, inputs.silent, inputs.mask),
        time=transformer.embed_time(inputs.times, inputs.times),
        condition=branch_keys_values(inputs.condition),
        plain_context=plain_context,
        plain_condition=None if changed_to is None else branch_keys_values(changed_to),
        edited=None if inputs.edited is None else branch_keys_values(inputs.edited),
    )
    x = shard(inputs.x, "batch", "sequence", None)
    momentum = jnp.zeros_like(x) if method.guidance == "apg" else jnp.float32(0)
    return fixed, solvers.start(x, (momentum, momentum) if method.edit_draws else momentum)


def advance(
    transformer: AceStepTransformer1DModel,
    fixed: Fixed,
    state: solvers.State,
    i: jax.Array | int,
    *,
    n: int,
    method: Method,
) -> solvers.State:
    """Run steps i to i + n - 1; n is static, i is not. Steps without guidance cost as much as steps with it."""
    inputs, times, scale = fixed.inputs, fixed.inputs.times, fixed.inputs.guidance_scale
    steps = times.shape[0] - 1
    valid = (jnp.arange(inputs.x.shape[1]) < inputs.lengths[:, None])[:, :, None]  # [B, T, 1]

    def branch_velocities(
        x: jax.Array, i: jax.Array, step: jax.Array, condition: tuple[KeysValues, jax.Array]
    ) -> list[jax.Array]:  # [B, T, C] -> R x [B, T, C] float32, at times[i] within a step
        (keys_values, counts), context = condition, fixed.context
        branches = counts.shape[0] // x.shape[0]
        if fixed.plain_condition is not None:
            assert inputs.cover_strength is not None and fixed.plain_context is not None
            plain = step >= jnp.floor(
                steps * inputs.cover_strength + 1e-6
            )  # [B], whether it has switched to text2music
            rows = _tile(plain, branches)
            context = jnp.where(plain[:, None, None], fixed.plain_context, context)
            counts = jnp.where(rows, fixed.plain_condition[1], counts)
            rows = rows[:, None, None, None]  # keys and values are [L, R * B, S, K, H]
            keys_values = jax.tree.map(lambda a, b: jnp.where(rows, b, a), keys_values, fixed.plain_condition[0])
        v = transformer(
            _tile(x, branches),
            TimeEmbedding(*(array[i][None] for array in fixed.time)),
            None,
            keys_values,
            _tile(context, branches),
            lengths=_tile(inputs.lengths, branches),
            encoder_lengths=counts,
        )
        return jnp.split(v.astype(jnp.float32), branches)

    def further(g: Guided) -> tuple[jax.Array, None]:
        """Guide a further evaluation within a step. It does not have APG's momentum, so APG becomes CFG; so does ADG at
        t = 0, where it is undefined. Source: ACE-Step 1.5, base."""
        plain, _ = GUIDANCE["cfg"](g, scale)
        if method.guidance != "adg":
            return plain, None
        turned, _ = GUIDANCE["adg"](g._replace(t=jnp.where(g.t > 0, g.t, 1.0)), scale)
        return jnp.where(g.t > 0, turned, plain), None

    def velocity(
        x: jax.Array,
        i: jax.Array,
        momentum: jax.Array | None,
        condition: tuple[KeysValues, jax.Array] = fixed.condition,
    ) -> tuple[jax.Array, jax.Array | None]:
        step = i if momentum is not None else i - 1  # a further evaluation is at the end of its step
        v, *others = branch_velocities(x, i, step, condition)
        if method.guidance:
            g = Guided(v, others[0], x, times[i], momentum)
            guided, new_momentum = further(g) if momentum is None else GUIDANCE[method.guidance](g, scale)
            v = jnp.where(inputs.guided[i], guided, v)
            if momentum is not None:
                assert new_momentum is not None
                momentum = jnp.where(inputs.guided[i], new_momentum, momentum)
        if inputs.plain_condition is not None and method.blend:
            assert inputs.cover_strength is not None
            weight = inputs.cover_strength[:, None, None]
            v = weight * v + (1 - weight) * others[-1]
        if inputs.velocity_norm is not None:
            norm_v, norm_x = (jnp.linalg.norm(jnp.where(valid, a, 0), axis=(1, 2), keepdims=True) for a in (v, x))
            v = v * jnp.minimum(1.0, inputs.velocity_norm * norm_x / jnp.maximum(norm_v, 1e-10))
        return v, momentum

    def inject(x: jax.Array, i: jax.Array) -> jax.Array:
        if inputs.kept is None:
            return x
        assert inputs.noise is not None and inputs.clean is not None and inputs.injected_steps is not None
        t = solvers.reached(method.solver, times, i)
        source = t * inputs.noise + (1 - t) * inputs.clean
        return jnp.where(inputs.kept[:, :, None] & (i < inputs.injected_steps), source, x)

    def correct(x: jax.Array, x0: jax.Array, i: jax.Array) -> jax.Array:
        assert inputs.dcw is not None
        return dcw.correct(x, jnp.where(valid, x0, x), inputs.dcw[i], method.wavelet)

    if method.edit_draws:
        assert fixed.edited is not None and inputs.clean is not None
        assert inputs.edit_window is not None and inputs.keys is not None
        source = fixed.edited
        return flow_edit.advance(
            lambda x, i, momentum: velocity(x, i, momentum, source),
            velocity,
            state,
            times,
            i,
            n,
            clean=inputs.clean,
            window=inputs.edit_window,
            keys=inputs.keys,
            draws=method.edit_draws,
            ema=inputs.velocity_ema,
        )
    return solvers.advance(
        velocity,
        state,
        times,
        i,
        n,
        solver=method.solver,
        keys=inputs.keys,
        after_step=inject,
        correct=None if inputs.dcw is None else correct,
        ema=inputs.velocity_ema,
        euler_end=method.euler_end,
    )


def finish(fixed: Fixed, state: solvers.State) -> jax.Array:
    """Return the latents, [B, T, C] float32; frames after a song's length are padding."""
    made, clean = fixed.inputs.made, fixed.inputs.clean
    if made is None:
        return state.x
    assert clean is not None
    return made[:, :, None] * state.x + (1 - made[:, :, None]) * clean


def _denoise(
    transformer: AceStepTransformer1DModel,
    condition_encoder: AceStepConditionEncoder,
    inputs: Inputs[jax.Array],
    *,
    method: Method,
) -> jax.Array:
    fixed, state = begin(transformer, condition_encoder, inputs, method=method)
    return finish(fixed, advance(transformer, fixed, state, 0, n=inputs.times.shape[0] - 1, method=method))


denoise = jax.jit(_denoise, static_argnames="method", compiler_options=COMPILER_OPTIONS)
begin_program = jax.jit(begin, static_argnames="method", compiler_options=COMPILER_OPTIONS)
advance_program = jax.jit(
    advance, static_argnames=("n", "method"), donate_argnames="state", compiler_options=COMPILER_OPTIONS
)
finish_program = jax.jit(finish, compiler_options=COMPILER_OPTIONS)


def denoise_in_pieces(
    transformer: AceStepTransformer1DModel,
    condition_encoder: AceStepConditionEncoder,
    inputs: Inputs,
    *,
    method: Method,
    on_step: StepCallback | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[], object] | None = None,
) -> jax.Array:
    """Denoise one step at a time, so that the loop can be watched and stopped; the result is the same as `denoise`'s.

    With several processes, all of them must call this, or all `denoise`: the programs differ.

    Args:
        on_step: called after each step with its index, the time at its beginning and the latents at its end. An
            exception that it raises ends the loop.
        should_stop: called before each step; if it returns true, the loop ends.
        progress: called after each step.

    Raises:
        Cancelled: if `should_stop` returned true.
    """
    steps, longest = len(inputs.times) - 1, int(np.max(inputs.lengths))
    fixed, state = begin_program(transformer, condition_encoder, inputs, method=method)
    for i in range(steps):
        if should_stop is not None and should_stop():
            raise Cancelled(f"stopped before step {i} of {steps}")
        state = advance_program(transformer, fixed, state, np.int32(i), n=1, method=method)
        state.x.block_until_ready()
        if progress is not None:
            progress()
        if on_step is not None:
            on_step(i, float(inputs.times[i]), np.array(on_host(state.x)[:, :longest]))
    return state.x if inputs.made is None else finish_program(fixed, state)


def _tile(x: jax.Array, count: int) -> jax.Array:
    """Return `count` copies along the batch axis."""
    return jnp.concatenate([x] * count) if count > 1 else x
