"""Options of XLA's compiler, for `jax.jit(compiler_options=...)`."""

from collections.abc import Iterable

import jax

# On a CPU, XLA's default scheduler favours concurrency: it copies the weights of all layers in a scan's body out of
# their stacks before the first layer runs, which takes ten times the memory. Other backends ignore this option.
COMPILER_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

# By default, XLA for TPU would turn each product over an fsdp axis into a loop of collective permutes over the devices.
# Its own estimate for that is 2.6 times the one for products with all-gathered weights.
_TPU_TRAINING_OPTIONS = {
    "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false",
}


def training_options(devices: Iterable[jax.Device]) -> dict[str, str]:  # pyright: ignore[reportInvalidTypeForm]
    """Return the compiler options of a training step on these devices; a backend rejects the options of another."""
    on_tpu = next(iter(devices)).platform == "tpu"
    return COMPILER_OPTIONS | (_TPU_TRAINING_OPTIONS if on_tpu else {})
