"""Numerical parity of a checkpoint between PyTorch and JAX, stage by stage: `acestep-jax convert verify SRC`.

Each stage gets the same inputs in both frameworks, taken from a short song. Each network is loaded, run and freed
before the next one, so peak memory is about twice the largest network in float32.
"""

import dataclasses
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from diffusers.pipelines.ace_step.modeling_ace_step import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
)
from flax import nnx
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3Model

from acestep_jax.inputs.programs import REFERENCE_FRAMES
from acestep_jax.inputs.prompt import lyric_text, prompt_text
from acestep_jax.io import original
from acestep_jax.io.conversion import build, open_source
from acestep_jax.io.pretrained import TorchCheckpoint
from acestep_jax.models.config import AutoencoderConfig, ConditionEncoderConfig, TransformerConfig

# Limits of max |ours - torch| / max |torch|. The transformer is the deepest network; codes are either exact or wrong.
# If torch's float32 differs from its float64 by more than half the limit, the limit is twice that difference.
LIMITS = {"transformer": 2e-5, "audio codes": 0.0}
DEFAULT_LIMIT = 1e-5
FRAMES = 751  # 30 s and an odd number

_TORCH = {
    "transformer": AceStepTransformer1DModel,
    "condition_encoder": AceStepConditionEncoder,
    "vae": AutoencoderOobleck,
    "audio_tokenizer": AceStepAudioTokenizer,
    "audio_token_detokenizer": AceStepAudioTokenDetokenizer,
}


class Row(NamedTuple):
    """One row of the table."""

    stage: str
    shape: tuple[int, ...]
    error: float
    limit: float
    cosine: float


def verify(
    source: str | Path,
    *,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    variant: str | None = None,
) -> bool:
    """Print a row for each stage as it completes; return whether all stages are within their limits.

    Args:
        source, vae, text_encoder, variant: see `open_source`.

    Raises:
        InputError: see `open_source` and `plan`.
    """
    opened = open_source(source, vae=vae, text_encoder=text_encoder, dtype="float32", variant=variant)
    print(f"{'stage':<24} {'shape':<18} {'error':>9} {'limit':>9} {'cosine':>11}")
    passed = True
    with jax.default_matmul_precision("highest"):
        for row in rows(opened):
            good = row.error <= row.limit
            passed = passed and good
            shape = "x".join(map(str, row.shape))
            print(
                f"{row.stage:<24} {shape:<18} {row.error:>9.1e} {row.limit:>9.0e} {row.cosine:>11.8f}"
                f"{'' if good else '  FAILED'}",
                flush=True,
            )
    print("error: max |JAX - torch| / max |torch|, in float32")
    return passed


def rows(opened: TorchCheckpoint) -> Iterator[Row]:
    """Run every stage on torch's outputs of the earlier networks, and yield its row."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    assert opened.tokenizer is not None
    tokenizer = Tokenizer.from_str(opened.tokenizer)
    text = tokenizer.encode(prompt_text("warm lofi piano with vinyl crackle", audio_duration=30, bpm=80)).ids
    lyrics = tokenizer.encode(lyric_text("[verse]\nsoft notes in the morning light", "en")).ids
    text, lyrics = np.array([text], np.int32), np.array([lyrics], np.int32)

    both = _Both(opened, "text_encoder")
    text_states, row = both.compare("text encoder", lambda m, t: m(t(text).long()).last_hidden_state, lambda m: m(text))
    yield row
    lyric_states, row = both.compare(
        "lyric embeddings",
        lambda m, t: m.get_input_embeddings()(t(lyrics).long()),
        lambda m: m.embed_tokens(lyrics),
    )
    yield row
    del both

    both = _Both(opened, "condition_encoder")
    silence = opened.tensors["condition_encoder"]["silence_latent"].read()
    inputs = (
        text_states,
        np.ones(text.shape, np.int64),
        lyric_states,
        np.ones(lyrics.shape, np.int64),
        silence[:, :REFERENCE_FRAMES],
        np.zeros(1, np.int64),
    )
    condition, row = both.compare("condition encoder", lambda m, t: m(*map(t, inputs))[0], lambda m: m(*inputs)[0])
    yield row
    del both

    config = opened.configs["transformer"]
    assert isinstance(config, TransformerConfig)
    channels = config.audio_acoustic_hidden_dim
    both = _Both(opened, "transformer")
    noise = normal(1, FRAMES, channels)
    context = np.concatenate([silence[:, :FRAMES], np.ones((1, FRAMES, channels), np.float32)], axis=-1)
    t, r = np.array([0.7], np.float32), np.array([0.4], np.float32)
    arguments = (noise, t, r, condition, context)
    _, row = both.compare(
        "transformer", lambda m, t: m(*map(t, arguments), return_dict=False)[0], lambda m: m(*arguments)
    )
    yield row
    del both

    both = _Both(opened, "vae")
    config = opened.configs["vae"]
    assert isinstance(config, AutoencoderConfig)
    audio = 0.1 * normal(1, config.audio_channels, 100 * config.hop_length)
    latents, row = both.compare(
        "autoencoder encode",
        lambda m, t: m.encode(t(audio)).latent_dist.mode().transpose(1, 2).contiguous(),
        lambda m: m.encode(audio).mean,
    )
    yield row
    _, row = both.compare(
        "autoencoder decode",
        lambda m, t: m.decode(t(latents).transpose(1, 2)).sample,
        lambda m: m.decode(latents),
    )
    yield row
    del both

    if "audio_tokenizer" not in opened.configs or "audio_token_detokenizer" not in opened.configs:
        return
    both = _Both(opened, "audio_tokenizer")
    arguments = (latents, silence)
    quantized, row = both.compare(
        "audio tokenizer",
        lambda m, t: m.tokenize(*map(t, arguments))[0],
        lambda m: m.tokenize(*arguments)[0],
    )
    yield row
    _, row = both.compare(
        "audio codes",
        lambda m, t: m.tokenize(*map(t, arguments))[1],
        lambda m: m.tokenize(*arguments)[1],
    )
    yield row
    del both
    both = _Both(opened, "audio_token_detokenizer")
    _, row = both.compare("audio detokenizer", lambda m, t: m(t(quantized)), lambda m: m(quantized))
    yield row


class _Both:
    """A network of the checkpoint in both frameworks, in float32."""

    def __init__(self, opened: TorchCheckpoint, network: str):
        gc.collect()
        self.torch = _torch_network(opened, network)
        self.jax = _jax_network(opened, network)

    def compare(
        self,
        stage: str,
        run_torch: Callable[[Any, Callable[[np.ndarray], torch.Tensor]], torch.Tensor],
        run_jax: Callable[[Any], jax.Array],
    ) -> tuple[np.ndarray, Row]:
        """Return torch's result and the row that compares ours with it.

        Args:
            stage: name of the stage.
            run_torch: called with the torch network and a function that converts arrays to its tensors.
            run_jax: called with our network.
        """
        with torch.no_grad():
            reference = run_torch(self.torch, torch.from_numpy).numpy()
        ours = np.asarray(jax.jit(run_jax)(self.jax), np.float64)
        exact = reference.astype(np.float64)
        error, limit = _relative(ours, exact), LIMITS.get(stage, DEFAULT_LIMIT)
        if error > limit > 0:
            with torch.no_grad():
                precise = run_torch(self.torch.double(), _double).numpy()
            self.torch.float()
            limit = max(limit, 2 * _relative(exact, precise))
        norms = np.linalg.norm(ours) * np.linalg.norm(exact)
        return reference, Row(stage, reference.shape, error, limit, float(np.sum(ours * exact) / max(norms, 1e-30)))


def _relative(found: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(found - reference).max() / max(np.abs(reference).max(), 1e-30))


def _double(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float64) if array.dtype == np.float32 else array)


def _jax_network(opened: TorchCheckpoint, network: str) -> nnx.Module:
    config = opened.configs[network]
    if isinstance(config, ConditionEncoderConfig):
        # The reference is what diffusers' class computes, which has neither of these options.
        config = dataclasses.replace(config, timbre_special_token=False, timbre_layer_types=None)
    return build(network, config, opened.tensors[network])


def _torch_network(opened: TorchCheckpoint, network: str) -> torch.nn.Module:
    config = opened.configs[network].to_hf()
    tensors = dict(opened.tensors[network])
    # Parameters are allocated when they are loaded; buffers that are not in the checkpoint are computed as usual.
    with init_empty_weights(include_buffers=False):
        if network == "text_encoder":
            config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
            module = Qwen3Model(Qwen3Config(**config))
            tensors = {original.original_name(network, name): tensor for name, tensor in tensors.items()}
        else:
            module = _TORCH[network](**config)
    if network == "vae":
        tensors = {n: t for n, t in tensors.items() if not n.endswith(".weight")} | opened.weight_norm
    values = {name: torch.from_numpy(tensor.read()) for name, tensor in tensors.items()}
    module.load_state_dict(values, assign=True)
    return module.eval()
