"""How a network is computed: its dtypes, quantisation, rematerialisation and attention kernel.

A `Runtime` is given when weights are loaded, and is never stored with them.
"""

import dataclasses
from collections.abc import Collection
from typing import Any, Self

from acestep_jax.errors import InputError

DTYPES = ("float32", "bfloat16", "float16")
MIXED = "mixed_float16"
PRECISIONS = (*DTYPES, MIXED)
QUANTIZATIONS = ("int8", "fp8")  # 8-bit formats of weights, see `models.quantization`
REMAT = ("none", "dots", "full")
ATTENTION_KERNELS = ("auto", "xla", "cudnn", "splash")


def check_dtype(name: str, argument: str = "dtype", choices: Collection[str] = DTYPES) -> str:
    """Return `name` if it is one of `choices`; raise InputError otherwise."""
    if name not in choices:
        raise InputError(f"{argument}: {name!r} is not a dtype of this library; use one of {', '.join(choices)}")
    return name


def check_stored(name: str, argument: str = "dtype") -> str:
    """Return `name` if weights can be stored in it (`DTYPES` or `QUANTIZATIONS`); raise InputError otherwise."""
    return check_dtype(name, argument, (*DTYPES, *QUANTIZATIONS))


def check_precision(name: str, argument: str = "dtype") -> str:
    """Return `name` if it is one of `PRECISIONS`; raise InputError otherwise."""
    return check_dtype(name, argument, PRECISIONS)


def split_dtype(name: str | None, argument: str = "dtype") -> tuple[str | None, str | None]:
    """Return (precision, quantisation) for a dtype given by the user, which is one of the two; the other is None.

    Raises:
        InputError: if it is in neither `PRECISIONS` nor `QUANTIZATIONS`.
    """
    if name is None or name in QUANTIZATIONS:
        return None, name
    return check_dtype(name, argument, (*PRECISIONS, *QUANTIZATIONS)), None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a network is computed, independently of its architecture.

    dtype: dtype of activations and matrix products. Norm statistics, softmax, sinusoids and FSQ stay in float32.
    param_dtype: dtype of the weights in memory, except for quantised ones.
    quantization: quantisation of the layers' weights, one of `QUANTIZATIONS`, see `models.quantization`; None: not
        quantised.
    products: "float16" to multiply in float16, with each row scaled to its range, in linear layers and attention. Sums
        and results are float32, and `dtype` must be float32 too. Convolutions are computed in `dtype`. Inference only:
        derivatives would be rounded to float16 without such a scale. None: products are computed in `dtype`.
    remat: what the backward pass recomputes in a layer: cheap elementwise operations ("none"), everything except
        products with weights ("dots"), or everything ("full").
    attention: attention kernel, see `models.attention.attention`.
    """

    dtype: str = "float32"
    param_dtype: str = "float32"
    quantization: str | None = None
    products: str | None = None
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self):
        check_dtype(self.dtype, "Runtime.dtype")
        check_dtype(self.param_dtype, "Runtime.param_dtype")
        if self.products is not None and (self.products, self.dtype) != ("float16", "float32"):
            raise InputError(
                "Runtime.products: expected None, or 'float16' with the dtype 'float32', found "
                f"{self.products!r} with {self.dtype!r}"
            )
        choices_of = {"remat": REMAT, "attention": ATTENTION_KERNELS, "quantization": (None, *QUANTIZATIONS)}
        for field, choices in choices_of.items():
            if (value := getattr(self, field)) not in choices:
                raise InputError(f"Runtime.{field}: expected one of {', '.join(map(str, choices))}, found {value!r}")

    @classmethod
    def of(cls, precision: str, **options: Any) -> Self:
        """Return the runtime of a precision: one dtype for everything, or "mixed_float16".

        Mixed precision is for GPUs with fast float16 but no bfloat16. The residual stream and the product inside the
        transformer's MLP exceed 65504, the largest float16, so only the operands of products are float16.

        Args:
            options: further fields, which override those of the precision.

        Raises:
            InputError: if the precision is unknown.
        """
        if check_precision(precision) == MIXED:
            chosen = dict(dtype="float32", param_dtype="float16", products="float16")
        else:
            chosen = dict(dtype=precision, param_dtype=precision)
        return cls(**(chosen | options))


DEFAULT_RUNTIME = Runtime()
