"""Performance of a fine-tuning step compared with a plain PyTorch loop: `python -m benchmarks.training`.

Ours is the compiled step of `acestep-jax train fit`. PyTorch's is diffusers' transformer, PEFT's adapters if there are
any, the loss, `clip_grad_norm_` and AdamW. Both start from the same random weights and adapters and use the same batch,
noise and timesteps, so that their losses agree at every step. Both run the lyric encoder and the projection of the
prompt in each step, without gradients; both are given the timbre token. Ours also draws noise and timesteps, which
PyTorch gets as inputs. Adapters have no dropout, because the dropped inputs would differ.
"""

import argparse
import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AceStepTransformer1DModel as TorchTransformer
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder as TorchConditionEncoder
from flax import nnx
from peft import LoraConfig, get_peft_model

from acestep_jax.convert.from_torch import from_module
from acestep_jax.convert.random_checkpoint import randomise
from acestep_jax.models.config import ConditionEncoderConfig, LoRAConfig, TransformerConfig
from acestep_jax.models.lora import add_lora
from acestep_jax.train import step as steps
from acestep_jax.train.config import DataConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from acestep_jax.train.objective import Batch, Frozen, context_latents, draw
from benchmarks import measure
from benchmarks.floor import FRAMES_PER_SECOND, TRANSFORMER_SIZES, lyric_encoder_flops, training_flops
from benchmarks.pipeline import shrunk
from benchmarks.transformer import cast

PROMPT_TOKENS, LYRIC_TOKENS = 128, 256
COLUMNS = (*measure.COLUMNS[:-1], "difference of losses", "audio s / s", "of the rate of x @ w")


@dataclasses.dataclass(frozen=True)
class Case:
    """A case to measure."""

    size: str
    layers: int
    method: str
    rank: int
    dtype: str
    remat: str
    frames: int
    batch: int

    @property
    def arguments(self) -> dict[str, dict]:
        """The constructor arguments for each network's torch class."""
        sizes = shrunk(self.size, self.layers)
        return {name: sizes[name] for name in ("transformer", "condition_encoder")}

    @property
    def flops(self) -> float:
        config = TransformerConfig(**self.arguments["transformer"])
        encoder = ConditionEncoderConfig(**self.arguments["condition_encoder"])
        tokens = LYRIC_TOKENS + 1 + PROMPT_TOKENS
        rank = self.rank if self.method == "lora" else None
        step = training_flops(config, self.frames, tokens, self.batch, rank=rank)
        return step + lyric_encoder_flops(encoder, LYRIC_TOKENS, self.batch)

    @property
    def train_config(self) -> TrainConfig:
        """The config of `acestep-jax train fit`, with a constant learning rate."""
        return TrainConfig(
            data="",
            checkpoint="",
            out="",
            method=self.method,
            steps=10**6,
            dtype=self.dtype,
            remat=self.remat,
            lora=LoRAConfig(rank=self.rank, alpha=2.0 * self.rank, dropout=0.0),
            objective=ObjectiveConfig(condition_dropout=0.0),
            optimizer=OptimizerConfig(warmup_steps=0, accumulation=1),
            examples=DataConfig(batch_size=self.batch, cover=0.0),
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--size", choices=TRANSFORMER_SIZES, default="2B", help="width of the blocks [2B]")
    add("--layers", type=int, default=4, help="layers of the transformer, the lyric encoder in proportion; 0: all [4]")
    add("--method", choices=("lora", "full"), default="lora", help="parameters to train [lora]")
    add("--rank", type=int, default=64, help="rank of the adapters; alpha is twice the rank [64]")
    add(
        "--remat",
        choices=("none", "dots", "full"),
        default="none",
        help="rematerialisation; unless none, PyTorch checkpoints its layers too [none]",
    )
    measure.add_options(parser, [30, 60, 120], 5)
    measure.add_compare_options(parser)
    options = parser.parse_args()

    measure.print_header()
    what = f"lora, rank {options.rank}" if options.method == "lora" else "full"
    depth = f"{options.layers} layers" if options.layers else "all layers"
    print(
        f"{what}, {options.size}, {depth}, batch {options.batch}, {options.dtype}, remat {options.remat}, "
        f"{LYRIC_TOKENS + 1 + PROMPT_TOKENS} condition tokens; seconds, median of {options.runs} (lowest - highest)\n"
    )
    row = measure.print_table(COLUMNS)
    names = ["JAX", *(f"torch {form}" for form in options.torch)]
    for seconds in options.seconds:
        frames = round(seconds * FRAMES_PER_SECOND)
        case = Case(
            options.size,
            options.layers,
            options.method,
            options.rank,
            options.dtype,
            options.remat,
            frames,
            options.batch,
        )
        for name, cold, timing, ratio, rate, floor, *rest in measure.compare(sides, (case, names), case.flops, options):
            speed = utilisation = ""
            if floor:
                speed, utilisation = f"{options.batch * seconds / timing.median:.1f}", f"{1 / float(floor):.0%}"
            row(f"{seconds:g} s", name, cold, timing, ratio, rate, floor, *rest, speed, utilisation)


def sides(case: Case, names: list[str]) -> dict[str, measure.Side]:
    """Return the sides with these names, from the same weights. A call is a step; the result is all losses so far."""
    theirs = randomise(TorchTransformer(**case.arguments["transformer"]))
    their_encoder = randomise(TorchConditionEncoder(**case.arguments["condition_encoder"]).eval())
    config = TransformerConfig(**case.arguments["transformer"])
    ours = from_module("transformer", config, theirs)
    encoder = from_module(
        "condition_encoder", ConditionEncoderConfig(**case.arguments["condition_encoder"]), their_encoder
    )
    ours = cast(ours, case.dtype)
    if case.method == "full":  # trained weights stay float32
        ours = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), ours)
    ours.runtime = dataclasses.replace(ours.runtime, remat=case.remat)
    lora = case.method == "lora"
    if lora:
        ours = add_lora(ours, case.train_config.lora, rngs=nnx.Rngs(0))
    model, params = steps.Model.split(ours, nnx.LoRAParam if lora else nnx.Param, None)
    adapters = {name: np.array(value) for name, value in params.items()} if lora else {}
    batch, frozen = make_batch(case, cast(encoder, case.dtype))
    made = {}
    for name in names:
        if name == "JAX":
            made[name] = jax_side(case, model, params, frozen, batch)
        else:
            transformer = _on_device(theirs, case.dtype if lora else "float32")
            given = make_inputs(case, frozen, batch)
            made[name] = torch_side(case, name, transformer, _on_device(their_encoder, case.dtype), adapters, given)
    return made


def make_batch(case: Case, encoder: nnx.Module) -> tuple[Batch, Frozen]:
    """Return a batch of random latents that fill their crops, arrays [1, B, ...], and the frozen networks."""
    random = np.random.default_rng(0)
    size, width = case.batch, encoder.config.text_hidden_dim
    normal = lambda *shape: random.standard_normal(shape, dtype=np.float32)  # noqa: E731
    lengths = lambda n: np.full(size, n, np.int32)  # noqa: E731
    batch = Batch(
        mean=normal(size, case.frames, 64),
        std=np.full((size, case.frames, 64), 0.1, np.float32),
        lengths=lengths(case.frames),
        text=normal(size, PROMPT_TOKENS, width),
        text_lengths=lengths(PROMPT_TOKENS),
        lyric_ids=random.integers(0, 1000, (size, LYRIC_TOKENS), np.int32),
        lyric_lengths=lengths(LYRIC_TOKENS),
        tasks=lengths(0),
        windows=np.tile(np.array([0, case.frames], np.int32), (size, 1)),
        numbers=np.arange(size, dtype=np.uint32),
    )
    embedding, timbre = normal(1000, width), normal(1, 1, encoder.config.hidden_size)
    frozen = Frozen(encoder, jnp.asarray(embedding, case.dtype), None, None, jnp.asarray(timbre, case.dtype))
    return jax.tree.map(lambda x: jnp.asarray(x)[None], batch), frozen


def make_inputs(case: Case, frozen: Frozen, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the inputs of PyTorch's step, on the device, including those that our step computes itself."""
    batch = jax.tree.map(lambda x: x[0], batch)
    config = case.train_config
    key = jax.random.split(jax.random.key(config.seed))[0]  # as in `make_step`
    noise, x0, t, _ = draw(batch, key, case.batch, config.objective)
    arrays = dict(
        noise=noise,
        x0=x0,
        t=t,
        context=context_latents(frozen, batch, x0),
        text=batch.text,
        lyrics=frozen.embedding[batch.lyric_ids],
        timbre=jnp.broadcast_to(frozen.timbre, (case.batch, 1, frozen.timbre.shape[-1])),
    )
    return {k: torch.from_numpy(np.array(x, np.float32)).to(measure.torch_device()) for k, x in arrays.items()}


def jax_side(case: Case, model: steps.Model, params: steps.Params, frozen: Frozen, batch: Batch) -> measure.Side:
    config = case.train_config
    optimizer = steps.make_optimizer(config.optimizer, config.steps)
    shardings = steps.state_shardings(model, params, optimizer, config.optimizer)
    state = steps.initial_state(params, optimizer, config.optimizer, shardings)
    step = steps.make_step(model, optimizer, config, shardings)
    program, losses = None, []

    def call() -> None:
        nonlocal program, state
        if program is None:  # the first call includes compilation
            program = step.lower(state, model.frozen, frozen, batch).compile()
        state, metrics = program(state, model.frozen, frozen, batch)
        jax.block_until_ready(state)
        losses.append(float(metrics.loss))

    return measure.Side(call, lambda: np.array(losses, np.float32))


def torch_side(
    case: Case,
    name: str,
    transformer: torch.nn.Module,
    encoder: torch.nn.Module,
    adapters: dict[str, np.ndarray],
    given: dict[str, torch.Tensor],
) -> measure.Side:
    """Return PyTorch's side; `adapters` are ours, so that both start from the same values."""
    if case.remat != "none":
        transformer.enable_gradient_checkpointing()
    if case.method == "lora":
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        settings = LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules=targets)
        transformer = get_peft_model(transformer, settings)
        copy_adapters(adapters, transformer)
    transformer.train()
    optimizer_config = case.train_config.optimizer
    learning = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, optimizer_config.learning_rate, weight_decay=optimizer_config.weight_decay)
    network = torch.compile(transformer, dynamic=False) if name.endswith("compile") else transformer
    device, losses = measure.torch_device(), []
    half = case.dtype != "float32"
    dtype = getattr(torch, case.dtype)
    noise, x0, t, context = (given[k] for k in ("noise", "x0", "t", "context"))

    def condition() -> torch.Tensor:
        text, lyrics, timbre = (given[k].to(dtype) for k in ("text", "lyrics", "timbre"))
        mask = torch.ones(lyrics.shape[:2], device=device)
        parts = encoder.lyric_encoder(inputs_embeds=lyrics, attention_mask=mask), timbre, encoder.text_projector(text)
        return torch.cat(parts, dim=1)  # as `encoder` packs them without padding

    def call() -> None:
        with torch.no_grad():
            tokens = condition()
            times = t[:, None, None]
            x_t = times * noise + (1 - times) * x0
        with torch.autocast(device.type, dtype) if half else contextlib.nullcontext():
            velocity = network(x_t.to(dtype), t.to(dtype), t.to(dtype), tokens, context.to(dtype), return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(velocity.float(), noise - x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, optimizer_config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        measure.wait_for_torch()

    return measure.Side(call, lambda: np.array(losses, np.float32))


def copy_adapters(adapters: dict[str, np.ndarray], network: torch.nn.Module) -> None:
    """Copy our stacked adapters to PEFT's."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if found := re.search(r"layers\.(\d+)\.(\w+\.to_\w+?)(?:\.0)?\.lora_([AB])\.", name):
                ours = adapters[f"layers.{found[2]}.lora_{found[3].lower()}"][int(found[1])]
                parameter.copy_(torch.from_numpy(ours).T)


def _on_device(module: torch.nn.Module, dtype: str) -> torch.nn.Module:
    """Return a copy on the device, since every side changes its own."""
    copy = type(module)(**dict(module.config))
    copy.load_state_dict(module.state_dict())
    return copy.to(measure.torch_device(), getattr(torch, dtype)).train(module.training)


if __name__ == "__main__":
    main()
