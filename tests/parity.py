"""What the parity tests share: the same weights in both frameworks, and one measure of the difference."""

import jax
import numpy as np
import torch
from acestep_jax.convert.from_torch import from_module
from acestep_jax.convert.random_checkpoint import randomise


def make_pair(name, theirs, config, seed=0):
    """Randomises the torch network and returns it with ours, loaded by the converter's own rules."""
    theirs = randomise(theirs, seed).eval()
    return theirs, convert(name, theirs, config)


def convert(name, theirs, config):
    """Our network called `name` with the weights of `theirs`."""
    return from_module(name, config, theirs)


def normal(*shape, seed=0):
    """A float32 array that both frameworks are given."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def run_torch(network, *inputs, **keywords):
    """Calls a torch network without gradients on NumPy inputs; a first output if there are several."""
    with torch.no_grad():
        out = network(*map(as_torch, inputs), **{k: as_torch(v) for k, v in keywords.items()})
    return tuple(o.numpy() for o in out) if isinstance(out, tuple) else out.numpy()


def as_torch(value):
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def run_jax(network, *inputs, method="__call__", **static):
    """Calls one of our networks, compiled, as a program of weights and inputs."""
    return jax.jit(lambda network, inputs: getattr(network, method)(*inputs, **static))(network, inputs)


def relative_error(ours, reference):
    """max |ours - reference| / max |reference|."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    assert np.isfinite(reference).all() and np.abs(reference).max() > 0
    return np.abs(ours - reference).max() / np.abs(reference).max()


def assert_close(ours, reference, limit=1e-5):
    error = relative_error(ours, reference)
    assert error <= limit, f"relative error {error:.2e} > {limit:.0e}"
