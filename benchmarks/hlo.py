"""Cycles, Pallas kernels and collectives of a TPU program compiled ahead of time, with loops multiplied out.

`compiled.cost_analysis()` counts the body of a loop once and gives -1 for times that it does not know. The HLO text has
the scheduler's estimate of each instruction, which is summed here over the schedule.
"""

import dataclasses
import math
import re
from collections import Counter

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|async_computation)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Program:
    """Hold the figures of one chip. A count is a pair: how many there are in the text, and how often they run.

    cycles: sum of the scheduler's estimates. Collectives and Pallas kernels have none, so they are not included.
    pallas_flops: those of the attention kernels' two matrix products, from the shapes of their operands.
    """

    cycles: float
    kernels: tuple[int, int]
    pallas_flops: float
    collectives: dict[str, tuple[int, int]]


def read(text: str) -> Program:
    """Return the figures of `compiled.as_text()`."""
    entry, computations = _computations(text)
    times: Counter[str] = Counter()  # how often each computation runs
    scheduled = set()  # those whose instructions are in the schedule themselves, unlike those of a fusion

    def visit(name: str, runs: int, in_schedule: bool) -> None:
        times[name] += runs
        if in_schedule:
            scheduled.add(name)
        for line in computations.get(name, ()):
            if loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                visit(loop[2], runs * _trip_count(computations[loop[1]]), in_schedule)
            elif branches := re.search(r"branch_computations=\{([^}]*)\}", line):
                for branch in re.findall(r"[\w.\-]+", branches[1]):
                    visit(branch, runs, in_schedule)
            elif called := _CALLED.search(line):
                visit(called[1], runs, in_schedule and " call(" in line)

    visit(entry, 1, True)
    cycles, kernels, pallas_flops = 0.0, Counter(), 0.0
    channels: dict[tuple[str, str], int] = {}  # a collective that is split into start, steps and end has one channel
    for name, runs in times.items():
        for line in computations.get(name, ()):
            if name in scheduled and (found := re.search(r'"estimated_cycles":"(\d+)"', line)):
                cycles += runs * int(found[1])
            if 'custom_call_target="tpu_custom_call"' in line:
                kernels += Counter(text=1, runs=runs)
                pallas_flops += runs * _attention_flops(line)
            if found := _COLLECTIVE.search(line):
                channel = re.search(r"channel_id=(\d+)", line)
                key = found[1], channel[1] if channel else line.split(" = ")[0]
                channels[key] = max(channels.get(key, 0), runs)
    collectives = {}
    for kind in COLLECTIVES:
        runs = [n for (found, _), n in channels.items() if found == kind]
        if runs:
            collectives[kind] = len(runs), sum(runs)
    return Program(cycles, (kernels["text"], kernels["runs"]), pallas_flops, collectives)


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """Return the name of the entry, and the instructions of every computation, one a line."""
    computations, entry, lines = {}, "", None
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _COMPUTATION.match(line)):
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line == "}":
            lines = None
        elif lines is not None:
            if re.match(r"  (?:ROOT )?%[\w.\-]+ = ", line) or not lines:
                lines.append(line)
            else:  # metadata may hold line breaks
                lines[-1] += line
    return entry, computations


def _trip_count(condition: list[str]) -> int:
    """Return the constant that a condition compares with: the trips of a loop from 0, as of `lax.scan` and `lax.map`.

    Raises:
        ValueError: if there is no such constant.
    """
    constants = re.findall(r" = [su]32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    if len(constants) != 1 or "direction=LT" not in "".join(condition):
        raise ValueError("a loop whose number of iterations is not a constant of its condition")
    return int(constants[0])


def _attention_flops(line: str) -> float:
    """Return the FLOPs of an attention kernel, which has operands q [..., T, H] and k, v [..., S, H]; 0 for others."""
    operands = re.search(r"operand_layout_constraints=\{(.*?\})\}", line)
    shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"(?:bf16|f16|f32)\[([\d,]+)\]", operands[1])]
    for q, k, v in zip(shapes, shapes[1:], shapes[2:], strict=False):
        if k == v and len(q) == len(k) >= 3 and q[-1] == k[-1]:
            return 4.0 * math.prod(q) * k[-2]
    return 0.0
