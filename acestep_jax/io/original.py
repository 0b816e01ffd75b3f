"""The layout in which ACE-Step publishes its models: folders, config and tensor names.

`decoder` is the transformer, `encoder` the condition encoder; one `config.json` describes all but the autoencoder
and the text encoder. See also diffusers' `scripts/convert_ace_step_to_diffusers.py`.
"""

import dataclasses
import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

from acestep_jax.errors import InputError
from acestep_jax.models.config import (
    LAYER_TYPES,
    AttentionConfig,
    AudioTokenDetokenizerConfig,
    AudioTokenizerConfig,
    ConditionEncoderConfig,
    NetworkConfig,
    TransformerConfig,
)

VAE, TEXT_ENCODER = "vae", "Qwen3-Embedding-0.6B"
MODEL_PREFIX = "acestep-v15-"
OWNER = "ACE-Step/"
REPOSITORY = f"{OWNER}Ace-Step1.5"  # turbo, the autoencoder, the text encoder and a planner
# The repository of each variant's transformer, as `acestep/model_downloader.py` of https://github.com/ace-step/ACE-Step-1.5
# has them (`MAIN_MODEL_REPO`, `SUBMODEL_REGISTRY`).
VARIANTS = MappingProxyType(
    {"turbo": REPOSITORY}
    | {
        name: f"{OWNER}{MODEL_PREFIX}{name}"
        for name in "base sft turbo-shift1 turbo-shift3 turbo-continuous xl-base xl-sft xl-turbo".split()
    }
)
MOST_TOKENS = 152_000  # bound of Qwen3's vocabulary size; the 5 Hz language model adds 64000 audio codes to it

PREFIXES = {
    "decoder.": "transformer",
    "encoder.": "condition_encoder",
    "tokenizer.": "audio_tokenizer",
    "detokenizer.": "audio_token_detokenizer",
}
# (diffusers, original), as parts of a name that end in a dot.
_ATTENTION_NAMES = (
    ("to_q.", "q_proj."),
    ("to_k.", "k_proj."),
    ("to_v.", "v_proj."),
    ("to_out.0.", "o_proj."),
    ("norm_q.", "q_norm."),
    ("norm_k.", "k_norm."),
)
_PATCH_NAMES = (("proj_in_conv.", "proj_in.1."), ("proj_out_conv.", "proj_out.1."))

# The encoders fall back to the transformer's size; tokenizer and detokenizer are as large as the encoders.
_ENCODER_KEYS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
_SHARED_KEYS = "head_dim rope_theta attention_bias attention_dropout rms_norm_eps sliding_window".split()
# Settings of training and of the application, and what transformers records about itself.
_IGNORED = frozenset(
    "architectures auto_map bos_token_id data_proportion dtype eos_token_id hidden_act initializer_range "
    "max_position_embeddings model_type num_audio_decoder_hidden_layers pad_token_id "
    "rope_parameters rope_scaling tie_word_embeddings timbre_fix_frame timestep_mu timestep_sigma torch_dtype "
    "transformers_version use_cache use_sliding_window vocab_size".split()
)


def find_folders(
    source: Path, vae: str | Path | None, text_encoder: str | Path | None, variant: str | None = None
) -> tuple[Path, Path, Path]:
    """Return the folders of the model, the autoencoder and the text encoder.

    Args:
        source: the model's folder, or the one that holds it and the other two.
        vae, text_encoder: their folders; None: the ones next to the model's.
        variant: which of several models, see `names_variant`.

    Raises:
        InputError: if there is no model or more than one, or no autoencoder or text encoder.
    """

    def is_model(folder: Path) -> bool:
        return (folder / "config.json").is_file() and (folder / "silence_latent.pt").is_file()

    if not is_model(source):
        models = sorted(folder for folder in source.iterdir() if folder.is_dir() and is_model(folder))
        if len(models) > 1:
            names = ", ".join(str(folder) for folder in models)
            models = [folder for folder in models if variant is not None and names_variant(folder.name, variant)]
            if len(models) != 1:
                which = "" if variant is None else f" none of them the variant {variant};"
                raise InputError(f"{source}: holds several models;{which} name one of {names}, or give variant")
        if not models:
            raise InputError(
                f"{source}: not a PyTorch checkpoint; expected model_index.json (diffusers) or config.json, "
                "model.safetensors and silence_latent.pt (original)"
            )
        source = models[0]
    found = []
    for given, name, option in ((vae, VAE, "--vae"), (text_encoder, TEXT_ENCODER, "--text-encoder")):
        folder = Path(given) if given is not None else source.absolute().parent / name
        if not folder.is_dir():
            raise InputError(
                f"{folder}: no such folder; take {name} from the hub's repository ACE-Step/Ace-Step1.5 and put it "
                f"there, or convert with acestep-jax convert from-torch {option} DIR"
            )
        found.append(folder)
    return source, found[0], found[1]


def split_config(values: dict[str, Any], source: str) -> dict[str, NetworkConfig]:
    """Return the config of each network from the one of the original layout; raise InputError on an unknown key."""
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    if values.get("hidden_act", "silu") != "silu":
        raise InputError(f"{source}: hidden_act: expected 'silu', found {values['hidden_act']!r}")
    rope, scaling = values.get("rope_parameters") or {}, values.get("rope_scaling")
    if scaling is not None or rope.get("rope_type", "default") != "default":
        raise InputError(f"{source}: scaled rotary embeddings are not supported, found {scaling or rope}")
    if "rope_theta" in rope:
        values.setdefault("rope_theta", rope["rope_theta"])
    if not values.get("use_sliding_window", True):
        raise InputError(f"{source}: use_sliding_window: expected true; name full layers in layer_types instead")
    used: set[str] = set()

    def take(*keys: str) -> dict[str, Any]:
        used.update(keys)
        return {key: values[key] for key in keys if key in values}

    own = take(*_ENCODER_KEYS, *_SHARED_KEYS)
    encoder = dict(own)
    for key in _ENCODER_KEYS:
        if (value := take(f"encoder_{key}").get(f"encoder_{key}")) is not None:
            encoder[key] = value
    kinds = values.get("layer_types")
    if kinds is not None and list(kinds) != [LAYER_TYPES[i % 2] for i in range(len(kinds))]:
        encoder["layer_types"] = kinds  # the original's encoders read the first entries of the transformer's list
    transformer = own | take(
        *"num_hidden_layers in_channels audio_acoustic_hidden_dim patch_size layer_types".split(),
        *"is_turbo is_lego_sft model_version lyric_alignment_layers_config".split(),
    )
    if "hidden_size" in encoder and encoder["hidden_size"] != own.get("hidden_size"):
        transformer["encoder_hidden_size"] = encoder["hidden_size"]
    condition = encoder | take(
        *"text_hidden_dim timbre_hidden_dim num_lyric_encoder_hidden_layers num_timbre_encoder_hidden_layers".split()
    )
    detokenizer = encoder | take(
        *"audio_acoustic_hidden_dim pool_window_size num_attention_pooler_hidden_layers".split()
    )
    tokenizer = detokenizer | take(*"fsq_dim fsq_input_levels fsq_input_num_quantizers".split())
    if unknown := sorted(values.keys() - used - _IGNORED):
        raise InputError(
            f"{source}: unknown key(s) {', '.join(unknown)}; the checkpoint may be of another model or a newer version"
        )
    configs = {
        "transformer": TransformerConfig.from_hf(transformer, source),
        "condition_encoder": ConditionEncoderConfig.from_hf(condition, source),
        "audio_tokenizer": AudioTokenizerConfig.from_hf(tokenizer, source),
        "audio_token_detokenizer": AudioTokenDetokenizerConfig.from_hf(detokenizer, source),
    }
    # In an XL model, the transformer is wider than the encoders.
    configs["condition_encoder"] = dataclasses.replace(
        configs["condition_encoder"],
        timbre_special_token="encoder_hidden_size" in transformer,
        timbre_layer_types=encoder.get("layer_types"),
    )
    return configs


def join_config(configs: dict[str, NetworkConfig]) -> dict[str, Any]:
    """Return the single config of the original layout for all four networks, the inverse of `split_config`.

    Raises:
        InputError: if the networks differ in a value that this layout has only once.
    """
    network = configs["transformer"]
    assert isinstance(network, TransformerConfig)
    transformer, encoder = network.to_hf(), configs["condition_encoder"].to_hf()
    values = transformer | {
        key: encoder[key] for key in encoder.keys() - transformer.keys() if key not in _ENCODER_KEYS
    }
    del values["encoder_hidden_size"]
    if network.is_lego_sft:
        values["is_lego_sft"] = True
    if network.lyric_alignment_layers_config is not None:
        heads = network.lyric_alignment_layers_config
        values["lyric_alignment_layers_config"] = {str(layer): list(rows) for layer, rows in heads}
    # All or none: if one is present, ACE-Step's own classes read all four.
    if any(encoder[key] != transformer[key] for key in _ENCODER_KEYS):
        values |= {f"encoder_{key}": encoder[key] for key in _ENCODER_KEYS}
    for name in ("audio_tokenizer", "audio_token_detokenizer"):
        part = configs[name].to_hf()
        values |= {key: part[key] for key in part.keys() - values.keys()}
    values["layer_types"] = [
        "full_attention" if window is None else "sliding_attention"
        for window in network.windows(network.num_hidden_layers)
    ]
    notes = {"architectures": ["AceStepConditionGenerationModel"], "model_type": "acestep", "hidden_act": "silu"}
    for name, config in split_config(values, "").items():
        expressed, wanted = _essentials(config), _essentials(configs[name])
        for key in wanted:
            if expressed[key] != wanted[key]:
                raise InputError(
                    f"{name}: {key} is {wanted[key]}, but the original layout has one value for several networks, "
                    f"here {expressed[key]}; use the layout diffusers"
                )
    return values | notes


def _essentials(config: NetworkConfig) -> dict[str, Any]:
    """Return a config's values that affect the network's function, including defaults that depend on other keys."""
    assert isinstance(config, AttentionConfig)
    values = config.to_hf()
    del values["attention_dropout"]
    depth = next(value for key, value in values.items() if re.fullmatch(r"num_(\w+_)?hidden_layers", key))
    values["layer_types"] = config.windows(depth)
    if isinstance(config, ConditionEncoderConfig):
        values["timbre_layer_types"] = config.timbre_windows()
    if "encoder_hidden_size" in values:
        values["encoder_hidden_size"] = values["encoder_hidden_size"] or values["hidden_size"]
    return values


def model_folder(configs: dict[str, NetworkConfig]) -> str:
    """Return the name under which ACE-Step publishes a model of this kind, such as `acestep-v15-xl-turbo`."""
    transformer, encoder = configs["transformer"], configs["condition_encoder"]
    assert isinstance(transformer, TransformerConfig) and isinstance(encoder, ConditionEncoderConfig)
    return f"{MODEL_PREFIX}{'xl-' if transformer.hidden_size != encoder.hidden_size else ''}{transformer.variant}"


def names_variant(name: str, variant: str) -> bool:
    """Return whether a folder or file of a model is named after a variant, such as turbo, xl-base or turbo-shift3."""
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower())
    stem = re.sub(r"^ace-?step-?(v?1-?5)?-", "", stem)
    stem = re.sub(r"(-(aio|bf16|fp16|fp32|fp8|e4m3fn|e5m2|scaled))+$", "", stem)
    return stem == re.sub(r"[^a-z0-9]+", "-", variant.lower())


def is_variant(holds: str, variant: str) -> bool:
    """Return whether a model that calls itself `holds`, such as xl-turbo, may be `variant`: turbo-shift3 is a turbo."""
    kind = re.match(r"(xl-)?[a-z]+", variant.lower().replace("_", "-"))
    return variant == holds or kind is not None and kind[0] == holds


def split_names(tensors: dict[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """Return the tensors of the one file by network and diffusers' name; raise InputError on an unknown name."""
    networks: dict[str, dict[str, Any]] = {network: {} for network in PREFIXES.values()}
    unknown = []
    for name, tensor in tensors.items():
        if name == "null_condition_emb":
            networks["condition_encoder"][name] = tensor
            continue
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            unknown.append(name)
            continue
        name = name.removeprefix(prefix)
        for ours, theirs in _PATCH_NAMES if prefix == "decoder." else ():
            name = re.sub(rf"^{re.escape(theirs)}", ours, name)
        networks[PREFIXES[prefix]][attention_name(name)] = tensor
    if unknown:
        names = ", ".join(sorted(unknown)[:5])
        raise InputError(f"{source}: unexpected tensor(s) {names}; this is not an ACE-Step 1.5 model")
    return networks


def attention_name(name: str) -> str:
    """Return diffusers' name of a tensor of an attention layer from the original's or Qwen3's name."""
    for ours, theirs in _ATTENTION_NAMES:
        name = re.sub(rf"(^|\.){re.escape(theirs)}", rf"\g<1>{ours}", name)
    return name


def original_name(network: str, name: str) -> str:
    """Return the name in the original layout of a tensor of `network` from diffusers' name."""
    for ours, theirs in (*_ATTENTION_NAMES, *(_PATCH_NAMES if network == "transformer" else ())):
        name = re.sub(rf"(^|\.){re.escape(ours)}", rf"\g<1>{theirs}", name)
    prefix = next((prefix for prefix, owner in PREFIXES.items() if owner == network), "")
    return name if name == "null_condition_emb" else prefix + name
