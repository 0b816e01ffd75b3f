"""PyTorch -> native: `python -m convert from-torch SRC DST`."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
from acestep_jax.convert import rules
from acestep_jax.convert.safetensors_writer import write_safetensors
from acestep_jax.convert.torch_checkpoint import (
    Tensor,
    TorchCheckpoint,
    attention_name,
    fold_weight_norm,
    open_checkpoint,
)
from flax import nnx
from tqdm import tqdm

from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint
from acestep_jax.models.config import NetworkConfig, check_dtype

WEIGHT_NORM = "vae_weight_norm.safetensors"


def from_torch(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
) -> None:
    """Converts a checkpoint, a stacked parameter at a time: memory stays near the largest of them.

    Args:
        source, vae, text_encoder: see `open_checkpoint`.
        destination: the folder to make.
        dtype: of all weights; None: each as it is, folded convolutions in float32.

    Raises:
        InputError: see `open_checkpoint` and `plan`; also if `destination` exists. Nothing is written then.
    """
    if dtype is not None:
        check_dtype(dtype, "--dtype")
    checkpoint.check_new(Path(destination))
    opened = open_checkpoint(source, vae=vae, text_encoder=text_encoder, dtype=dtype)
    plans = {name: plan(name, config, opened.tensors[name]) for name, config in opened.configs.items()}
    configs = {name: _with_stored_dtype(config, plans[name]) for name, config in opened.configs.items()}
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
            configs,
            arrays(bar),
            opened.tokenizer,
            opened.tokenizer_config,
            {WEIGHT_NORM: lambda path: _write_weight_norm(path, opened)},
        )


def plan(network: str, config: NetworkConfig, tensors: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Which torch tensors make up each of our parameters, row by row; every tensor and every parameter once.

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
        raise InputError(f"{network}: the tensors do not fit the config; are both of one model?\n  {listing}{more}")
    return {leaf: [tensors[name] for name in names] for leaf, names in leaves.items()}


def build(network: str, config: NetworkConfig, tensors: dict[str, Tensor]) -> nnx.Module:
    """The network with the weights of `tensors`, in memory; raises InputError as `plan` does."""
    leaves = plan(network, config, tensors)
    arrays = {leaf: jnp.asarray(gather(network, leaf, rows)) for leaf, rows in leaves.items()}
    return checkpoint.assemble(checkpoint.abstract(network, config), arrays)


def from_module(network: str, config: NetworkConfig, module: torch.nn.Module) -> nnx.Module:
    """The network with the weights of a torch module of diffusers or transformers; raises InputError as `plan` does."""
    tensors = {key: _tensor(value) for key, value in module.state_dict().items()}
    if network == "text_encoder":
        tensors = {attention_name(key): tensor for key, tensor in tensors.items()}
    if network == "vae":
        tensors = fold_weight_norm(tensors, None)
    return build(network, config, tensors)


def _tensor(value: torch.Tensor) -> Tensor:
    array = value.detach().cpu().numpy()
    return Tensor(array.shape, array.dtype, lambda: array)


def gather(network: str, leaf: str, tensors: list[Tensor]) -> np.ndarray:
    """Reads the tensors of one leaf and puts them in our layout, stacked if there is one for each layer."""
    _, rule = rules.to_torch(network, leaf, (len(tensors),))
    if not rules.is_stacked(leaf):
        return np.ascontiguousarray(rule.to_jax(tensors[0].read()))
    first = rule.to_jax(tensors[0].read())
    stacked = np.empty((len(tensors), *first.shape), np.result_type(*(tensor.dtype for tensor in tensors)))
    stacked[0] = first
    for row, tensor in enumerate(tensors[1:], start=1):
        stacked[row] = rule.to_jax(tensor.read())
    return stacked


def _with_stored_dtype(config: NetworkConfig, leaves: dict[str, list[Tensor]]) -> NetworkConfig:
    """A network computes, unless told otherwise, in the dtype that most of its weights are stored in."""
    sizes: Counter[str] = Counter()
    for tensors in leaves.values():
        for tensor in tensors:
            sizes[tensor.dtype.name] += int(np.prod(tensor.shape))
    dtype = sizes.most_common(1)[0][0]
    return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def _write_weight_norm(path: Path, opened: TorchCheckpoint) -> None:
    """Keeps the factors of the folded convolutions for `to-torch`, so that the way back can be bit-exact."""
    write_safetensors(path, [(name, t.shape, t.dtype, t.read) for name, t in opened.weight_norm.items()])
