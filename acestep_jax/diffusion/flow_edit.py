"""FlowEdit: change a song by the difference of two velocities, for the text that describes it and for the wanted text.

With z the edited latents, s the source's, and new noise n for each step and each of `draws`:

    s_t = (1 - t) s + t n,  z_t = z + s_t - s
    z  <- z + (t' - t) mean(v_wanted(z_t, t) - v_source(s_t, t))       steps lo, ..., hi - 1
    x   = z + s_t - s at step hi, and then  x <- x + (t' - t) v_wanted(x, t)

Steps before lo are left out. With hi = N the result is z. Guidance has a momentum for each of the two; a step advances
it by the mean over its draws. Source: Kulikov et al., arXiv 2412.08629, as ACE-Step 1.5 uses it
(`acestep/models/common/flow_edit.py`).
"""

import jax
import jax.numpy as jnp

from acestep_jax.diffusion.solvers import State, Velocity, blend


def advance(
    source: Velocity,
    wanted: Velocity,
    state: State,
    times: jax.Array,
    i: jax.Array | int,
    n: int,
    *,
    clean: jax.Array,
    window: jax.Array,
    keys: jax.Array,
    draws: int = 1,
    ema: jax.Array | None = None,
) -> State:
    """Run steps i to i + n - 1 as one scan. x of the state is z, or x from step hi on.

    Args:
        source, wanted: (x, i, momentum) -> (v, momentum) at time times[i].
        state: its momentum is a pair, for both velocities in this order; `past` contains their last values.
        times: [N + 1] float32, strictly decreasing.
        i: the first step; may be traced.
        n: the number of steps, static.
        clean: [B, T, C], the source's latents s.
        window: [2] int32, lo and hi.
        keys: [B], one for each song. The noise of a frame does not depend on T.
        draws: the number of noises in a step, static.
        ema: fraction of the previous step's velocity in each velocity; None: 0.
    """
    low, high = window[0], window[1]

    def noised(i: jax.Array, draw: int) -> jax.Array:
        fold = jax.vmap(jax.random.fold_in, (0, None))
        noise = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:], jnp.float32))(fold(fold(keys, i), draw))
        return (1 - times[i]) * clean + times[i] * noise

    def smooth(v: jax.Array, before: jax.Array, i: jax.Array) -> jax.Array:
        return v if ema is None else jnp.where(i == low, v, blend(v, before, ema))

    def edit(state: State, i: jax.Array) -> State:
        found = []
        for draw in range(draws):
            s = noised(i, draw)
            found.append((source(s, i, state.momentum[0]), wanted(state.x + s - clean, i, state.momentum[1])))
        (v_source, m_source), (v_wanted, m_wanted) = jax.tree.map(lambda *values: sum(values) / draws, *found)
        v_source, v_wanted = smooth(v_source, state.past[0], i), smooth(v_wanted, state.past[1], i)
        x = state.x + (times[i + 1] - times[i]) * (v_wanted - v_source)
        return State(x, (m_source, m_wanted), (v_source, v_wanted))

    def follow(state: State, i: jax.Array) -> State:
        x = jnp.where(i == high, state.x + noised(i, 0) - clean, state.x)
        v, momentum = wanted(x, i, state.momentum[1])
        v = smooth(v, state.past[1], i)
        return State(x + (times[i + 1] - times[i]) * v, (state.momentum[0], momentum), (state.past[0], v))

    def step(state: State, i: jax.Array) -> tuple[State, None]:
        part = jnp.where(i < low, 0, jnp.where(i < high, 1, 2))
        return jax.lax.switch(part, [lambda state, i: state, edit, follow], state, i), None

    return jax.lax.scan(step, state, i + jnp.arange(n))[0]


def window(n_min: float, n_max: float, steps: int) -> tuple[int, int]:
    """Return the steps lo and hi for the fractions `flow_edit_n_min` and `flow_edit_n_max`."""
    return int(steps * n_min + 1e-9), int(steps * n_max + 1e-9)
