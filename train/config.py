"""The settings of a run: frozen dataclasses, which are the command line and the YAML file as well.

`--lora.rank 8` on the command line is `lora: {rank: 8}` in the file that `--config` names; a later one wins. The
resolved settings are kept in the run's folder as `config.yaml`.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin

import jsonargparse

from acestep_jax.config import LoRAConfig
from acestep_jax.errors import InputError
from acestep_jax.request import MAX_DURATION, MIN_DURATION


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which examples are drawn.

    Args:
        batch_size: examples of one forward pass, over all devices.
        crop_seconds: lengths of the crops, each of which compiles once; a batch has one of them. Of those that the data
            were prepared for; none: all of them.
        text2music: weight of the task in the mixture.
        repaint: weight of making a random window of the song anew.
        cover: weight of making the song from its own 5 Hz codes.
        validation_fraction: share of the songs that is held out, at least one if it is not 0.
        workers: threads that read ahead.
    """

    batch_size: int = 1
    crop_seconds: tuple[float, ...] = ()
    text2music: float = 0.6
    repaint: float = 0.2
    cover: float = 0.2
    validation_fraction: float = 0.05
    workers: int = 4

    @property
    def task_weights(self) -> tuple[float, float, float]:
        """In the order of `TASKS`; they add up to one."""
        weights = (self.text2music, self.repaint, self.cover)
        return tuple(weight / sum(weights) for weight in weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is learned from an example.

    Args:
        timesteps: logit_normal, the greater of two logit-normal draws, as ACE-Step was trained; stratified, the same
            distribution, spread evenly over a step's examples; turbo, the eight times of the turbo schedule.
        timestep_mu: mean of the logit-normal distribution.
        timestep_sigma: its standard deviation.
        condition_dropout: share of the examples that are shown no condition, for guidance.
    """

    timesteps: Literal["stratified", "logit_normal", "turbo"] = "stratified"
    timestep_mu: float = -0.4
    timestep_sigma: float = 1.0
    condition_dropout: float = 0.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a warm-up, then a cosine to a hundredth of the learning rate.

    Args:
        learning_rate: its peak.
        warmup_steps: of linear growth; by default 100, or a tenth of all steps if that is less.
        weight_decay: of matrices; norms, biases and modulation tables do not decay.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        max_grad_norm: gradients are scaled down to this norm.
        accumulation: batches of one step.
        ema_decay: keeps an exponential moving average of the weights, beside them.
    """

    learning_rate: float = 1e-4
    warmup_steps: int | None = None
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    accumulation: int = 4
    ema_decay: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What is seen of a run.

    Args:
        log_every: steps between lines of metrics.jsonl and TensorBoard.
        validate_every: steps between validations on held-out songs, besides those at checkpoints.
        sample_every: steps between samples of sample_prompts.
        sample_prompts: what to make samples of; none: no samples.
        sample_seconds: their duration.
    """

    log_every: int = 10
    validate_every: int = 250
    sample_every: int = 500
    sample_prompts: tuple[str, ...] = ()
    sample_seconds: float = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of fine-tuning.

    Args:
        data: folder that `python -m train preprocess` made.
        checkpoint: native checkpoint to start from.
        out: folder of the run; if it is there, the run goes on from its last checkpoint.
        method: lora, adapters on frozen weights; full, all weights of the transformer.
        steps: optimizer steps.
        seed: of everything random.
        dtype: of the computation and of frozen weights; by default as stored. What is trained is float32 always.
        remat: what the backward pass computes again instead of keeping it in memory.
        mesh: devices for each axis, such as fsdp=4,tensor=2; by default one device.
        save_every: steps between checkpoints, which are written while training goes on.
        keep: how many of the latest checkpoints stay, besides the best.
        max_bad_steps: steps in a row whose loss or gradient is no number, after which the run stops.
        lora: adapters.
        objective: loss.
        optimizer: steps.
        examples: batches.
        report: metrics and samples.
    """

    data: str
    checkpoint: str
    out: str
    method: Literal["lora", "full"] = "lora"
    steps: int = 2000
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] | None = None
    remat: Literal["none", "dots", "full"] = "none"
    mesh: str | None = None
    save_every: int = 250
    keep: int = 2
    max_bad_steps: int = 5
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    examples: DataConfig = dataclasses.field(default_factory=DataConfig)
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)

    def __post_init__(self):
        optimizer, objective, examples, report = self.optimizer, self.objective, self.examples, self.report
        at_least = [
            ("steps", self.steps, 1),
            ("seed", self.seed, 0),
            ("save_every", self.save_every, 1),
            ("keep", self.keep, 1),
            ("max_bad_steps", self.max_bad_steps, 1),
            ("optimizer.accumulation", optimizer.accumulation, 1),
            ("optimizer.warmup_steps", optimizer.warmup_steps or 0, 0),
            ("optimizer.weight_decay", optimizer.weight_decay, 0),
            ("examples.batch_size", examples.batch_size, 1),
            ("examples.workers", examples.workers, 0),
            ("examples.text2music", examples.text2music, 0),
            ("examples.repaint", examples.repaint, 0),
            ("examples.cover", examples.cover, 0),
            *((f"report.{name}", getattr(report, name), 1) for name in ("log_every", "validate_every", "sample_every")),
        ]
        if self.seed >= 2**32:
            raise InputError(f"seed: expected a number from 0 to 2^32 - 1, found {self.seed}")
        for name, value, least in at_least:
            if not least <= value < math.inf:
                raise InputError(f"{name}: expected a number of at least {least}, found {value}")
        if (optimizer.warmup_steps or 0) >= self.steps:
            raise InputError(
                f"optimizer.warmup_steps: expected less than steps ({self.steps}), found {optimizer.warmup_steps}"
            )
        if report.sample_prompts and not MIN_DURATION <= report.sample_seconds <= MAX_DURATION:
            raise InputError(
                f"report.sample_seconds: expected {MIN_DURATION:g} to {MAX_DURATION:g}, found {report.sample_seconds:g}"
            )
        above_zero = [
            ("objective.timestep_sigma", objective.timestep_sigma),
            ("optimizer.learning_rate", optimizer.learning_rate),
            ("optimizer.max_grad_norm", optimizer.max_grad_norm),
            ("optimizer.eps", optimizer.eps),
            ("examples.text2music + repaint + cover", examples.text2music + examples.repaint + examples.cover),
        ]
        for name, value in above_zero:
            if not 0 < value < math.inf:
                raise InputError(f"{name}: expected a number above 0, found {value}")
        below_one = [
            ("objective.condition_dropout", objective.condition_dropout),
            ("optimizer.beta1", optimizer.beta1),
            ("optimizer.beta2", optimizer.beta2),
            ("examples.validation_fraction", examples.validation_fraction),
            *([("optimizer.ema_decay", optimizer.ema_decay)] if optimizer.ema_decay is not None else []),
        ]
        for name, value in below_one:
            if not 0 <= value < 1:
                raise InputError(f"{name}: expected a number from 0 to below 1, found {value}")


def parse(arguments: list[str]) -> TrainConfig:
    """The settings that a command line asks for, files of `--config` included.

    Raises:
        InputError: naming the setting that is unknown, missing or of the wrong kind.
    """
    parser = _parser()
    try:
        return _instantiate(parser, parser.parse_args(arguments))
    except jsonargparse.ArgumentError as error:
        files = [value for flag, value in itertools.pairwise(arguments) if flag == "--config"]
        where = f" (settings come from {', '.join(files)} and the command line)" if files else ""
        raise InputError(f"{_explain(str(error))}{where}; `python -m train fit --help` lists all settings") from None


def _explain(message: str) -> str:
    """The library's message about a value of the wrong kind or a flag that it does not know, in words."""
    kinds = dict(_kinds(TrainConfig))
    if (found := re.search(r'Parser key "([\w.]+)":\n.*(?:Got|Given) value: ([^\n]*)', message, re.DOTALL)) and (
        kind := kinds.get(found[1])
    ):
        return f"{found[1]}: expected {kind}, found {found[2]}"
    if found := re.fullmatch(r"unrecognized arguments: --([\w.]+)(.*)", message):
        last = found[1].rpartition(".")[2]
        if near := [f"--{name}" for name in kinds if name.rpartition(".")[2] == last]:
            return f"{message}; did you mean {' or '.join(near)}?"
    return message


def _kinds(config: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting by dotted name, with what it may be."""
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        tuple[str, ...]: 'a list such as \'["one", "two"]\'',
        tuple[float, ...]: "a list such as '[30, 60]'",
    }
    for field in dataclasses.fields(config):
        name, kind = f"{prefix}{field.name}", field.type
        if NoneType in get_args(kind):  # such as float | None
            kind = get_args(kind)[0]
        if dataclasses.is_dataclass(kind):
            yield from _kinds(kind, f"{name}.")
        else:
            yield name, f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else words[kind]


def read(path: Path) -> TrainConfig:
    """The settings that a run has kept; raises InputError if there are none, or they cannot be used."""
    if not path.is_file():
        raise InputError(f"{path.parent}: no {path.name} here, so this is no run of `python -m train fit`")
    parser = _parser()
    try:
        return _instantiate(parser, parser.parse_path(str(path)))
    except (jsonargparse.ArgumentError, OSError) as error:
        raise InputError(f"{path}: {error}") from None


def write(path: Path, config: TrainConfig) -> None:
    """Writes `config.yaml`."""
    parser = _parser()
    values = parser.parse_object(dataclasses.asdict(config))
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(parser.dump(values), encoding="utf-8")
    temporary.replace(path)


def differences(a: TrainConfig, b: TrainConfig) -> dict[str, tuple]:
    """The settings that two runs do not share, by dotted name, with both values."""
    flat = [_flatten(dataclasses.asdict(config)) for config in (a, b)]
    return {name: (value, flat[1][name]) for name, value in flat[0].items() if value != flat[1][name]}


def _flatten(values: dict, prefix: str = "") -> dict:
    result = {}
    for name, value in values.items():
        result |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return result


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="python -m train fit", description="Fine-tune the transformer of a checkpoint.", exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="a YAML file with any of these settings")
    parser.add_class_arguments(TrainConfig)
    return parser


def _instantiate(parser: jsonargparse.ArgumentParser, values) -> TrainConfig:
    values = parser.instantiate(values)
    return TrainConfig(**{field.name: values[field.name] for field in dataclasses.fields(TrainConfig)})
