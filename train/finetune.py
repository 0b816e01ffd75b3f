"""`acestep-jax train fit`: from a data folder and a checkpoint to an adapter or a fine-tuned checkpoint."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from acestep_jax import AceStepPipeline
from acestep_jax.diffusion import noise
from acestep_jax.distributed import all_succeed, parse_mesh, variable_sharding
from acestep_jax.errors import InputError
from acestep_jax.inputs import tasks
from acestep_jax.inputs.programs import REFERENCE_FRAMES
from acestep_jax.io import checkpoint, checkpoint_writer
from acestep_jax.io.adapter import Adapter, save_adapter
from acestep_jax.io.files import as_path
from acestep_jax.io.manifest import check_unquantized
from acestep_jax.io.native import find_native
from acestep_jax.models.lora import add_lora
from acestep_jax.models.registry import FAMILY
from acestep_jax.settings import with_own_settings
from acestep_jax.train import config_file, dataset
from acestep_jax.train import step as steps
from acestep_jax.train.config import TASKS, TrainConfig
from acestep_jax.train.data_folder import fingerprint, read_index, text_sha256
from acestep_jax.train.loop import Data, Trainer, train
from acestep_jax.train.objective import Batch, Frozen, freeze
from acestep_jax.train.report import Panel, Report
from acestep_jax.train.run import CONFIG, check_folder

logger = logging.getLogger(__name__)

TIME_BUCKETS = [(i / 5, (i + 1) / 5) for i in range(5)]  # parts of [0, 1] whose losses are reported separately
LABEL = "mean squared error of the velocity"


@with_own_settings
def fit(config: TrainConfig) -> Path:
    """Start or resume a fine-tuning run; return the folder of its result, `adapter/` or `model/` in `config.out`.

    Raises:
        InputError: if the data, the checkpoint or the settings do not match, the run in `config.out` has other
            settings, the disk is full, or (DivergedError) the loss is non-finite in `max_bad_steps` consecutive steps.
    """
    mesh = parse_mesh(config.mesh)
    _check_batch(config, mesh)
    warn_of_settings(config)
    check_folder(as_path(config.out), config)
    index = read_index(config.data)
    with all_succeed():
        config, requested = located(config)
    if (found := fingerprint(config.checkpoint)) != index.checkpoint:
        raise InputError(
            f"{config.data}: was made with another autoencoder or text encoder ({index.checkpoint[:12]}) than those of "
            f"{config.checkpoint} ({found[:12]}); preprocess again with this checkpoint"
        )
    songs, held_out = dataset.split(index, config.examples.validation_fraction)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        trainer = FineTuning(config, mesh)
        trainer.requested = requested
        silence = np.asarray(trainer.silence(max(index.crop_seconds) * index.latents_per_second))
        size, accumulation = config.examples.batch_size, config.optimizer.accumulation
        rows = steps.rows_of_process(mesh, size)
        folder = as_path(config.data)
        examples = dataset.Examples(folder, index, songs, config.examples, silence)
        held_out_examples = dataset.Examples(folder, index, held_out, config.examples, silence) if held_out else None

        def batches(first: int) -> Iterator[Batch[jax.Array]]:
            for batch in dataset.training_batches(examples, config.seed, accumulation, rows, first):
                yield steps.place(batch, mesh, 1, rows, size)

        def validation() -> Iterator[Batch[jax.Array]]:
            assert held_out_examples is not None
            for batch in dataset.validation_batches(held_out_examples):
                yield steps.place(jax.tree.map(lambda x: x[np.asarray(rows)], batch), mesh, 0, rows, size)

        made_from = {
            "data": text_sha256([[song.sha256, song.text_sha256, song.repeat] for song in index.songs]),
            "checkpoint": fingerprint(config.checkpoint, ("transformer", "condition_encoder")),
        }
        rate = index.latents_per_second
        return train(trainer, Data(batches, validation if held_out else None, made_from, rate))


def warn_of_settings(config: TrainConfig) -> None:
    """Warn of each setting that differs from its default but has no effect because of another setting."""
    plain = TrainConfig(data=config.data, checkpoint=config.checkpoint, out=config.out)
    rules = (
        (("lora.",), config.method == "lora", "method=lora"),
        (("objective.timestep_",), config.objective.timesteps != "turbo", "objective.timesteps other than turbo"),
        (("report.sample_every", "report.sample_seconds"), config.report.sample_prompts, "report.sample_prompts"),
        (("report.validate_every",), config.examples.validation_fraction, "examples.validation_fraction above 0"),
    )
    for name in config_file.differences(plain, config):
        for names, acts, needs in rules:
            if name.startswith(names) and not acts:
                logger.warning("%s: has no effect here; it needs %s", name, needs)


def located(config: TrainConfig) -> tuple[TrainConfig, TrainConfig]:
    """Return the settings with the local folder of the native checkpoint, downloaded and converted if necessary, and
    the settings as the run stores them, with the commit of a hub repository.

    Raises:
        InputError: see `find_native`.
    """
    file = as_path(config.out) / CONFIG
    if config.revision is None and file.is_file():
        before = config_file.read(file)
        if isinstance(before, TrainConfig) and (before.checkpoint, before.variant) == (
            config.checkpoint,
            config.variant,
        ):
            config = dataclasses.replace(config, revision=before.revision)
    found = find_native(config.checkpoint, config.variant, revision=config.revision)
    requested = dataclasses.replace(config, revision=found.commit)
    return dataclasses.replace(requested, checkpoint=str(found.folder)), requested


class FineTuning(Trainer):
    """Fine-tuning of a checkpoint's transformer: adapters, or all weights."""

    config: TrainConfig
    panels = (
        Panel(LABEL, {"loss": "training", "validation_loss": "held-out songs"}),
        Panel(
            LABEL, {f"loss_t_{a:.1f}_{b:.1f}": f"{a:.1f} to {b:.1f}" for a, b in TIME_BUCKETS}, "training, by time t"
        ),
    )

    def __init__(self, config: TrainConfig, mesh: Mesh | None):
        path = as_path(config.checkpoint)
        tokenizes = config.examples.tokenizes
        manifest = checkpoint.read_manifest(path)
        check_unquantized(path, manifest, "training needs")
        if tokenizes and (missing := [n for n in FAMILY.optional if n not in manifest.configs]):
            names = " and ".join(f"examples.{name}" for name in TASKS if tasks.TASKS[name].tokenized)
            raise InputError(f"{path}: has no {' and '.join(missing)}, which covers need; set {names} to 0")
        lora = config.method == "lora"
        (transformer,) = checkpoint.load(
            path,
            dtype=config.dtype,
            param_dtype=None if lora else "float32",
            remat=config.remat,
            mesh=mesh,
            names=["transformer"],
        ).values()
        if lora:
            transformer = add_lora(transformer, config.lora, rngs=nnx.Rngs(noise.key(config.seed)))
        super().__init__(config, transformer, nnx.LoRAParam if lora else nnx.Param, mesh)
        del transformer
        others = ["condition_encoder", *(FAMILY.optional if tokenizes else ())]
        networks = checkpoint.load(path, dtype=config.dtype, mesh=mesh, names=others)
        self.frozen: Frozen = freeze(networks, _embedding(path, manifest, config.dtype, mesh), REFERENCE_FRAMES)
        self.fixed = self.model.frozen, self.frozen
        self._step = steps.make_step(self.model, self.optimizer, config, self.shardings)
        self._evaluate = steps.make_evaluation(self.model, config, self.shardings)
        self._pipeline: AceStepPipeline | None = None

    def silence(self, frames: float) -> jax.Array:
        """Return latents of silence, [frames, 64] float32."""
        return self.frozen.condition_encoder.silence(int(frames))[0].astype(jnp.float32)

    def validate(self, batches: Iterable[Batch[jax.Array]]) -> dict[str, float]:
        """Return the mean loss at fixed timesteps and noise, overall and at each timestep."""
        errors, elements = 0.0, 0.0
        for batch in batches:
            error, element = self._evaluate(self.state.params, *self.fixed, batch)
            errors, elements = errors + error, elements + element
        by_time = np.asarray(errors / elements)
        times = steps.validation_times(self.config)
        named = {f"validation_loss_t_{t:.3f}": float(value) for t, value in zip(times, by_time, strict=True)}
        return {"validation_loss": float(by_time.mean())} | named

    def summarise(self, details: list[dict[str, np.ndarray]]) -> dict[str, float]:
        """Return the mean loss of the examples in each interval of `TIME_BUCKETS`."""
        t, errors = (np.concatenate([step[name] for step in details]) for name in ("t", "errors"))
        row = {}
        for low, high in TIME_BUCKETS:
            if len(inside := errors[(t >= low) & (t < high) & np.isfinite(errors)]):
                row[f"loss_t_{low:.1f}_{high:.1f}"] = float(inside.mean())
        return row

    def sample(self, report: Report, step: int) -> None:
        """Report a song for each sample prompt, from the same noise each time."""
        config = self.config
        if self._pipeline is None:
            path = config.checkpoint
            networks: dict[str, Any] = checkpoint.load(
                path, dtype=config.dtype, mesh=self.mesh, names=["text_encoder", "vae"]
            )
            self._pipeline = AceStepPipeline(
                transformer=None,
                sampling_defaults=checkpoint.read_manifest(path).sampling,
                condition_encoder=self.frozen.condition_encoder,
                tokenizer=checkpoint.load_tokenizer(path),
                mesh=self.mesh,
                **networks,
            )
        weights = jax.jit(self.model.gathered)(self.state.params)
        self._pipeline.transformer = self.model.merge(weights, self.model.frozen)
        for i, prompt in enumerate(config.report.sample_prompts):
            song = self._pipeline(prompt, "[Instrumental]", config.report.sample_seconds, seed=i)
            assert song.audios is not None
            report.sample(step, i, prompt, song.audios[0], song.sample_rate)
        self._pipeline.transformer = None

    def results(self) -> dict[str, steps.Params]:
        """Return `adapter` or `model`, and `adapter-ema` or `model-ema` if there is an EMA.

        There is no `model` if several processes train: they do not write a whole checkpoint.
        """
        lora = self.config.method == "lora"
        if not lora and jax.process_count() > 1:
            out = self.config.out
            logger.warning("%s: write the model with `acestep-jax train export %s DST`, in one process", out, out)
            return {}
        name = "adapter" if lora else "model"
        found = {name: self.state.params, f"{name}-ema": self.state.ema}
        return {name: params for name, params in found.items() if params is not None}

    @staticmethod
    def write_result(path: Path, config: TrainConfig, weights: dict[str, np.ndarray], notes: dict[str, Any]) -> None:
        """Write an adapter or a checkpoint with these weights atomically; raise InputError if `path` exists."""
        if config.method == "lora":
            save_adapter(path, Adapter(config.lora, weights))
        else:
            checkpoint_writer.save_changed(config.checkpoint, path, "transformer", weights)


def _check_batch(config: TrainConfig, mesh: Mesh | None) -> None:
    parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    if config.examples.batch_size % parts:
        raise InputError(
            f"examples.batch_size: {config.examples.batch_size} does not divide by the mesh's data and fsdp ({parts}); "
            "give a multiple of that"
        )


def _embedding(path: Path, manifest: checkpoint.Manifest, dtype: str | None, mesh: Mesh | None) -> jax.Array:
    """Load only the embedding table of the text encoder, [vocabulary, 1024]."""
    leaf = "embed_tokens.embedding"
    variable = checkpoint.leaves(checkpoint.abstract("text_encoder", manifest.configs["text_encoder"]))[leaf]
    stored = checkpoint.network_leaves(path, manifest)["text_encoder"][leaf]
    target = jax.ShapeDtypeStruct(stored.shape, dtype or stored.dtype, sharding=variable_sharding(variable, mesh))
    return checkpoint.load_leaves(path, "text_encoder", {leaf: target})[leaf]
