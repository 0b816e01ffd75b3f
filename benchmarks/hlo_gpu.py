"""The kernels of a GPU program: their kinds, FLOPs and memory traffic.

XLA for GPUs estimates no times. All figures are derived only from the shapes in the HLO text.
"""

import dataclasses
import math
import re
from collections import Counter

from benchmarks.hlo import COLLECTIVES, Computation, Instruction, Module
from benchmarks.targets import Card

# Operations that launch no kernel.
_NOTHING = frozenset(
    "parameter tuple get-tuple-element bitcast constant while call conditional after-all opt-barrier "
    "copy-done async-done async-update partition-id replica-id iota add-dependency".split()
)


@dataclasses.dataclass(frozen=True)
class Figures:
    """Figures per card.

    kernels: number of kernels that the program launches, by kind, with loops multiplied out.
    layer: kernels in one iteration of the loop over layers, by kind; None without such a loop.
    copied: bytes that kernels that only move values read and write, in the whole program.
    traffic: bytes that all kernels read and write.
    flops: FLOPs of products and attention, as the kernels compute them.
    bound: seconds, the sum over kernels of their FLOPs at peak rate or their bytes at the memory's bandwidth, whichever
        takes longer, plus the collectives at the link's bandwidth.
    """

    kernels: Counter[str]
    layer: Counter[str] | None
    copied: float
    traffic: float
    flops: float
    bound: float


def read(text: str, card: Card, devices: int = 1, layer_trips: int | None = None) -> Figures:
    """Return the figures of `compiled.as_text()`.

    Args:
        layer_trips: trip count of the loop over layers. If several loops have it, the one with most kernels is used.
    """
    module = Module(text)
    kernels: Counter[str] = Counter()
    copied = traffic = flops = bound = 0.0
    for computation, instruction, runs in module.schedule():
        kind = kernel_kind(module, instruction)
        if kind is None:
            continue
        kernels[kind] += runs
        moved = module.written_bytes(instruction) + module.read_bytes(computation, instruction)
        products = kernel_flops(module, computation, instruction)
        if kind == "collective":
            continue
        if kind == "copy":
            moved = 2 * module.written_bytes(instruction)
            copied += runs * moved
        traffic += runs * moved
        flops += runs * products
        bound += runs * max(products / card.peak, moved / card.bandwidth)
    bound += module.collective_seconds(card.link, devices)
    bodies = [loop.body for loop in module.loops if layer_trips and loop.trips == layer_trips]
    layers = [loop_kernels(module, body) for body in bodies]
    layer = max(layers, key=lambda counter: sum(counter.values()), default=None)
    return Figures(kernels, layer, copied, traffic, flops, bound)


def loop_kernels(module: Module, body: str) -> Counter[str]:
    """Return the kernels in one iteration of a loop, by kind."""
    found: Counter[str] = Counter()
    for _, instruction, runs in module.schedule(body):
        if kind := kernel_kind(module, instruction):
            found[kind] += runs
    return found


def kernel_kind(module: Module, instruction: Instruction) -> str | None:
    """Return the kind of kernel that an instruction launches; None if it launches none."""
    opcode, target = instruction.opcode, instruction.target
    if opcode in _NOTHING:
        return None
    if opcode.removesuffix("-start") in COLLECTIVES or opcode == "async-start":
        return "collective"
    if opcode.endswith("-done"):
        return None
    if opcode == "custom-call":
        return _call_kind(target)
    if module.only_moves(instruction):
        return "copy"
    if opcode == "fusion":
        inner = module.computations.get(instruction.called or "", {}).values()
        calls = [kind for i in inner if i.opcode == "custom-call" and (kind := _call_kind(i.target))]
        if calls:
            return calls[0]
        if "triton" in instruction.rest and any(_has_dot(module, i) for i in inner):
            return "Triton product"
        return "elementwise or reduction"
    return opcode


def _call_kind(target: str) -> str | None:
    if "fmha" in target:
        return "cuDNN attention"
    if "cudnn" in target:
        return "cuDNN convolution"
    if "cublas" in target or "gemm" in target:
        return "cuBLAS product"
    if "triton" in target or "mosaic" in target:
        return "Pallas"
    return None if target in ("Sharding", "AllocateBuffer", "TopK", "") else target


def _has_dot(module: Module, instruction: Instruction) -> bool:
    if instruction.opcode == "dot":
        return True
    inner = module.computations.get(instruction.called or "", {}) if instruction.opcode in ("fusion", "call") else {}
    return any(_has_dot(module, i) for i in inner.values())


def kernel_flops(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Return the FLOPs of the products in a kernel."""
    if instruction.opcode == "fusion":
        inner = module.computations.get(instruction.called or "", {})
        return sum(kernel_flops(module, inner, i) for i in inner.values())
    if instruction.opcode != "custom-call":
        return module.dot_flops(computation, instruction)
    kind = _call_kind(instruction.target)
    operands = [computation[name].shapes[0] for name in instruction.operands if name in computation]
    if kind == "cuBLAS product":
        numbers = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)
        summed = [operands[0].dims[int(d)] for d in re.findall(r"\d+", numbers[1])] if numbers else []
        return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(summed)
    if kind == "cuDNN convolution":
        labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.rest)
        kernel = operands[1].dims
        outputs = kernel[labels[1].index("o")] if labels else 1
        return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(kernel) / max(outputs, 1)
    if kind == "cuDNN attention":
        q, k = operands[0].dims, operands[1].dims
        products = 5 if "Backward" in instruction.target else 2
        # [B, T, N, H] and [B, S, K, H]
        return 2.0 * products * math.prod(q) * k[1]
    if kind == "Pallas" and (cost := re.search(r'flops(?:\\?"|\\22)\s*:\s*(?:\\?"|\\22)?(\d+)', instruction.rest)):
        return float(cost[1])
    return 0.0


def text_of(kernels: Counter[str] | None) -> str:
    """Return counts such as "12 cuBLAS product, 3 copy", most first."""
    return ", ".join(f"{n} {kind}" for kind, n in kernels.most_common()) if kernels else ""
