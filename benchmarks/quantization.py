"""Errors of 8-bit weights compared with bfloat16: `python -m benchmarks.quantization`.

A transformer with random weights N(0, 0.02), in each variant, is compared with float32: the change that a layer makes
to the same input, and the latents after the steps of a turbo model from the same noise. With `--planner`, a planner is
compared instead: the logits of codes after each of 64 tokens, and how often the best code is the same. Errors are
relative, |x - x'| / |x'|. Products of 8 bits by 8 bits, which XLA does not compute on a CPU, are emulated: values are
rounded as on a device, and multiplied in float32.
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from acestep_jax.diffusion.schedule import schedule
from acestep_jax.io import checkpoint
from acestep_jax.models.config import NetworkConfig, PlannerConfig, TransformerConfig
from acestep_jax.models.kernels import quantized
from acestep_jax.models.layers import rotary_embedding
from acestep_jax.models.quantization import QuantizedLinear, parts, quantize
from acestep_jax.models.registry import PLANNER
from acestep_jax.models.runtime import QUANTIZATIONS, Runtime
from acestep_jax.models.transformer import AceStepTransformer1DModel
from benchmarks import measure
from benchmarks.floor import FRAMES_PER_SECOND, TRANSFORMER_SIZES

COLUMNS = ("weights", "activations", "bytes / bfloat16", "a layer's change", "/ bfloat16", "latents", "/ bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=str(__doc__).split("\n")[0])
    add = parser.add_argument
    add("--size", choices=TRANSFORMER_SIZES, default="2B", help="width of the blocks [2B]")
    add("--layers", type=int, default=4, help="number of layers, even; 0: all [4]")
    add("--seconds", type=float, default=30, help="length of the song [30]")
    add("--steps", type=int, default=8, help="steps from noise to latents [8]")
    add("--condition-tokens", type=int, default=128, help="number of tokens to attend to [128]")
    add("--planner", action="store_true", help="compare the 0.6B planner instead, with --layers layers")
    add("--round", action="store_true", help="use weights that are exact in bfloat16, like published ones")
    options = parser.parse_args()

    if options.planner:
        compare_planners(options)
        return
    arguments = dict(TRANSFORMER_SIZES[options.size])
    if options.layers:
        arguments["num_hidden_layers"] = options.layers
    config = TransformerConfig(**arguments, is_turbo=True)
    exact = random_network("transformer", config, rounded=options.round)
    assert isinstance(exact, AceStepTransformer1DModel)
    frames = round(options.seconds * FRAMES_PER_SECOND)
    rng = np.random.default_rng(1)
    shapes = (frames, 64), (options.condition_tokens, config.encoder_hidden_size or config.hidden_size), (frames, 128)
    noise, condition, context = (jnp.asarray(rng.standard_normal((1, *shape), np.float32)) for shape in shapes)
    times = schedule(options.steps, 3.0)

    def results(network: nnx.Module, inputs: list[jax.Array]) -> tuple[list[np.ndarray], np.ndarray]:
        changes = [np.asarray(layer_change(network, x, condition, i), np.float32) for i, x in enumerate(inputs)]
        return changes, np.asarray(generate(network, noise, condition, context, times))

    measure.print_header()
    print(f"{options.size}, {config.num_hidden_layers} layers, {options.seconds:g} s, {options.steps} steps\n")
    inputs = layer_inputs(exact, noise, condition, context)
    reference = results(exact, inputs)
    row = measure.print_table(COLUMNS)
    half = _cast(exact, "bfloat16")
    plain, known = _bytes(half), None
    for weights, activations, network in variants(exact, half):
        changes, latents = results(network, inputs)
        layers = float(np.mean([_error(*pair) for pair in zip(changes, reference[0], strict=True)]))
        errors = layers, _error(latents, reference[1])
        known = known or errors
        cells = [(f"{error:.2e}", f"{error / base:.2f}") for error, base in zip(errors, known, strict=True)]
        row(weights, activations, f"{_bytes(network) / plain:.3f}", *cells[0], *cells[1])


def compare_planners(options: argparse.Namespace) -> None:
    """Print the table of a planner."""
    layers = {"num_hidden_layers": options.layers} if options.layers else {}
    exact = random_network(PLANNER, config := PlannerConfig(**layers), rounded=options.round)
    tokens = np.random.default_rng(1).integers(0, config.first_code, (1, 64)).astype(np.int32)
    logits = jax.jit(lambda model: model.code_logits(model.hidden_states(tokens, np.zeros(1, np.int32))))
    measure.print_header()
    print(f"planner of 0.6B, {config.num_hidden_layers} layers, 64 tokens\n")
    row = measure.print_table(("weights", "activations", "bytes / bfloat16", "logits", "/ bfloat16", "same best code"))
    reference = np.asarray(logits(exact))[..., : config.num_codes + 1]
    half = _cast(exact, "bfloat16")
    plain, known = _bytes(half), None
    for weights, activations, network in variants(exact, half):
        if "products" in activations:  # the planner does not use these
            continue
        found = np.asarray(logits(network))[..., : config.num_codes + 1]
        error = _error(found, reference)
        known = known or error
        same = (found.argmax(-1) == reference.argmax(-1)).mean()
        cells = f"{_bytes(network) / plain:.3f}", f"{error:.2e}", f"{error / known:.2f}", f"{same:.0%}"
        row(weights, activations, *cells)


def variants(exact: nnx.Module, half: nnx.Module):
    """Yield each variant as (dtype of weights, dtype of activations, network); bfloat16 first."""
    yield "bfloat16", "bfloat16", half
    for kind in QUANTIZATIONS:
        made = quantize(exact, kind)
        yield kind, "float32", made
        made = _cast(made, "bfloat16")
        yield kind, "bfloat16", made
        yield kind, f"bfloat16, in products {kind}", _with_both(made)


def random_network(name: str, config: NetworkConfig, *, rounded: bool) -> nnx.Module:
    """Return a network with matrices drawn from N(0, 0.02) and norms of 1."""
    module = checkpoint.abstract(name, config)
    rng = np.random.default_rng(0)
    arrays = {}
    for name, variable in checkpoint.leaves(module).items():
        value = np.ones(variable.shape, np.float32)
        if not name.endswith(".scale"):
            value = rng.standard_normal(variable.shape, np.float32) * np.float32(0.02)
        array = jnp.asarray(value)
        arrays[name] = array.astype(jnp.bfloat16).astype(jnp.float32) if rounded else array
    return checkpoint.assemble(module, arrays)


def generate(network, noise, condition, context, times) -> jax.Array:
    """Return the latents after Euler steps through `times`, in float32 as in the pipeline."""
    x = noise
    for t, after in zip(times[:-1], times[1:], strict=True):
        x = x + (after - t) * _velocity(network, x, jnp.full((1,), t), condition, context).astype(jnp.float32)
    return x


@jax.jit
def _velocity(network, x, t, condition, context):
    return network(x, t, t, condition, context)


@jax.jit
def layer_inputs(network, x, condition, context) -> list[jax.Array]:
    """Return the input of each layer, [B, T, D], at t = 1."""
    h = network.proj_in_conv(jnp.concatenate([context, x], axis=-1))
    found = []
    for i in range(network.config.num_hidden_layers):
        found.append(h)
        h = h + _change(network, h, condition, i)
    return found


@jax.jit(static_argnums=3)
def layer_change(network, x, condition, index: int) -> jax.Array:
    """Return the change that a layer makes to x [B, T, D]."""
    return _change(network, x.astype(network.runtime.dtype), condition, index)


def _change(network, x, condition, index: int) -> jax.Array:
    config, dtype = network.config, jnp.dtype(network.runtime.dtype)
    layer = jax.tree.map(lambda leaf: leaf[index], network.layers)
    time = jnp.ones(1)
    rope = rotary_embedding(x.shape[1], config.head_dim, config.rope_theta)
    embedded = network.condition_embedder(condition.astype(dtype))
    modulation = network.embed_time(time, time).modulation
    return layer(x, modulation, embedded, rope=rope, window=network.windows[index]) - x


def _cast(network: nnx.Module, dtype: str) -> nnx.Module:
    """Return the network in a dtype, except for quantised weights and their scales."""
    network = nnx.merge(*nnx.split(network))
    modules: list[Any] = [module for _, module in nnx.iter_modules(network)]
    for module in modules:
        if isinstance(module, nnx.Linear | nnx.Embed):
            module.dtype = jnp.dtype(dtype)
        elif isinstance(getattr(module, "runtime", None), Runtime):
            module.runtime = dataclasses.replace(module.runtime, dtype=dtype, param_dtype=dtype)
    quantised = parts(network)
    kept = {*quantised, *(part.scale for part in quantised.values())}
    leaves = checkpoint.leaves(network)
    return checkpoint.assemble(network, {n: v[...] if n in kept else v[...].astype(dtype) for n, v in leaves.items()})


def _with_both(network: nnx.Module) -> nnx.Module:
    """Return the network with emulated products of 8 bits by 8 bits."""
    network = nnx.merge(*nnx.split(network))
    for _, module in nnx.iter_modules(network):
        if isinstance(module, QuantizedLinear):
            module.dot_general = _emulated
    return network


def _emulated(x: jax.Array, w: jax.Array, dimensions, **options) -> jax.Array:
    kind = quantized.kind_of(w.dtype)
    rows, scale = quantized.quantize(x, kind, -1)
    return quantized.weight_only(rows.astype(jnp.float32), w, dimensions, **options) * scale


def _bytes(network: nnx.Module) -> int:
    return sum(variable[...].nbytes for variable in checkpoint.leaves(network).values())


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


if __name__ == "__main__":
    main()
