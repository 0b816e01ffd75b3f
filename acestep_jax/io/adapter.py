"""LoRA, DoRA, LoKr and LoHa adapters of the transformer: as files, loaded alongside its weights, or merged into them.

A folder: `adapter.json` is the `LoRAConfig`, `adapter.safetensors` the float32 parameters by dotted path. PyTorch
adapters are read as well, see `io.adapter_reader`.
"""

import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from acestep_jax.errors import InputError
from acestep_jax.io import checkpoint
from acestep_jax.io.adapter_reader import read_lora
from acestep_jax.io.files import as_path, check_new, local_copy, local_files, publish_folder
from acestep_jax.models.adapters import Factors, apply_adapters, is_merged, prepare_adapter, rescale_adapters
from acestep_jax.models.config import LoRAConfig, TransformerConfig
from acestep_jax.models.lora import PARTS, check_shapes, merge_loras
from acestep_jax.models.transformer import AceStepTransformer1DModel

FORMAT, FORMAT_VERSION = "acestep-jax-lora", 1
CONFIG, WEIGHTS = "adapter.json", "adapter.safetensors"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A trained adapter of a transformer with L layers.

    config: its training configuration; at scale 1 its product is multiplied by `alpha / rank`.
    leaves: the parameters, float32, by dotted path within the transformer. A layer in `layers` has
        `layers.P.lora_a` [L, in, r], `layers.P.lora_b` [L, r, out] and, for DoRA only, `layers.P.lora_magnitude`
        [L, out]. Another layer, such as `condition_embedder`, has the same without L. A LoKr or LoHa layer has the
        arrays that `models.lora` names instead.
    """

    config: LoRAConfig
    leaves: Mapping[str, np.ndarray]


def save_adapter(path: str | Path, adapter: Adapter) -> None:
    """Write an adapter, atomically.

    Raises:
        InputError: if `path` exists, see `publish_folder`, or the parameters do not match `Adapter`.
    """
    path = as_path(path)
    check_new(path)
    _check_leaves(adapter, str(path))
    leaves = {name: np.ascontiguousarray(value) for name, value in adapter.leaves.items()}
    values = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(adapter.config)}
    with publish_folder(path, sum(value.nbytes for value in leaves.values())) as folder:
        (folder / WEIGHTS).write_bytes(save(leaves))  # `save_file` would make it readable only by its owner
        (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_adapter(path: str | Path, num_layers: int | None = None) -> Adapter:
    """Read an adapter written by `save_adapter`, or a PyTorch adapter in any layout that `adapter_reader.read_lora`
    supports.

    Args:
        num_layers: number of layers of the transformer; required for a PyTorch adapter without the last layers, which
            does not say how many there are.

    Raises:
        InputError: if `path` is something else, or is damaged or incomplete.
    """
    path = as_path(path)
    if not path.exists():
        raise InputError(f"{path}: no such folder or file; expected the folder or the .safetensors file of an adapter")
    if not (path / CONFIG).is_file() and not (path / WEIGHTS).is_file():
        copy = local_files(path, (".safetensors", ".json")) if path.is_dir() else local_copy(path)
        try:
            adapter = Adapter(*read_lora(copy, num_layers))
        except InputError as error:
            raise InputError(str(error).replace(str(copy), str(path))) from None
        _check_leaves(adapter, str(path))
        return adapter
    try:
        values = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: expected {CONFIG} next to {WEIGHTS}; export or convert the adapter again") from None
    except ValueError as error:
        raise InputError(f"{path / CONFIG}: not valid JSON ({error}); export or convert the adapter again") from None
    adapter = Adapter(_read_config(path / CONFIG, values), _read_leaves(path / WEIGHTS))
    _check_leaves(adapter, str(path / WEIGHTS))
    return adapter


def check_adapter(adapter: Adapter, config: TransformerConfig, source: str = "adapter") -> None:
    """Check that an adapter matches a transformer; if not, raise InputError naming `source` and the parameter."""
    shapes = checkpoint.leaf_shapes("transformer", config)
    kernels = {n.removesuffix(".kernel"): leaf.shape for n, leaf in shapes.items() if n.endswith(".kernel")}
    check_shapes(adapter.leaves, kernels, source)


def merge_adapters(
    transformer: AceStepTransformer1DModel, adapters: Sequence[Adapter], scales: Sequence[float]
) -> AceStepTransformer1DModel:
    """Return a copy of the transformer with the changes of all adapters, each times its scale, added to its weights.

    Every change is relative to the given weights, so the order does not matter. See `models.lora.merge_loras`.

    Args:
        scales: scale of each adapter: 1 is the adapter as trained, 0 has no effect, below 0 is the opposite.

    Raises:
        InputError: if an adapter is for another model, or a scale is not a finite number.
    """
    for scale in scales:
        check_scale(scale)
    parts = [(a.leaves, a.config.scaling, float(k)) for a, k in zip(adapters, scales, strict=True)]
    return merge_loras(transformer, parts)


def resolve_adapters(
    adapters: str | Path | Adapter | Sequence[str | Path | Adapter],
    scale: float | Sequence[float],
    config: TransformerConfig,
) -> tuple[list[Adapter], list[float]]:
    """Read and check one or several adapters or folders, and one scale for all or one for each; return both as lists.

    Raises:
        InputError: see `load_adapter`, `check_adapter` and `check_scale`; or if the counts differ.
    """
    adapters = [adapters] if isinstance(adapters, str | Path | Adapter) else list(adapters)
    scales = list(cast(Sequence[float], [scale] * len(adapters) if np.ndim(scale) == 0 else scale))
    if len(scales) != len(adapters):
        raise InputError(f"scale: expected one number or {len(adapters)}, one for each adapter, found {len(scales)}")
    for value in scales:
        check_scale(value)
    depth = config.num_hidden_layers
    loaded = [adapter if isinstance(adapter, Adapter) else load_adapter(adapter, depth) for adapter in adapters]
    for given, adapter in zip(adapters, loaded, strict=True):
        check_adapter(adapter, config, "adapter" if isinstance(given, Adapter) else str(given))
    return loaded, scales


def check_scale(scale: float, argument: str = "scale") -> None:
    """Raise InputError unless `scale` is a finite number."""
    number = isinstance(scale, int | float | np.number) and not isinstance(scale, bool)
    if not number or not math.isfinite(scale):
        raise InputError(f"{argument}: expected a finite number such as 0.8, found {scale!r}")


@dataclasses.dataclass(frozen=True)
class LoadedAdapters:
    """The adapters of a transformer, by name. Every method returns a new object, and changes nothing if it raises.

    LoRA and DoRA are computed alongside the weights, see `models.adapters`: every change is relative to the weights of
    `base`, so the order in which adapters are loaded does not matter, and new scales need neither memory nor
    compilation (but see `Placement.second_copy`). LoKr and LoHa change a copy of the weights of their layers, which is
    made again for new scales.

    base: the transformer without adapters; None in a pipeline without one.
    network: the transformer with adapters; it shares the arrays of `base`, and is `base` if there are no adapters.
    scales: scale of each adapter by name; 1 is the adapter as trained, 0 is off.
    """

    base: Any
    network: Any
    factors: Mapping[str, Factors]
    scales: Mapping[str, float]

    @classmethod
    def none(cls, base: AceStepTransformer1DModel | None) -> "LoadedAdapters":
        """Return the state before the first adapter is loaded."""
        return cls._apply(base, {}, {})

    @classmethod
    def _apply(cls, base: Any, factors: Mapping[str, Factors], scales: Mapping[str, float]) -> "LoadedAdapters":
        network = apply_adapters(base, list(factors.values()), [scales[name] for name in factors]) if factors else base
        return cls(base, network, factors, MappingProxyType(dict(scales)))

    def load(
        self,
        adapters: str | Path | Adapter | Sequence[str | Path | Adapter],
        scale: float | Sequence[float] = 1.0,
        name: str | Sequence[str] | None = None,
    ) -> "LoadedAdapters":
        """Load more adapters.

        Args:
            adapters: an adapter, a folder, or several.
            scale: one for all or one for each.
            name: one for each; None: the names of their folders, followed by -2, -3, ... where a name is taken.

        Raises:
            InputError: see `resolve_adapters`; or if a name is taken, empty, or there are more or fewer names.
        """
        found, scales = resolve_adapters(adapters, scale, self.base.config)
        if not found:
            return self
        given = [adapters] if isinstance(adapters, str | Path | Adapter) else list(adapters)
        names = _new_names(given, self.scales) if name is None else _check_names(name, len(given), self.scales)
        made = {
            name: prepare_adapter(self.base, adapter.leaves, adapter.config.scaling)
            for name, adapter in zip(names, found, strict=True)
        }
        scales = {name: float(scale) for name, scale in zip(names, scales, strict=True)}
        return self._apply(self.base, {**self.factors, **made}, {**self.scales, **scales})

    def set(self, scales: Mapping[str, float]) -> "LoadedAdapters":
        """Change the scales of loaded adapters; adapters that are not named are turned off.

        Raises:
            InputError: if a name is unknown, or a scale is not a finite number.
        """
        if not isinstance(scales, Mapping):
            raise InputError(f'scales: expected scales by name, such as {{"style": 0.8}}, found {scales!r}')
        self._check_loaded(scales)
        for name, scale in scales.items():
            check_scale(scale, f"scales[{name!r}]")
        scales = {name: float(scales.get(name, 0.0)) for name in self.scales}
        if not scales:
            return self
        if any(map(is_merged, self.factors.values())):
            return self._apply(self.base, self.factors, scales)
        network = rescale_adapters(self.network, list(self.factors.values()), [scales[name] for name in self.factors])
        return LoadedAdapters(self.base, network, self.factors, MappingProxyType(scales))

    def unload(self, names: str | Iterable[str] | None = None) -> "LoadedAdapters":
        """Remove adapters; None: all, which gives `base` itself.

        Raises:
            InputError: if a name is unknown.
        """
        names = self.scales if names is None else [names] if isinstance(names, str) else list(names)
        self._check_loaded(names)
        kept = {name: factors for name, factors in self.factors.items() if name not in names}
        return self._apply(self.base, kept, {name: self.scales[name] for name in kept})

    def _check_loaded(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.scales:
                near = difflib.get_close_matches(str(name), self.scales, 1)
                known = f"loaded are {', '.join(self.scales)}" if self.scales else "none is loaded; use load_lora first"
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise InputError(f"adapters: {name!r} is unknown; {hint}{known}")


def scales_by_name(
    names: Mapping[str, float] | str | Sequence[str], scales: float | Sequence[float | None] | None = None
) -> Mapping[str, float]:
    """Return scales by name from either form of `set_adapters`: scales by name, or names and their scales.

    Args:
        scales: one for all names, or one for each; None: 1.

    Raises:
        InputError: if the numbers of scales and names differ, or scales are given twice.
    """
    if isinstance(names, Mapping):
        if scales is not None:
            raise InputError("adapter_weights: the scales are given by name already; leave it out")
        return names
    if not isinstance(names, str | list | tuple):
        raise InputError(f'scales: expected scales by name, such as {{"style": 0.8}}, or names, found {names!r}')
    names = [names] if isinstance(names, str) else list(names)
    each = list(scales) if isinstance(scales, list | tuple) else [scales] * len(names)
    if len(each) != len(names):
        raise InputError(f"adapter_weights: expected one or {len(names)}, one for each adapter, found {len(each)}")
    return {name: cast(float, 1.0 if scale is None else scale) for name, scale in zip(names, each, strict=True)}


def _new_names(adapters: Sequence[str | Path | Adapter], taken: Iterable[str]) -> list[str]:
    """Return a free name for each adapter."""
    names: list[str] = []
    for adapter in adapters:
        stem = "adapter"
        if not isinstance(adapter, Adapter):
            stem = os.path.basename(os.path.abspath(adapter)).removesuffix(".safetensors")
        name, count = stem, 1
        while name in {*taken, *names}:
            count += 1
            name = f"{stem}-{count}"
        names.append(name)
    return names


def _check_names(name: str | Sequence[str], count: int, taken: Iterable[str]) -> list[str]:
    names = [name] if isinstance(name, str) else list(name)
    if len(names) != count:
        raise InputError(f"name: expected {count}, one for each adapter, found {len(names)}")
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise InputError(f"name: expected text that is not empty, found {name!r}")
        if name in {*taken, *names[:i]}:
            raise InputError(f"name: an adapter {name!r} is loaded already; choose another name or unload it first")
    return names


def _read_config(file: Path, values: dict) -> LoRAConfig:
    again = "export or convert the adapter again"
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise InputError(f'{file}: expected "format": "{FORMAT}"; {again}')
    if (version := values.pop("format_version", None)) != FORMAT_VERSION:
        raise InputError(
            f"{file}: format_version {version}, but this version of acestep-jax reads {FORMAT_VERSION}; update the "
            "package or convert the adapter again"
        )
    known = {field.name for field in dataclasses.fields(LoRAConfig)}
    if unknown := sorted(values.keys() - known):
        raise InputError(f"{file}: unknown key(s) {', '.join(unknown)}; expected {', '.join(sorted(known))}; {again}")
    if missing := sorted(known - values.keys()):
        raise InputError(f"{file}: the key(s) {', '.join(missing)} are missing; {again}")
    try:
        return LoRAConfig(**values)
    except (InputError, TypeError) as error:
        raise InputError(f"{file}: {error}; {again}") from None


def _read_leaves(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise InputError(f"{file}: missing; export or convert the adapter again")
    try:
        return load_file(local_copy(file))
    except (SafetensorError, KeyError) as error:  # KeyError: of a dtype that NumPy lacks
        raise InputError(f"{file}: damaged ({error}); export or convert the adapter again") from None


def _check_leaves(adapter: Adapter, source: str) -> None:
    """Check that the parameters are complete, and consistent with the config and each other."""
    rank, leaves, use_dora = adapter.config.rank, adapter.leaves, adapter.config.use_dora
    if not leaves:
        raise InputError(f"{source}: holds no adapted layer; expected NAME.lora_a and NAME.lora_b of at least one")
    found: dict[str, dict[str, np.ndarray]] = {}
    for leaf in sorted(leaves):
        layer, _, part = leaf.rpartition(".")
        found.setdefault(layer, {})[part] = leaves[leaf]
        if leaves[leaf].dtype != np.float32:
            raise InputError(f"{source}: {leaf} is {leaves[leaf].dtype}, expected float32")
        if not np.isfinite(leaves[leaf]).all():
            raise InputError(f"{source}: {leaf} holds NaN or infinities; download or export the adapter again")
    depths = {}
    for layer, parts in found.items():
        kind = next((kind for kind, (first, *_) in PARTS.items() if first in parts), "lora")
        wanted = (*PARTS[kind], *(("lora_magnitude",) if use_dora else ()))
        for part in sorted({*wanted, *parts}):
            if part not in parts:
                what = "a DoRA" if use_dora else "an"
                raise InputError(
                    f"{source}: {layer}.{part} is missing; each layer of {what} adapter has {', '.join(wanted)}"
                )
            if part not in wanted:
                raise InputError(f"{source}: unexpected tensor {layer}.{part}; expected NAME.{', NAME.'.join(wanted)}")
        depth = _check_shapes_of(parts, kind, layer, rank, source)
        if depth is not None:
            depths[layer] = depth
    if len(set(depths.values())) > 1:
        raise InputError(f"{source}: expected one number of layers for all, found {depths}")


def _check_shapes_of(parts: Mapping[str, np.ndarray], kind: str, layer: str, rank: int, source: str) -> int | None:
    """Check that the shapes of a layer's arrays match; return the number of transformer layers that they are for."""
    stacked = re.search(r"(?:^|\.)layers\.", layer) is not None
    ndim = 3 if stacked else 2
    name, *others = PARTS[kind]
    first = parts[name]
    axes = {"lora": ("in", "r"), "lokr": ("in", "out"), "loha": ("in", "r")}[kind]
    if first.ndim != ndim or (kind != "lokr" and first.shape[-1] != rank):
        with_rank = f" with r = {rank}" if kind != "lokr" else ""
        raise InputError(
            f"{source}: {layer}.{name} has shape {list(first.shape)}, expected "
            f"{('L', *axes) if stacked else axes}{with_rank}"
        )
    stack = first.shape[:-2]
    second = parts[others[0]]
    outputs = second.shape[-1] if second.ndim else 0
    rest = {
        "lora": {"lora_b": (*stack, rank, outputs)},
        "lokr": {"lokr_w2": (*stack, *second.shape[-2:])},
        "loha": {"loha_b1": (*stack, rank, outputs), "loha_a2": first.shape, "loha_b2": (*stack, rank, outputs)},
    }[kind]
    if "lora_magnitude" in parts:
        rest["lora_magnitude"] = (*stack, outputs)
    for part, expected in rest.items():
        if (shape := parts[part].shape) != expected:
            raise InputError(
                f"{source}: {layer}.{part} has shape {list(shape)}, expected {list(expected)} to match {name} "
                f"{list(first.shape)}"
            )
    return len(first) if stacked else None
