"""The architecture of each network, as a configuration that is stored with its weights.

Fields have the names, meanings and defaults of the `config.json` that diffusers and transformers write with the
weights. How a network is computed is not part of it, see `models.runtime`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from acestep_jax.errors import InputError

LAYER_TYPES = ("sliding_attention", "full_attention")


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


# The values that a field of each type may have.
_VALUES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a positive integer", _is_size),
    int | None: ("a positive integer or null", lambda value: value is None or _is_size(value)),
    float: ("a number, zero or more", lambda value: type(value) in (int, float) and value >= 0),
    bool: ("true or false", lambda value: type(value) is bool),
    tuple[int, ...]: ("positive integers", lambda value: type(value) is tuple and all(map(_is_size, value))),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The base of all architectures: how they are checked, read and written."""

    # Keys of a foreign config.json that do not change the network's function.
    ignored: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self):
        name = type(self).__name__
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, value := tuple(value))
            if field.type in _VALUES and not _VALUES[field.type][1](value):
                raise InputError(f"{name}.{field.name}: expected {_VALUES[field.type][0]}, found {value!r}")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], source: str = "config.json") -> Self:
        """Read the dictionary of a PyTorch `config.json`; raise InputError on an unknown key.

        Keys that begin with an underscore are diffusers' own metadata and are skipped.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        given = {key: value for key, value in values.items() if not key.startswith("_") and key not in cls.ignored}
        if unknown := sorted(given.keys() - known):
            raise InputError(
                f"{source}: unknown key(s) {', '.join(unknown)}; {cls.__name__} knows {', '.join(sorted(known))}. "
                "The checkpoint may belong to another model or to a newer version"
            )
        return cls(**given)

    def to_hf(self) -> dict[str, Any]:
        """Return the inverse of `from_hf`: a dictionary ready for JSON."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(NetworkConfig):
    """The base of all architectures with attention layers."""

    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    rope_theta: float = 1000000.0
    attention_bias: bool = False
    attention_dropout: float = 0.0
    rms_norm_eps: float = 1e-6
    sliding_window: int = 128  # tokens on either side, inclusive
    layer_types: tuple[str, ...] | None = None  # None: alternating sliding and full, sliding first

    def __post_init__(self):
        super().__post_init__()
        name, heads, key_heads = type(self).__name__, self.num_attention_heads, self.num_key_value_heads
        if heads % key_heads:
            raise InputError(
                f"{name}: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({key_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"{name}.head_dim: expected an even number (rotary embedding), found {self.head_dim}")
        for kind in self.layer_types or ():
            if kind not in LAYER_TYPES:
                raise InputError(f"{name}.layer_types: expected {' or '.join(LAYER_TYPES)}, found {kind!r}")

    def windows(self, num_layers: int) -> tuple[int | None, ...]:
        """Return the sliding window of each layer, None if full; raise InputError if `layer_types` is too short."""
        return self._windows("layer_types", num_layers)

    def _windows(self, field: str, num_layers: int) -> tuple[int | None, ...]:
        kinds = getattr(self, field) or tuple(LAYER_TYPES[i % 2] for i in range(num_layers))
        if len(kinds) < num_layers:
            raise InputError(
                f"{type(self).__name__}.{field}: {num_layers} layers need as many entries, found {len(kinds)}"
            )
        for kind in kinds:
            if kind not in LAYER_TYPES:
                raise InputError(f"{type(self).__name__}.{field}: expected {' or '.join(LAYER_TYPES)}, found {kind!r}")
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in kinds[:num_layers])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(AttentionConfig):
    """The diffusion transformer. The defaults are the 2B model.

    lyric_alignment_layers_config: (layer, heads) of the cross-attention that follows the singing, see
        `models.alignment`; config.json has it as an object keyed by layer. None: unknown.
    """

    num_hidden_layers: int = 24
    in_channels: int = 192  # source latents, chunk mask and noisy latents
    audio_acoustic_hidden_dim: int = 64  # channels of a latent frame
    patch_size: int = 2  # latent frames in a token
    encoder_hidden_size: int | None = None  # width of the condition tokens; None: hidden_size
    is_turbo: bool = False
    is_lego_sft: bool = False  # fine-tuned on stems, whose captions have a format of their own
    model_version: str | None = None
    lyric_alignment_layers_config: tuple[tuple[int, tuple[int, ...]], ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.windows(self.num_hidden_layers)
        if (heads := self.lyric_alignment_layers_config) is not None:
            try:
                pairs = heads.items() if isinstance(heads, Mapping) else heads
                found = tuple(sorted((int(layer), tuple(map(int, heads))) for layer, heads in pairs))
                valid = all(layer >= 0 and heads and min(heads) >= 0 for layer, heads in found)
            except (TypeError, ValueError):
                found, valid = None, False
            if not valid:
                raise InputError(
                    "TransformerConfig.lyric_alignment_layers_config: expected lists of heads by layer, found "
                    f"{self.lyric_alignment_layers_config!r}"
                )
            object.__setattr__(self, "lyric_alignment_layers_config", found or None)

    def to_hf(self) -> dict[str, Any]:
        """Return what `NetworkConfig.to_hf` does; diffusers has no keys for `is_lego_sft` and lyric alignment."""
        values = super().to_hf()
        del values["is_lego_sft"], values["lyric_alignment_layers_config"]
        return values

    @property
    def turbo(self) -> bool:
        """Return whether guidance is distilled into the weights: few steps, no guidance."""
        return self.is_turbo or self.model_version == "turbo"

    @property
    def variant(self) -> str:
        """Return the name that the model goes by, such as turbo, base or sft."""
        return self.model_version or ("turbo" if self.turbo else "base")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionEncoderConfig(AttentionConfig):
    """Lyric, timbre and text encoders. `layer_types` is the lyric encoder's.

    timbre_layer_types: layer types of the timbre encoder; None: alternating sliding and full, the only order that
        diffusers supports. ACE-Step's own code uses the transformer's for all encoders.
    timbre_special_token: whether a learned token before the reference's frames summarises them, instead of the first
        frame. XL models were trained this way, and ACE-Step's own code does it for them; diffusers reads the first
        frame for all models and leaves the token, which all checkpoints have, unused. Conversion from either layout
        sets it for XL models, whose transformer is wider than the encoders.
    """

    text_hidden_dim: int = 1024
    timbre_hidden_dim: int = 64
    num_lyric_encoder_hidden_layers: int = 8
    num_timbre_encoder_hidden_layers: int = 4
    timbre_special_token: bool = False
    timbre_layer_types: tuple[str, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.timbre_windows()

    def timbre_windows(self) -> tuple[int | None, ...]:
        """Return the sliding window of each layer of the timbre encoder, None for full attention."""
        return self._windows("timbre_layer_types", self.num_timbre_encoder_hidden_layers)

    def to_hf(self) -> dict[str, Any]:
        """Return what `NetworkConfig.to_hf` does; neither layout has keys for the timbre encoder's own fields."""
        values = super().to_hf()
        del values["timbre_special_token"], values["timbre_layer_types"]
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioTokenizerConfig(AttentionConfig):
    """25 Hz latents to 5 Hz codes."""

    audio_acoustic_hidden_dim: int = 64
    pool_window_size: int = 5  # latent frames per code
    fsq_dim: int = 2048
    fsq_input_levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    fsq_input_num_quantizers: int = 1
    num_attention_pooler_hidden_layers: int = 2

    def __post_init__(self):
        if self.fsq_input_levels is None:
            object.__setattr__(self, "fsq_input_levels", (8, 8, 8, 5, 5, 5))
        super().__post_init__()
        if self.fsq_dim != self.hidden_size:
            raise InputError(
                f"AudioTokenizerConfig.fsq_dim: the quantizer reads the pooler's output, so it must equal "
                f"hidden_size ({self.hidden_size}), found {self.fsq_dim}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioTokenDetokenizerConfig(AttentionConfig):
    """5 Hz codes to 25 Hz latents."""

    audio_acoustic_hidden_dim: int = 64
    pool_window_size: int = 5
    num_attention_pooler_hidden_layers: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoderConfig(AttentionConfig):
    """Qwen3 as the text encoder. The defaults are Qwen3-Embedding-0.6B."""

    vocab_size: int = 151669
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 28

    ignored: ClassVar[frozenset[str]] = frozenset(
        "architectures attn_implementation bos_token_id chunk_size_feed_forward dtype eos_token_id id2label "
        "initializer_range is_encoder_decoder label2id max_position_embeddings max_window_layers model_type "
        "output_attentions output_hidden_states pad_token_id problem_type return_dict sliding_window "
        "tie_word_embeddings torch_dtype transformers_version use_cache use_sliding_window".split()
    )

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], source: str = "config.json") -> Self:
        values = dict(values)
        # transformers 5 groups two keys of transformers 4.
        rope = values.pop("rope_parameters", None) or {}
        scaling = values.pop("rope_scaling", None)
        if rope.get("rope_type", "default") != "default" or scaling is not None:
            raise InputError(f"{source}: scaled rotary embeddings are not supported, found {scaling or rope}")
        # If the file has no value, transformers' default applies, not ours.
        values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10000.0))
        if (activation := values.pop("hidden_act", "silu")) != "silu":
            raise InputError(f"{source}: hidden_act: expected 'silu', found {activation!r}")
        if values.get("use_sliding_window"):
            raise InputError(f"{source}: use_sliding_window: not supported by the text encoder")
        if "sliding_attention" in (values.pop("layer_types", None) or ()):
            raise InputError(f"{source}: layer_types: the text encoder has only full attention")
        return super().from_hf(values, source)

    def to_hf(self) -> dict[str, Any]:
        values = super().to_hf()
        del values["sliding_window"], values["layer_types"]
        return values | {"architectures": ["Qwen3Model"], "model_type": "qwen3", "hidden_act": "silu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannerConfig(TextEncoderConfig):
    """Qwen3 as the 5 Hz language model. The defaults are acestep-5Hz-lm-0.6B; the token ids are the same for all sizes.

    first_code: token id of audio code 0; the tokens before it are text.
    num_codes: size of the codebook. The published vocabulary has 65535 tokens for codes.
    eos_token_id: ends a turn.
    """

    vocab_size: int = 217204
    first_code: int = 151669
    num_codes: int = 64000
    eos_token_id: int = 151645
    tie_word_embeddings: bool = True

    ignored: ClassVar[frozenset[str]] = TextEncoderConfig.ignored - {"tie_word_embeddings", "eos_token_id"}

    def __post_init__(self):
        super().__post_init__()
        if not self.tie_word_embeddings:
            raise InputError(
                "PlannerConfig.tie_word_embeddings: expected true, found false; all published planners compute their "
                "logits from the embedding"
            )
        if self.first_code + self.num_codes > self.vocab_size:
            raise InputError(
                f"PlannerConfig.vocab_size: expected at least {self.first_code + self.num_codes}, of which "
                f"{self.num_codes} are audio codes, found {self.vocab_size}; a plain language model has no codes, "
                "use one of acestep-5Hz-lm-0.6B, -1.7B and -4B"
            )
        if self.eos_token_id >= self.first_code:
            raise InputError(
                f"PlannerConfig.eos_token_id: expected a token before the codes, below {self.first_code}, found "
                f"{self.eos_token_id}"
            )

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], source: str = "config.json") -> Self:
        # The published files do not mention the codes, and their eos_token_id is that of the model they started from.
        if "first_code" not in values:
            values = {key: value for key, value in values.items() if key != "eos_token_id"}
        try:
            return super().from_hf(values, source)
        except InputError as error:
            raise InputError(str(error) if str(error).startswith(source) else f"{source}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        values = super().to_hf() | {"architectures": ["Qwen3ForCausalLM"]}
        published = PlannerConfig()
        if all(values[name] == getattr(published, name) for name in ("first_code", "num_codes", "eos_token_id")):
            del values["first_code"], values["num_codes"]
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(NetworkConfig):
    """Oobleck, waveform to latents and back. The defaults are ACE-Step's: 48 kHz stereo, 25 frames per second.

    encoder_hidden_size: outputs of the encoder per frame: mean and scale of each channel.
    encoder_channels: width of the encoder's first layer; None: encoder_hidden_size, as in diffusers.
    patch_size: samples that the outermost layers process as one step, stacked as channels, which makes these layers
        cheaper; diffusers has only 1.
    """

    encoder_hidden_size: int = 128
    encoder_channels: int | None = None
    patch_size: int = 1
    downsampling_ratios: tuple[int, ...] = (2, 4, 4, 6, 10)
    channel_multiples: tuple[int, ...] = (1, 2, 4, 8, 16)
    decoder_channels: int = 128
    decoder_input_channels: int = 64
    audio_channels: int = 2
    sampling_rate: int = 48000  # Hz

    def __post_init__(self):
        super().__post_init__()
        if odd := [ratio for ratio in self.downsampling_ratios if ratio % 2]:
            raise InputError(f"AutoencoderConfig.downsampling_ratios: expected even numbers, found {odd}")
        if len(self.channel_multiples) != len(self.downsampling_ratios):
            sizes = f"{self.channel_multiples} and {self.downsampling_ratios}"
            raise InputError(
                f"AutoencoderConfig: channel_multiples and downsampling_ratios must have the same length, found {sizes}"
            )

    @property
    def hop_length(self) -> int:
        """Return the number of samples in a latent frame."""
        return self.patch_size * math.prod(self.downsampling_ratios)

    def to_hf(self) -> dict[str, Any]:
        """Return what `NetworkConfig.to_hf` does; raise InputError if diffusers has no such network."""
        values = super().to_hf()
        for name, known in (("encoder_channels", None), ("patch_size", 1)):
            if (value := values.pop(name)) != known:
                raise InputError(f"AutoencoderConfig.{name}: diffusers supports only {known}, found {value}")
        return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters, see `models.lora`.

    Args:
        rank: Rank of the two factors.
        alpha: The scale of the adapter is alpha / rank.
        dropout: Dropout rate of the adapters' inputs in training.
        targets: Regular expressions that match the ends of the dotted paths of linear layers, such as to_q.
        use_dora: Whether to train the norm of each output's weights separately from their direction.
    """

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.1
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out")
    use_dora: bool = False

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        if not _is_size(self.rank):
            raise InputError(f"lora.rank: expected a positive integer, found {self.rank!r}")
        if not 0 < self.alpha < float("inf"):
            raise InputError(f"lora.alpha: expected a number above 0, found {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout: expected a number from 0 to below 1, found {self.dropout!r}")
        if not self.targets:
            raise InputError("lora.targets: expected at least one pattern, found none")

    @property
    def scaling(self) -> float:
        """Return alpha / rank."""
        return self.alpha / self.rank
