"""Settings as YAML: the `config.yaml` of a run, and the parsers that the command line is built from."""

import dataclasses
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from acestep_jax.errors import InputError
from acestep_jax.io.files import local_copy, publish_file
from acestep_jax.train.config import AutoencoderTrainConfig, Config, TrainConfig


def add_settings(parser: jsonargparse.ArgumentParser, kind: type[Config]) -> None:
    """Add an option for each setting of this kind of run, and `--config` for a YAML file of them."""
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_class_arguments(kind)


def instantiate(values: Any, kind: Any) -> Any:
    """Return the settings of this kind from what a parser with `add_settings` has read; ignore other values."""
    made = {}
    for field in dataclasses.fields(kind):
        value = values[field.name]
        made[field.name] = instantiate(value, field.type) if dataclasses.is_dataclass(field.type) else value
    return kind(**made)


def read(path: Path) -> Config:
    """Read the settings of a run of either kind.

    Raises:
        InputError: if the file is missing, or its settings cannot be used.
    """
    if not path.is_file():
        raise InputError(f"{path.parent}: no {path.name} here, so this is not the folder of a training run")
    try:
        kind = AutoencoderTrainConfig if "model" in yaml.safe_load(path.read_text(encoding="utf-8")) else TrainConfig
        return instantiate(_parser(kind).parse_path(str(local_copy(path))), kind)
    except (jsonargparse.ArgumentError, yaml.YAMLError, TypeError, OSError) as error:
        raise InputError(f"{path}: {error}") from None


def write(path: Path, config: Config) -> None:
    """Write the settings of a run atomically."""
    parser = _parser(type(config))
    values = parser.parse_object(dataclasses.asdict(config))
    with publish_file(path) as temporary:
        temporary.write_text(parser.dump(values), encoding="utf-8")


def differences(a: Config, b: Config) -> dict[str, tuple]:
    """Return the settings that differ between two runs of one kind, by dotted name, with both values."""
    flat = [_flatten(dataclasses.asdict(config)) for config in (a, b)]
    return {name: (value, flat[1][name]) for name, value in flat[0].items() if value != flat[1][name]}


def _flatten(values: dict, prefix: str = "") -> dict:
    result = {}
    for name, value in values.items():
        result |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return result


def _parser(kind: type[Config]) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    add_settings(parser, kind)
    return parser
