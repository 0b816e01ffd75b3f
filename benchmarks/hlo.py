"""The text of a compiled program: its instructions, how often each computation runs, and the bytes and FLOPs of
instructions. `hlo_tpu` and `hlo_gpu` contain the parts that are specific to a compiler."""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
# Operations that only move values. Scalar index arithmetic may accompany them.
MOVES = frozenset(
    "bitcast broadcast concatenate constant copy dynamic-slice dynamic-update-slice gather get-tuple-element iota pad "
    "parameter reshape reverse slice transpose tuple".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")
_VIEWS = ("bitcast", "reshape")
_FREE = {*_VIEWS, "constant", "get-tuple-element", "iota", "parameter", "tuple"}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|async_computation)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int((re.search(r"\d+", self.dtype) or ["0"])[0])
        return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; `rest` is the text after its operands."""

    name: str
    shapes: tuple[Shape, ...]  # several for a tuple
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def bytes(self) -> int:
        """Return the size of its result."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def called(self) -> str | None:
        """Return the name of the computation that it calls or fuses."""
        found = _CALLED.search(self.rest)
        return found[1] if found else None

    @property
    def target(self) -> str:
        """Return the target of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop's body, its trip count (None if unknown) and the total number of runs of its body."""

    body: str
    trips: int | None
    runs: int


class Module:
    """A compiled program, with loops multiplied out; a loop with an unknown trip count counts once.

    runs: how often each computation runs.
    scheduled: computations whose instructions are scheduled individually, unlike those of a fusion.
    loops: loops in program order, outer ones before inner ones.
    """

    def __init__(self, text: str):
        entry, lines = _computations(text)
        self.computations: dict[str, Computation] = {
            name: {i.name: i for i in map(_instruction, body) if i} for name, body in lines.items()
        }
        self.runs: Counter[str] = Counter()
        self.scheduled: set[str] = set()
        self.loops: list[Loop] = []
        self._visit(entry, 1, True)

    def _visit(self, name: str, runs: int, in_schedule: bool) -> None:
        self.runs[name] += runs
        if in_schedule:
            self.scheduled.add(name)
        for instruction in self.computations.get(name, {}).values():
            if instruction.opcode == "while":
                condition, body = (re.search(rf"{key}=%?([\w.\-]+)", instruction.rest) for key in ("condition", "body"))
                assert condition and body
                trips = self._trip_count(instruction, condition[1])
                inner = runs * (1 if trips is None else trips)
                self.loops.append(Loop(body[1], trips, inner))
                self._visit(body[1], inner, in_schedule)
            elif branches := re.search(r"branch_computations=\{([^}]*)\}", instruction.rest):
                for branch in re.findall(r"[\w.\-]+", branches[1]):
                    self._visit(branch, runs, in_schedule)
            elif instruction.called:
                self._visit(instruction.called, runs, in_schedule and instruction.opcode == "call")

    def _trip_count(self, loop: Instruction, condition: str) -> int | None:
        """Return the trip count found by the compiler, or the constant in the condition of a loop that counts from 0,
        as in `lax.scan` and `lax.map`."""
        if known := re.search(r'known_trip_count"?[=:]\{"?n"?:"?(\d+)', loop.rest):
            return int(known[1])
        lines = self.computations[condition].values()
        constants = [i.operands[0] for i in lines if i.opcode == "constant" and i.shapes[0].dims == ()]
        less = any("direction=LT" in i.rest for i in lines)
        called = [self.computations.get(i.called or "", {}) for i in lines]
        less |= any("direction=LT" in i.rest for computation in called for i in computation.values())
        if len(constants) != 1 or not less or not constants[0].isdigit():
            return None
        return int(constants[0])

    def schedule(self, body: str | None = None) -> Iterator[tuple[Computation, Instruction, int]]:
        """Yield each scheduled instruction with its computation and how often it runs: in one iteration of a loop's
        body, including the computations that it calls, or in the whole program."""
        if body is None:
            for name in self.scheduled:
                computation = self.computations.get(name, {})
                for instruction in computation.values():
                    yield computation, instruction, self.runs[name]
            return
        computation = self.computations.get(body, {})
        for instruction in computation.values():
            yield computation, instruction, 1
            times, inner = 1, None
            if instruction.opcode == "while":
                loop = re.search(r"body=%?([\w.\-]+)", instruction.rest)
                assert loop
                inner = loop[1]
                times = next(entry.trips for entry in self.loops if entry.body == inner) or 1
            elif instruction.opcode == "call":
                inner = instruction.called
            if inner:
                yield from ((c, i, n * times) for c, i, n in self.schedule(inner))

    def collectives(self) -> dict[str, list[tuple[int, Instruction]]]:
        """Return how often each collective runs, by kind. A collective that is split into start, steps and end counts
        as one; on TPUs, a computation that sums and takes a part is a reduce-scatter."""
        channels: dict[tuple[str, str], tuple[int, Instruction]] = {}
        for name, runs in self.runs.items():
            for instruction in self.computations.get(name, {}).values():
                kind = instruction.opcode.removesuffix("-start")
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                if kind not in COLLECTIVES:
                    continue
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                key = kind, channel[1] if channel else instruction.name
                if runs > channels.get(key, (0, None))[0]:
                    channels[key] = runs, instruction
        found = {kind: [entry for (k, _), entry in channels.items() if k == kind] for kind in COLLECTIVES}
        return {kind: entries for kind, entries in found.items() if entries}

    def collective_seconds(self, link: float, devices: int) -> float:
        """Return the time of all collectives, one after another and without overlap, if each device sends its part over
        one link in one direction."""
        seconds = 0.0
        for kind, entries in self.collectives().items():
            for runs, instruction in entries:
                arrays = [shape.bytes for shape in instruction.shapes if shape.dims]  # a tuple combines several
                if instruction.opcode.endswith("-start") and kind != "all-reduce":  # operands, then results
                    arrays = arrays[len(arrays) // 2 :]
                size = sum(arrays)
                group = _group_size(instruction.rest, devices)
                fraction = (group - 1) / group
                if kind == "all-reduce":
                    size *= 2 * fraction
                elif kind == "reduce-scatter" and instruction.opcode == kind:
                    size *= group - 1  # `size` is the result's
                elif kind != "collective-permute":
                    size *= fraction
                seconds += runs * size / link
        return seconds

    def only_moves(self, instruction: Instruction) -> bool:
        """Return whether an instruction only copies values, and computes nothing but indices."""
        if instruction.opcode in ("copy", "copy-start"):
            return True
        if instruction.opcode != "fusion":
            return instruction.opcode in MOVES - _FREE
        return self._moves(instruction.called or "")

    def _moves(self, name: str) -> bool:
        arrays = False
        for inner in self.computations.get(name, {}).values():
            if inner.opcode == "fusion" and self._moves(inner.called or ""):
                continue
            if inner.opcode not in MOVES and (_largest(inner) > 1 or inner.opcode == "custom-call"):
                return False
            arrays |= inner.opcode == "parameter" and _largest(inner) > 1
        return arrays  # otherwise it fills with constants

    def read_bytes(self, computation: Computation, instruction: Instruction) -> int:
        """Return the bytes of the operands, or only of their slices if a fusion reads nothing else."""
        fused = self.computations.get(instruction.called or "", {}) if instruction.opcode == "fusion" else {}
        parameters = {i.operands[0]: i for i in fused.values() if i.opcode == "parameter"}
        total = 0
        for number, operand in enumerate(instruction.operands):
            whole = computation[operand].bytes if operand in computation else 0
            inner = parameters.get(str(number))
            total += whole if inner is None else min(whole, _read_of(fused, inner))
        if instruction.opcode in _SLICES:
            return instruction.bytes
        return total

    def written_bytes(self, instruction: Instruction) -> int:
        """Return the bytes of the result, or of the part that is written in place."""
        fused = self.computations.get(instruction.called or "", {}) if instruction.opcode == "fusion" else {}
        updates = [fused[i.operands[1]].bytes for i in fused.values() if i.opcode == "dynamic-update-slice"]
        if updates and not any(i.root and i.opcode == "tuple" for i in fused.values()):
            return sum(updates)
        # What a kernel of Pallas updates in place, it hardly writes; other custom calls write all of it.
        aliases = "triton" in instruction.target and re.search(
            r"output_to_operand_aliasing=\{(.*?\))\}", instruction.rest
        )
        updated = re.findall(r"\{(\d*)\}: \(\d+", aliases[1]) if aliases else ()
        return instruction.bytes - sum(instruction.shapes[int(i or 0)].bytes for i in updated)

    def dot_flops(self, computation: Computation, instruction: Instruction) -> float:
        """Return the FLOPs of `dot` and `convolution` in an instruction, including its fusion."""
        if instruction.opcode == "dot":
            left = computation[instruction.operands[0]].shapes[0]
            summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
            sizes = [left.dims[int(d)] for d in summed[1].split(",") if d] if summed else []
            return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(sizes)
        if instruction.opcode == "convolution":
            return _convolution_flops(computation, instruction)
        if instruction.opcode in ("fusion", "call") and (inner := self.computations.get(instruction.called or "")):
            return sum(self.dot_flops(inner, i) for i in inner.values())
        return 0.0


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """Return the FLOPs of a convolution: each output value sums over all axes of the kernel except output features."""
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.rest)
    kernel = computation[instruction.operands[1]].shapes[0]
    outputs = kernel.dims[labels[1].index("o")] if labels else 1
    return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(kernel.dims) / max(outputs, 1)


def _largest(instruction: Instruction) -> int:
    return max((math.prod(shape.dims) for shape in instruction.shapes), default=0)


def _read_of(fused: Computation, value: Instruction) -> int:
    """Return the bytes that a fusion reads of a parameter: only its slices, if it reads only slices."""
    total = 0
    for user in fused.values():
        if value.name not in user.operands:
            continue
        if user.opcode in _SLICES and user.operands[0] == value.name:
            total += user.bytes
        elif user.opcode in _VIEWS:
            total += _read_of(fused, user)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # arrays written in place are not read
        else:
            return value.bytes
    return total


def _group_size(rest: str, devices: int) -> int:
    """Return the number of devices in a group of a collective."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):  # a mesh, and axes of it
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
        parts = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", found[2])  # an axis, or the size of a part of it
        return math.prod(int(size or sizes[name]) for name, size in parts)
    return devices


@functools.cache
def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(Shape(t, tuple(int(n) for n in dims.split(",") if n)) for t, dims in _SHAPE.findall(text))


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s*(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    text = line[head.end() :]
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode = re.match(r"\s*([\w\-]+)\(", text[end:])
    if not opcode:
        return None
    begin = end + opcode.end() - 1
    close = _closing(text, begin)
    inside = text[begin + 1 : close]
    if opcode[1] in ("parameter", "constant"):
        operands = (inside,)
    else:
        operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(re.findall(r"[\w.\-]+", inside))
    return Instruction(head[2], _shapes(text[:end]), opcode[1], operands, text[close + 1 :], bool(head[1]))


def _closing(text: str, begin: int) -> int:
    """Return the position of the parenthesis that closes the one at `begin`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, begin):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text) - 1


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """Return the name of the entry computation, and the instructions of every computation, one per line."""
    computations, entry, lines = {}, "", None
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _COMPUTATION.match(line)):
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line == "}":
            lines = None
        elif lines is not None:
            if re.match(r"  (?:ROOT )?%?[\w.\-]+ = ", line) or not lines:
                lines.append(line)
            else:  # metadata may hold line breaks
                lines[-1] += line
    return entry, computations
