"""One optimizer step as one compiled program: gradient -> clip -> AdamW -> moving average -> counters.

`update` does everything after the gradient, the same for adapters, full weights and the autoencoder. `make_step` is the
step of fine-tuning, `make_evaluation` its validation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from acestep_jax.diffusion import noise
from acestep_jax.distributed import state_sharding, variable_sharding
from acestep_jax.models.kernels.compiler import COMPILER_OPTIONS, training_options
from acestep_jax.models.lora import DropoutKey, without_dropout
from acestep_jax.train.adamw import AdamW, Optimizer, Params, apply
from acestep_jax.train.config import AdamConfig, TrainConfig
from acestep_jax.train.objective import Batch, Frozen, draw, stratified_time, velocity_losses

Shardings = Any  # a `TrainState` of shardings


class TrainState(NamedTuple):
    """All that a step changes. Weights and moments are float32."""

    step: jax.Array  # int32, number of steps so far
    params: Params
    opt_state: Any  # state of `make_optimizer`, with its counters of skipped steps
    ema: Params | None


class Metrics(NamedTuple):
    """The metrics of a step, on the devices."""

    loss: jax.Array
    grad_norm: jax.Array  # before clipping
    bad_steps: jax.Array  # consecutive steps, up to this one, that were skipped because their gradients are non-finite
    updates: jax.Array  # updates before this step, without skipped steps
    frames: jax.Array  # latent frames in the loss
    details: dict[str, jax.Array]  # metrics of only this kind of training


@dataclasses.dataclass(frozen=True)
class Model:
    """A network split into trainable parameters, dropout keys, and the rest."""

    graphdef: nnx.GraphDef
    paths: dict[str, tuple]
    shardings: dict[str, Any]  # of the trainable parameters, as a state has them
    used: dict[str, Any]  # the same, as the network reads them; they differ if whole weights are trained on a mesh
    dtype: jnp.dtype  # of the computation
    keys: nnx.State
    frozen: nnx.State
    evaluation: nnx.GraphDef  # without dropout

    @classmethod
    def split(cls, network: Any, kind: type[nnx.Variable], mesh: Mesh | None) -> tuple["Model", Params]:
        """Split a network; `kind` is the type of its trainable variables, nnx.LoRAParam or nnx.Param."""
        graphdef, params, keys, frozen = nnx.split(network, kind, DropoutKey, ...)
        named = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(params)}
        used = {name: variable_sharding(variable, mesh) for name, (_, variable) in named.items()}
        shardings = used  # adapters are small
        if kind is nnx.Param:
            shardings = {name: state_sharding(used[name], variable.shape) for name, (_, variable) in named.items()}
        model = cls(
            graphdef,
            {name: path for name, (path, _) in named.items()},
            shardings,
            used,
            jnp.dtype(network.runtime.dtype),
            keys,
            frozen,
            nnx.split(without_dropout(network))[0],
        )
        return model, {name: variable.get_value() for name, (_, variable) in named.items()}

    def gathered(self, params: Params) -> Params:
        """Return the weights of a state, split only as the network reads them.

        Those for which that is an exchange are sent in the dtype of the computation, to which each layer casts them
        anyway. Their gradients then have this dtype, too, in which products have computed them.
        """

        def gather(name: str, x: jax.Array) -> jax.Array:
            if self.used[name] == self.shardings[name]:
                return x
            return jax.lax.with_sharding_constraint(x.astype(self.dtype), self.used[name])

        return {name: gather(name, x) for name, x in params.items()}

    def merge(self, params: Params, frozen: nnx.State, key: jax.Array | None = None) -> Any:
        """Return the network with these weights; with dropout from `key`, or without dropout."""
        learnt = nnx.from_flat_state([(path, nnx.Param(params[name])) for name, path in self.paths.items()])
        if key is None:
            return nnx.merge(self.evaluation, learnt, frozen)
        fresh = [
            (path, variable.replace(_keys(jax.random.fold_in(key, i), variable.shape)))
            for i, (path, variable) in enumerate(nnx.to_flat_state(self.keys))
        ]
        return nnx.merge(self.graphdef, learnt, nnx.from_flat_state(fresh), frozen)


def make_optimizer(config: AdamConfig, steps: int) -> Optimizer:
    """Return AdamW with gradient clipping. Steps with non-finite gradients are skipped and counted."""
    return AdamW(config, steps)


def initial_state(params: Params, optimizer: Optimizer, config: AdamConfig, shardings: Shardings) -> TrainState:
    """Return the state before the first step; it takes over the buffers of `params`."""

    def init(params: Params) -> TrainState:
        ema = jax.tree.map(jnp.copy, params) if config.ema_decay else None
        return TrainState(jnp.int32(0), params, optimizer.init(params), ema)

    given: dict[str, Any] = params
    if jax.process_count() > 1:  # parameters initialised here, not loaded, are equal in every process
        given = {k: v if isinstance(v.sharding, NamedSharding) else np.asarray(v) for k, v in params.items()}
    # Only a buffer with the state's sharding can be taken over.
    given = {
        k: jax.device_put(v, shardings.params[k]) if isinstance(getattr(v, "sharding", None), NamedSharding) else v
        for k, v in given.items()
    }
    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(given)


def state_shardings(model: Model, params: Params, optimizer: Optimizer, config: AdamConfig) -> Shardings:
    """Return the sharding of every array of a state: moments and EMA like their weights, counters replicated."""
    first = next(iter(model.shardings.values()))
    whole: Any = NamedSharding(first.mesh, P()) if isinstance(first, NamedSharding) else first
    opt_state = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        model.shardings,
        transform_non_params=lambda _: whole,
    )
    return TrainState(whole, model.shardings, opt_state, model.shardings if config.ema_decay else None)


def update(
    state: TrainState,
    gradients: Params,
    optimizer: Optimizer,
    config: AdamConfig,
    *,
    divisor: jax.Array | float = 1.0,
    loss: jax.Array,
    frames: jax.Array,
    details: dict[str, jax.Array],
) -> tuple[TrainState, Metrics]:
    """Apply gradients / divisor to a state; return the next state and the metrics of the step.

    ema = d ema + (1 - d) params with d = `ema_decay`. If a gradient is non-finite, weights and moments are unchanged.
    """
    params, opt_state, norm = apply(optimizer, gradients, state.opt_state, state.params, divisor)
    ema, decay = state.ema, config.ema_decay
    if decay:
        ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)
    metrics = Metrics(
        loss=loss,
        grad_norm=norm,
        bad_steps=opt_state.notfinite_count,
        updates=state.step - state.opt_state.total_notfinite,
        frames=frames,
        details=details,
    )
    return TrainState(state.step + 1, params, opt_state, ema), metrics


def compiled(step: Callable[..., Any], shardings: Shardings) -> Callable[..., Any]:
    """Return the jitted step: (state, ...) -> (state, Metrics). It donates the buffers of the state."""
    options = training_options(shardings.step.device_set)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step), compiler_options=options)


def batch_sharding(mesh: Mesh | None, leading: int) -> jax.sharding.Sharding:
    """Return the sharding of batches: rows over data and fsdp, after `leading` other axes."""
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, P(*(None,) * leading, ("data", "fsdp")))


def rows_of_process(mesh: Mesh | None, batch_size: int) -> list[int]:
    """Return the rows of each batch that the devices of this process need."""
    indices: dict[Any, Any] = dict(batch_sharding(mesh, 0).addressable_devices_indices_map((batch_size,)))
    rows: set[int] = set()
    for (index,) in indices.values():
        rows |= set(range(*index.indices(batch_size)))
    return sorted(rows)


def place(
    batch: Batch[np.ndarray], mesh: Mesh | None, leading: int, rows: list[int], batch_size: int
) -> Batch[jax.Array]:
    """Place host arrays that hold only `rows`; return global arrays with all rows of the batch."""
    sharding = batch_sharding(mesh, leading)
    if mesh is None:
        placed: Any = jax.device_put(batch, sharding)
        return placed
    where = {row: i for i, row in enumerate(rows)}

    def put(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            wanted = [where[row] for row in range(*index[leading].indices(batch_size))]
            return np.take(x, wanted, axis=leading)

        shape = (*x.shape[:leading], batch_size, *x.shape[leading + 1 :])
        return jax.make_array_from_callback(shape, sharding, part)

    return Batch(*map(put, batch))


def make_step(model: Model, optimizer: Optimizer, config: TrainConfig, shardings: Shardings) -> Callable[..., Any]:
    """Return the jitted step: (state, frozen transformer, Frozen, batch [accumulation, B, ...]) -> (state, Metrics).

    Gradients and element counts are summed over devices and accumulated batches before they are divided, so accumulated
    batches give the same result as one large batch, except for dropout in adapters. The state's buffers are donated.
    `Metrics.details`: t and errors (mean squared error) of each example, [examples] float32.
    """
    step_size = config.examples.batch_size * config.optimizer.accumulation
    example_key, dropout_key = jax.random.split(noise.key(config.seed))

    def step(state: TrainState, frozen_transformer: nnx.State, frozen: Frozen, batch: Batch[jax.Array]):
        def squared_error(params: Params, part: Batch[jax.Array], key: jax.Array):
            adapter_key, attention_key = jax.random.split(key)
            transformer = model.merge(params, frozen_transformer, adapter_key)
            if not transformer.config.attention_dropout:
                attention_key = None
            draws = draw(part, example_key, step_size, config.objective)
            errors, elements = velocity_losses(transformer, frozen, part, draws, attention_key)
            return errors.sum(), (errors, elements, draws.t)

        def differentiate(xs):
            i, part = xs
            key = jax.random.fold_in(dropout_key, state.step * config.optimizer.accumulation + i)
            new, sums = jax.grad(squared_error, has_aux=True)(params, part, key)
            # Without this, the partitioner may keep whole gradients on every device. In two steps, it first sums over
            # fsdp, and sums over data only the parts that are left.
            new = jax.lax.with_sharding_constraint(new, model.used)
            new = jax.tree.map(lambda g, w: g.astype(w.dtype), new, state.params)
            return jax.lax.with_sharding_constraint(new, shardings.params), sums

        def accumulate(gradients: Params, xs):
            new, sums = differentiate(xs)
            return jax.tree.map(jnp.add, gradients, new), sums

        params = model.gathered(state.params)
        parts = jnp.arange(config.optimizer.accumulation), batch
        if config.optimizer.accumulation == 1:  # avoids adding the gradients to zeros
            gradients, sums = differentiate(jax.tree.map(lambda leaf: leaf[0], parts))
            errors, elements, t = jax.tree.map(lambda leaf: leaf[None], sums)
        else:
            zeros = jax.tree.map(jnp.zeros_like, state.params)
            gradients, (errors, elements, t) = jax.lax.scan(accumulate, zeros, parts)
        total = elements.sum()
        details = dict(t=t.reshape(-1), errors=(errors / jnp.maximum(elements, 1.0)).reshape(-1))
        loss, frames = errors.sum() / total, total / batch.mean.shape[-1]
        return update(
            state, gradients, optimizer, config.optimizer, divisor=total, loss=loss, frames=frames, details=details
        )

    return compiled(step, shardings)


VALIDATION_TIMES = 8


def validation_times(config: TrainConfig) -> np.ndarray:
    """Return [times] float32: the medians of equally likely intervals of the logit-normal distribution."""
    quantiles = jnp.asarray((np.arange(VALIDATION_TIMES, dtype=np.float32) + 0.5) / VALIDATION_TIMES)
    return np.asarray(stratified_time(quantiles, config.objective.timestep_mu, config.objective.timestep_sigma))


def make_evaluation(
    model: Model, config: TrainConfig, shardings: Shardings
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Return the jitted (params, frozen transformer, Frozen, batch [B, ...]) -> (squared errors, element counts), sums
    over the batch, at each of `validation_times`, [times] each. The noise depends only on the song and the time."""
    times = jnp.asarray(validation_times(config))

    def evaluate(params: Params, frozen_transformer: nnx.State, frozen: Frozen, batch: Batch[jax.Array]):
        transformer = model.merge(model.gathered(params), frozen_transformer)

        def at(xs):
            i, t = xs
            key = jax.random.fold_in(noise.key(0), i)
            t = jnp.full(batch.lengths.shape, t)
            draws = draw(batch, key, 1, config.objective)._replace(t=t, dropped=jnp.zeros(t.shape, bool))
            errors, elements = velocity_losses(transformer, frozen, batch, draws)
            return errors.sum(), elements.sum()

        return jax.lax.map(at, (jnp.arange(VALIDATION_TIMES), times))

    return jax.jit(evaluate, out_shardings=shardings.step, compiler_options=COMPILER_OPTIONS)


def _keys(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.split(key, shape) if shape else key
