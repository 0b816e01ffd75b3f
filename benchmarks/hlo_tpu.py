"""The time of a TPU program as estimated by its compiler: scheduled cycles, Pallas kernels and collectives.

`compiled.cost_analysis()` counts the body of a loop once and returns -1 for unknown times. The HLO text has the
scheduler's estimate for each instruction, which is summed here over the schedule.
"""

import dataclasses
import json
import math
import re

from benchmarks.hlo import Computation, Instruction, Module
from benchmarks.targets import Chip

KERNEL_RATE = 0.6  # fraction of the peak that a Pallas kernel is assumed to reach
# Number of products of the size of the scores in each kernel of splash attention.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "dkv and dq": 5}


@dataclasses.dataclass(frozen=True)
class Figures:
    """Figures per chip. A count is a pair: the number in the program's text, and how often they run.

    scheduled: seconds, the sum of the scheduler's cycles, which do not include collectives and Pallas kernels.
    kernels_at_peak: seconds of the Pallas kernels at peak rate.
    kernels: seconds of the Pallas kernels at `KERNEL_RATE` of the peak or at the memory's bandwidth, whichever takes
        longer.
    exchanged: seconds of the collectives, at the bandwidth of a link.
    """

    scheduled: float
    kernels_at_peak: float
    kernels: float
    exchanged: float
    kernel_counts: tuple[int, int]
    collectives: dict[str, tuple[int, int]]

    @property
    def at_best(self) -> float:
        """Return the time if kernels reached the peak and collectives were free."""
        return self.scheduled + self.kernels_at_peak

    @property
    def estimate(self) -> float:
        return self.scheduled + self.kernels + self.exchanged


def read(text: str, chip: Chip, devices: int) -> Figures:
    """Return the figures of `compiled.as_text()`."""
    module = Module(text)
    cycles, found, runs_of_kernels, at_peak, kernels = 0.0, 0, 0, 0.0, 0.0
    for computation, instruction, runs in module.schedule():
        if estimated := re.search(r'"estimated_cycles":"(\d+)"', instruction.rest):
            cycles += runs * int(estimated[1])
        if instruction.target == "tpu_custom_call":
            found, runs_of_kernels = found + 1, runs_of_kernels + runs
            flops = kernel_flops(computation, instruction)
            moved = instruction.bytes + module.read_bytes(computation, instruction)
            at_peak += runs * flops / chip.peak
            kernels += runs * max(flops / (KERNEL_RATE * chip.peak), moved / chip.bandwidth)
    collectives = {
        kind: (len(entries), sum(runs for runs, _ in entries)) for kind, entries in module.collectives().items()
    }
    exchanged = module.collective_seconds(chip.link, devices)
    return Figures(cycles / chip.clock, at_peak, kernels, exchanged, (found, runs_of_kernels), collectives)


def kernel_flops(computation: Computation, instruction: Instruction) -> float:
    """Return the FLOPs that an attention kernel executes, in whole blocks, masked or not; 0 for other kernels.

    Its operands are q [..., T, H] and k, v [..., S, H]. If it visits only some blocks of keys, its first operands are
    lists of them, [heads, blocks of queries, visited blocks], and its metadata have the block size.
    """
    operands = [computation[name].shapes[0] for name in instruction.operands if name in computation]
    arrays = [shape.dims for shape in operands if shape.dtype in ("bf16", "f16", "f32")]
    lists = [shape.dims for shape in operands if shape.dtype[0] in "su" and len(shape.dims) >= 3]
    for q, k, v in zip(arrays, arrays[1:], arrays[2:], strict=False):
        if k == v and len(q) == len(k) >= 3 and q[-1] == k[-1]:
            found = re.search(r"splash_\w+?_(fwd|dq|dkv)", instruction.rest + instruction.name)
            kind = found[1] if found else "fwd"
            queries, keys = q[-2], k[-2]
            if lists and (sizes := _block_sizes(instruction.rest)):
                if kind == "dkv":  # its lists are [heads, visited blocks of queries, blocks of keys]
                    queries = min(queries, lists[0][-2] * sizes["block_q_dkv"])
                else:
                    keys = min(keys, lists[0][-1] * sizes["block_kv_dq" if kind == "dq" else "block_kv"])
            if kind == "dkv" and any(len(shape.dims) > len(q) for shape in instruction.shapes):
                kind = "dkv and dq"  # a sum by queries of each block of keys, [blocks, ..., T, H]
            return 2.0 * _PRODUCTS[kind] * math.prod(q) / q[-2] * queries * keys
    return 0.0


def _block_sizes(rest: str) -> dict[str, int] | None:
    found = re.search(r"xprof_metadata.{1,12}?(\{.*?\})", rest)
    return json.loads(found[1].replace("\\", "")) if found else None
