"""What the parity tests share: the same weights in both frameworks, and one measure of the difference.

PyTorch is imported where it is needed, so that unit tests take `normal` and `assert_close` from here without it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.io import checkpoint
from acestep_jax.models.runtime import Runtime

DIFFUSERS = dict(compat="diffusers")  # what every comparison of songs with diffusers' needs


def make_pair(name, theirs, config, seed=0):
    """Randomise the torch network; return it and ours, loaded by the converter's own rules."""
    from acestep_jax.convert.random_checkpoint import randomise

    theirs = randomise(theirs, seed).eval()
    return theirs, convert(name, theirs, config)


def convert(name, theirs, config, **runtime):
    """Return our network called `name` with the weights of `theirs`."""
    from acestep_jax.convert.from_torch import from_module

    return from_module(name, config, theirs, Runtime(**runtime))


def normal(*shape, seed=0):
    """Return a standard normal float32 array of this shape, the same for the same seed and shape."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def run_torch(network, *inputs, **keywords):
    """Call a torch network on NumPy inputs without gradients; return a NumPy array, or a tuple of them."""
    import torch

    with torch.no_grad():
        out = network(*map(as_torch, inputs), **{k: as_torch(v) for k, v in keywords.items()})
    return tuple(o.numpy() for o in out) if isinstance(out, tuple) else out.numpy()


def as_torch(value):
    """Return a tensor that shares the memory of a NumPy array, and any other value as it is."""
    import torch

    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def run_jax(network, *inputs, method="__call__", **static):
    """Call a method of one of our networks, compiled as a program of weights and inputs, once for all tests: not
    for code that a test has patched."""
    return _compiled(method, tuple(static.items()))(network, inputs)


@functools.cache
def _compiled(method, static):
    return jax.jit(lambda network, inputs: getattr(network, method)(*inputs, **dict(static)))


def random_network(name, config, runtime=None, seed=0):
    """Return our network called `name` with random weights drawn by NumPy: compiling its own initialisers takes as long
    as compiling its forward pass. Activations stay near one, and no norm is one and no bias zero.
    """
    network = checkpoint.abstract(name, config, runtime or Runtime())

    def drawn(i, leaf, variable):
        value = normal(*variable.shape, seed=1000 * seed + i)
        kind = leaf.rpartition(".")[2]
        if kind == "kernel":
            value /= np.sqrt(np.prod(variable.shape[leaf.startswith("layers.") : -1]))
        elif kind in ("scale", "bias"):
            value = (kind == "scale") + 0.1 * value
        else:
            value /= np.sqrt(variable.shape[-1])
        return jnp.asarray(value, variable.dtype)

    return checkpoint.assemble(
        network, {leaf: drawn(i, leaf, v) for i, (leaf, v) in enumerate(checkpoint.leaves(network).items())}
    )


def relative_error(ours, reference):
    """Return max |ours - reference| / max |reference|, computed in double precision."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    assert np.isfinite(reference).all() and np.abs(reference).max() > 0
    return np.abs(ours - reference).max() / np.abs(reference).max()


def assert_close(ours, reference, limit=1e-5):
    """Fail where the relative error is above a limit, or not a number."""
    error = relative_error(ours, reference)
    assert error <= limit, f"relative error {error:.2e} > {limit:.0e}"
