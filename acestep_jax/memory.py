"""What networks and songs take of a device's memory.

Weights are counted. What a program takes beside them, its temporary arrays and its result, was read off programs
compiled for each kind of device: `python -m benchmarks.device_memory`.
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

# The transformer of each published size, beside the defaults of `TransformerConfig`.
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
SECONDS = (60.0, 240.0, 600.0)  # lengths of songs that programs were compiled for
LONGEST = SECONDS[-1]

# Temporary memory and result, GB, for one song of `SECONDS`: of denoising by size, and of decoding.
# By platform and precision; compiled for A100, T4 and v5e, with 512 condition tokens.
WORKING: Mapping[tuple[str, str], Mapping[str, tuple[float, ...]]] = MappingProxyType(
    {
        # 60 s on one chip; 600 s as one of eight songs on a v5e 2x4 (docs/performance.md); 240 s on the line between.
        # Of decoding, the temporary memory of 600 s with the result of each length.
        ("tpu", "bfloat16"): {
            "2B": (0.724, 0.816, 1.000),
            "XL": (1.848, 2.042, 2.430),
            "decode": (0.524, 0.594, 0.740),
        },
        ("gpu", "bfloat16"): {
            "2B": (0.278, 0.353, 0.598),
            "XL": (0.495, 0.602, 1.019),
            "decode": (0.784, 0.952, 1.259),
        },
        ("gpu", "mixed_float16"): {
            "2B": (0.252, 0.500, 0.906),
            "XL": (0.552, 0.821, 1.485),
            "decode": (1.402, 1.723, 2.113),
        },
    }
)


def configs_of(size: str) -> dict[str, NetworkConfig]:
    """Return the architectures of a published turbo model, of a size of `SIZES`."""
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
        quantization: of the networks that `models.quantization` knows, one of `runtime.QUANTIZATIONS`; None: none.
    """
    itemsize = jnp.dtype(Runtime.of(precision).param_dtype).itemsize
    found = {}
    for name, config in configs.items():
        leaves = leaf_shapes(name, config, quantization if name in NETWORKS else None)
        own = quantized_layers(leaves)
        found[name] = sum(
            math.prod(shape.shape) * (shape.dtype.itemsize if leaf.rpartition(".")[0] in own else itemsize)
            for leaf, shape in leaves.items()
        )
    return found


def working_bytes(
    configs: Mapping[str, NetworkConfig], precision: str, platform: str, seconds: float, rows: int = 1
) -> dict[str, int]:
    """Return what the programs "denoise" and "decode" take beside weights, bytes.

    Between the lengths that were compiled it is taken as linear. A transformer narrower than 2B counts as 2B, one wider
    as XL; other precisions than those that were compiled as bfloat16, float32 twice that.

    Args:
        seconds: length of the songs, up to `LONGEST`.
        rows: how many at once; a guided one counts twice.
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
    """Return what a song takes with all networks on one device, with guidance unless the transformer is turbo's.

    It does not count the second copy of the layers that a GPU with enough memory keeps, see `placement`.
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
    """Return what a song takes with networks copied to the device in turn, see `placement`."""
    weights = weight_bytes(configs, precision, quantization)
    working = working_bytes(configs, precision, platform, seconds)
    encoding = sum(weights[name] for name in weights if name != "transformer")
    denoising = weights.get("transformer", 0) + weights.get("condition_encoder", 0)
    denoising += _branches(configs) * working["denoise"]
    return max(encoding, denoising, weights.get("vae", 0) + working["decode"])


def _branches(configs: Mapping[str, NetworkConfig]) -> int:
    """Return how many velocities a step computes for a song: guidance contrasts two."""
    transformer: Any = configs.get("transformer")
    return 1 if transformer is None or transformer.turbo else 2
