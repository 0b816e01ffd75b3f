"""The mapping between PyTorch's tensor names and layouts and ours, used in both directions.

The PyTorch side uses diffusers' names. A stacked leaf `layers.REST` stands for `layers.0.REST`, `layers.1.REST`, ...
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Transform = Callable[[np.ndarray], np.ndarray]


class Rule(NamedTuple):
    """A torch name and ours. `*` stands for any module path, empty or ending in a dot, the same on both sides."""

    torch: str
    jax: str
    to_jax: Transform
    to_torch: Transform


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _transpose(x: np.ndarray) -> np.ndarray:
    return x.T


def _permute(*axes: int) -> tuple[Transform, Transform]:
    inverse = tuple(np.argsort(axes))
    return (lambda x: x.transpose(axes)), (lambda x: x.transpose(inverse))


def _upsample_to_jax(w: np.ndarray) -> np.ndarray:
    """Map the kernel 2s of ConvTranspose1d of stride s, [in, out, 2s], to [2, in, s, out], the earlier frame first."""
    inputs, outputs, size = w.shape
    return w.reshape(inputs, outputs, 2, size // 2)[:, :, ::-1].transpose(2, 0, 3, 1)


def _upsample_to_torch(w: np.ndarray) -> np.ndarray:
    _, inputs, stride, outputs = w.shape
    return w.transpose(1, 3, 0, 2)[:, :, ::-1].reshape(inputs, outputs, 2 * stride)


_LINEARS = "gate_proj up_proj down_proj text_projector".split()
_BIASED_LINEARS = (
    "to_q to_k to_v linear_1 linear_2 time_proj condition_embedder audio_acoustic_proj project_in project_out proj_out"
).split()
_NORMS = (
    "norm norm_q norm_k norm_out self_attn_norm cross_attn_norm mlp_norm input_layernorm post_attention_layernorm"
).split()
_PARAMETERS = "scale_shift_table special_token special_tokens null_condition_emb silence_latent".split()

ATTENTION_RULES = (
    *(Rule(f"*{name}.weight", f"*{name}.kernel", _transpose, _transpose) for name in (*_LINEARS, *_BIASED_LINEARS)),
    *(Rule(f"*{name}.bias", f"*{name}.bias", _same, _same) for name in (*_BIASED_LINEARS, "embed_tokens")),
    Rule("*to_out.0.weight", "*to_out.kernel", _transpose, _transpose),
    Rule("*to_out.0.bias", "*to_out.bias", _same, _same),
    *(Rule(f"*{name}.weight", f"*{name}.scale", _same, _same) for name in _NORMS),
    *(Rule(f"*{name}", f"*{name}", _same, _same) for name in _PARAMETERS),
    Rule("proj_in_conv.weight", "proj_in_conv.kernel", *_permute(2, 1, 0)),
    Rule("proj_in_conv.bias", "proj_in_conv.bias", _same, _same),
    Rule("proj_out_conv.weight", "proj_out_conv.kernel", *_permute(0, 2, 1)),
    Rule("proj_out_conv.bias", "proj_out_conv.bias", _same, _same),
)
_LINEAR_EMBEDDING = Rule("*embed_tokens.weight", "*embed_tokens.kernel", _transpose, _transpose)
_TABLE_EMBEDDING = Rule("embed_tokens.weight", "embed_tokens.embedding", _same, _same)
# Weight norm is folded where tensors are read, so these see plain `weight`s.
_AUTOENCODER_RULES = (
    *(Rule(f"*{name}.weight", f"*{name}.kernel", *_permute(2, 1, 0)) for name in ("conv1", "conv2")),
    Rule("*conv_t1.weight", "*conv_t1.kernel", _upsample_to_jax, _upsample_to_torch),
    *(Rule(f"*{name}.bias", f"*{name}.bias", _same, _same) for name in ("conv1", "conv2", "conv_t1")),
    *(
        Rule(f"*{name}", f"*{name}", lambda x: x.reshape(-1), lambda x: x.reshape(1, -1, 1))
        for name in ("alpha", "beta")
    ),
)

RULES: dict[str, tuple[Rule, ...]] = {
    "transformer": ATTENTION_RULES,
    "condition_encoder": (*ATTENTION_RULES, _LINEAR_EMBEDDING),
    "text_encoder": (*ATTENTION_RULES, _TABLE_EMBEDDING),
    "planner": (*ATTENTION_RULES, _TABLE_EMBEDDING),
    "vae": _AUTOENCODER_RULES,
    "audio_tokenizer": (*ATTENTION_RULES, _LINEAR_EMBEDDING),
    "audio_token_detokenizer": (*ATTENTION_RULES, _LINEAR_EMBEDDING),
}


def to_jax(network: str, torch_name: str) -> tuple[str, int | None, Rule]:
    """Return the leaf that a torch tensor belongs to, its row if the leaf is stacked, and the rule between them.

    Raises:
        KeyError: unless exactly one rule matches the name.
    """
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", torch_name)
    row = int(layer[1]) if layer else None
    name = torch_name if row is None else torch_name.replace(f"layers.{row}.", "layers.", 1)
    leaf, rule = _lookup(network, name, "torch", "jax")
    return leaf, row, rule


def to_torch(network: str, leaf: str, shape: tuple[int, ...]) -> tuple[list[str], Rule]:
    """Return the torch names of the rows of a leaf, or the one of a leaf that is not stacked, and the rule."""
    name, rule = _lookup(network, leaf, "jax", "torch")
    if not is_stacked(leaf):
        return [name], rule
    return [re.sub(r"(^|\.)layers\.", rf"\g<1>layers.{i}.", name, count=1) for i in range(shape[0])], rule


def torch_shape(leaf: str, rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the torch tensor that a leaf of `shape`, or each row of a stacked one, comes from."""
    return rule.to_torch(np.broadcast_to(np.float32(0), shape[1:] if is_stacked(leaf) else shape)).shape


def is_stacked(leaf: str) -> bool:
    """Return whether the first axis of a leaf counts layers."""
    return re.search(r"(?:^|\.)layers\.", leaf) is not None


def _lookup(network: str, name: str, source: str, target: str) -> tuple[str, Rule]:
    found = []
    for rule in RULES[network]:
        pattern = re.escape(getattr(rule, source)).replace(r"\*", r"((?:.*\.)?)")
        if match := re.fullmatch(pattern, name):
            prefix = match[1] if match.groups() else ""
            found.append((getattr(rule, target).replace("*", prefix), rule))
    if len(found) != 1:
        raise KeyError(f"{network}: {len(found)} rules match {name!r}")
    return found[0]
