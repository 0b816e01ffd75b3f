"""The settings of a run: frozen dataclasses that define the command-line options and the keys of the YAML file.

`--lora.rank 8` on the command line is `lora: {rank: 8}` in the file given with `--config`; the later one wins. See
`train.config_file` for how they are read and written.
"""

import dataclasses
import math
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from acestep_jax.errors import InputError, nearest
from acestep_jax.inputs import tasks
from acestep_jax.models.config import AutoencoderConfig, LoRAConfig
from acestep_jax.request import MAX_DURATION, MIN_DURATION

# The tasks that training samples; `DataConfig` has a weight for each. Data folders store the index of a task in this
# tuple, so the order must not change.
TASKS = tuple(name for name, task in tasks.TASKS.items() if task.trained)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings whose `Literal` fields are checked when they are made, from the command line, a file or Python.

    Raises:
        InputError: if a value is none of a field's choices.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            choices, value = _choices(field.type), getattr(self, field.name)
            if choices and value not in choices:
                names = [choice for choice in choices if choice is not None]
                raise InputError(f"{field.name}: {value!r} is unknown; {nearest(str(value).lower(), names)}")


def _choices(kind: Any) -> tuple[Any, ...]:
    """Return the values that a `Literal` allows, and None if it is optional; () for any other type."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) not in (Union, UnionType):
        return ()
    found = tuple(choice for member in get_args(kind) for choice in _choices(member))
    return (*found, None) if found and NoneType in get_args(kind) else found


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """How examples are sampled.

    Args:
        batch_size: Examples in one forward pass, over all devices.
        crop_seconds: Lengths of the crops, in seconds, such as '[30, 60]'. Each length compiles once, and a batch has
            crops of one length. By default all lengths that the data were prepared for.
        text2music: Weight of the task text2music in the mixture.
        repaint: Weight of the task repaint, which regenerates a random region of the song.
        cover: Weight of the task cover, which regenerates the song from its own 5 Hz codes.
        validation_fraction: Fraction of the songs held out for validation, at least one song; 0 for none.
        workers: Number of threads that prefetch examples.
    """

    batch_size: int = 1
    crop_seconds: tuple[float, ...] = ()
    text2music: float = 0.6
    repaint: float = 0.2
    cover: float = 0.2
    validation_fraction: float = 0.05
    workers: int = 4

    @property
    def task_weights(self) -> tuple[float, ...]:
        """The probability of each of `TASKS`."""
        weights = [getattr(self, name) for name in TASKS]
        return tuple(weight / sum(weights) for weight in weights)

    @property
    def tokenizes(self) -> bool:
        """Whether any task in the mixture passes its source through the audio tokenizer."""
        return any(getattr(self, name) > 0 for name in TASKS if tasks.TASKS[name].tokenized)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Settings):
    """The training objective.

    Args:
        timesteps: Distribution of the timesteps t. logit_normal: the greater of two logit-normal draws, as ACE-Step was
            trained; stratified: the same distribution, spread evenly over the examples of a step; turbo: only the eight
            timesteps of the turbo schedule.
        timestep_mu: Mean of the normal distribution underlying the logit-normal one.
        timestep_sigma: Standard deviation of the normal distribution underlying the logit-normal one.
        condition_dropout: Probability of training an example without its condition, for classifier-free guidance.
    """

    timesteps: Literal["stratified", "logit_normal", "turbo"] = "stratified"
    timestep_mu: float = -0.4
    timestep_sigma: float = 1.0
    condition_dropout: float = 0.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamConfig(Settings):
    """AdamW with linear warm-up, then cosine decay to 1% of the learning rate.

    Args:
        learning_rate: Peak learning rate.
        warmup_steps: Steps of linear warm-up. By default 100, or a tenth of all steps if that is less.
        weight_decay: Weight decay of matrices; it does not apply to norms, biases and modulation tables.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        eps: Constant added to the root of the second moment.
        max_grad_norm: Gradients are clipped to this global norm.
        ema_decay: Decay rate of an exponential moving average (EMA) of the weights, kept in addition to them. By
            default there is none.
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
        """Raise InputError if a value cannot be used in a run of this many steps."""
        _at_least(("warmup_steps", self.warmup_steps or 0, 0), ("weight_decay", self.weight_decay, 0), of="optimizer.")
        _above_zero(
            *((name, getattr(self, name)) for name in ("learning_rate", "max_grad_norm", "eps")), of="optimizer."
        )
        _below_one(("beta1", self.beta1), ("beta2", self.beta2), ("ema_decay", self.ema_decay or 0), of="optimizer.")
        if (self.warmup_steps or 0) >= steps:
            raise InputError(f"optimizer.warmup_steps: expected less than steps ({steps}), found {self.warmup_steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(AdamConfig):
    """AdamW with linear warm-up, then cosine decay to 1% of the learning rate.

    Args:
        accumulation: Number of batches whose gradients are accumulated in one step.
    """

    accumulation: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig(Settings):
    """Metrics, validation and samples.

    Args:
        log_every: Steps between entries in metrics.jsonl and TensorBoard.
        validate_every: Steps between validations on held-out songs, in addition to the ones at checkpoints.
        sample_every: Steps between samples of the sample prompts.
        sample_prompts: Prompts to generate samples of, such as '["lofi piano"]'. By default no samples.
        sample_seconds: Duration of a sample, in seconds.
    """

    log_every: int = 10
    validate_every: int = 250
    sample_every: int = 500
    sample_prompts: tuple[str, ...] = ()
    sample_seconds: float = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Fine-tune the transformer of a checkpoint.

    Args:
        data: Folder of training data, as written by `acestep-jax train preprocess`.
        checkpoint: Native or PyTorch checkpoint to start from, or the id of a repository on the Hugging Face hub. A run
            stores an id with its revision instead of a local path, so it can resume on any machine.
        variant: Model to use where there are several, such as turbo, base, sft or xl-turbo.
        revision: Branch, tag or commit of the repository. By default the one that the run started with, or the newest.
        out: Folder of the run. If it holds a run already, training resumes from its last checkpoint.
        method: What is trained. lora: adapters on frozen weights; full: all weights of the transformer.
        steps: Number of optimizer steps.
        seed: Seed of all random numbers, 0 to 2^32 - 1.
        dtype: Dtype of the computation and of frozen weights. By default as stored. Trained weights are always float32.
        remat: Activations that the backward pass recomputes instead of storing. dots: all except matrix products; full:
            all.
        mesh: Number of devices of each mesh axis, such as fsdp=4,tensor=2. By default one device.
        save_every: Steps between checkpoints, which are written in the background.
        keep: Number of latest checkpoints to keep, in addition to the best.
        max_bad_steps: The run stops after this many consecutive steps with a non-finite loss or gradient.
        lora: Adapters.
        objective: Loss.
        optimizer: Optimizer.
        examples: Batches.
        report: Metrics and samples.
    """

    data: str
    checkpoint: str
    variant: str | None = None
    revision: str | None = None
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
        super().__post_init__()
        objective, examples, report = self.objective, self.examples, self.report
        _at_least(
            ("steps", self.steps, 1),
            ("save_every", self.save_every, 1),
            ("keep", self.keep, 1),
            ("max_bad_steps", self.max_bad_steps, 1),
            ("optimizer.accumulation", self.optimizer.accumulation, 1),
            ("examples.batch_size", examples.batch_size, 1),
            ("examples.workers", examples.workers, 0),
            *((f"examples.{name}", getattr(examples, name), 0) for name in TASKS),
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
            (f"examples.{' + '.join(TASKS)}", sum(getattr(examples, name) for name in TASKS)),
        )
        _below_one(
            ("objective.condition_dropout", objective.condition_dropout),
            ("examples.validation_fraction", examples.validation_fraction),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OobleckConfig(Settings):
    """Architecture of an autoencoder trained from scratch, for 48 kHz stereo.

    Args:
        latent_channels: Channels of a latent frame.
        patch_size: Samples that the outermost layers treat as one time step.
        downsampling_ratios: Downsampling of each block, even numbers. Their product, times patch_size, is the number of
            samples per latent frame.
        channel_multiples: Width after each block, as a multiple of encoder_channels and decoder_channels.
        encoder_channels: Width of the encoder's outermost layers.
        decoder_channels: Width of the decoder's outermost layers.
    """

    latent_channels: int = 64
    patch_size: int = 1
    downsampling_ratios: tuple[int, ...] = (2, 4, 4, 6, 10)
    channel_multiples: tuple[int, ...] = (1, 2, 4, 8, 16)
    encoder_channels: int = 128
    decoder_channels: int = 128

    @property
    def network(self) -> AutoencoderConfig:
        """The configuration of the network."""
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
class ReconstructionConfig(Settings):
    """The loss of an autoencoder, see `train.reconstruction`.

    Args:
        windows: Window lengths of the spectra, in samples, even numbers.
        spectrum: Weight of the spectral distance.
        spectrum_warmup: Steps over which the weight of the spectral distance grows from 0, so that the waveform term
            teaches phases first.
        waveform: Weight of the mean absolute error of the waveform.
        kl: Weight of the KL divergence of the posterior from N(0, 1), in nats per latent value.
    """

    windows: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    spectrum: float = 1.0
    spectrum_warmup: int = 0
    waveform: float = 10.0
    kl: float = 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderTrainConfig(Settings):
    """Train an autoencoder from scratch.

    Args:
        data: Folder of audio files, searched with its subfolders.
        out: Folder of the run. If it holds a run already, training resumes from its last checkpoint.
        steps: Number of optimizer steps.
        seed: Seed of all random numbers, 0 to 2^32 - 1.
        batch_size: Crops per step.
        crop_seconds: Length of a crop, in seconds, rounded to whole latent frames.
        validation_fraction: Fraction of the files held out for validation, at least one file; 0 for none.
        save_every: Steps between checkpoints, each of which is validated.
        log_every: Steps between entries in metrics.jsonl and TensorBoard.
        keep: Number of latest checkpoints to keep, in addition to the best.
        max_bad_steps: The run stops after this many consecutive steps with a non-finite loss or gradient.
        model: Architecture.
        loss: Loss.
        optimizer: Optimizer.
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

    def __post_init__(self):
        super().__post_init__()
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
    def report(self) -> ReportConfig:
        """The report settings in the form that fine-tuning uses: validation at checkpoints, no samples."""
        return ReportConfig(log_every=self.log_every, validate_every=self.save_every)

    @property
    def crop_samples(self) -> int:
        """The number of samples in a crop, a whole number of latent frames."""
        network = self.model.network
        return round(self.crop_seconds * network.sampling_rate / network.hop_length) * network.hop_length


Config = TrainConfig | AutoencoderTrainConfig


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
