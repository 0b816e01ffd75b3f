"""`config.json` of the native checkpoint: the architecture of each network, and other metadata of the checkpoint.

Version 2 of the format contains no runtime. Version 1, which stored dtypes, remat and the attention kernel with each
network, can still be read: only its dtype of the computation is used, as the checkpoint's default. Version 3 is for
checkpoints with quantised weights, which earlier versions of this library cannot read.
"""

import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from acestep_jax.errors import InputError
from acestep_jax.io.files import as_path
from acestep_jax.models.config import NetworkConfig
from acestep_jax.models.kernels.platform import default_precision
from acestep_jax.models.quantization import NETWORKS, quantized_layers
from acestep_jax.models.registry import FAMILY, SamplingDefaults
from acestep_jax.models.runtime import MIXED, QUANTIZATIONS, check_dtype

FORMAT, FORMAT_VERSION, NEWEST_VERSION = "acestep-jax", 2, 3
CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of `config.json`.

    configs: the architecture of each network.
    tokenizer_config: settings from the PyTorch tokenizer folder, kept for conversion back.
    sampling: defaults of this checkpoint that override its variant's: some of the fields of `SamplingDefaults`.
    dtypes: default dtype of the computation by network; for a network without an entry, it is the dtype that most of
        its weights are stored in.
    quantization: quantisation of the weights by network, one of `runtime.QUANTIZATIONS`; networks without an entry are
        not quantised.
    """

    configs: dict[str, NetworkConfig]
    tokenizer_config: dict[str, Any]
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtypes: dict[str, str] = dataclasses.field(default_factory=dict)
    quantization: dict[str, str] = dataclasses.field(default_factory=dict)


def manifest_values(manifest: Manifest) -> dict[str, Any]:
    """Return the contents of `config.json`, ready for JSON."""
    return {
        "format": FORMAT,
        "format_version": NEWEST_VERSION if manifest.quantization else FORMAT_VERSION,
        **{name: dataclasses.asdict(config) for name, config in manifest.configs.items()},
        "tokenizer_config": manifest.tokenizer_config,
        **({"sampling": manifest.sampling} if manifest.sampling else {}),
        **({"dtypes": manifest.dtypes} if manifest.dtypes else {}),
        **({"quantization": manifest.quantization} if manifest.quantization else {}),
    }


def read_manifest(path: str | Path, required: Iterable[str] | None = None) -> Manifest:
    """Read `config.json`, of this version of the format or an earlier one.

    Args:
        required: networks that must be there; None: all but the optional ones.

    Raises:
        InputError: if `path` holds no checkpoint of this library, or lacks one of them.
    """
    required = FAMILY.networks.keys() - set(FAMILY.optional) if required is None else set(required)
    path = as_path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; expected an acestep-jax checkpoint")
    convert = f"if this is a PyTorch checkpoint, convert it: acestep-jax convert from-torch {path} DST"
    try:
        values = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no {CONFIG} here, so this is no acestep-jax checkpoint; {convert}") from None
    except ValueError as error:
        raise InputError(f"{path / CONFIG}: not valid JSON ({error})") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise InputError(f"{path / CONFIG}: not of an acestep-jax checkpoint; {convert}")
    if (version := values.pop("format_version", None)) not in range(1, NEWEST_VERSION + 1):
        raise InputError(
            f"{path / CONFIG}: format_version {version}, but this version of acestep-jax reads 1 to {NEWEST_VERSION}; "
            "update the package or convert the checkpoint again"
        )
    dtypes = _drop_runtime(values, str(path / CONFIG)) if version == 1 else values.pop("dtypes", {})
    quantization = values.pop("quantization", {}) if version == NEWEST_VERSION else {}
    tokenizer_config, sampling = values.pop("tokenizer_config", {}), values.pop("sampling", {})
    check_sampling(sampling, f"{path / CONFIG}: sampling")
    if not isinstance(dtypes, dict) or (unknown := sorted(dtypes.keys() - values.keys())):
        what = f"unknown network(s) {', '.join(unknown)}" if isinstance(dtypes, dict) else f"found {dtypes!r}"
        raise InputError(f"{path / CONFIG}: dtypes: expected a dtype for some of its networks, {what}")
    for name, dtype in dtypes.items():
        check_dtype(dtype, f"{path / CONFIG}: {name}.dtype" if version == 1 else f"{path / CONFIG}: dtypes: {name}")
    _check_quantization(quantization, values.keys() & NETWORKS.keys(), f"{path / CONFIG}: quantization")
    if unknown := sorted(values.keys() - FAMILY.every.keys()):
        raise InputError(f"{path / CONFIG}: unknown network(s) {', '.join(unknown)}")
    if missing := sorted(required - set(FAMILY.optional) - values.keys()):
        raise InputError(f"{path / CONFIG}: the network(s) {', '.join(missing)} are missing")
    configs = {}
    for name, (_, config) in FAMILY.every.items():
        if name in values:
            if not isinstance(values[name], dict):
                raise InputError(f"{path / CONFIG}: {name}: expected a JSON object, found {values[name]!r}")
            known = {field.name for field in dataclasses.fields(config)}
            if unknown := sorted(values[name].keys() - known):
                raise InputError(f"{path / CONFIG}: {name}: unknown key(s) {', '.join(unknown)}")
            configs[name] = config(**values[name])
    return Manifest(configs, tokenizer_config, sampling, dtypes, quantization)


def _check_quantization(values: Any, networks: Iterable[str], source: str) -> None:
    """Raise InputError unless these are valid quantisations of some of the networks."""
    if not isinstance(values, dict):
        raise InputError(f"{source}: expected a JSON object, found {values!r}")
    for name, kind in values.items():
        if name not in networks or kind not in QUANTIZATIONS:
            raise InputError(
                f"{source}: expected {' or '.join(QUANTIZATIONS)} for some of {', '.join(sorted(networks))}, found "
                f"{kind!r} for {name}"
            )


def check_unquantized(path: str | Path, manifest: Manifest, what: str) -> None:
    """Raise InputError if a checkpoint is quantised. `what`: how its weights would be used, for the message."""
    for name, kind in manifest.quantization.items():
        raise InputError(
            f"{path}: its {name} is quantised to {kind}, but {what} weights in float32, bfloat16 or float16; take the "
            "checkpoint that it was made from"
        )


def _drop_runtime(values: dict[str, Any], source: str) -> dict[str, str]:
    """Remove the runtime that version 1 of the format stored from `values`; return the dtypes of the networks."""
    dtypes = {}
    for name in FAMILY.networks:
        if isinstance(network := values.get(name), dict):
            found = {key: network.pop(key, None) for key in ("dtype", "param_dtype", "remat", "attention_kernel")}
            if found["param_dtype"] is not None:
                check_dtype(found["param_dtype"], f"{source}: {name}.param_dtype")
            dtypes[name] = found["dtype"] or "float32"
    return dtypes


def check_sampling(values: Any, source: str) -> None:
    """Raise InputError unless these are valid sampling defaults for a checkpoint. `source`: name for messages."""
    if not isinstance(values, Mapping):
        raise InputError(f"{source}: expected a JSON object, found {values!r}")
    known = [field.name for field in dataclasses.fields(SamplingDefaults)]
    if unknown := sorted(values.keys() - set(known)):
        raise InputError(f"{source}: unknown key(s) {', '.join(unknown)}; expected some of {', '.join(known)}")
    for name, value in values.items():
        if name == "num_inference_steps":
            valid, expected = type(value) is int and value >= 1, "a whole number of at least 1"
        elif name == "vocal_language":
            valid, expected = type(value) is str and value.strip() != "", "a language code"
        else:
            least = 0.0 if name == "guidance_scale" else sys.float_info.min
            valid = type(value) in (int, float) and least <= value < math.inf
            expected = "a number of at least 0" if name == "guidance_scale" else "a number above 0"
        if not valid:
            raise InputError(f"{source}: {name}: expected {expected}, found {value!r}")


def default_dtype(manifest: Manifest, name: str, stored: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    """Return the default dtype of the network `name`'s computation, see `Manifest.dtypes`.

    If weights are only stored as float16, the computation is in float32, because activations exceed float16's range.

    Args:
        stored: its parameters, as returned by `network_leaves`. Quantised ones do not count.
    """
    if name in manifest.dtypes:
        return manifest.dtypes[name]
    sizes: Counter[str] = Counter()
    quantized = quantized_layers(stored)
    for leaf, found in stored.items():
        if leaf.rpartition(".")[0] not in quantized:
            sizes[np.dtype(found.dtype).name] += math.prod(found.shape)
    found = sizes.most_common(1)[0][0]
    return "float32" if found == "float16" else found


def pick_dtype(manifest: Manifest, mesh: Mesh | None = None) -> str | None:
    """Return the default dtype for loading a checkpoint: `default_precision` of the device.

    None, each array as stored, if the checkpoint itself gives the dtypes of its networks' computation; but bfloat16 and
    float16 are replaced with mixed precision on GPUs that need it.
    """
    suited = default_precision(mesh)
    half = set(manifest.dtypes.values()) - {"float32"}
    return suited if not manifest.dtypes or (half and suited == MIXED) else None
