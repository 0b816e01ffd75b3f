"""From the tensors of a PyTorch checkpoint to ours: in memory, or as a native checkpoint."""

import functools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint, checkpoint_writer, quantizing, rules
from acestep_jax.io.companions import Fetch
from acestep_jax.io.files import as_path, check_new
from acestep_jax.io.locate import Located, locate
from acestep_jax.io.planner_files import is_planner, names_planner, open_planner
from acestep_jax.io.pretrained import TorchCheckpoint, open_checkpoint
from acestep_jax.io.safetensors_reader import Tensor
from acestep_jax.io.safetensors_writer import write_safetensors
from acestep_jax.models.config import NetworkConfig
from acestep_jax.models.registry import FAMILY
from acestep_jax.models.runtime import DEFAULT_RUNTIME, Runtime, check_stored

WEIGHT_NORM = "vae_weight_norm.safetensors"


def from_torch(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    variant: str | None = None,
) -> None:
    """Convert a PyTorch checkpoint to a native one, see `convert`.

    Args:
        source: a folder or file as for `open_checkpoint`, the folder of a planner, or the id of a repository on the
            Hugging Face hub.
        destination: the folder to create.
        dtype: dtype of all weights; None keeps the dtype of each, and folded convolutions are float32. "int8" and "fp8"
            quantise layers and keep the dtype of other weights, see `models.quantization`.
        vae, text_encoder, variant: see `open_checkpoint`.

    Raises:
        InputError: see `open_source` and `plan`; also if `destination` exists. Nothing is written in these cases.
    """
    if dtype is not None:
        check_stored(dtype, "--dtype")
    check_new(as_path(destination))
    if (planner := _planner_folder(source)) is not None:
        for option, value in (("--vae", vae), ("--text-encoder", text_encoder), ("--variant", variant)):
            if value is not None:
                raise InputError(f"{option}: {source} is a planner, which has none; leave the option out")
        convert(open_planner(planner, dtype), destination)
        return
    opened = open_source(source, vae=vae, text_encoder=text_encoder, dtype=dtype, variant=variant)
    convert(opened, destination)


def _planner_folder(source: str | Path) -> Path | None:
    """Return the folder of the planner that a source names; None if it is not a planner."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder if is_planner(folder) else None
    if names_planner(str(source)) is None:
        return None
    from acestep_jax.io.hub_planner import locate_planner  # importing the client takes a fifth of a second

    return locate_planner(str(source)).model


def open_source(
    source: str | Path,
    *,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    dtype: str | None = None,
    variant: str | None = None,
) -> TorchCheckpoint:
    """Open a checkpoint as `open_checkpoint` does, also by the id of a repository on the hub.

    Raises:
        InputError: see `locate` and `open_checkpoint`.
    """
    return open_located(locate(str(source), variant), variant, dtype=dtype, vae=vae, text_encoder=text_encoder)


def open_located(
    place: Located,
    variant: str | None,
    *,
    dtype: str | None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    fetch: Fetch | None = None,
) -> TorchCheckpoint:
    """Open a checkpoint where it is, see `open_checkpoint`."""
    return open_checkpoint(
        place.model,
        vae=vae or place.vae,
        text_encoder=text_encoder or place.text_encoder,
        dtype=dtype,
        variant=None if place.is_of_one_variant else variant,
        fetch=fetch,
    )


def convert(
    opened: TorchCheckpoint, destination: str | Path, extra_files: Mapping[str, Callable[[Path], None]] | None = None
) -> None:
    """Write an open checkpoint as a native one, one stacked parameter at a time, with peak memory near the largest one.

    Args:
        destination: the folder to create.
        extra_files: see `checkpoint_writer.save`; they are written after the weights and the tokenizer.

    Raises:
        InputError: see `plan`; also if `destination` exists or the disk has no room. Nothing is left behind.
    """
    plans = {name: plan(name, config, opened.tensors[name]) for name, config in opened.configs.items()}
    every = [tensor for leaves in plans.values() for tensors in leaves.values() for tensor in tensors]
    quantization = quantizing.kinds_of(opened.configs, opened.quantization)

    def arrays(bar: tqdm) -> Iterator[tuple[str, np.ndarray]]:
        for name, leaves in plans.items():
            bar.set_description(f"converting {name}")
            quantized = quantizing.Quantizer(name, opened.configs[name], quantization.get(name))
            for leaf, tensors in leaves.items():
                yield from quantized(leaf, gather(name, leaf, tensors))
                bar.update(len(tensors))

    with tqdm(total=len(every), unit="tensor", disable=None) as bar:
        checkpoint_writer.save(
            destination,
            opened.configs,
            arrays(bar),
            opened.tokenizer,
            opened.tokenizer_config,
            {
                **{name: functools.partial(shutil.copyfile, file) for name, file in opened.extra_files.items()},
                **({WEIGHT_NORM: lambda path: _write_weight_norm(path, opened)} if opened.weight_norm else {}),
                **(extra_files or {}),
            },
            sampling=sampling_of(opened.files),
            quantization=quantization,
            size=None if quantization else sum(_bytes(tensor) for tensor in [*every, *opened.weight_norm.values()]),
        )


def sampling_of(files: Iterable[Path]) -> dict[str, float]:
    """Return a model's own sampling defaults: the shift of a turbo model that was distilled at a single one.

    Args:
        files: files of the model. The name of their nearest ACE-Step folder, such as acestep-v15-turbo-shift1, tells
            the shift; the config does not.
    """

    def name(file: Path) -> str:
        parts = [part.lower().replace("_", "-") for part in reversed(file.parts)]
        return next((part for part in parts if "acestep" in part or "ace-step" in part), "")

    names = {name(file) for file in files}
    return next(({"shift": s} for part, s in FAMILY.shifts.items() if any(part in name for name in names)), {})


def plan(network: str, config: NetworkConfig, tensors: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Return the torch tensors that make up each of our parameters, row by row; each is used exactly once.

    Raises:
        InputError: naming the tensors that are missing, unexpected or of the wrong shape.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    leaves: dict[str, list[str]] = {}
    for leaf, whole in checkpoint.leaf_shapes(network, config).items():
        names, rule = rules.to_torch(network, leaf, whole.shape)
        leaves[leaf] = names
        wanted |= dict.fromkeys(names, rules.torch_shape(leaf, rule, whole.shape))
    problems = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in tensors]
    problems += [f"unexpected: {name} {list(t.shape)}" for name, t in tensors.items() if name not in wanted]
    problems += [
        f"misshapen: {name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        listing = "\n  ".join(problems[:8])
        raise InputError(
            f"{network}: the tensors do not match the config; check that both are of the same model\n  {listing}{more}"
        )
    return {leaf: [tensors[name] for name in names] for leaf, names in leaves.items()}


def build(
    network: str, config: NetworkConfig, tensors: dict[str, Tensor], runtime: Runtime = DEFAULT_RUNTIME
) -> nnx.Module:
    """Return the network with the weights of `tensors`, in memory; raise InputError as `plan` does."""
    leaves = plan(network, config, tensors)
    arrays = {leaf: jnp.asarray(gather(network, leaf, rows)) for leaf, rows in leaves.items()}
    return checkpoint.assemble(checkpoint.abstract(network, config, runtime), arrays)


def gather(network: str, leaf: str, tensors: list[Tensor]) -> np.ndarray:
    """Read the tensors of one parameter and return it in our layout, stacked if there is one tensor for each layer."""
    _, rule = rules.to_torch(network, leaf, (len(tensors),))
    if not rules.is_stacked(leaf):
        return np.ascontiguousarray(rule.to_jax(tensors[0].read()))
    first = rule.to_jax(tensors[0].read())
    # The layers of a model may have several dtypes, and NumPy cannot promote bfloat16 with float16.
    dtype = jnp.result_type(*{tensor.dtype for tensor in tensors})
    stacked = np.empty((len(tensors), *first.shape), dtype)
    stacked[0] = first
    for row, tensor in enumerate(tensors[1:], start=1):
        stacked[row] = rule.to_jax(tensor.read())
    return stacked


def _bytes(tensor: Tensor) -> int:
    """Return the size of a tensor in memory."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _write_weight_norm(path: Path, opened: TorchCheckpoint) -> None:
    """Write the factors of the folded convolutions, so that `to-torch` can restore them bit for bit."""
    write_safetensors(path, [(name, t.shape, t.dtype, t.read) for name, t in opened.weight_norm.items()])
