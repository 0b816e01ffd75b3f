"""Performance of text-to-music, all stages, compared with diffusers' own pipeline: `python -m benchmarks.pipeline`.

Both have the same random weights, prompt and number of steps, and run in one process with alternating calls; each side
draws its own noise.
"""

import argparse
import copy
import functools
from collections.abc import Callable

import jax
import torch
from tokenizers import Tokenizer

from acestep_jax import AceStepPipeline
from acestep_jax.convert.from_torch import from_module
from acestep_jax.convert.random_checkpoint import SIZES, random_pipeline
from acestep_jax.models.registry import FAMILY
from acestep_jax.placement import choose
from benchmarks import measure
from benchmarks.floor import TRANSFORMER_SIZES
from benchmarks.transformer import cast

PROMPT = "dream pop with shimmering guitars and a steady beat"
LYRICS = "[verse]\nsoft light on the water, slow days of summer\n[chorus]\nand we sing along\n" * 3
STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--size", choices=TRANSFORMER_SIZES, default="2B", help="width of the blocks [2B]")
    add("--layers", type=int, default=4, help="layers of the transformer, other stacks in proportion; 0: all [4]")
    measure.add_options(parser, [30], 3)
    options = parser.parse_args()

    measure.print_header()
    depth = f"{options.layers} layers" if options.layers else "all layers"
    print(
        f"{options.size}, {depth}, batch {options.batch}, {STEPS} steps, {options.dtype}; seconds, median of "
        f"{options.runs} (lowest - highest)\n"
    )
    row = measure.print_table(("audio", "side", "cold", "warm", "torch / ours", "times faster than real time"))
    ours, theirs = pair(options.size, options.layers, options.dtype)
    for seconds in options.seconds:
        prompts = [PROMPT] * options.batch
        calls = {"JAX": functools.partial(ours, prompts, LYRICS, seconds, num_inference_steps=STEPS, seed=0)}
        for form in options.torch:
            calls[f"torch {form}"] = torch_call(theirs, form, options.batch, seconds)
        timings = measure.alternate(calls, options.runs)
        for name, timing in timings.items():
            ratio = timing.median / timings["JAX"].median
            speed = options.batch * seconds / timing.median
            row(f"{seconds:g} s", name, f"{timing.cold:.1f}", timing, f"{ratio:.2f}", f"{speed:.2f}")


def pair(size: str, layers: int, dtype: str):
    """Return our pipeline and diffusers' with the same random weights, on the device."""
    theirs = random_pipeline(shrunk(size, layers))
    networks = {}
    for name in FAMILY.networks:
        module = getattr(theirs, name)
        networks[name] = cast(from_module(name, config_of(name, module), module), dtype)
    tokenizer = Tokenizer.from_str(theirs.tokenizer.backend_tokenizer.to_str())
    theirs.set_progress_bar_config(disable=True)
    theirs.to(measure.torch_device(), getattr(torch, dtype))
    weights = {name: sum(x.nbytes for x in jax.tree.leaves(network)) for name, network in networks.items()}
    placement = choose(sum(weights.values()), None, None, weights["transformer"])  # as `from_pretrained` does
    return AceStepPipeline(**networks, tokenizer=tokenizer, placement=placement), theirs


def shrunk(size: str, layers: int) -> dict[str, dict]:
    """Return arguments of each torch class for `random_pipeline`, with a transformer of `layers` layers; 0: all."""
    sizes = copy.deepcopy(SIZES["2B"]) | {"transformer": dict(TRANSFORMER_SIZES[size]), "condition_encoder": {}}
    if layers:
        whole = sizes["transformer"].get("num_hidden_layers", 24)

        def part(count: int) -> int:
            return max(2, 2 * round(count * layers / whole / 2))

        sizes["transformer"]["num_hidden_layers"] = layers
        sizes["text_encoder"]["num_hidden_layers"] = part(28)
        sizes["condition_encoder"] = dict(
            num_lyric_encoder_hidden_layers=part(8), num_timbre_encoder_hidden_layers=part(4)
        )
    return sizes


def config_of(name: str, module: torch.nn.Module):
    """Return our config for a torch module."""
    values = module.config.to_dict() if name == "text_encoder" else module.config
    return FAMILY.networks[name][1].from_hf(values)


def torch_call(pipeline, form: str, batch: int, seconds: float) -> Callable[[], object]:
    if form == "compile":
        pipeline = copy.copy(pipeline)
        pipeline.transformer = torch.compile(pipeline.transformer, dynamic=False)
        pipeline.vae = copy.copy(pipeline.vae)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, dynamic=False)

    def call():
        generator = torch.Generator(measure.torch_device()).manual_seed(0)
        return pipeline(
            [PROMPT] * batch,
            [LYRICS] * batch,
            audio_duration=seconds,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            generator=generator,
        )

    return call


if __name__ == "__main__":
    main()
