"""The minimum number of floating-point operations of each network: only matrix products, a multiply-add counts as two.

Padding, the parts of blocks outside a band and elementwise work are not counted, so times above this floor show them.
"""

from acestep_jax.memory import SIZES
from acestep_jax.models.config import (
    AttentionConfig,
    AudioTokenDetokenizerConfig,
    AudioTokenizerConfig,
    AutoencoderConfig,
    ConditionEncoderConfig,
    PlannerConfig,
    TextEncoderConfig,
    TransformerConfig,
)

FRAMES_PER_SECOND = 25  # latent frames
TRANSFORMER_SIZES = SIZES
PLANNER_SIZES = {
    "0.6B": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
    "1.7B": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16),
    "4B": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
}


def transformer_flops(config: TransformerConfig, frames: int, condition_tokens: int, batch: int = 1) -> float:
    """Return the FLOPs of one forward pass over `frames` latent frames.

    This includes embedding and projecting the `condition_tokens` condition tokens.
    """
    weights, condition, attention = _transformer_products(config, frames, condition_tokens)
    return 2.0 * batch * (weights + condition + attention)


def training_flops(
    config: TransformerConfig, frames: int, condition_tokens: int, batch: int = 1, *, rank: int | None = None
) -> float:
    """Return the FLOPs of a forward and a backward pass when training all weights or, with `rank`, only adapters.

    Adapters are on the linear layers of attention. The backward pass of a product of two activations, as in attention,
    costs twice its forward pass. For a product with a weight it costs twice the forward pass if the weight is trained,
    else the same, or nothing if the input does not depend on trained parameters, as for the condition.
    Rematerialisation is not counted.
    """
    weights, condition, attention = _transformer_products(config, frames, condition_tokens)
    if rank is None:
        return 6.0 * batch * (weights + condition + attention)
    hidden, tokens = config.hidden_size, -(-frames // config.patch_size)
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    adapters = 4 * tokens * (hidden + query) + 2 * (tokens + condition_tokens) * (hidden + key)
    adapters *= rank * config.num_hidden_layers
    return 2.0 * batch * (2 * weights + condition + 3 * attention + 3 * adapters)


def _transformer_products(config: TransformerConfig, frames: int, condition_tokens: int) -> tuple[int, int, int]:
    """Return the multiply-adds of latents with weights, of the condition with weights, and of attention."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    tokens = -(-frames // config.patch_size)
    weights = tokens * config.patch_size * hidden * (config.in_channels + config.audio_acoustic_hidden_dim)
    condition = condition_tokens * (config.encoder_hidden_size or hidden) * hidden
    attention = 0
    for window in config.windows(config.num_hidden_layers):
        pairs = tokens**2 if window is None else band_pairs(tokens, window)
        weights += tokens * (4 * hidden * query + 2 * hidden * key + 3 * hidden * mlp)
        condition += 2 * hidden * key * condition_tokens
        attention += 2 * query * (pairs + tokens * condition_tokens)
    return weights, condition, attention


def lyric_encoder_flops(config: ConditionEncoderConfig, tokens: int, batch: int = 1) -> float:
    """Return the FLOPs of one forward pass over `tokens` lyric tokens."""
    windows = config.windows(config.num_lyric_encoder_hidden_layers)
    return 2.0 * batch * (tokens * config.text_hidden_dim * config.hidden_size + _layers(config, windows, tokens))


def tokenizer_flops(
    tokenizer: AudioTokenizerConfig, detokenizer: AudioTokenDetokenizerConfig, frames: int, batch: float = 1
) -> float:
    """Return the FLOPs from latents to codes and back; each window of frames has layers of its own, in the tokenizer
    with one token more."""
    total = 0
    for config, extra in ((tokenizer, 1), (detokenizer, 0)):
        size, hidden = config.pool_window_size, config.hidden_size
        windows = config.windows(config.num_attention_pooler_hidden_layers)
        embedded = size if extra else 1
        products = embedded * hidden**2 + size * config.audio_acoustic_hidden_dim * hidden
        total += -(-frames // size) * (products + _layers(config, windows, size + extra))
    return 2.0 * batch * total


def text_encoder_flops(config: TextEncoderConfig, tokens: int, batch: int = 1) -> float:
    """Return the FLOPs of one forward pass over prompts, with causal attention."""
    layers = _layers(config, (None,) * config.num_hidden_layers, tokens)
    later = config.num_hidden_layers * 2 * config.num_attention_heads * config.head_dim * tokens * (tokens - 1) // 2
    return 2.0 * batch * (layers - later)


def planner_step_flops(config: PlannerConfig, rows: int, slots: int) -> float:
    """Return the FLOPs of one decoding step, in which each row attends to `slots` earlier tokens."""
    query = config.num_attention_heads * config.head_dim
    layers = _layers(config, (None,) * config.num_hidden_layers, 1) + 2 * query * slots * config.num_hidden_layers
    return 2.0 * rows * (layers + (config.num_codes + 1) * config.hidden_size)


def planner_step_bytes(config: PlannerConfig, rows: int, slots: int, width: int, cache_width: int | None = None) -> int:
    """Return the bytes that such a step must read: weights, head of codes, and the cache.

    Args:
        width: bytes per weight.
        cache_width: bytes per value of the cache; None: the same.
    """
    hidden, head_dim, mlp = config.hidden_size, config.head_dim, config.intermediate_size
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    layer = 2 * hidden * query + 2 * hidden * key + 3 * hidden * mlp + 2 * hidden + 2 * head_dim
    weights = config.num_hidden_layers * layer + hidden
    cache = 2 * config.num_hidden_layers * rows * slots * key * (cache_width or width)
    return (weights + (config.num_codes + 1) * hidden) * width + cache


def _layers(config: AttentionConfig, windows: tuple[int | None, ...], tokens: int) -> int:
    """Return the multiply-adds of an encoder's layers over `tokens` tokens."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    total = 0
    for window in windows:
        pairs = tokens**2 if window is None else band_pairs(tokens, window)
        total += tokens * (2 * hidden * query + 2 * hidden * key + 3 * hidden * mlp) + 2 * query * pairs
    return total


def band_pairs(tokens: int, window: int) -> int:
    """Return the number of pairs of tokens that are at most `window` apart."""
    window = min(window, tokens - 1)
    return tokens * (2 * window + 1) - window * (window + 1)


def decoder_flops(config: AutoencoderConfig, frames: int, batch: int = 1) -> float:
    """Return the FLOPs of Oobleck's decoder on `frames` latent frames."""
    channels = [config.decoder_channels * m for m in (1, *config.channel_multiples)][::-1]
    total = frames * 7 * config.decoder_input_channels * channels[0]
    samples = frames
    for inputs, outputs, stride in zip(channels, channels[1:], config.downsampling_ratios[::-1], strict=False):
        total += samples * 2 * stride * inputs * outputs  # each input frame is multiplied by 2 * stride taps
        samples *= stride
        total += samples * 3 * (7 + 1) * outputs**2
    total += samples * 7 * channels[-1] * config.patch_size * config.audio_channels
    return 2.0 * batch * total
