"""Performance of Oobleck's decoder compared with diffusers' own: `python -m benchmarks.autoencoder`.

Both have the same random weights and latents, and run in one process with alternating calls.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderOobleck as TorchAutoencoder

from acestep_jax.convert.from_torch import from_module
from acestep_jax.convert.random_checkpoint import randomise
from acestep_jax.models.autoencoder import AutoencoderOobleck
from acestep_jax.models.config import AutoencoderConfig
from acestep_jax.models.kernels.compiler import COMPILER_OPTIONS
from benchmarks import measure
from benchmarks.floor import FRAMES_PER_SECOND, decoder_flops
from benchmarks.transformer import cast

ARGUMENTS = dict(downsampling_ratios=[2, 4, 4, 6, 10], sampling_rate=48000)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoencoder", description=__doc__.split("\n")[0])
    measure.add_options(parser, [10], 5)
    measure.add_compare_options(parser)
    options = parser.parse_args()

    measure.print_header()
    print(f"decode, batch {options.batch}, {options.dtype}; seconds, median of {options.runs} (lowest - highest)\n")
    row = measure.print_table(measure.COLUMNS)
    for seconds in options.seconds:
        shape = options.batch, round(seconds * FRAMES_PER_SECOND), 64
        names = ["JAX", *(f"torch {form}" for form in options.torch)]
        flops = decoder_flops(AutoencoderConfig(**ARGUMENTS), shape[1], options.batch)
        for cells in measure.compare(sides, (options.dtype, shape, names), flops, options):
            row(f"{seconds:g} s", *cells)


def sides(dtype: str, shape: tuple[int, int, int], names: list[str]) -> dict[str, measure.Side]:
    """Return the sides with these names, with the same weights and latents."""
    latents = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    theirs = randomise(TorchAutoencoder(**ARGUMENTS).eval())
    made = {}
    if "JAX" in names:
        ours = cast(from_module("vae", AutoencoderConfig(**ARGUMENTS), theirs), dtype)
        x = jnp.asarray(latents)
        made["JAX"] = measure.jax_side(lambda: decode(ours, x))
    device = measure.torch_device()
    theirs.to(device, getattr(torch, dtype))
    z = torch.from_numpy(latents).to(device, getattr(torch, dtype)).transpose(1, 2)
    for name in names:
        if name != "JAX":
            run = torch.compile(theirs.decode, dynamic=False) if name.endswith("compile") else theirs.decode
            made[name] = measure.torch_side(lambda run=run: run(z).sample)
    return made


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def decode(vae: AutoencoderOobleck, latents: jax.Array) -> jax.Array:
    return vae.decode(latents)


if __name__ == "__main__":
    main()
