"""ComfyUI's weights: all networks in one file, or a file for each; their names, and configs inferred from the shapes.

One file: `model.diffusion_model.` before the original names of the transformer and its encoders, `vae.` and
`text_encoders.qwen3_06b.transformer.`; the 5 Hz language model (`text_encoders.qwen3_2b.` or `qwen3_4b.`) is left out.
Separate files have the names without these prefixes. There is no config.json, so sizes come from the shapes of the
tensors, and other values (window, rotary base, levels of the quantiser) are those of all published models.
"""

import re
from collections.abc import Mapping
from typing import Any

from acestep_jax.errors import InputError
from acestep_jax.io import original
from acestep_jax.io.original import attention_name
from acestep_jax.io.safetensors_reader import Tensor
from acestep_jax.models.config import AutoencoderConfig, NetworkConfig, TextEncoderConfig

MODEL, VAE, TEXT_ENCODER, PLANNER = "model", "vae", "text_encoder", "planner"
# Folders of ComfyUI, and of the repository of split files, by part; and the files that belong to ACE-Step 1.5.
FOLDERS = {MODEL: "diffusion_models", VAE: "vae", TEXT_ENCODER: "text_encoders"}
FILES = {VAE: "ace_1.5_vae.safetensors", TEXT_ENCODER: "qwen_0.6b_ace15.safetensors"}
_PREFIXES = {
    "model.diffusion_model.": MODEL,
    "diffusion_model.": MODEL,
    "first_stage_model.": VAE,
    "vae.": VAE,
    "text_encoders.qwen3_06b.transformer.": TEXT_ENCODER,
    "cond_stage_model.qwen3_06b.transformer.": TEXT_ENCODER,
    "text_encoders.": PLANNER,
    "cond_stage_model.": PLANNER,
}
_VARIANT = re.compile(r"(?:^|[^a-z])(turbo|base|sft)(?=[^a-z]|$)")


def parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a file by part, without prefixes and without missing parts.

    The 5 Hz language model is a part only if there are no others. The result is empty for any other file.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is not None:
            found.setdefault(_PREFIXES[prefix], {})[name.removeprefix(prefix)] = tensor
    if found:
        if len(found) > 1:
            found.pop(PLANNER, None)
        return found
    names = tensors.keys()
    if "null_condition_emb" in names or any(name.startswith("decoder.layers.0.cross_attn.") for name in names):
        return {MODEL: dict(tensors)}
    if any(re.match(r"decoder\.(layers\.\d+|block\.\d+|conv1)\.", name) for name in names):
        return {VAE: dict(tensors)}
    embedding = tensors.get("model.embed_tokens.weight", tensors.get("embed_tokens.weight"))
    if embedding is not None:
        return {PLANNER if embedding.shape[0] > original.MOST_TOKENS else TEXT_ENCODER: dict(tensors)}
    return {}


def find_variant(name: str, given: str | None) -> str:
    """Return turbo, base or sft: the given variant, or the one in the name of a file.

    Raises:
        InputError: if there is neither, because the tensors do not tell the variant.
    """
    stem = (given or name).lower()
    found = set(_VARIANT.findall(stem))
    if len(found) != 1:
        problem = f"variant: expected turbo, base or sft, found {given!r}" if given else f"{name}: of which variant?"
        raise InputError(f"{problem}; give variant (--variant) turbo, base or sft, which the weights do not tell")
    return found.pop()


def model_config(tensors: Mapping[str, Tensor], variant: str, source: str) -> dict[str, NetworkConfig]:
    """Return the configs of the networks in a diffusion model with original names.

    Raises:
        InputError: if a tensor that determines a size is missing.
    """
    size = _Sizes(tensors, source)
    attention = "decoder.layers.0.self_attn"
    head = size("decoder.layers.0.self_attn.q_norm.weight", 0)
    values: dict[str, Any] = {
        "hidden_size": size(f"{attention}.q_proj.weight", 1),
        "intermediate_size": size("decoder.layers.0.mlp.gate_proj.weight", 0),
        "num_attention_heads": size(f"{attention}.q_proj.weight", 0) // head,
        "num_key_value_heads": size(f"{attention}.k_proj.weight", 0) // head,
        "head_dim": head,
        "attention_bias": f"{attention}.q_proj.bias" in tensors,
        "num_hidden_layers": size.depth("decoder"),
        "in_channels": size("decoder.proj_in.1.weight", 1),
        "patch_size": size("decoder.proj_in.1.weight", 2),
        "audio_acoustic_hidden_dim": size("decoder.proj_out.1.weight", 1),
        "is_turbo": variant == "turbo",
        "model_version": variant,
    }
    lyric = "encoder.lyric_encoder"
    values |= {
        "encoder_hidden_size": size(f"{lyric}.layers.0.self_attn.q_proj.weight", 1),
        "encoder_intermediate_size": size(f"{lyric}.layers.0.mlp.gate_proj.weight", 0),
        "encoder_num_attention_heads": size(f"{lyric}.layers.0.self_attn.q_proj.weight", 0) // head,
        "encoder_num_key_value_heads": size(f"{lyric}.layers.0.self_attn.k_proj.weight", 0) // head,
        "text_hidden_dim": size("encoder.text_projector.weight", 1),
        "timbre_hidden_dim": size("encoder.timbre_encoder.embed_tokens.weight", 1),
        "num_lyric_encoder_hidden_layers": size.depth(lyric),
        "num_timbre_encoder_hidden_layers": size.depth("encoder.timbre_encoder"),
        "pool_window_size": size("detokenizer.special_tokens", 1),
        "num_attention_pooler_hidden_layers": size.depth("tokenizer.attention_pooler"),
        "fsq_dim": size("tokenizer.quantizer.project_in.weight", 1),
    }
    return original.split_config(values, source)


def text_encoder_config(tensors: Mapping[str, Tensor], source: str) -> NetworkConfig:
    """Return the config of a text encoder, whose tensors have names as in Qwen3Model, see `text_encoder_names`."""
    size = _Sizes(tensors, source)
    head = size("layers.0.self_attn.norm_q.weight", 0)
    return TextEncoderConfig(
        vocab_size=size("embed_tokens.weight", 0),
        hidden_size=size("embed_tokens.weight", 1),
        intermediate_size=size("layers.0.mlp.gate_proj.weight", 0),
        num_hidden_layers=size.depth(""),
        num_attention_heads=size("layers.0.self_attn.to_q.weight", 0) // head,
        num_key_value_heads=size("layers.0.self_attn.to_k.weight", 0) // head,
        head_dim=head,
    )


def vae_config(tensors: Mapping[str, Tensor], source: str) -> NetworkConfig:
    """Return the config of an autoencoder with diffusers' names."""
    size = _Sizes(tensors, source)
    blocks = size.depth("encoder", "block")

    def convolution(name: str, axis: int) -> int:
        return size(f"{name}.weight_v" if f"{name}.weight_v" in tensors else f"{name}.weight", axis)

    channels = convolution("encoder.conv1", 0)
    return AutoencoderConfig(
        encoder_hidden_size=convolution("encoder.conv2", 0),
        encoder_channels=None if channels == convolution("encoder.conv2", 0) else channels,
        downsampling_ratios=tuple(convolution(f"encoder.block.{i}.conv1", 2) // 2 for i in range(blocks)),
        channel_multiples=tuple(convolution(f"encoder.block.{i}.conv1", 0) // channels for i in range(blocks)),
        decoder_channels=convolution("decoder.conv2", 1),
        decoder_input_channels=convolution("decoder.conv1", 1),
        audio_channels=convolution("encoder.conv1", 1),
    )


def text_encoder_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a text encoder under diffusers' names of attention, without what a language model and CLIP add to it."""
    unused = ("lm_head.weight", "logit_scale", "text_projection", "text_projection.weight")
    names = {name: name.removeprefix("model.") for name in tensors if name not in unused}
    return {attention_name(name): tensors[old] for old, name in names.items()}


def vae_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an autoencoder from Stable Audio's names, which ComfyUI uses, to diffusers'; leave others unchanged.

    There, encoder and decoder are sequences: a convolution, the blocks, a snake activation and a convolution. A block
    is a sequence too, with the residual units first in the encoder and last in the decoder.
    """
    last = max((int(found[1]) for name in tensors if (found := re.match(r"decoder\.layers\.(\d+)\.", name))), default=0)
    if not last:
        return dict(tensors)
    outer = {0: "conv1", last - 1: "snake1", last: "conv2"} | {i: f"block.{i - 1}" for i in range(1, last - 1)}
    inner = {
        "encoder": {0: "res_unit1", 1: "res_unit2", 2: "res_unit3", 3: "snake1", 4: "conv1"},
        "decoder": {0: "snake1", 1: "conv_t1", 2: "res_unit1", 3: "res_unit2", 4: "res_unit3"},
    }
    unit = {0: "snake1", 1: "conv1", 2: "snake2", 3: "conv2"}
    found = {}
    for name, tensor in tensors.items():
        half, *numbers = name.split(".layers.")
        path, rest = [half], ""
        for level, part in zip((outer, inner.get(half, {}), unit), numbers, strict=False):
            number, _, rest = part.partition(".")
            path.append(level.get(int(number), part) if number.isdigit() else part)
        # Newer versions of PyTorch have other names for the two factors of weight norm.
        rest = rest.replace("parametrizations.weight.original0", "weight_g")
        rest = rest.replace("parametrizations.weight.original1", "weight_v")
        if rest in ("alpha", "beta") and len(tensor.shape) == 1:
            tensor = Tensor(
                (1, *tensor.shape, 1), tensor.dtype, lambda t=tensor: t.read().reshape(1, -1, 1), tensor.file
            )
        found[".".join((*path, rest))] = tensor
    return found


class _Sizes:
    """Reads sizes from the shapes of tensors."""

    def __init__(self, tensors: Mapping[str, Tensor], source: str):
        self.tensors, self.source = tensors, source

    def __call__(self, name: str, axis: int) -> int:
        if name not in self.tensors or len(self.tensors[name].shape) <= axis:
            raise InputError(
                f"{self.source}: no {name} of the expected shape; this is not ACE-Step 1.5, or a part of it"
            )
        return self.tensors[name].shape[axis]

    def depth(self, module: str, stack: str = "layers") -> int:
        pattern = re.compile(rf"{re.escape(f'{module}.' if module else '')}{stack}\.(\d+)\.")
        return 1 + max((int(found[1]) for name in self.tensors if (found := pattern.match(name))), default=0)
