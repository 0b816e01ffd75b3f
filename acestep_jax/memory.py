"""The device memory that networks and songs need.

Weights are counted. Other memory of a program, its temporary arrays and its result, was measured on programs compiled
for each kind of device: `python -m benchmarks.device_memory`.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from acestep_jax.io.checkpoint import leaf_shapes
from acestep_jax.models.config import (
    AudioTokenDetokenizerConfig,
    AudioTokenizerConfig,
    AutoencoderConfig,
    ConditionEncoderConfig,
    NetworkConfig,
    TextEncoderConfig,
    TransformerConfig,
)
from acestep_jax.models.quantization import NETWORKS, quantized_layers
from acestep_jax.models.runtime import Runtime

# The transformer of each published size, as differences from the defaults of `TransformerConfig`.
SIZES: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "2B": {},
        "XL": dict(
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=32,
            num_attention_heads=32,
            encoder_hidden_size=2048,
        ),
    }
)
SECONDS = (60.0, 240.0, 600.0)  # durations of songs for which programs were compiled
LONGEST = SECONDS[-1]

# Temporary memory and result in GB for one song of `SECONDS`: for denoising by size, and for decoding. By platform and
# precision; compiled for A100, T4 and v5e, with 512 condition tokens.
WORKING: Mapping[tuple[str, str], Mapping[str, tuple[float, ...]]] = MappingProxyType(
    {
        ("tpu", "bfloat16"): {
            "2B": (0.082, 0.262, 0.466),
            "XL": (0.310, 0.449, 0.788),
            "decode": (0.327, 0.399, 0.543),
        },
        ("gpu", "bfloat16"): {
            "2B": (0.278, 0.353, 0.598),
            "XL": (0.495, 0.602, 1.019),
            "decode": (0.496, 0.637, 0.925),
        },
        ("gpu", "mixed_float16"): {
            "2B": (0.252, 0.500, 0.906),
            "XL": (0.552, 0.821, 1.485),
            "decode": (0.775, 0.916, 1.208),
        },
    }
)


def configs_of(size: str) -> dict[str, NetworkConfig]:
    """Return the architectures of a published turbo model with a size of `SIZES`."""
    return {
        "transformer": TransformerConfig(**SIZES[size], is_turbo=True),
        "condition_encoder": ConditionEncoderConfig(),
        "text_encoder": TextEncoderConfig(),
        "vae": AutoencoderConfig(),
        "audio_tokenizer": AudioTokenizerConfig(),
        "audio_token_detokenizer": AudioTokenDetokenizerConfig(),
    }


def weight_bytes(
    configs: Mapping[str, NetworkConfig], precision: str, quantization: str | None = None
) -> dict[str, int]:
    """Return the bytes of the weights of each network in a precision of `runtime.PRECISIONS`.

    Args:
        quantization: quantisation of the networks in `quantization.NETWORKS`, one of `runtime.QUANTIZATIONS`; None:
            none.
    """
    itemsize = jnp.dtype(Runtime.of(precision).param_dtype).itemsize
    found = {}
    for name, config in configs.items():
        leaves = leaf_shapes(name, config, quantization if name in NETWORKS else None, precision)
        own = quantized_layers(leaves)
        found[name] = sum(
            math.prod(shape.shape) * (shape.dtype.itemsize if leaf.rpartition(".")[0] in own else itemsize)
            for leaf, shape in leaves.items()
        )
    return found


def working_bytes(
    configs: Mapping[str, NetworkConfig], precision: str, platform: str, seconds: float, rows: int = 1
) -> dict[str, int]:
    """Return the bytes that the programs "denoise" and "decode" need in addition to weights.

    Values are interpolated linearly between the compiled durations. A transformer narrower than 2B counts as 2B, a
    wider one as XL. Precisions that were not compiled count as bfloat16, float32 as twice bfloat16.

    Args:
        seconds: duration of the songs, up to `LONGEST`.
        rows: batch size; a song with guidance counts twice.
    """
    table = WORKING.get((platform, precision)) or WORKING["tpu" if platform == "tpu" else "gpu", "bfloat16"]
    transformer: Any = configs.get("transformer", TransformerConfig())
    size = "2B" if transformer.hidden_size <= TransformerConfig().hidden_size else "XL"
    unit = 1e9 * rows * (2 if precision == "float32" else 1)
    return {
        program: int(unit * np.interp(seconds, SECONDS, table[row]))
        for program, row in (("denoise", size), ("decode", "decode"))
    }


def needed_bytes(
    configs: Mapping[str, NetworkConfig],
    precision: str,
    platform: str,
    seconds: float = LONGEST,
    quantization: str | None = None,
) -> int:
    """Return the bytes that a song needs with all networks on one device, with guidance unless it is a turbo model.

    This does not include the second copy of the layers that a GPU with enough memory keeps, see `placement`.
    """
    weights = sum(weight_bytes(configs, precision, quantization).values())
    working = working_bytes(configs, precision, platform, seconds)
    return weights + max(_branches(configs) * working["denoise"], working["decode"])


def needed_in_turn(
    configs: Mapping[str, NetworkConfig],
    precision: str,
    platform: str,
    seconds: float,
    quantization: str | None = None,
) -> int:
    """Return the bytes that a song needs if networks are copied to the device one at a time, see `placement`."""
    weights = weight_bytes(configs, precision, quantization)
    working = working_bytes(configs, precision, platform, seconds)
    encoding = sum(weights[name] for name in weights if name != "transformer")
    denoising = weights.get("transformer", 0) + weights.get("condition_encoder", 0)
    denoising += _branches(configs) * working["denoise"]
    return max(encoding, denoising, weights.get("vae", 0) + working["decode"])


def _branches(configs: Mapping[str, NetworkConfig]) -> int:
    """Return the number of velocities per song and step: two with guidance."""
    transformer: Any = configs.get("transformer")
    return 1 if transformer is None or transformer.turbo else 2
