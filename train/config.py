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
from typing import ClassVar, Literal, TypeVar, get_args, get_origin

import jsonargparse

from acestep_jax.errors import InputError
from acestep_jax.io.files import publish_file
from acestep_jax.models.config import AutoencoderConfig, LoRAConfig
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
class AdamConfig:
    """AdamW with a warm-up, then a cosine to a hundredth of the learning rate.

    Args:
        learning_rate: its peak.
        warmup_steps: of linear growth; by default 100, or a tenth of all steps if that is less.
        weight_decay: of matrices; norms, biases and modulation tables do not decay.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        max_grad_norm: gradients are scaled down to this norm.
        ema_decay: keeps an exponential moving average of the weights, beside them.
    """

    learning_rate: float = 1e-4
    warmup_steps: int | None = None
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    ema_decay: float | None = None

    def check(self, steps: int) -> None:
        """Raises InputError if a value cannot be used in a run of so many steps."""
        _at_least(("warmup_steps", self.warmup_steps or 0, 0), ("weight_decay", self.weight_decay, 0), of="optimizer.")
        _above_zero(
            *((name, getattr(self, name)) for name in ("learning_rate", "max_grad_norm", "eps")), of="optimizer."
        )
        _below_one(("beta1", self.beta1), ("beta2", self.beta2), ("ema_decay", self.ema_decay or 0), of="optimizer.")
        if (self.warmup_steps or 0) >= steps:
            raise InputError(f"optimizer.warmup_steps: expected less than steps ({steps}), found {self.warmup_steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(AdamConfig):
    """AdamW with a warm-up, then a cosine to a hundredth of the learning rate.

    Args:
        accumulation: batches of one step.
    """

    accumulation: int = 4


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
    """Fine-tune the transformer of a checkpoint.

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

    command: ClassVar[str] = "fit"

    def __post_init__(self):
        objective, examples, report = self.objective, self.examples, self.report
        _at_least(
            ("steps", self.steps, 1),
            ("save_every", self.save_every, 1),
            ("keep", self.keep, 1),
            ("max_bad_steps", self.max_bad_steps, 1),
            ("optimizer.accumulation", self.optimizer.accumulation, 1),
            ("examples.batch_size", examples.batch_size, 1),
            ("examples.workers", examples.workers, 0),
            ("examples.text2music", examples.text2music, 0),
            ("examples.repaint", examples.repaint, 0),
            ("examples.cover", examples.cover, 0),
            *((f"report.{name}", getattr(report, name), 1) for name in ("log_every", "validate_every", "sample_every")),
        )
        _check_seed(self.seed)
        self.optimizer.check(self.steps)
        if report.sample_prompts and not MIN_DURATION <= report.sample_seconds <= MAX_DURATION:
            raise InputError(
                f"report.sample_seconds: expected {MIN_DURATION:g} to {MAX_DURATION:g}, found {report.sample_seconds:g}"
            )
        _above_zero(
            ("objective.timestep_sigma", objective.timestep_sigma),
            ("examples.text2music + repaint + cover", examples.text2music + examples.repaint + examples.cover),
        )
        _below_one(
            ("objective.condition_dropout", objective.condition_dropout),
            ("examples.validation_fraction", examples.validation_fraction),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OobleckConfig:
    """An autoencoder from nothing, for 48 kHz stereo.

    Args:
        latent_channels: of a latent frame.
        patch_size: samples that the outermost layers take as one step.
        downsampling_ratios: even; their product, times patch_size, is the samples of a latent frame.
        channel_multiples: of the widths below, after each of the ratios.
        encoder_channels: of the encoder's outermost layers.
        decoder_channels: of the decoder's outermost layers.
    """

    latent_channels: int = 64
    patch_size: int = 1
    downsampling_ratios: tuple[int, ...] = (2, 4, 4, 6, 10)
    channel_multiples: tuple[int, ...] = (1, 2, 4, 8, 16)
    encoder_channels: int = 128
    decoder_channels: int = 128

    @property
    def network(self) -> AutoencoderConfig:
        return AutoencoderConfig(
            encoder_hidden_size=2 * self.latent_channels,
            encoder_channels=self.encoder_channels,
            decoder_input_channels=self.latent_channels,
            decoder_channels=self.decoder_channels,
            patch_size=self.patch_size,
            downsampling_ratios=self.downsampling_ratios,
            channel_multiples=self.channel_multiples,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """What an autoencoder learns by, see `train.reconstruction`.

    Args:
        windows: of the spectra, in samples, even.
        spectrum: weight of the spectra's distance.
        spectrum_warmup: steps in which it grows to that from 0: phases are learned first, by the waveform.
        waveform: weight of the mean absolute error of the samples.
        kl: weight of the divergence of the posterior, in nats a value, from N(0, 1).
    """

    windows: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    spectrum: float = 1.0
    spectrum_warmup: int = 0
    waveform: float = 10.0
    kl: float = 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderTrainConfig:
    """Train an autoencoder from random weights.

    Args:
        data: folder of audio files, with subfolders.
        out: folder of the run; if it is there, the run goes on from its last checkpoint.
        steps: optimizer steps.
        seed: of everything random.
        batch_size: crops of a step.
        crop_seconds: their length, in whole latent frames.
        validation_fraction: share of the files that is held out, at least one if it is not 0.
        save_every: steps between checkpoints and validations.
        log_every: steps between lines of metrics.jsonl and TensorBoard.
        keep: how many of the latest checkpoints stay, besides the best.
        max_bad_steps: steps in a row whose loss or gradient is no number, after which the run stops.
        model: sizes.
        loss: what is learned.
        optimizer: steps.
    """

    data: str
    out: str
    steps: int = 10000
    seed: int = 0
    batch_size: int = 8
    crop_seconds: float = 1.28
    validation_fraction: float = 0.05
    save_every: int = 500
    log_every: int = 20
    keep: int = 2
    max_bad_steps: int = 5
    model: OobleckConfig = dataclasses.field(default_factory=OobleckConfig)
    loss: ReconstructionConfig = dataclasses.field(default_factory=ReconstructionConfig)
    optimizer: AdamConfig = dataclasses.field(default_factory=AdamConfig)

    command: ClassVar[str] = "autoencoder"

    def __post_init__(self):
        names = ("steps", "batch_size", "save_every", "log_every", "keep", "max_bad_steps")
        _at_least(*((name, getattr(self, name), 1) for name in names))
        weights = ("spectrum", "spectrum_warmup", "waveform", "kl")
        _at_least(*((name, getattr(self.loss, name), 0) for name in weights), of="loss.")
        _check_seed(self.seed)
        self.optimizer.check(self.steps)
        _below_one(("validation_fraction", self.validation_fraction))
        if not self.loss.windows or any(window < 2 or window % 2 for window in self.loss.windows):
            raise InputError(f"loss.windows: expected even numbers of samples, found {list(self.loss.windows)}")
        longest = max(self.loss.windows) / self.model.network.sampling_rate
        if not longest <= self.crop_seconds < math.inf or self.crop_samples < 1:
            raise InputError(
                f"crop_seconds: expected at least a latent frame and the longest window ({longest:g} s), found "
                f"{self.crop_seconds:g}"
            )

    @property
    def crop_samples(self) -> int:
        network = self.model.network
        return round(self.crop_seconds * network.sampling_rate / network.hop_length) * network.hop_length


Config = TypeVar("Config", TrainConfig, AutoencoderTrainConfig)


def _at_least(*settings: tuple[str, float, float], of: str = "") -> None:
    for name, value, least in settings:
        if not least <= value < math.inf:
            raise InputError(f"{of}{name}: expected a number of at least {least}, found {value}")


def _above_zero(*settings: tuple[str, float], of: str = "") -> None:
    for name, value in settings:
        if not 0 < value < math.inf:
            raise InputError(f"{of}{name}: expected a number above 0, found {value}")


def _below_one(*settings: tuple[str, float], of: str = "") -> None:
    for name, value in settings:
        if not 0 <= value < 1:
            raise InputError(f"{of}{name}: expected a number from 0 to below 1, found {value}")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise InputError(f"seed: expected a number from 0 to 2^32 - 1, found {seed}")


def parse(arguments: list[str], kind: type[Config] = TrainConfig) -> Config:
    """The settings of this kind that a command line asks for, files of `--config` included.

    Raises:
        InputError: naming the setting that is unknown, missing or of the wrong kind.
    """
    parser = _parser(kind)
    try:
        return _instantiate(parser, parser.parse_args(arguments), kind)
    except jsonargparse.ArgumentError as error:
        files = [value for flag, value in itertools.pairwise(arguments) if flag == "--config"]
        where = f" (settings come from {', '.join(files)} and the command line)" if files else ""
        help_ = f"`python -m train {kind.command} --help` lists all settings"
        raise InputError(f"{_explain(str(error), kind)}{where}; {help_}") from None


def _explain(message: str, config: type) -> str:
    """The library's message about a value of the wrong kind or a flag that it does not know, in words."""
    kinds = dict(_kinds(config))
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
        tuple[int, ...]: "a list of whole numbers such as '[2, 4]'",
    }
    for field in dataclasses.fields(config):
        name, kind = f"{prefix}{field.name}", field.type
        if NoneType in get_args(kind):  # such as float | None
            kind = get_args(kind)[0]
        if dataclasses.is_dataclass(kind):
            yield from _kinds(kind, f"{name}.")
        else:
            yield name, f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else words[kind]


def read(path: Path, kind: type[Config] = TrainConfig) -> Config:
    """The settings that a run has kept; raises InputError if there are none, or they cannot be used."""
    if not path.is_file():
        raise InputError(f"{path.parent}: no {path.name} here, so this is no run of `python -m train {kind.command}`")
    parser = _parser(kind)
    try:
        return _instantiate(parser, parser.parse_path(str(path)), kind)
    except (jsonargparse.ArgumentError, OSError) as error:
        raise InputError(f"{path}: {error}") from None


def write(path: Path, config: Config) -> None:
    """Writes `config.yaml`."""
    parser = _parser(type(config))
    values = parser.parse_object(dataclasses.asdict(config))
    with publish_file(path) as temporary:
        temporary.write_text(parser.dump(values), encoding="utf-8")


def differences(a: Config, b: Config) -> dict[str, tuple]:
    """The settings that two runs do not share, by dotted name, with both values."""
    flat = [_flatten(dataclasses.asdict(config)) for config in (a, b)]
    return {name: (value, flat[1][name]) for name, value in flat[0].items() if value != flat[1][name]}


def _flatten(values: dict, prefix: str = "") -> dict:
    result = {}
    for name, value in values.items():
        result |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return result


def _parser(kind: type[Config]) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m train {kind.command}", description=kind.__doc__.split("\n")[0], exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="a YAML file with any of these settings")
    parser.add_class_arguments(kind)
    return parser


def _instantiate(parser: jsonargparse.ArgumentParser, values, kind: type[Config]) -> Config:
    values = parser.instantiate(values)
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})
