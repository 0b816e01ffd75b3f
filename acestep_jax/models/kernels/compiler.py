"""Options of XLA's compiler, for `jax.jit(compiler_options=...)`."""

from collections.abc import Iterable

import jax

# On a CPU, XLA's default order of operations prefers concurrency: it copies the weights of all layers of a scan's body
# out of their stacks before the first of them runs, which takes ten times the memory. Other backends ignore this.
COMPILER_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

# XLA for TPU would cut each product that meets an fsdp axis into a loop over the devices, a permutation at a time. The
# compiler's own estimate of that is 2.6 times the one of products with whole gathered weights.
_TPU_TRAINING_OPTIONS = {
    "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false",
}


def training_options(devices: Iterable[jax.Device]) -> dict[str, str]:  # pyright: ignore[reportInvalidTypeForm]
    """Return the options for a step of training on these devices; a backend rejects the options of another."""
    on_tpu = next(iter(devices)).platform == "tpu"
    return COMPILER_OPTIONS | (_TPU_TRAINING_OPTIONS if on_tpu else {})
