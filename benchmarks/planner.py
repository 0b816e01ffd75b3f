"""Performance of the planner compared with transformers' own: `python -m benchmarks.planner`.

Both have the same random weights and tokens, and run in one process with alternating calls. A decoding step reads all
weights and the head of codes once: the floor is the time to read these bytes at the rate at which JAX sums a large
array in the same run.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import Qwen3Config, StaticCache
from transformers import Qwen3ForCausalLM as TorchQwen3

from acestep_jax.convert.from_torch import from_module
from acestep_jax.models.config import PlannerConfig
from acestep_jax.models.kernels.compiler import COMPILER_OPTIONS
from acestep_jax.models.kv_cache import Cache
from acestep_jax.models.qwen3 import Qwen3ForCausalLM
from benchmarks import measure
from benchmarks.floor import PLANNER_SIZES, planner_step_bytes
from benchmarks.transformer import cast

SIZES = PLANNER_SIZES | {
    "tiny": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
}
READ_BYTES = 1 << 29  # size of the array that is summed to measure the bandwidth
# Of transformers: a cache that grows, a static one, and a static one with torch.compile.
FORMS = ("eager", "static", "compile")
COLUMNS = ("what", "side", "cold", "seconds", "tokens/s", "steps/s", "GB a step", "time / floor", "torch / ours")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--size", choices=SIZES, default="0.6B", help="size of the planner [0.6B]")
    add("--layers", type=int, default=0, help="number of layers; 0: all [0]")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of weights and products [float32]")
    add("--batch", type=int, default=2, help="rows: a song with guidance has two [2]")
    add("--prompt", type=int, default=256, help="tokens of a prompt [256]")
    add("--steps", type=int, default=16, help="tokens decoded per call [16]")
    add("--window", type=int, default=512, help="slots of the cache to attend to [512]")
    add("--torch", nargs="*", choices=FORMS, default=list(FORMS), help="forms of transformers [all]")
    add("--runs", type=int, default=3, help="calls of each side after the first [3]")
    options = parser.parse_args()

    arguments = dict(vocab_size=217204, num_key_value_heads=2 if options.size == "tiny" else 8, head_dim=128)
    arguments |= SIZES[options.size]
    if options.layers:
        arguments["num_hidden_layers"] = options.layers
    config = PlannerConfig(**arguments)
    measure.print_header()
    print(
        f"{options.size}, {config.num_hidden_layers} layers, {options.batch} rows, {options.dtype}; seconds, median of "
        f"{options.runs} (lowest - highest)\n"
    )
    prefills, decodes = sides(config, options)
    row = measure.print_table(COLUMNS)
    timings = measure.alternate(prefills, options.runs)
    for name, timing in timings.items():
        rate = f"{options.batch * options.prompt / timing.median:.0f}"
        row("prefill", name, f"{timing.cold:.1f}", timing, rate, "", "", "", _ratio(timings, name))
    slots = options.prompt + options.steps // 2  # the mean position
    size = planner_step_bytes(config, options.batch, slots, jnp.dtype(options.dtype).itemsize)
    timings = measure.alternate(decodes | {"sum": _read()}, options.runs)
    bandwidth = READ_BYTES / timings.pop("sum").median
    for name, timing in timings.items():
        rate, floor = options.steps / timing.median, size / bandwidth
        cells = f"{options.batch * rate:.1f}", f"{rate:.2f}", f"{size / 1e9:.3f}", f"{1 / rate / floor:.2f}"
        row("decode", name, f"{timing.cold:.1f}", timing, *cells, _ratio(timings, name))
    print(f"\nA large array is read at {bandwidth / 1e9:.1f} GB/s.")


def _ratio(timings: dict[str, measure.Timing], name: str) -> str:
    return f"{timings[name].median / timings['JAX'].median:.2f}"


def sides(config: PlannerConfig, options: argparse.Namespace) -> tuple[dict, dict]:
    """Return the calls of prefill and of decoding, by side."""
    prompts = np.random.default_rng(0).integers(0, 151643, (options.batch, options.prompt))
    # transformers' static cache is not truncated between calls.
    slots = max(options.window, options.prompt + options.steps * (options.runs + 2))
    values = config.to_hf()
    with torch.device("meta"):
        theirs = TorchQwen3(Qwen3Config(**values))
    theirs = theirs.to_empty(device="cpu").eval()
    theirs.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in theirs.parameters():
            value.normal_(0.0, 0.02, generator=generator) if value.ndim > 1 else value.fill_(1.0)
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    ours = cast(from_module("planner", config, theirs), options.dtype)
    assert isinstance(ours, Qwen3ForCausalLM)
    ours = ours.split()
    start = np.zeros(options.batch, np.int32)
    tokens = jnp.asarray(prompts, jnp.int32)

    def read() -> tuple[jax.Array, Cache]:
        return prefill(ours, tokens, start, slots=options.window)

    kept = read()
    head = jax.jit(lambda model: model.code_head())(ours)
    prefills = {"JAX": lambda: jax.block_until_ready(read())}
    decodes = {
        "JAX": lambda: jax.block_until_ready(
            decode(ours, head, *kept, start, options.prompt, steps=options.steps, window=options.window)
        )
    }
    theirs = theirs.to(measure.torch_device(), getattr(torch, options.dtype))
    for form in options.torch:
        prefills[f"torch {form}"], decodes[f"torch {form}"] = _torch_calls(theirs, form, prompts, slots, options.steps)
    return prefills, decodes


def _torch_calls(theirs: TorchQwen3, form: str, prompts: np.ndarray, slots: int, steps: int):
    device = measure.torch_device()
    ids = torch.from_numpy(prompts).to(device)
    first, count = 151669, 64000
    model = theirs.model
    step = model
    if form == "compile":  # as transformers' `generate` does; the mode means CUDA graphs
        step = torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else None)

    @torch.inference_mode()
    def read():
        cache = StaticCache(config=theirs.config, max_cache_len=slots) if form != "eager" else None
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        measure.wait_for_torch()
        return out.last_hidden_state[:, -1], out.past_key_values

    @torch.inference_mode()
    def write():
        hidden, cache = read_once()
        for _ in range(steps):
            token = (hidden @ theirs.lm_head.weight[first : first + count].T).argmax(-1) + first
            at = torch.tensor([cache.get_seq_length()], device=device)
            out = step(input_ids=token[:, None], past_key_values=cache, use_cache=True, cache_position=at)
            hidden = out.last_hidden_state[:, -1].clone()  # the next step of a CUDA graph reuses its memory
        if form == "eager":
            cache.crop(-steps)
        measure.wait_for_torch()

    @functools.cache
    def read_once():
        return read()

    return read, write


@functools.partial(jax.jit, static_argnames="slots", compiler_options=COMPILER_OPTIONS)
def prefill(model: Qwen3ForCausalLM, tokens: jax.Array, start: jax.Array, *, slots: int) -> tuple[jax.Array, Cache]:
    return model.prefill(tokens, start, model.init_cache(tokens.shape[0], slots))


@functools.partial(jax.jit, static_argnames=("steps", "window"), compiler_options=COMPILER_OPTIONS)
def decode(model, head, hidden, cache, start, position, *, steps: int, window: int) -> jax.Array:
    """Write the likeliest code `steps` times; return the hidden state of the last one."""

    def body(i, carry):
        hidden, cache = carry
        token = model.planner.first_code + jnp.argmax(model.code_logits(hidden, head)[:, 1:], -1)
        return model.decode(token, position + i, start, cache, window=window)

    return jax.lax.fori_loop(0, steps, body, (hidden, cache))[0]


def _read():
    x = jnp.ones(READ_BYTES // 4, jnp.float32).reshape(-1, 4096)
    total = jax.jit(jnp.sum)
    return lambda: total(x).block_until_ready()


if __name__ == "__main__":
    main()
