"""One optimizer step as one compiled program, the same for adapters and for all weights."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from acestep_jax.train.config import AdamConfig, TrainConfig
from acestep_jax.train.objective import Batch, Frozen, draw, stratified_time, velocity_losses
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from acestep_jax.distributed import variable_sharding
from acestep_jax.inputs.programs import COMPILER_OPTIONS
from acestep_jax.models.lora import DropoutKey, without_dropout
from acestep_jax.models.transformer import AceStepTransformer1DModel

# XLA for TPU would cut each product that meets an fsdp axis into a loop over the devices, a permutation at a time. The
# compiler's own estimate of that is 2.6 times the one of products with whole gathered weights.
TPU_OPTIONS = {
    "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false",
}

DECAYING = ("kernel", "lora_a", "lora_b")

Params = dict[str, jax.Array]  # by dotted path


class TrainState(NamedTuple):
    """All that a step changes. Weights and moments are float32."""

    step: jax.Array  # int32, how many were made
    params: Params
    opt_state: optax.OptState
    ema: Params | None


class Metrics(NamedTuple):
    """Of one step."""

    loss: jax.Array  # mean squared error over the valid frames of all its examples
    grad_norm: jax.Array  # before it is limited
    bad_steps: jax.Array  # how many in a row, up to this one, had gradients that are no numbers and were left out
    updates: jax.Array  # made before this step, which those that were left out are not
    t: jax.Array  # [examples]
    errors: jax.Array  # [examples], mean squared error of each
    frames: jax.Array  # valid ones


@dataclasses.dataclass(frozen=True)
class Model:
    """A network in parts: what learns, the keys of dropout, and the rest."""

    graphdef: nnx.GraphDef
    paths: dict[str, tuple]
    shardings: dict[str, Any]  # of what learns
    keys: nnx.State
    frozen: nnx.State
    evaluation: nnx.GraphDef  # without dropout

    @classmethod
    def take_apart(
        cls, transformer: AceStepTransformer1DModel, kind: type[nnx.Variable], mesh: Mesh | None
    ) -> tuple["Model", Params]:
        """`kind`: of the variables that learn, nnx.LoRAParam or nnx.Param."""
        graphdef, params, keys, frozen = nnx.split(transformer, kind, DropoutKey, ...)
        named = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(params)}
        model = cls(
            graphdef,
            {name: path for name, (path, _) in named.items()},
            {name: variable_sharding(variable, mesh) for name, (_, variable) in named.items()},
            keys,
            frozen,
            nnx.split(without_dropout(transformer))[0],
        )
        return model, {name: variable.get_value() for name, (_, variable) in named.items()}

    def merge(self, params: Params, frozen: nnx.State, key: jax.Array | None = None) -> AceStepTransformer1DModel:
        """The transformer with these weights; with dropout from `key`, or none."""
        learnt = nnx.from_flat_state([(path, nnx.Param(params[name])) for name, path in self.paths.items()])
        if key is None:
            return nnx.merge(self.evaluation, learnt, frozen)
        fresh = [
            (path, variable.replace(_keys(jax.random.fold_in(key, i), variable.shape)))
            for i, (path, variable) in enumerate(nnx.to_flat_state(self.keys))
        ]
        return nnx.merge(self.graphdef, learnt, nnx.from_flat_state(fresh), frozen)


def learning_rate(config: AdamConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine to a hundredth of the peak at the last of `steps`."""
    peak = config.learning_rate
    warmup = min(100, steps // 10) if config.warmup_steps is None else config.warmup_steps
    if not warmup:
        return optax.cosine_decay_schedule(peak, steps, 0.01)
    # The first step already learns: a rate of 0 would be a step lost.
    return optax.warmup_cosine_decay_schedule(peak / warmup, peak, warmup, steps, 0.01 * peak)


def make_optimizer(config: AdamConfig, steps: int) -> optax.GradientTransformation:
    """AdamW with clipping; steps whose gradients are not finite change nothing and are counted."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate(config, steps),
            config.beta1,
            config.beta2,
            config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: {name: name.rpartition(".")[2] in DECAYING for name in params},
        ),
    )
    return optax.apply_if_finite(optimizer, max_consecutive_errors=2**30)


def initial_state(
    params: Params, optimizer: optax.GradientTransformation, config: AdamConfig, shardings: TrainState
) -> TrainState:
    """The state before the first step, which takes over the buffers of `params`."""

    def init(params: Params) -> TrainState:
        ema = jax.tree.map(jnp.copy, params) if config.ema_decay else None
        return TrainState(jnp.int32(0), params, optimizer.init(params), ema)

    if jax.process_count() > 1:  # those that were made here and not loaded are the same in every process
        params = {k: v if isinstance(v.sharding, NamedSharding) else np.asarray(v) for k, v in params.items()}
    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)


def state_shardings(
    model: Model, params: Params, optimizer: optax.GradientTransformation, config: AdamConfig
) -> TrainState:
    """Where the leaves of a state live: moments and averages with their weights, counters everywhere."""
    whole = next(iter(model.shardings.values()))
    if isinstance(whole, NamedSharding):
        whole = NamedSharding(whole.mesh, P())
    opt_state = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        model.shardings,
        transform_non_params=lambda _: whole,
    )
    return TrainState(whole, model.shardings, opt_state, model.shardings if config.ema_decay else None)


def batch_sharding(mesh: Mesh | None, leading: int) -> jax.sharding.Sharding:
    """Of batches: rows over data and fsdp, after `leading` axes."""
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, P(*(None,) * leading, ("data", "fsdp")))


def rows_of_process(mesh: Mesh | None, batch_size: int) -> list[int]:
    """The rows of every batch that the devices of this process need."""
    sharding = batch_sharding(mesh, 0)
    rows: set[int] = set()
    for (index,) in sharding.addressable_devices_indices_map((batch_size,)).values():
        rows |= set(range(*index.indices(batch_size)))
    return sorted(rows)


def place(batch: Batch, mesh: Mesh | None, leading: int, rows: list[int], batch_size: int) -> Batch:
    """Host arrays with `rows` alone -> global arrays with all rows of the batch."""
    sharding = batch_sharding(mesh, leading)
    if mesh is None:
        return jax.device_put(batch, sharding)
    where = {row: i for i, row in enumerate(rows)}

    def put(x: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            wanted = [where[row] for row in range(*index[leading].indices(batch_size))]
            return np.take(x, wanted, axis=leading)

        shape = (*x.shape[:leading], batch_size, *x.shape[leading + 1 :])
        return jax.make_array_from_callback(shape, sharding, part)

    return Batch(*map(put, batch))


def make_step(
    model: Model, optimizer: optax.GradientTransformation, config: TrainConfig, shardings: TrainState
) -> Callable[..., Any]:
    """The jitted step: (state, frozen transformer, Frozen, batch [accumulation, B, ...]) -> (state, Metrics).

    Gradients and the number of elements add up over devices and parts before one is divided by the other, so that a
    batch in parts is the batch in one, but for what dropout in adapters drops. The state's buffers are donated.
    """
    step_size = config.examples.batch_size * config.optimizer.accumulation
    example_key, dropout_key = jax.random.split(jax.random.key(config.seed))

    def step(state: TrainState, frozen_transformer: nnx.State, frozen: Frozen, batch: Batch):
        def squared_error(params: Params, part: Batch, key: jax.Array):
            adapter_key, attention_key = jax.random.split(key)
            transformer = model.merge(params, frozen_transformer, adapter_key)
            if not transformer.config.attention_dropout:
                attention_key = None
            draws = draw(part, example_key, step_size, config.objective)
            errors, elements = velocity_losses(transformer, frozen, part, draws, attention_key)
            return errors.sum(), (errors, elements, draws.t)

        def accumulate(gradients: Params, xs):
            i, part = xs
            key = jax.random.fold_in(dropout_key, state.step * config.optimizer.accumulation + i)
            new, sums = jax.grad(squared_error, has_aux=True)(state.params, part, key)
            # Without this, the partitioner may keep whole gradients on every device.
            new = jax.lax.with_sharding_constraint(new, shardings.params)
            return jax.tree.map(jnp.add, gradients, new), sums

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        parts = jnp.arange(config.optimizer.accumulation), batch
        gradients, (errors, elements, t) = jax.lax.scan(accumulate, zeros, parts)
        total = elements.sum()
        gradients = jax.tree.map(lambda g: g / total, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema, decay = state.ema, config.optimizer.ema_decay
        if decay:
            ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)
        metrics = Metrics(
            loss=errors.sum() / total,
            grad_norm=optax.global_norm(gradients),
            bad_steps=opt_state.notfinite_count,
            updates=state.step - state.opt_state.total_notfinite,
            t=t.reshape(-1),
            errors=(errors / jnp.maximum(elements, 1.0)).reshape(-1),
            frames=total / batch.mean.shape[-1],
        )
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    on_tpu = next(iter(shardings.step.device_set)).platform == "tpu"
    options = COMPILER_OPTIONS | (TPU_OPTIONS if on_tpu else {})
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step), compiler_options=options)


VALIDATION_TIMES = 8


def validation_times(config: TrainConfig) -> np.ndarray:
    """[times] float32: the middles of equally likely parts of the logit-normal distribution."""
    quantiles = (np.arange(VALIDATION_TIMES, dtype=np.float32) + 0.5) / VALIDATION_TIMES
    return np.asarray(stratified_time(quantiles, config.objective.timestep_mu, config.objective.timestep_sigma))


def make_evaluation(
    model: Model, config: TrainConfig, shardings: TrainState
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The jitted (params, frozen transformer, Frozen, batch [B, ...]) -> sums over the batch of squared errors and of
    elements at each of `validation_times`, [times] each. Noise depends on the song and the time alone."""
    times = jnp.asarray(validation_times(config))

    def evaluate(params: Params, frozen_transformer: nnx.State, frozen: Frozen, batch: Batch):
        transformer = model.merge(params, frozen_transformer)

        def at(xs):
            i, t = xs
            key = jax.random.fold_in(jax.random.key(0), i)
            t = jnp.full(batch.lengths.shape, t)
            draws = draw(batch, key, 1, config.objective)._replace(t=t, dropped=jnp.zeros(t.shape, bool))
            errors, elements = velocity_losses(transformer, frozen, batch, draws)
            return errors.sum(), elements.sum()

        return jax.lax.map(at, (jnp.arange(VALIDATION_TIMES), times))

    return jax.jit(evaluate, out_shardings=shardings.step, compiler_options=COMPILER_OPTIONS)


def _keys(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.split(key, shape) if shape else key
