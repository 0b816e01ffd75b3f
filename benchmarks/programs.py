"""The programs that are compiled ahead of time, with the shapes and shardings of their arguments on a mesh."""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from acestep_jax.diffusion import denoise
from acestep_jax.distributed import partition_spec, variable_sharding
from acestep_jax.inputs import programs as stages
from acestep_jax.inputs.buckets import BUCKETS
from acestep_jax.inputs.collate import Tokens
from acestep_jax.io import checkpoint
from acestep_jax.memory import configs_of, needed_bytes, weight_bytes
from acestep_jax.models.config import (
    AudioTokenDetokenizerConfig,
    AudioTokenizerConfig,
    AutoencoderConfig,
    ConditionEncoderConfig,
    LoRAConfig,
    NetworkConfig,
    PlannerConfig,
    TextEncoderConfig,
    TransformerConfig,
)
from acestep_jax.models.kernels.platform import platform
from acestep_jax.models.kernels.unstacked import unstacking_pays
from acestep_jax.models.kv_cache import KVCache
from acestep_jax.models.lora import add_lora
from acestep_jax.models.qwen3 import Qwen3ForCausalLM
from acestep_jax.models.registry import FAMILY
from acestep_jax.models.runtime import Runtime
from acestep_jax.models.scan import period
from acestep_jax.models.transformer import AceStepTransformer1DModel
from acestep_jax.planner import generate as planner
from acestep_jax.planner.sampling import Drawing, LanguageSampling
from acestep_jax.planner.writer import CODE_BUCKETS, PROMPT_BUCKETS
from acestep_jax.train import step as steps
from acestep_jax.train.config import TASKS, DataConfig, OptimizerConfig, TrainConfig
from acestep_jax.train.objective import Batch, Frozen
from benchmarks.floor import (
    FRAMES_PER_SECOND,
    PLANNER_SIZES,
    TRANSFORMER_SIZES,
    decoder_flops,
    lyric_encoder_flops,
    planner_step_bytes,
    planner_step_flops,
    text_encoder_flops,
    tokenizer_flops,
    training_flops,
    transformer_flops,
)

STEPS = 8
PLAN_STEPS = 64  # that a run of the planner makes
PROMPT_TOKENS = 128  # prompt tokens in training; the other condition tokens are lyrics
BFLOAT16 = Runtime.of("bfloat16")


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with the shapes of its arguments.

    flops: FLOPs that it needs on all chips together.
    bytes: bytes of the weights that it must read once per step, on all chips together; 0 if it is bound by FLOPs.
    steps: number of steps that it makes.
    layer_trips: trip count of the loop over layers; None if there is no such loop, or none that represents the program.
    values: to run it, the values of integers and flags by the end of their path in the arguments; others are zeros.
    passes: how often a run makes what `flops`, `bytes` and `steps` count.
    """

    name: str
    function: Callable
    arguments: tuple
    static: dict[str, Any]
    flops: float
    bytes: float = 0.0
    steps: int = 1
    layer_trips: int | None = None
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    passes: int = 1


def programs(
    options: argparse.Namespace,
    mesh: Mesh,
    seconds: float,
    batch: int,
    precision: str = "bfloat16",
    usable: float | None = None,
) -> Iterator[Program]:
    """Yield the requested programs. All frames of a bucket count as frames of the song.

    Args:
        usable: bytes that JAX may use of a device. With enough memory, one GPU denoises with unstacked layers, as in
            the pipeline.
    """
    frames, runtime = round(seconds * FRAMES_PER_SECOND), Runtime.of(precision)
    if "encode" in options.stage:
        yield encode_program(options, mesh, batch, runtime)
    if "denoise" in options.stage:
        for size in options.size:
            quantized = dataclasses.replace(runtime, quantization=options.quantization)
            with jax.set_mesh(mesh):
                needed = needed_bytes(configs_of(size), precision, platform(), quantization=options.quantization)
                needed += leaf_bytes("transformer", transformer_config(options, size), quantized)
                unstacked = mesh.size == 1 and unstacking_pays(int(needed), usable)
            yield denoise_program(options, mesh, size, BUCKETS.frames_of(frames), batch, quantized, unstacked)
    if "train" in options.stage:
        for size in options.size:
            for method in options.method:
                yield train_program(options, mesh, size, method, frames, batch)
    if "decode" in options.stage:
        yield decode_program(mesh, BUCKETS.frames_of(frames), batch, runtime)
    if "plan" in options.stage:
        quantized = dataclasses.replace(runtime, quantization=options.quantization)
        for size in options.planner:
            yield from plan_programs(mesh, size, seconds, batch, quantized)


def encode_program(options: argparse.Namespace, mesh: Mesh, batch: int, runtime: Runtime = BFLOAT16) -> Program:
    """Return the program that encodes texts and lyrics; the lyrics' tokens include the timbre token of silence."""
    text_config, config = TextEncoderConfig(), ConditionEncoderConfig()
    lyrics = options.condition_tokens - PROMPT_TOKENS
    tokens = lambda count: Tokens(  # noqa: E731
        sharded((batch, count), jnp.int32, ("batch", None), mesh), sharded((batch, count), bool, ("batch", None), mesh)
    )
    arguments = (
        abstract("text_encoder", text_config, mesh, runtime=runtime),
        abstract("condition_encoder", config, mesh, runtime=runtime),
        tokens(PROMPT_TOKENS),
        tokens(lyrics),
        sharded((1, config.hidden_size), runtime.dtype, (None, None), mesh),  # the encoded timbre of silence
        sharded((batch,), jnp.int32, ("batch",), mesh),
    )
    flops = lyric_encoder_flops(config, lyrics, batch) + text_encoder_flops(text_config, PROMPT_TOKENS, batch)
    trips = text_config.num_hidden_layers
    return Program("encode", stages.encode, arguments, {}, flops, layer_trips=trips, values={".mask": True})


def plan_programs(mesh: Mesh, size: str, seconds: float, batch: int, runtime: Runtime = BFLOAT16) -> Iterator[Program]:
    """Yield the programs of the planner that read a prompt and write audio codes with guidance: two rows per song, and
    in a step a cache half full.

    The loop over steps ends depending on data, so it counts once, and figures are per step.
    """
    config = PlannerConfig(vocab_size=217204, **PLANNER_SIZES[size])
    written = next(n for n in CODE_BUCKETS if n >= round(5 * seconds))
    prompt, rows = PROMPT_BUCKETS[0], 2 * batch
    slots = prompt + written
    model = abstract("planner", config, mesh, runtime=runtime)
    if mesh.size == 1:
        with jax.set_mesh(mesh):
            model = jax.eval_shape(Qwen3ForCausalLM.split, model)
    drawing = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, Drawing.of(LanguageSampling(), batch)))
    counts = sharded((batch,), jnp.int32, ("batch",), mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    inputs = planner.CodeInputs(
        planner.Prompts(
            sharded((rows, prompt), jnp.int32, ("batch", None), mesh), sharded((rows,), jnp.int32, ("batch",), mesh)
        ),
        counts,
        keys,
        drawing,
        ends_in_loop=jax.ShapeDtypeStruct((), jnp.bool_),
    )
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda m, i: planner.begin(m, i, slots=slots), model, inputs)
        state = state._replace(cache=jax.eval_shape(lambda m, c: m.grow(c, slots), model, state.cache))
    if isinstance(state.cache, KVCache):
        axes = "layers", "batch", "heads", None, None
        state = state._replace(cache=jax.tree.map(lambda x: sharded(x.shape, x.dtype, axes, mesh), state.cache))
    until = jax.ShapeDtypeStruct((), jnp.int32)
    width = 1 if runtime.quantization else jnp.dtype(runtime.param_dtype).itemsize
    read = planner_step_bytes(config, rows, prompt + written // 2, width, jnp.dtype(runtime.dtype).itemsize)
    flops = planner_step_flops(config, rows, prompt + written // 2)
    arguments = model, inputs, state, until
    trips = config.num_hidden_layers
    prompt_flops = text_encoder_flops(config, prompt, rows)
    yield Program(
        f"plan {size}, a prompt",
        planner.begin_program,
        (model, inputs),
        dict(slots=slots),
        prompt_flops,
        layer_trips=trips,
        values={".targets": written},
    )
    values = {".targets": written, ".step": written // 2, "[3]": written // 2 + PLAN_STEPS}
    yield Program(
        f"plan {size}, a step",
        planner.advance_program,
        arguments,
        dict(window=slots),
        flops,
        read,
        layer_trips=trips,
        values=values,
        passes=PLAN_STEPS,
    )


def decode_program(mesh: Mesh, frames: int, batch: int, runtime: Runtime = BFLOAT16) -> Program:
    config, scaled = AutoencoderConfig(), jax.ShapeDtypeStruct((batch,), jnp.bool_)
    vae = abstract("vae", config, mesh, runtime=runtime)
    arguments = vae, _latents(batch, frames, mesh), _counts(batch), scaled
    flops = decoder_flops(config, frames, batch)
    return Program("decode", stages.decode, arguments, {}, flops, values={"[2]": frames})


def denoise_program(
    options: argparse.Namespace,
    mesh: Mesh,
    size: str,
    frames: int,
    batch: int,
    runtime: Runtime = BFLOAT16,
    unstacked: bool = False,
) -> Program:
    config, tokens = transformer_config(options, size), options.condition_tokens
    width = config.encoder_hidden_size or config.hidden_size
    latents, counts = _latents(batch, frames, mesh), _counts(batch)
    condition = sharded((batch, tokens, width), runtime.dtype, ("batch", None, None), mesh)
    flags = jax.ShapeDtypeStruct((batch, frames), jnp.bool_)
    inputs = denoise.Inputs(
        x=latents,
        lengths=counts,
        condition=denoise.Condition(condition, counts),
        source=latents,
        silent=flags,
        mask=flags,
        times=jax.ShapeDtypeStruct((STEPS + 1,), jnp.float32),
        guided=jax.ShapeDtypeStruct((STEPS + 1,), jnp.bool_),
        guidance_scale=jax.ShapeDtypeStruct((), jnp.float32),
    )
    transformer = abstract("transformer", config, mesh, runtime=runtime)
    if unstacked:
        transformer = jax.eval_shape(AceStepTransformer1DModel.unstacked, transformer)
    encoder = abstract("condition_encoder", ConditionEncoderConfig(), mesh, runtime=runtime)
    arguments = transformer, encoder, inputs
    flops = STEPS * transformer_flops(config, frames, tokens, batch)
    weights = STEPS * leaf_bytes("transformer", config, runtime)
    method = dict(method=denoise.Method())
    trips = None if unstacked else config.num_hidden_layers // period(config.windows(config.num_hidden_layers))
    values = {".condition.lengths": tokens, ".lengths": frames, ".mask": True}
    return Program(f"denoise {size}", denoise.denoise, arguments, method, flops, weights, STEPS, trips, values)


def train_program(options: argparse.Namespace, mesh: Mesh, size: str, method: str, frames: int, batch: int) -> Program:
    """Return the step of `acestep-jax train fit --dtype bfloat16`, with all tasks in the mixture.

    `batch` is the number of examples in a step, in `options.accumulation` parts.
    """
    lora = method == "lora"
    part, lyrics = batch // options.accumulation, options.condition_tokens - 1 - PROMPT_TOKENS
    settings = TrainConfig(
        data="",
        checkpoint="",
        out="",
        method=method,
        dtype="bfloat16",
        remat=options.remat,
        lora=LoRAConfig(rank=options.rank, alpha=2.0 * options.rank),
        optimizer=OptimizerConfig(accumulation=options.accumulation),
        examples=DataConfig(batch_size=part),
    )
    config = transformer_config(options, size)
    runtime = Runtime(dtype="bfloat16", param_dtype="bfloat16" if lora else "float32", remat=options.remat)
    transformer = abstract("transformer", config, mesh, settings.lora if lora else None, runtime)
    model, params = steps.Model.split(transformer, nnx.LoRAParam if lora else nnx.Param, mesh)
    optimizer = steps.make_optimizer(settings.optimizer, settings.steps)
    shardings = steps.state_shardings(model, params, optimizer, settings.optimizer)
    state = jax.eval_shape(lambda p: steps.TrainState(jnp.int32(0), p, optimizer.init(p), None), params)
    state = jax.tree.map(_placed, state, shardings)

    encoder = ConditionEncoderConfig()
    text_encoder = TextEncoderConfig()
    embedding = checkpoint.leaves(abstract("text_encoder", text_encoder, mesh))["embed_tokens.embedding"].get_value()
    tokenizer_config, detokenizer_config = AudioTokenizerConfig(), AudioTokenDetokenizerConfig()
    frozen = Frozen(
        abstract("condition_encoder", encoder, mesh),
        embedding,
        abstract("audio_tokenizer", tokenizer_config, mesh),
        abstract("audio_token_detokenizer", detokenizer_config, mesh),
        jax.ShapeDtypeStruct((1, 1, encoder.hidden_size), jnp.bfloat16, sharding=NamedSharding(mesh, P())),
    )
    shape = lambda *axes, dtype=jnp.int32: jax.ShapeDtypeStruct(  # noqa: E731
        (options.accumulation, part, *axes), dtype, sharding=steps.batch_sharding(mesh, 1)
    )
    latents = shape(frames, config.audio_acoustic_hidden_dim, dtype=jnp.float32)
    examples = Batch(
        mean=latents,
        std=latents,
        lengths=shape(),
        text=shape(PROMPT_TOKENS, encoder.text_hidden_dim, dtype=jnp.bfloat16),
        text_lengths=shape(),
        lyric_ids=shape(lyrics),
        lyric_lengths=shape(),
        tasks=shape(),
        windows=shape(2),
        numbers=shape(dtype=jnp.uint32),
    )
    step = steps.make_step(model, optimizer, settings, shardings)
    rank = options.rank if lora else None
    flops = training_flops(config, frames, options.condition_tokens, batch, rank=rank)
    flops += lyric_encoder_flops(encoder, lyrics, batch)
    covers = batch * settings.examples.task_weights[TASKS.index("cover")]  # on average
    flops += tokenizer_flops(tokenizer_config, detokenizer_config, frames, covers)
    name = f"train {method} {size}, remat {options.remat}"
    trips = config.num_hidden_layers // period(config.windows(config.num_hidden_layers))
    values = {
        ".text_lengths": PROMPT_TOKENS,
        ".lyric_lengths": lyrics,
        ".lengths": frames,
        ".windows": (0, frames),
    }
    return Program(name, step, (state, model.frozen, frozen, examples), {}, flops, layer_trips=trips, values=values)


def transformer_config(options: argparse.Namespace, size: str) -> TransformerConfig:
    layers = dict(num_hidden_layers=options.layers) if options.layers else {}
    return TransformerConfig(**TRANSFORMER_SIZES[size] | layers, is_turbo=True)


def abstract(
    name: str,
    config: NetworkConfig,
    mesh: Mesh,
    adapters: LoRAConfig | None = None,
    runtime: Runtime = BFLOAT16,
) -> nnx.Module:
    """Return the abstract network with the shardings of `checkpoint.load`, and with adapters if they are given."""
    module = checkpoint.abstract(name, config, runtime)
    if adapters is not None:
        make = FAMILY.networks[name][0]
        module = jax.eval_shape(
            lambda: add_lora(make(config, runtime=runtime, rngs=nnx.Rngs(0)), adapters, rngs=nnx.Rngs(0))
        )
    leaves = {
        leaf: jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=variable_sharding(variable, mesh))
        for leaf, variable in checkpoint.leaves(module).items()
    }
    return checkpoint.assemble(module, leaves)


def leaf_bytes(name: str, config: NetworkConfig, runtime: Runtime) -> float:
    """Return the size of a network's weights."""
    return weight_bytes({name: config}, runtime.param_dtype, runtime.quantization)[name]


def sharded(shape: tuple[int, ...], dtype, names: tuple[str | None, ...], mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition_spec(names, shape, mesh)))


def _placed(x: jax.ShapeDtypeStruct, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _latents(batch: int, frames: int, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return sharded((batch, frames, 64), jnp.float32, ("batch", "sequence", None), mesh)


def _counts(batch: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch,), jnp.int32)
