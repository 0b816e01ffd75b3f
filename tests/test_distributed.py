"""Meshes, where arrays go on them, and that they change no result."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from acestep_jax import AceStepTransformer1DModel, InputError, TransformerConfig, make_mesh
from acestep_jax.distributed import batch_shards, log_once, partition_spec, shard, state_sharding, variable_sharding
from acestep_jax.io import checkpoint
from acestep_jax.models.attention import attention
from tests.parity import assert_close, normal

CASES = [
    (
        ("batch", "sequence", None),
        (8, 6, 5),
        dict(data=2, fsdp=2, sequence=2),
        P(("data", "fsdp"), ("sequence",), None),
    ),
    (("batch", "sequence", None), (2, 7, 5), dict(data=2, fsdp=2, sequence=2), P(("data",), None, None)),
    (("layers", "embed", "mlp"), (4, 32, 48), dict(fsdp=4, tensor=2), P(None, ("fsdp",), ("tensor",))),
    (("layers", "embed", "heads"), (4, 30, 48), dict(fsdp=4, tensor=2), P(None, None, ("tensor",))),
    (("embed",), (32,), dict(data=8), P(None)),
]


@pytest.mark.unit
@pytest.mark.parametrize("names, shape, axes, expected", CASES)
def test_partition_spec(names, shape, axes, expected):
    """What does not divide is split as far as it does, or replicated."""
    assert partition_spec(names, shape, make_mesh(**axes)) == expected


@pytest.mark.unit
@pytest.mark.parametrize(
    "axes, spec, size, expected",
    [
        (dict(data=2, fsdp=4), P(None, ("fsdp",), ("tensor",)), 16, P(None, ("fsdp", "data"), ("tensor",))),
        (dict(data=2, fsdp=4), P(None, ("fsdp",), None), 12, P(None, ("fsdp",), None)),  # not a multiple of eight
        (dict(data=2, tensor=4), P(None, None, ("tensor",)), 16, P(None, None, ("tensor",))),
        (dict(fsdp=8), P(None, ("fsdp",), None), 16, P(None, ("fsdp",), None)),
    ],
)
def test_a_state_is_split_over_data_as_well(axes, spec, size, expected):
    mesh = make_mesh(**axes)
    assert state_sharding(NamedSharding(mesh, spec), (2, size, 4)).spec == expected


@pytest.mark.unit
@pytest.mark.parametrize(
    "axes, size, expected", [(dict(data=8), 8, 8), (dict(data=2, fsdp=4), 2, 2), (dict(tensor=8), 8, 1)]
)
def test_parts_of_a_batch(axes, size, expected):
    assert batch_shards(size) == 1
    with jax.set_mesh(make_mesh(**axes)):
        assert batch_shards(size) == expected


@pytest.mark.unit
def test_what_does_not_divide_is_told_once(caplog):
    mesh = make_mesh(data=8)
    for _ in range(2):
        partition_spec(("batch",), (13,), mesh)
    assert caplog.messages == ["batch axis of 13 does not divide by the mesh's data: replicated"]


@pytest.mark.unit
def test_mesh_must_fit_the_devices():
    with pytest.raises(InputError, match="data=2, fsdp=1, tensor=2, sequence=1 needs 4 devices, but 8 are present"):
        make_mesh(data=2, tensor=2)


@pytest.mark.unit
def test_shard_without_a_mesh_does_nothing():
    x = jnp.ones((4, 4))
    assert shard(x, "batch", None) is x


def attention_inputs(batch=8, t=64, s=64, heads=8, key_heads=2, padded=True):
    """Queries, keys, values and key lengths."""
    lengths = np.linspace(s, s - 9, batch).astype(np.int32) if padded else None
    q, k, v = (normal(batch, n, h, 8, seed=i) for i, (n, h) in enumerate([(t, heads), (s, key_heads), (s, key_heads)]))
    return q, k, v, lengths


def on_mesh(function, arrays, **axes):
    with jax.set_mesh(make_mesh(**axes)):
        return jax.jit(function)(*arrays)


def attend(window, *arrays):
    *qkv, lengths = arrays
    return attention(*qkv, window=window, key_lengths=lengths)


KINDS = {
    "window": (4, {}),
    "window without padding": (4, dict(padded=False)),
    "full": (None, {}),
    "cross": (None, dict(s=21)),
}
MESHES = [
    dict(data=8),
    dict(fsdp=8),
    dict(tensor=8),
    dict(sequence=8),
    dict(tensor=4, sequence=2),
    dict(data=2, fsdp=2, tensor=2),
    dict(fsdp=2, tensor=2, sequence=2),
]


@functools.cache
def without_mesh(kind):
    window, shapes = KINDS[kind]
    return jax.jit(functools.partial(attend, window))(*attention_inputs(**shapes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_attention_is_the_same_on_a_mesh(axes, kind):
    """Two key heads do not divide by tensor=8 or 4: each device takes the one that its query heads share."""
    window, shapes = KINDS[kind]
    found = on_mesh(functools.partial(attend, window), attention_inputs(**shapes), **axes)
    assert len(found.sharding.device_set) == 8 and not found.sharding.is_fully_replicated
    assert_close(found, without_mesh(kind), 1e-6)


# What does not divide: the mesh, the inputs, the window, and what is logged.
UNEVEN = {
    "query heads": (
        dict(tensor=8),
        dict(heads=4),
        None,
        "heads axis of 4 does not divide by the mesh's tensor: replicated",
    ),
    "key heads": (
        dict(tensor=4, sequence=2),
        dict(heads=12, key_heads=6),
        None,
        "12 query and 6 key heads do not divide by tensor=4: replicated",
    ),
    "window": (
        dict(sequence=8),
        {},
        9,
        "64 tokens on sequence=8 are fewer than the window of 9 each: replicated",
    ),
    "tokens": (
        dict(sequence=8),
        dict(t=60, s=60),
        4,
        "sequence axis of 60 does not divide by the mesh's sequence: replicated",
    ),
    "songs": (
        dict(data=2, fsdp=2, tensor=2),
        dict(batch=3),
        None,
        "batch axis of 3 does not divide by the mesh's data, fsdp: replicated",
    ),
    "half the songs": (
        dict(data=2, fsdp=2, sequence=2),
        dict(batch=2),
        4,
        "batch axis of 2 does not divide by the mesh's data, fsdp: split over data only",
    ),
}


@pytest.mark.parametrize("case", UNEVEN)
def test_attention_that_does_not_divide(case, caplog):
    axes, shapes, window, message = UNEVEN[case]
    log_once.cache_clear()
    arrays, run = attention_inputs(**shapes), functools.partial(attend, window)
    found = on_mesh(run, arrays, **axes)
    assert caplog.messages == [message]
    assert_close(found, jax.jit(run)(*arrays), 1e-6)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("axes", [dict(fsdp=2, tensor=2, sequence=2), dict(tensor=8)], ids=str)
def test_gradients_of_attention_on_a_mesh(axes, window):
    *arrays, lengths = attention_inputs(batch=2, t=16, s=16)
    weights = normal(*arrays[0].shape, seed=3)

    def loss(*arrays):
        return jnp.sum(attend(window, *arrays, lengths) * weights)

    gradients = jax.grad(loss, argnums=(0, 1, 2))
    for found, expected in zip(on_mesh(gradients, arrays, **axes), jax.jit(gradients)(*arrays), strict=True):
        assert_close(found, expected, 1e-6)


def collectives(window, **axes):
    """Of compiled attention whose inputs are split along time: kind and first shape of each."""
    mesh = make_mesh(**axes)
    arrays = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(None, "sequence")))
        for x in attention_inputs()[:3]
    ]
    with jax.set_mesh(mesh):
        text = jax.jit(functools.partial(attention, window=window)).lower(*arrays).compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf" = \(?f32\[([\d,]+)\].*? ({kinds})(?:-start)?\(", text)


@pytest.mark.unit
def test_a_window_needs_only_its_halo():
    """Four keys and four values to either side."""
    assert collectives(4, sequence=8) == [("8,4,2,8", "collective-permute")] * 4


@pytest.mark.unit
def test_full_attention_gathers_keys_and_no_queries():
    assert collectives(None, sequence=8) == [("8,64,2,8", "all-gather")] * 2


TRANSFORMER_MESHES = [
    dict(data=8),
    dict(fsdp=4, tensor=2),
    dict(data=2, tensor=2, sequence=2),
    dict(fsdp=2, tensor=2, sequence=2),
    dict(sequence=8),
    dict(tensor=8),
]
CONFIG = TransformerConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=4,
)


@functools.cache
def transformer():
    """A model, a compiled call of it, its inputs and its velocity without a mesh."""
    model = jax.jit(lambda: AceStepTransformer1DModel(CONFIG, rngs=nnx.Rngs(0)))()
    t = jnp.linspace(0.2, 0.9, 8)
    inputs = normal(8, 96, 64), t, t / 2, normal(8, 6, 32, seed=1), normal(8, 96, 128, seed=2)
    lengths = dict(lengths=np.arange(96, 80, -2, np.int32), encoder_lengths=np.array([6, 5, 4, 3] * 2, np.int32))
    run = jax.jit(lambda model: model(*inputs, **lengths))
    return model, run, run(model)


# Those of one or two axes are parts of those of three; whole songs are made on data, tensor and sequence, see
# `test_same_seed_on_one_device_or_eight`.
@pytest.mark.slow
@pytest.mark.parametrize("axes", TRANSFORMER_MESHES, ids=str)
def test_transformer_is_the_same_on_a_mesh(axes):
    """With padding of latents and condition; also that parameters really are split, and the result too."""
    model, run, expected = transformer()
    mesh = make_mesh(**axes)
    placed = {k: jax.device_put(v[...], variable_sharding(v, mesh)) for k, v in checkpoint.leaves(model).items()}
    kernel = placed["layers.mlp.up_proj.kernel"]
    parts = axes.get("fsdp", 1) * axes.get("tensor", 1)
    assert kernel.addressable_shards[0].data.size == kernel.size // parts
    with jax.set_mesh(mesh):
        found = run(checkpoint.assemble(checkpoint.abstract("transformer", CONFIG), placed))
    assert found.sharding.is_fully_replicated == (axes == dict(tensor=8))
    assert_close(found, expected, 1e-6)
