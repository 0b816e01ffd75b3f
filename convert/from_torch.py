"""Conversion of PyTorch modules to ours, in memory; `acestep_jax.io.conversion` converts checkpoints."""

import torch
from flax import nnx

from acestep_jax.io.conversion import build, from_torch
from acestep_jax.io.original import attention_name
from acestep_jax.io.planner_files import planner_names
from acestep_jax.io.pretrained import fold_weight_norm
from acestep_jax.io.safetensors_reader import Tensor
from acestep_jax.models.config import NetworkConfig
from acestep_jax.models.registry import PLANNER
from acestep_jax.models.runtime import DEFAULT_RUNTIME, Runtime

__all__ = ["from_module", "from_torch"]


def from_module(
    network: str, config: NetworkConfig, module: torch.nn.Module, runtime: Runtime = DEFAULT_RUNTIME
) -> nnx.Module:
    """Return our network with the weights of a diffusers or transformers module; raise InputError as `plan` does."""
    tensors = {key: _tensor(value) for key, value in module.state_dict().items()}
    if network == "text_encoder":
        tensors = {attention_name(key): tensor for key, tensor in tensors.items()}
    if network == PLANNER:
        tensors = planner_names(tensors)
    if network == "vae":
        tensors = fold_weight_norm(tensors, None)
    return build(network, config, tensors, runtime)


def _tensor(value: torch.Tensor) -> Tensor:
    array = value.detach().cpu().numpy()
    return Tensor(array.shape, array.dtype, lambda: array)
