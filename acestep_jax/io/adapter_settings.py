"""The settings that trainers record with an adapter, and the ones that this library supports.

Settings are accepted only if they are known not to change the meaning of the tensors; others are errors that name them.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from safetensors import SafetensorError, safe_open

from acestep_jax.errors import InputError

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_KEY, LOKR_KEY = "lora_adapter_metadata", "lokr_config"
PEFT_KINDS = {"LORA": "lora_alpha", "LOKR": "alpha", "LOHA": "alpha"}  # the key of alpha in each

# PEFT settings that are read, or that matter only for training, or only together with others.
_ALLOWED = frozenset(
    "alpha alpha_pattern auto_mapping base_model_name_or_path bias corda_config decompose_both decompose_factor "
    "ensure_weight_tying eva_config exclude_modules inference_mode init_lora_weights init_weights layers_pattern "
    "layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_config megatron_core "
    "module_dropout peft_type peft_version qalora_group_size r rank_dropout rank_dropout_scale rank_pattern revision "
    "runtime_config target_modules task_type use_dora use_effective_conv2d use_rslora".split()
)
# Initialisations that do not change the model's weights. Others change them, and the adapter is relative to the change.
_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")


class Settings(NamedTuple):
    """The recorded settings: rank and alpha, possibly by module, and how they are combined.

    file: the file that contains them.
    pattern: rank and alpha by a regular expression for the end of a module's name.
    """

    file: Path
    rank: float
    alpha: float
    rank_pattern: dict[str, float]
    alpha_pattern: dict[str, float]
    use_rslora: bool
    use_dora: bool
    dropout: Any

    def of(self, module: str) -> tuple[float, float]:
        """Return rank and alpha of a module. Patterns are read as by PEFT: the first that matches the end of a name."""
        name = re.sub(r"^(base_model\.model|transformer)\.", "", module)

        def first(pattern: dict[str, float], default: float) -> float:
            return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", name)), default)

        return first(self.rank_pattern, self.rank), first(self.alpha_pattern, self.alpha)


def read_peft_settings(file: Path) -> Settings:
    """Read `adapter_config.json`; raise InputError if it is missing, damaged, or has unsupported settings."""
    if not file.is_file():
        raise InputError(f"{file}: missing; it holds the adapter's rank and alpha, put it next to {PEFT_WEIGHTS}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return _check(values, file)


def read_header_settings(file: Path) -> Settings | None:
    """Return the settings that diffusers writes in the header of a file, as `transformer.KEY` or only KEY."""
    values = _header(file, DIFFUSERS_KEY)
    if values is None:
        return None
    return _check({key.removeprefix("transformer."): value for key, value in values.items()}, file)


def read_lokr_settings(file: Path) -> dict[str, Any]:
    """Return the settings of LyCORIS that ACE-Step's own trainer writes in the header of a file; empty without."""
    return _header(file, LOKR_KEY) or {}


def _header(file: Path, key: str) -> dict[str, Any] | None:
    try:
        with safe_open(file, framework="np") as reader:
            text = (reader.metadata() or {}).get(key)
        values = None if text is None else json.loads(text)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{file}: {key} in the header is damaged ({error}); save the adapter again") from None
    if values is not None and not isinstance(values, dict):
        raise InputError(f"{file}: {key} in the header: expected a JSON object, found {values!r}")
    return values


def _check(values: dict[str, Any], file: Path) -> Settings:
    kind = values.get("peft_type") or "LORA"
    if kind not in PEFT_KINDS:
        raise InputError(f"{file}: peft_type {kind!r}; expected {', '.join(PEFT_KINDS)}, others are not supported")
    if set_ := [key for key in sorted(values) if values[key] and key not in _ALLOWED]:
        raise InputError(
            f"{file}: {set_[0]} is {values[set_[0]]!r}; only plain LoRA, DoRA, LoKr and LoHa are supported. Merge the "
            "adapter into the model with PEFT (merge_and_unload) and convert the model"
        )
    if (bias := values.get("bias") or "none") != "none":
        raise InputError(f"{file}: bias is {bias!r}; expected 'none', trained biases are not supported")
    if not any(values.get("init_lora_weights") is known for known in _INITIALISATIONS[:3]) and (
        (start := values.get("init_lora_weights")) not in _INITIALISATIONS[3:]
    ):
        raise InputError(
            f"{file}: init_lora_weights is {start!r}, which also changed the model's weights before training, so the "
            "adapter does not fit the published ones. PEFT makes a plain LoRA of it: save_pretrained(FOLDER, "
            "path_initial_model_for_weight_conversion=the adapter as it was before training); one that was not kept, "
            "or of LoftQ, can only be merged there (merge_and_unload)"
        )
    alpha = PEFT_KINDS[kind]
    for key in ("r", alpha):
        if not is_number(values.get(key)):
            raise InputError(f"{file}: {key}: expected a number above 0, found {values.get(key)!r}")
    patterns = [values.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    for key, pattern in zip(("rank_pattern", "alpha_pattern"), patterns, strict=True):
        if not isinstance(pattern, dict) or not all(map(is_number, pattern.values())):
            raise InputError(f"{file}: {key}: expected numbers above 0 by module name, found {pattern!r}")
        for module in pattern:
            try:
                re.compile(module)
            except re.error as error:
                raise InputError(f"{file}: {key}: {module!r} is not a regular expression ({error})") from None
    ranks, alphas = patterns
    flags = bool(values.get("use_rslora")), bool(values.get("use_dora"))
    dropout = values.get("lora_dropout") or 0.0
    return Settings(file, values["r"], values[alpha], ranks, alphas, flags[0], flags[1], dropout)


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number above 0."""
    return type(value) in (int, float) and 0 < value < math.inf
