"""Performance of a transformer forward pass compared with diffusers' own: `python -m benchmarks.transformer`.

Both have the same random weights and inputs, and run in one process with alternating calls.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AceStepTransformer1DModel as TorchTransformer
from flax import nnx

from acestep_jax.convert.from_torch import from_module
from acestep_jax.convert.random_checkpoint import randomise
from acestep_jax.models.config import TransformerConfig
from acestep_jax.models.kernels.compiler import COMPILER_OPTIONS
from acestep_jax.models.transformer import AceStepTransformer1DModel
from benchmarks import measure
from benchmarks.floor import FRAMES_PER_SECOND, TRANSFORMER_SIZES, transformer_flops


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transformer", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--size", choices=TRANSFORMER_SIZES, default="2B", help="width of the blocks [2B]")
    add("--layers", type=int, default=4, help="number of layers, even; 0: all [4]")
    add("--condition-tokens", type=int, default=512, help="number of tokens to attend to [512]")
    measure.add_options(parser, [30, 120, 300], 5)
    measure.add_compare_options(parser)
    options = parser.parse_args()

    arguments = dict(TRANSFORMER_SIZES[options.size])
    if options.layers:
        arguments["num_hidden_layers"] = options.layers
    config = TransformerConfig(**arguments)
    measure.print_header()
    print(
        f"{options.size}, {config.num_hidden_layers} layers, batch {options.batch}, {options.condition_tokens} "
        f"condition tokens, {options.dtype}; seconds, median of {options.runs} (lowest - highest)\n"
    )
    row = measure.print_table(measure.COLUMNS)
    names = ["JAX", *(f"torch {form}" for form in options.torch)]
    for seconds in options.seconds:
        frames = round(seconds * FRAMES_PER_SECOND)
        flops = transformer_flops(config, frames, options.condition_tokens, options.batch)
        case = arguments, options.dtype, frames, options.condition_tokens, options.batch, names
        for cells in measure.compare(sides, case, flops, options):
            row(f"{seconds:g} s", *cells)


def sides(
    arguments: dict, dtype: str, frames: int, condition_tokens: int, batch: int, names: list[str]
) -> dict[str, measure.Side]:
    """Return the sides with these names, with the same weights and inputs."""
    theirs = randomise(TorchTransformer(**arguments).eval())
    config = TransformerConfig(**arguments)
    inputs = make_inputs(config, frames, condition_tokens, batch)
    made = {}
    if "JAX" in names:
        ours = cast(from_module("transformer", config, theirs), dtype)
        if jax.default_backend() == "gpu":  # as the pipeline does
            ours = jax.jit(AceStepTransformer1DModel.unstacked)(ours)
        arrays = [jnp.asarray(x) for x in inputs]
        made["JAX"] = measure.jax_side(lambda: forward(ours, *arrays))
    if names != ["JAX"]:
        theirs = theirs.to(measure.torch_device(), getattr(torch, dtype))
        tensors = [torch.from_numpy(x).to(measure.torch_device(), getattr(torch, dtype)) for x in inputs]
    for name in names:
        if name != "JAX":
            run = torch.compile(theirs, dynamic=False) if name.endswith("compile") else theirs
            made[name] = measure.torch_side(lambda run=run: run(*tensors, return_dict=False)[0])
    return made


def cast(network: nnx.Module, dtype: str) -> nnx.Module:
    """Return the network with its weights and computation in `dtype`."""
    network = jax.tree.map(lambda leaf: leaf.astype(dtype), network)
    runtime = dataclasses.replace(network.runtime, dtype=dtype, param_dtype=dtype)
    fresh = nnx.eval_shape(lambda: type(network)(network.config, runtime=runtime, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(fresh), nnx.state(network))


def make_inputs(config: TransformerConfig, frames: int, condition_tokens: int, batch: int) -> list[np.ndarray]:
    """Return the inputs of one call in order, float32."""
    random = np.random.default_rng(0)
    channels = config.audio_acoustic_hidden_dim
    condition = config.encoder_hidden_size or config.hidden_size
    shapes = (batch, frames, channels), (batch, condition_tokens, condition), (batch, frames, 2 * channels)
    x, condition, context = (random.standard_normal(shape, dtype=np.float32) for shape in shapes)
    t = np.full(batch, 0.7, np.float32)
    return [x, t, t, condition, context]


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def forward(network: AceStepTransformer1DModel, *inputs: jax.Array) -> jax.Array:
    return network(*inputs)


if __name__ == "__main__":
    main()
