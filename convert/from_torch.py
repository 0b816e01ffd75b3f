"""PyTorch checkpoint to native checkpoint: `acestep-jax convert from-torch SRC DST`."""

import math
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from tqdm import tqdm

from acestep_jax.convert import rules
from acestep_jax.convert.safetensors_writer import write_safetensors
from acestep_jax.convert.torch_checkpoint import (
    Tensor,
    TorchCheckpoint,
    attention_name,
    fold_weight_norm,
    open_checkpoint,
)
from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint
from acestep_jax.models.config import DEFAULT_RUNTIME, NetworkConfig, Runtime, check_dtype

WEIGHT_NORM = "vae_weight_norm.safetensors"


def from_torch(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
) -> None:
    """Convert a checkpoint one stacked parameter at a time, so that peak memory stays near the largest of them.

    Args:
        source, vae, text_encoder: see `open_checkpoint`.
        destination: the folder to create.
        dtype: what all weights are cast to; None keeps the dtype of each, and folded convolutions are float32.

    Raises:
        InputError: see `open_checkpoint` and `plan`; also if `destination` exists. Nothing is written in these cases.
    """
    if dtype is not None:
        check_dtype(dtype, "--dtype")
    checkpoint.check_new(Path(destination))
    opened = open_checkpoint(source, vae=vae, text_encoder=text_encoder, dtype=dtype)
    plans = {name: plan(name, config, opened.tensors[name]) for name, config in opened.configs.items()}
    total = sum(len(tensors) for plan in plans.values() for tensors in plan.values())

    def arrays(bar: tqdm) -> Iterator[tuple[str, np.ndarray]]:
        for name, leaves in plans.items():
            bar.set_description(name)
            for leaf, tensors in leaves.items():
                yield f"{name}.{leaf}", gather(name, leaf, tensors)
                bar.update(len(tensors))

    with tqdm(total=total, unit="tensor", disable=None) as bar:
        checkpoint.save(
            destination,
            opened.configs,
            arrays(bar),
            opened.tokenizer,
            opened.tokenizer_config,
            {WEIGHT_NORM: lambda path: _write_weight_norm(path, opened)},
            size=sum(_bytes(tensor) for plan in plans.values() for tensors in plan.values() for tensor in tensors),
        )


def plan(network: str, config: NetworkConfig, tensors: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Return the torch tensors that make up each of our parameters, row by row; each is used exactly once.

    Raises:
        InputError: naming the tensors that are missing, unexpected or of the wrong shape.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    leaves: dict[str, list[str]] = {}
    for leaf, whole in checkpoint.leaf_shapes(network, config).items():
        names, rule = rules.to_torch(network, leaf, whole.shape)
        leaves[leaf] = names
        wanted |= dict.fromkeys(names, rules.torch_shape(leaf, rule, whole.shape))
    problems = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in tensors]
    problems += [f"unexpected: {name} {list(t.shape)}" for name, t in tensors.items() if name not in wanted]
    problems += [
        f"misshapen: {name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        listing = "\n  ".join(problems[:8])
        raise InputError(
            f"{network}: the tensors do not match the config; check that both are of the same model\n  {listing}{more}"
        )
    return {leaf: [tensors[name] for name in names] for leaf, names in leaves.items()}


def build(
    network: str, config: NetworkConfig, tensors: dict[str, Tensor], runtime: Runtime = DEFAULT_RUNTIME
) -> nnx.Module:
    """Return the network with the weights of `tensors`, in memory; raise InputError as `plan` does."""
    leaves = plan(network, config, tensors)
    arrays = {leaf: jnp.asarray(gather(network, leaf, rows)) for leaf, rows in leaves.items()}
    return checkpoint.assemble(checkpoint.abstract(network, config, runtime), arrays)


def from_module(
    network: str, config: NetworkConfig, module: torch.nn.Module, runtime: Runtime = DEFAULT_RUNTIME
) -> nnx.Module:
    """Return the network with the weights of a module of diffusers or transformers; raise InputError as `plan` does."""
    tensors = {key: _tensor(value) for key, value in module.state_dict().items()}
    if network == "text_encoder":
        tensors = {attention_name(key): tensor for key, tensor in tensors.items()}
    if network == "vae":
        tensors = fold_weight_norm(tensors, None)
    return build(network, config, tensors, runtime)


def _tensor(value: torch.Tensor) -> Tensor:
    array = value.detach().cpu().numpy()
    return Tensor(array.shape, array.dtype, lambda: array)


def gather(network: str, leaf: str, tensors: list[Tensor]) -> np.ndarray:
    """Read the tensors of one parameter and return it in our layout, stacked if there is one tensor for each layer."""
    _, rule = rules.to_torch(network, leaf, (len(tensors),))
    if not rules.is_stacked(leaf):
        return np.ascontiguousarray(rule.to_jax(tensors[0].read()))
    first = rule.to_jax(tensors[0].read())
    stacked = np.empty((len(tensors), *first.shape), np.result_type(*(tensor.dtype for tensor in tensors)))
    stacked[0] = first
    for row, tensor in enumerate(tensors[1:], start=1):
        stacked[row] = rule.to_jax(tensor.read())
    return stacked


def _bytes(tensor: Tensor) -> int:
    """Return the size of a tensor in memory."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _write_weight_norm(path: Path, opened: TorchCheckpoint) -> None:
    """Write the factors of the folded convolutions, so that `to-torch` can restore them bit for bit."""
    write_safetensors(path, [(name, t.shape, t.dtype, t.read) for name, t in opened.weight_norm.items()])
