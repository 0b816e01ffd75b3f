"""Options of XLA's compiler, for `jax.jit(compiler_options=...)`."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

# On a CPU, XLA's default scheduler favours concurrency: it copies the weights of all layers in a scan's body out of
# their stacks before the first layer runs, which takes ten times the memory. Other backends ignore this option.
COMPILER_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

# By default, XLA for TPU would turn each product over an fsdp axis into a loop of collective permutes over the devices.
# Its own estimate for that is 2.6 times the one for products with all-gathered weights.
_TPU_TRAINING_OPTIONS = {
    "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false",
}


# By default, XLA for CPUs gives sums to the library of its products, YNNPACK, too. Of x * y, [375, 2048], it takes 4
# to 7 ms for a sum over either axis, where XLA's own loop takes 0.7; so the derivative of a norm takes five times as
# long. The sums of inference, of norms and softmax, are faster in the library.
_CPU_TRAINING_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def training_options(devices: Iterable[jax.Device]) -> dict[str, str]:  # pyright: ignore[reportInvalidTypeForm]
    """Return the compiler options of a training step on these devices; a backend rejects the options of another."""
    platform = next(iter(devices)).platform
    if platform == "tpu":
        return COMPILER_OPTIONS | _TPU_TRAINING_OPTIONS
    return COMPILER_OPTIONS | (_CPU_TRAINING_OPTIONS if platform == "cpu" and _cpu_options_exist() else {})


@functools.cache
def _cpu_options_exist() -> bool:
    """Return whether this version of XLA accepts `_CPU_TRAINING_OPTIONS`, which is experimental."""
    try:
        jax.jit(jnp.negative, compiler_options=_CPU_TRAINING_OPTIONS).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
