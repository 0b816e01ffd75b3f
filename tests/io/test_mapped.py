"""Arrays read from mapped files against Orbax's own reading."""

import sys

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


@pytest.fixture
def weights(tmp_path):
    """Return a checkpoint as `save` writes large arrays: uncompressed, the first of each file at its beginning."""
    arrays = {
        "net.a": np.arange(4800.0, dtype=np.float32).reshape(60, 80),
        "net.b": np.arange(500, dtype=np.int32),
        "net.c": np.array(3, np.int8),
    }
    context = ocp.Context()
    context.array.saving.use_compression = False
    with context:
        for names in (["net.a"], ["net.b", "net.c"]):
            ocp.partial.save(tmp_path / "weights", checkpoint.nest({name: arrays[name] for name in names}))
        ocp.partial.finalize(tmp_path / "weights")
    return tmp_path / "weights", arrays


def wanted_of(arrays):
    host = checkpoint.host_sharding()
    return {name: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=host) for name, x in arrays.items()}


@pytest.mark.unit
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_arrays_lie_where_they_are_stored(weights):
    path, arrays = weights
    views = mapped._views(path / mapped.STATE, wanted_of(arrays))
    assert set(views) == {"net.a", "net.b"}  # what is smaller than a kilobyte lies within the tree
    found = dict(mapped.read(path, wanted_of(arrays)))
    mapped.release()
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value)
        assert (name in views) == is_mapped(found[name])
    donated = jax.jit(lambda x: x + 1, donate_argnums=0)(found["net.a"])
    np.testing.assert_array_equal(donated, arrays["net.a"] + 1)
    np.testing.assert_array_equal(views["net.a"], arrays["net.a"])  # which is not written to


def is_mapped(array):
    """Return whether an array lies in a mapped file of a checkpoint."""
    address = array.unsafe_buffer_pointer()
    with open("/proc/self/maps") as file:
        areas = [line.split() for line in file if "/ocdbt.process_" in line]
    return any(first <= address < last for first, last in ([int(x, 16) for x in a[0].split("-")] for a in areas))


@pytest.mark.unit
def test_shapes_are_those_that_orbax_reads(weights):
    path, arrays = weights
    assert {name: (x.shape, x.dtype) for name, x in mapped.stored(path).items()} == {
        name: (np.shape(x), np.asarray(x).dtype) for name, x in arrays.items()
    }
    tree = dict(checkpoint.flatten(ocp.metadata(WEIGHTS).metadata))
    found = mapped.stored(WEIGHTS)
    assert {name: (x.shape, x.dtype) for name, x in tree.items()} == {
        name: (x.shape, x.dtype) for name, x in found.items()
    }


@pytest.mark.unit
def test_what_is_damaged_is_an_error(weights):
    path, arrays = weights
    for file in path.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:100])
    assert mapped.stored(path) is None
    with pytest.raises(ValueError):
        dict(mapped.read(path, wanted_of(arrays)))


@pytest.mark.unit
def test_another_shape_is_an_error(weights):
    path, arrays = weights
    other = jax.ShapeDtypeStruct((80, 60), np.float32, sharding=checkpoint.host_sharding())
    with pytest.raises(ValueError, match=r"net.a: expected shape \(80, 60\), found \(60, 80\)"):
        dict(mapped.read(path, {"net.a": other}))


@pytest.mark.unit
def test_other_places_and_formats_are_left_to_orbax(tmp_path):
    wanted = targets(checkpoint.host_sharding())
    assert not mapped.is_mapped(tmp_path, wanted.values())
    sharded = jax.NamedSharding(jax.make_mesh((8,), ("tensor",)), jax.P())
    assert not mapped.is_mapped(WEIGHTS, targets(sharded).values())
