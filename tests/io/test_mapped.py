"""Arrays read from mapped files against Orbax's own reading."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from acestep_jax.io import checkpoint, mapped

WEIGHTS = checkpoint.SMALL_MODEL / checkpoint.WEIGHTS


def targets(sharding, dtype=None):
    stored = checkpoint.stored_leaves(checkpoint.SMALL_MODEL)
    names = [name for name in stored if name.startswith("vae.")]
    return {
        name: jax.ShapeDtypeStruct(stored[name].shape, dtype or stored[name].dtype, sharding=sharding) for name in names
    }


@pytest.mark.unit
def test_arrays_are_those_that_orbax_reads():
    wanted = targets(checkpoint.host_sharding())
    assert mapped.is_mapped(WEIGHTS, wanted.values())
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        expected = dict(checkpoint.flatten(ocp.load(WEIGHTS, checkpoint.nest(wanted))))
    found = dict(mapped.read(WEIGHTS, wanted))
    assert list(found) == list(wanted)
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype and value.sharding == wanted[name].sharding
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.unit
def test_arrays_are_cast():
    wanted, half = targets(checkpoint.host_sharding()), targets(checkpoint.host_sharding(), jnp.bfloat16)
    exact = dict(mapped.read(WEIGHTS, wanted))
    for name, value in mapped.read(WEIGHTS, half):
        np.testing.assert_array_equal(value, exact[name].astype(jnp.bfloat16), err_msg=name)


@pytest.mark.unit
def test_memory_is_aligned_so_that_jax_takes_it_as_it_is():
    for shape in [(3,), (5, 7), ()]:
        array = mapped._empty(shape, np.dtype(np.float32))
        assert array.shape == shape and array.ctypes.data % mapped.ALIGNMENT == 0
    large = mapped._empty((1 << 20,), np.dtype(np.float32))
    large[:] = 1
    assert jax.device_put(large, checkpoint.host_sharding()).unsafe_buffer_pointer() == large.ctypes.data


@pytest.mark.unit
def test_other_places_and_formats_are_left_to_orbax(tmp_path):
    wanted = targets(checkpoint.host_sharding())
    assert not mapped.is_mapped(tmp_path, wanted.values())
    sharded = jax.NamedSharding(jax.make_mesh((8,), ("tensor",)), jax.P())
    assert not mapped.is_mapped(WEIGHTS, targets(sharded).values())
