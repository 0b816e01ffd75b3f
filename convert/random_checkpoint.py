"""PyTorch checkpoints with random weights from diffusers' own classes: `acestep-jax convert random-torch DST`.

They generate noise. Use them to try out the tools, in tests, and for measurements at full size.
"""

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from diffusers.pipelines.ace_step.modeling_ace_step import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
)
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from acestep_jax.io.files import on_this_machine, publish_folder

_ATTENTION = dict(
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=16,
)
_TEXT = dict(hidden_size=48, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
# Arguments of each class that differ from its defaults.
SIZES: dict[str, dict[str, dict]] = {
    "tiny": {
        "transformer": _ATTENTION | {"num_hidden_layers": 4, "in_channels": 24, "audio_acoustic_hidden_dim": 8},
        "condition_encoder": _ATTENTION
        | {
            "text_hidden_dim": 48,
            "timbre_hidden_dim": 8,
            "num_lyric_encoder_hidden_layers": 2,
            "num_timbre_encoder_hidden_layers": 2,
        },
        "audio_tokenizer": _ATTENTION | {"fsq_dim": 64, "audio_acoustic_hidden_dim": 8},
        "audio_token_detokenizer": _ATTENTION | {"audio_acoustic_hidden_dim": 8},
        "text_encoder": _TEXT | {"num_hidden_layers": 2},
        "vae": {"encoder_hidden_size": 16, "decoder_channels": 8, "decoder_input_channels": 8},
    },
    "2B": {
        "text_encoder": dict(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151669,
        ),
    },
}
END_OF_TEXT = "<|endoftext|>"


def write_random_checkpoint(
    destination: str | Path, *, size: str = "tiny", variant: str = "turbo", dtype: str = "float32", seed: int = 0
) -> None:
    """Write a checkpoint in diffusers' layout; the same arguments give the same bytes.

    Args:
        destination: the folder to create.
        size: "tiny", or "2B" for the size of the published model (12.6 GB in float32).
        variant: "turbo", "base" or "sft".
        dtype: dtype of all weights.
        seed: seed of the weights.

    Raises:
        InputError: if `destination` exists.
    """
    with publish_folder(on_this_machine(destination)) as folder:
        pipeline = random_pipeline(SIZES[size], variant=variant, seed=seed)
        if dtype != "float32":
            pipeline.to(getattr(torch, dtype))
        pipeline.save_pretrained(folder)


def random_pipeline(sizes: dict[str, dict], *, variant: str = "turbo", seed: int = 0) -> AceStepPipeline:
    """Return a torch pipeline with random parameters and buffers. `sizes`: one of `SIZES`, or of the same form."""
    tokenizer = byte_tokenizer()
    text = Qwen3Config(
        **{"vocab_size": tokenizer.get_vocab_size(), "rope_theta": 1e6, "rms_norm_eps": 1e-6, **sizes["text_encoder"]}
    )
    networks = {
        "transformer": AceStepTransformer1DModel(
            **sizes.get("transformer", {}), is_turbo=variant == "turbo", model_version=variant
        ),
        "condition_encoder": AceStepConditionEncoder(**sizes.get("condition_encoder", {})),
        "text_encoder": Qwen3Model(text),
        "vae": AutoencoderOobleck(
            **{"downsampling_ratios": [2, 4, 4, 6, 10], "sampling_rate": 48000, **sizes.get("vae", {})}
        ),
        "audio_tokenizer": AceStepAudioTokenizer(**sizes.get("audio_tokenizer", {})),
        "audio_token_detokenizer": AceStepAudioTokenDetokenizer(**sizes.get("audio_token_detokenizer", {})),
    }
    for i, network in enumerate(networks.values()):
        randomise(network.eval(), seed + i)
    return AceStepPipeline(
        **networks,
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, padding_side="right"
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )


@torch.no_grad()
def randomise(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill all parameters and buffers with random values that keep activations near one; return the network.

    In a newly built network norms are one and biases zero, so a swapped or missing one would go unnoticed.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator)

    for name, value in network.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last in ("alpha", "beta"):
            value.copy_(0.3 * normal(value))
        elif last == "weight_g":
            # The norm of a kernel of variance 1 / fan-in; transposed convolutions count their fan-in over axis 0.
            direction = network.get_parameter(name.removesuffix("_g") + "_v")
            fan_in = 2 * direction.shape[0] if ".conv_t1." in name else direction[0].numel()
            norm = (direction[0].numel() / fan_in) ** 0.5
            # Small residual branches, as in a trained network: larger ones would amplify rounding errors thirtyfold.
            gain = 0.25 if ".res_unit" in name and ".conv2." in name else 0.7
            value.copy_(gain * norm * (1.0 + 0.1 * normal(value)))
        elif last == "bias":
            value.copy_(0.1 * normal(value))
        elif value.ndim == 1:
            value.copy_(1.0 + 0.2 * normal(value))
        elif last in ("scale_shift_table", "special_token", "special_tokens", "null_condition_emb"):
            value.copy_(0.5 * normal(value))
        elif "embed_tokens" in name and isinstance(network, Qwen3Model | Qwen3ForCausalLM):
            value.copy_(normal(value))
        else:
            value.copy_(normal(value) / value[0].numel() ** 0.5)
    for name, buffer in network.named_buffers():
        if name == "silence_latent":
            buffer.copy_(normal(buffer))
    return network


def byte_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer that ends each text with `<|endoftext|>`, as Qwen3-Embedding's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    return tokenizer
