"""Meshes and where arrays go on them."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from acestep_jax import AceStepTransformer1DModel, InputError, TransformerConfig, checkpoint, make_mesh
from acestep_jax.sharding import partition_spec, shard, variable_sharding
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


@pytest.mark.parametrize("names, shape, axes, expected", CASES)
def test_partition_spec(names, shape, axes, expected):
    """What does not divide is split as far as it does, or replicated."""
    assert partition_spec(names, shape, make_mesh(**axes)) == expected


def test_what_does_not_divide_is_told_once(caplog):
    mesh = make_mesh(data=8)
    for _ in range(2):
        partition_spec(("batch",), (13,), mesh)
    assert caplog.messages == ["batch axis of 13 does not divide by the mesh's data: replicated"]


def test_mesh_must_fit_the_devices():
    with pytest.raises(InputError, match="data=2, fsdp=1, tensor=2, sequence=1 needs 4 devices, but 8 are present"):
        make_mesh(data=2, tensor=2)


def test_shard_without_a_mesh_does_nothing():
    x = jnp.ones((4, 4))
    assert shard(x, "batch", None) is x


@pytest.mark.parametrize("axes", [dict(data=8), dict(fsdp=4, tensor=2), dict(data=2, tensor=2, sequence=2)])
def test_transformer_is_the_same_on_a_mesh(axes):
    """Also that parameters really are split, and the result too."""
    config = TransformerConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
    )
    model = AceStepTransformer1DModel(config, rngs=nnx.Rngs(0))
    t = jnp.linspace(0.2, 0.9, 8)
    inputs = normal(8, 96, 64), t, t / 2, normal(8, 6, 32, seed=1), normal(8, 96, 128, seed=2)
    run = jax.jit(lambda model, *inputs: model(*inputs))
    expected = run(model, *inputs)
    mesh = make_mesh(**axes)
    placed = {k: jax.device_put(v[...], variable_sharding(v, mesh)) for k, v in checkpoint.leaves(model).items()}
    kernel = placed["layers.mlp.up_proj.kernel"]
    parts = axes.get("fsdp", 1) * axes.get("tensor", 1)
    assert kernel.addressable_shards[0].data.size == kernel.size // parts
    with jax.set_mesh(mesh):
        found = run(checkpoint.assemble(checkpoint.abstract("transformer", config), placed), *inputs)
    assert not found.sharding.is_fully_replicated
    assert_close(found, expected, 1e-6)
