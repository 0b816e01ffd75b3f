"""One optimizer step against the same step in torch, and what a step promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import AceStepTransformer1DModel as TorchTransformer
from flax import nnx
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict

from acestep_jax import make_mesh
from acestep_jax.convert.from_torch import from_module
from acestep_jax.io import checkpoint
from acestep_jax.models.config import LoRAConfig
from acestep_jax.models.lora import add_lora
from acestep_jax.models.transformer import AceStepTransformer1DModel
from acestep_jax.train import adamw
from acestep_jax.train import step as steps
from acestep_jax.train.objective import freeze
from tests import objective_programs as programs
from tests.parity import as_torch, assert_close, normal, relative_error
from tests.training import random_batch, settings

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "gate_proj", "up_proj", "down_proj"]
LORA = dict(rank=4, alpha=6.0, dropout=0.0, targets=("to_.*", "gate_proj", "up_proj", "down_proj"))
SGD_RATE, ADAM_RATE, CLIP, DECAY = 1e-3, 1e-4, 0.5, 5.0  # so much decay that it is seen in one step


@pytest.fixture(scope="module")
def configs(tiny):
    return checkpoint.read_manifest(tiny[1]).configs


@pytest.fixture(scope="module")
def frozen(tiny):
    names = ["condition_encoder", "audio_tokenizer", "audio_token_detokenizer"]
    embedding = checkpoint.load(tiny[1], names=["text_encoder"])["text_encoder"].embed_tokens.embedding[...]
    return freeze(checkpoint.load(tiny[1], names=names), embedding, 750)


@pytest.fixture(scope="module")
def without_covers(frozen):
    """Without the audio tokenizer, which takes half of the time that a step takes to compile."""
    return frozen._replace(audio_tokenizer=None, audio_token_detokenizer=None)


@pytest.fixture(scope="module")
def full_step(tiny):
    """Return the step of all weights with AdamW and moving averages, for two parts of two songs, compiled once."""
    return prepare(load_transformers(tiny)[1], FULL)[1]


def config(**changes):
    plain = dict(optimizer__learning_rate=ADAM_RATE, optimizer__warmup_steps=0, optimizer__weight_decay=DECAY)
    plain |= dict(optimizer__max_grad_norm=CLIP, steps=1000)
    return settings("data", "checkpoint", "run", **plain | changes)


FULL = config(method="full", optimizer__ema_decay=0.75)


def prepare(transformer, config, optimizer=None, mesh=None):
    """The model in parts, the jitted step, and the first state."""
    kind = nnx.LoRAParam if config.method == "lora" else nnx.Param
    model, params = steps.Model.split(transformer, kind, mesh)
    optimizer = optimizer or steps.make_optimizer(config.optimizer, config.steps)
    shardings = steps.state_shardings(model, params, optimizer, config.optimizer)
    state = steps.initial_state(params, optimizer, config.optimizer, shardings)
    return model, steps.make_step(model, optimizer, config, shardings), state


def parts(configs, count, tasks=3, **options):
    """Batches of a step, leaves [count, B, ...]; songs of different lengths and the first so many of the tasks."""
    kinds = [(i % tasks, (i + 1) % tasks) for i in range(count)]
    made = [random_batch(configs, tasks=kinds[i], first_number=2 * i, **options) for i in range(count)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *made)


def torch_loss(theirs, frozen, batch, config):
    """The loss of a step with our noise, times and conditions, each song alone and without padding."""
    example_key, _ = jax.random.split(jax.random.key(config.seed))
    step_size = config.examples.batch_size * config.optimizer.accumulation
    total, elements = 0.0, 0
    for part in (type(batch)(*leaves) for leaves in zip(*batch, strict=True)):
        draws = programs.draw(part, example_key, step_size, config.objective)
        condition, condition_lengths = programs.encode(frozen, part, draws.dropped)
        context = programs.context(frozen, part, draws.x0)
        for j, length in enumerate(part.lengths):
            t = draws.t[j : j + 1]
            noise, x0 = draws.noise[j : j + 1, :length], draws.x0[j : j + 1, :length]
            inputs = (
                t[:, None, None] * noise + (1 - t[:, None, None]) * x0,
                t,
                t,
                condition[j : j + 1, : condition_lengths[j]],
                context[j : j + 1, :length],
            )
            found = theirs(*(as_torch(np.array(x)) for x in inputs), return_dict=False)[0]
            error = (found - as_torch(np.array(noise - x0))) ** 2
            total, elements = total + error.sum(), elements + error.numel()
    return total / elements


def norm_error(ours, theirs):
    """By norm: Adam divides gradients by their size, so that one that is rounding alone makes a whole step."""
    theirs = np.asarray(theirs, np.float64)
    return np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)


def load_transformers(tiny):
    theirs = TorchTransformer.from_pretrained(tiny[0], subfolder="transformer").train()
    return theirs, from_module("transformer", checkpoint.read_manifest(tiny[1]).configs["transformer"], theirs)


OPTIMIZERS = {
    "sgd": (
        lambda: optax.apply_if_finite(optax.sgd(SGD_RATE), 9),
        lambda groups: torch.optim.SGD(groups, lr=SGD_RATE, weight_decay=0.0),
        False,
    ),
    "adamw": (lambda: None, lambda groups: torch.optim.AdamW(groups, lr=ADAM_RATE), True),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "adamw")) for name in OPTIMIZERS]
)
def test_full_step_matches_torch(tiny, configs, frozen, without_covers, full_step, name):
    """Two parts of two songs of different lengths: the loss to 1e-5, every weight after the step to 1e-4."""
    make, make_theirs, clips = OPTIMIZERS[name]
    theirs, ours = load_transformers(tiny)
    settings = FULL
    frozen = frozen if name == "sgd" else without_covers
    model, step, state = prepare(ours, settings, make())
    step = step if name == "sgd" else full_step
    batch = parts(configs, 2, tasks=3 if name == "sgd" else 2)
    before = {k: np.asarray(v) for k, v in state.params.items()}
    loss = torch_loss(theirs, frozen, batch, settings)

    decaying = [p for n, p in theirs.named_parameters() if n.endswith("weight") and p.ndim > 1]
    others = [p for n, p in theirs.named_parameters() if not (n.endswith("weight") and p.ndim > 1)]
    groups = [dict(params=decaying, weight_decay=DECAY if clips else 0.0), dict(params=others, weight_decay=0.0)]
    optimizer = make_theirs(groups)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP if clips else torch.inf)
    optimizer.step()

    state, metrics = step(state, model.frozen, frozen, batch)
    assert abs(float(metrics.loss) / loss.item() - 1) <= 1e-5
    assert abs(float(metrics.grad_norm) / norm.item() - 1) <= 1e-4
    assert norm.item() > 2 * CLIP  # so that the limit acts
    expected = checkpoint.leaves(from_module("transformer", configs["transformer"], theirs))
    assert state.params.keys() == expected.keys()
    for leaf, variable in expected.items():
        ours, value = np.asarray(state.params[leaf]), np.asarray(variable[...])
        moved = value - before[leaf]
        assert np.abs(moved).max() > 0, leaf
        assert norm_error(ours, value) <= 1e-4, leaf
        if name == "sgd":  # the gradient itself
            assert relative_error(ours - before[leaf], moved) <= 1e-3, leaf
        assert norm_error(ours - before[leaf], moved) <= 0.1, leaf


def inject_lora(theirs, use_dora=False):
    """PEFT's adapters with random factors."""
    lora = LoraConfig(
        r=LORA["rank"], lora_alpha=LORA["alpha"], lora_dropout=0.0, target_modules=TARGETS, use_dora=use_dora
    )
    theirs.requires_grad_(False)
    inject_adapter_in_model(lora, theirs)
    generator = torch.Generator().manual_seed(1)
    for name, value in theirs.named_parameters():
        if "lora_B" in name:
            value.data.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return theirs


def adapter_leaves(theirs):
    """PEFT's parameters as our leaves."""
    found = {}
    for key, value in get_peft_model_state_dict(theirs).items():
        _, row, rest = key.split(".", 2)
        name = f"layers.{rest.replace('to_out.0', 'to_out').replace('.weight', '')}"
        name = name.replace("lora_A", "lora_a").replace("lora_B", "lora_b")
        name = name.replace("lora_magnitude_vector", "lora_magnitude")
        array = value.detach().numpy()
        found.setdefault(name, {})[int(row)] = array.T if array.ndim == 2 else array
    return {name: np.stack([rows[i] for i in sorted(rows)]) for name, rows in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OPTIMIZERS, "dora"])
def test_lora_step_matches_peft(tiny, configs, without_covers, name):
    """PEFT on the diffusers model: the loss to 1e-5, every factor after the step to 1e-4."""
    make, make_theirs, clips = OPTIMIZERS["adamw" if name == "dora" else name]
    theirs, ours = load_transformers(tiny)
    theirs = inject_lora(theirs, use_dora=name == "dora")
    settings = config(lora=LoRAConfig(**LORA, use_dora=name == "dora"))
    ours = add_lora(ours, settings.lora, rngs=nnx.Rngs(0))
    model, step, state = prepare(ours, settings, make())
    before = adapter_leaves(theirs)
    assert before.keys() == state.params.keys()
    state = state._replace(params={k: jnp.asarray(v) for k, v in before.items()})
    batch = parts(configs, 2, tasks=2)

    loss = torch_loss(theirs, without_covers, batch, settings)
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    still = [p for n, p in trained.items() if "magnitude" in n]
    decaying = [p for n, p in trained.items() if "magnitude" not in n]
    groups = [dict(params=decaying, weight_decay=DECAY if clips else 0.0), dict(params=still, weight_decay=0.0)]
    optimizer = make_theirs([group for group in groups if group["params"]])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(list(trained.values()), CLIP if clips else torch.inf)
    optimizer.step()

    state, metrics = step(state, model.frozen, without_covers, batch)
    assert abs(float(metrics.loss) / loss.item() - 1) <= 1e-5
    for leaf, value in adapter_leaves(theirs).items():
        ours = np.asarray(state.params[leaf])
        assert np.abs(value - before[leaf]).max() > 0, leaf
        assert norm_error(ours, value) <= 1e-4, leaf
        if name == "sgd":
            assert relative_error(ours - before[leaf], value - before[leaf]) <= 1e-3, leaf
        assert norm_error(ours - before[leaf], value - before[leaf]) <= 0.1, leaf


def run_steps(transformer, frozen, configs, settings, count, mesh=None, *, accumulation, size, optimizer=None):
    """Weights and losses after some steps, all on one mesh or without; with covers if `frozen` has their networks."""
    covers = frozen.audio_tokenizer is not None
    model, step, state = prepare(transformer, settings, optimizer, mesh)
    losses = []
    rows = steps.rows_of_process(mesh, size)
    for i in range(count):
        tasks = (0, 1, 2 if covers else 1, 0)
        batch = random_batch(configs, lengths=(61, 37, 50, 44), tasks=tasks, first_number=4 * i, text_tokens=7)
        batch = jax.tree.map(lambda x: x.reshape(accumulation, size, *x.shape[1:]), batch)
        state, metrics = step(state, model.frozen, frozen, steps.place(batch, mesh, 1, rows, size))
        losses.append(float(metrics.loss))
    return state, losses


@pytest.mark.slow
def test_parts_of_a_batch_are_the_batch(tiny, configs, without_covers):
    """Four songs at once, in two parts or in four; lengths differ, so that a mean of means would be another.

    By default `test_full_step_matches_torch` has a step of two parts.
    """
    results = []
    for accumulation in (1, 4):
        _, ours = load_transformers(tiny)
        size = 4 // accumulation
        changes = dict(optimizer__accumulation=accumulation, examples__batch_size=size, method="full")
        run = functools.partial(run_steps, optimizer=optax.apply_if_finite(optax.sgd(SGD_RATE), 9))
        results.append(run(ours, without_covers, configs, config(**changes), 2, accumulation=accumulation, size=size))
    for state, losses in results[1:]:
        np.testing.assert_allclose(losses, results[0][1], rtol=1e-5)
        for leaf, value in results[0][0].params.items():
            assert_close(state.params[leaf], value, 1e-4)


# Every axis that splits weights or the batch at once.
MESHES = [dict(data=2, fsdp=2, tensor=2)]


# Adapters by default, of every kind of layer: what their factors learn is made of the gradients of the weights.
@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_meshes_train_as_one_device(tiny, configs, frozen, without_covers, method):
    """Some steps on eight devices against one."""
    count = 10 if method == "full" else 4
    frozen = frozen if method == "full" else without_covers  # half the time to compile
    targets = ("self_attn.to_q", "cross_attn.to_v", "to_out", "up_proj", "condition_embedder")
    changes = dict(method=method, lora=LoRAConfig(rank=4, alpha=8.0, dropout=0.2, targets=targets))
    changes |= dict(optimizer__accumulation=1, examples__batch_size=4, optimizer__ema_decay=0.9)
    settings = config(**changes, optimizer__learning_rate=1e-4)

    def make(mesh):
        (transformer,) = checkpoint.load(tiny[1], names=["transformer"], mesh=mesh).values()
        if method == "lora":
            transformer = add_lora(transformer, settings.lora, rngs=nnx.Rngs(0))
        return transformer

    alone, losses = run_steps(make(None), frozen, configs, settings, count, accumulation=1, size=4)
    for axes in MESHES:
        mesh = make_mesh(**axes)
        with jax.set_mesh(mesh):
            everywhere = jax.device_put(frozen, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
            state, found = run_steps(make(mesh), everywhere, configs, settings, count, mesh, accumulation=1, size=4)
        np.testing.assert_allclose(found, losses, rtol=1e-5)
        for ours, theirs in ((state.params, alone.params), (state.ema, alone.ema)):
            for leaf, value in theirs.items():
                assert norm_error(ours[leaf], value) <= 1e-5, leaf
        if axes.get("fsdp", 1) > 1:
            leaf = "layers.self_attn.to_q." + ("lora_a" if method == "lora" else "kernel")
            moments = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, dict))
            arrays = [state.params, state.ema, *(m for m in moments if isinstance(m, dict) and leaf in m)]
            assert len(arrays) == 4
            for tree in arrays:
                parts = axes["fsdp"] * (axes["data"] if method == "full" else 1)
                assert tree[leaf].sharding.shard_shape(tree[leaf].shape)[1] == tree[leaf].shape[1] // parts


def test_dropout_differs_by_step_and_layer_and_not_in_evaluation(tiny):
    (transformer,) = checkpoint.load(tiny[1], names=["transformer"]).values()
    lora = LoRAConfig(rank=4, alpha=8.0, dropout=0.5)
    model, params = steps.Model.split(add_lora(transformer, lora, rngs=nnx.Rngs(0)), nnx.LoRAParam, None)
    keys = lambda key: model.merge(params, model.frozen, key).layers.self_attn.to_q.dropout_key[...]  # noqa: E731
    first, again, other = keys(jax.random.key(0)), keys(jax.random.key(0)), keys(jax.random.key(1))
    assert len({tuple(row) for row in np.asarray(jax.random.key_data(first))}) == len(first) > 1
    assert (first == again).all() and not (first == other).any()
    assert model.merge(params, model.frozen).layers.self_attn.to_q.dropout_key is None


@pytest.mark.slow
def test_attention_dropout_is_in_the_step(configs, without_covers):
    settings, draws = config(optimizer__accumulation=1, method="full"), []
    for rate in (0.0, 0.5):
        values = dataclasses.replace(configs["transformer"], attention_dropout=rate)
        network = jax.jit(lambda values=values: AceStepTransformer1DModel(values, rngs=nnx.Rngs(0)))()
        model, step, state = prepare(network, settings)
        program = step.trace(state, model.frozen, without_covers, parts(configs, 1, tasks=2)).jaxpr
        draws.append(str(program).count("random_bits["))
    assert draws[0] < draws[1]


@pytest.mark.slow
def test_a_bad_step_changes_nothing(tiny, configs, without_covers):
    """A song that is no number: its step is left out and counted, and the next one learns again."""
    _, ours = load_transformers(tiny)
    settings = config(optimizer__accumulation=1, optimizer__ema_decay=0.75, method="full")
    model, step, state = prepare(ours, settings)
    good = parts(configs, 1, tasks=2)
    bad = good._replace(mean=np.where(np.arange(2)[None, :, None, None] == 1, np.nan, good.mean).astype(np.float32))
    state, metrics = step(state, model.frozen, without_covers, good)
    before = {k: np.asarray(v) for k, v in state.params.items()}
    for count in (1, 2):
        state, metrics = step(state, model.frozen, without_covers, bad)
        assert int(metrics.bad_steps) == count and not np.isfinite(metrics.loss)
    assert all(np.array_equal(state.params[k], v) for k, v in before.items())
    state, metrics = step(state, model.frozen, without_covers, good)
    assert int(metrics.bad_steps) == 0 and int(state.step) == 4
    assert any(not np.array_equal(state.params[k], v) for k, v in before.items())


def test_average_of_the_weights(tiny, configs, without_covers, full_step):
    model, _, state = prepare(load_transformers(tiny)[1], FULL)
    average = {k: np.asarray(v) for k, v in state.params.items()}
    for _ in range(3):
        state, _ = full_step(state, model.frozen, without_covers, parts(configs, 2, tasks=2))
        average = {k: 0.75 * v + 0.25 * np.asarray(state.params[k]) for k, v in average.items()}
    for leaf, value in average.items():
        np.testing.assert_allclose(state.ema[leaf], value, rtol=1e-5, atol=1e-7)
        if leaf.endswith("kernel"):
            assert not np.allclose(state.params[leaf], value, rtol=1e-5, atol=1e-7)


# By default the dtypes of a step, which is not compiled.
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_half_precision_base_keeps_float32_trainables(tiny, configs, compiled):
    """What learns and its moments are float32 over bfloat16 weights, and small updates are not rounded away."""
    (transformer,) = checkpoint.load(tiny[1], dtype="bfloat16", names=["transformer"]).values()
    half = lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x  # noqa: E731
    networks = checkpoint.load(tiny[1], dtype="bfloat16", names=["condition_encoder"])
    embedding = checkpoint.load(tiny[1], names=["text_encoder"])["text_encoder"].embed_tokens.embedding[...]
    frozen = freeze(networks, half(embedding), 750)
    settings = config(optimizer__learning_rate=1e-6, optimizer__accumulation=1)
    model, step, state = prepare(add_lora(transformer, settings.lora, rngs=nnx.Rngs(0)), settings)
    before = {k: np.asarray(v) for k, v in state.params.items()}
    run = step if compiled else functools.partial(jax.eval_shape, step)
    state, metrics = run(state, model.frozen, frozen, parts(configs, 1, tasks=2))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert moments and {leaf.dtype.name for leaf in (*moments, *state.params.values())} == {"float32"}
    assert metrics.loss.dtype == jnp.float32
    if compiled:
        assert np.isfinite(metrics.loss)
        assert all(np.abs(state.params[k] - v).max() > 0 for k, v in before.items() if k.endswith("lora_b"))
    assert {v.dtype.name for _, v in nnx.to_flat_state(model.frozen) if v.ndim > 1} == {"bfloat16"}


@pytest.mark.slow
def test_gathered_weights_are_only_read_in_half_precision(tiny):
    """So that a mesh may send them rounded: forward and gradient are the same, bit for bit."""
    options: dict = dict(dtype="bfloat16", param_dtype="float32", names=["transformer"])
    (transformer,) = checkpoint.load(tiny[1], **options).values()
    model, params = steps.Model.split(transformer, nnx.Param, make_mesh(data=2, fsdp=2, tensor=2))
    sent = [name for name in params if model.used[name] != model.shardings[name]]
    assert {"layers.mlp.up_proj.kernel", "time_embed.time_proj.kernel", "proj_out_conv.kernel"} <= set(sent)
    config, t = transformer.config, jnp.full(2, 0.5)
    channels = config.audio_acoustic_hidden_dim
    x, context = normal(2, 6, channels, seed=1), normal(2, 6, config.in_channels - channels, seed=2)
    condition = normal(2, 5, config.encoder_hidden_size or config.hidden_size, seed=3)

    def squares(params):
        return jnp.square(model.merge(params, model.frozen)(x, t, t, condition, context).astype(jnp.float32)).sum()

    # Otherwise XLA for CPUs would leave out the rounding where it computes in float32.
    run = jax.jit(jax.value_and_grad(squares), compiler_options={"xla_allow_excess_precision": False})
    value, slopes = run(params)
    other, others = run({name: x.astype(jnp.bfloat16) if name in sent else x for name, x in params.items()})
    assert value == other
    for name, slope in slopes.items():
        np.testing.assert_array_equal(slope, others[name].astype(jnp.float32), err_msg=name)


@pytest.mark.parametrize("warmup, steps_", [(100, 2000), (0, 10), (None, 50)])
def test_learning_rate(warmup, steps_):
    """Linear to the peak, then a cosine to a hundredth of it; the first step learns already."""
    optimizer = dataclasses.replace(config().optimizer, warmup_steps=warmup, learning_rate=1e-3)
    rate = np.array([float(adamw.learning_rate(optimizer, steps_)(i)) for i in range(steps_ + 1)])
    warmup = 5 if warmup is None else warmup
    assert rate[0] > 0 and abs(rate[warmup] - 1e-3) < 1e-9 and abs(rate[-1] - 1e-5) < 1e-9
    assert (np.diff(rate[:warmup]) > 0).all() and (np.diff(rate[warmup:]) < 0).all()
    middle = (warmup + steps_) // 2
    assert abs(rate[middle] - (1e-3 + 1e-5) / 2) < 3e-5
