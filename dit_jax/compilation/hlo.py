"""What a compiled program does, read off its optimised HLO: products and memory traffic.

The compiler's own cost analysis counts the body of a loop once; here everything counts as often as it runs.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
    "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
# They name or rename memory and move nothing.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
        "iota", "opt-barrier", "add-dependency"}  # fmt: skip
CALLS = ("call", "call-start")  # the second one of TPU7x, whose SparseCores talk to other chips
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "Sharding")
ALIAS = "output_to_operand_aliasing={{}: (0, {})}"  # of a fusion whose result is its operand, seen otherwise


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array: its shape, its bytes, and whether it lies in the device's main memory (not in scratch memory)."""

    dims: tuple[int, ...]
    bytes: int
    main: bool

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return self.bytes // self.elements

    @property
    def traffic(self) -> int:
        """Bytes that reading or writing all of it moves to or from main memory."""
        return self.bytes if self.main else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    outputs: tuple[Buffer, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found and found[1]


class Program:
    """An optimised HLO module of one device."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self.devices = int(found[1]) if (found := re.search(r"num_partitions=(\d+)", text)) else 1
        current = None
        for line in text.splitlines():
            if line.endswith("{") and (head := _HEAD.match(line)):
                current = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif current is not None and (found := _INSTRUCTION.match(line)):
                instruction = _instruction(*found.groups())
                current[instruction.name] = instruction

    @cached_property
    def runs(self) -> list[tuple[str, int]]:
        """(computation, how often it runs) of those that run as a sequence of instructions; those inside fusions run
        with their fusion."""
        found = []

        def visit(name: str, times: int) -> None:
            found.append((name, times))
            for instruction in self.computations[name].values():
                if instruction.opcode == "while":
                    visit(instruction.attribute("body"), times * self.trip_count(instruction))
                elif instruction.opcode in CALLS:
                    visit(instruction.attribute("to_apply"), times)
                elif instruction.opcode == "conditional":  # each of them might run
                    for branch in re.findall(r"%([\w.\-]+)", " ".join(_BRANCHES.findall(instruction.attributes))):
                        visit(branch, times)

        visit(self.entry, 1)
        return found

    def instructions(self) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, runs) of all that run."""
        for name, times in self.runs:
            for instruction in self.computations[name].values():
                yield name, instruction, times

    def trip_count(self, loop: Instruction) -> int:
        """How often a loop runs: as the compiler notes, or else until its counter, from 0, reaches a constant."""
        if known := re.search(r"known_trip_count\D*(\d+)", loop.attributes):
            return int(known[1])
        condition, body = (self.computations[loop.attribute(part)] for part in ("condition", "body"))
        bounds = [int(i.attributes) for i in condition.values() if i.opcode == "constant" and i.attributes.isdigit()]
        counters = [i.attributes for i in condition.values() if i.opcode == "get-tuple-element"]
        if len(bounds) != 1 or len(counters) != 1:
            return 1
        (result,) = (i for i in body.values() if i.root)
        counted = body[result.operands[int(re.match(r"index=(\d+)", counters[0])[1])]]
        while counted.opcode in ("copy", "bitcast"):
            counted = body[counted.operands[0]]
        steps = [body[name].attributes for name in counted.operands if body[name].opcode == "constant"]
        return math.ceil(bounds[0] / int(steps[0])) if steps else bounds[0]

    @cached_property
    def traffic(self) -> int:
        """Bytes that are read from and written to a device's main memory."""
        return sum(times * self.moved(name, i) for name, i, times in self.instructions())

    def moved(self, computation: str, instruction: Instruction) -> int:
        """Bytes that one run of an instruction reads from and writes to main memory."""
        opcode, known = instruction.opcode, self.computations[computation]
        written = sum(output.traffic for output in instruction.outputs)
        if opcode in FREE or opcode.endswith("-done") or opcode in ("while", "conditional", *CALLS):
            return 0
        if opcode == "custom-call" and any(f'"{target}"' in instruction.attributes for target in FREE_CALLS):
            return 0
        operands = [buffer for name in instruction.operands for buffer in known[name].outputs] if known else []
        if opcode in ("dynamic-slice", "slice", "gather"):
            (part,) = instruction.outputs
            return part.bytes * (operands[0].main + part.main)
        if opcode == "dynamic-update-slice":
            return operands[1].bytes * (operands[1].main + instruction.outputs[0].main)
        if opcode in ("copy-start", "slice-start"):
            target = instruction.outputs[1] if opcode == "slice-start" else instruction.outputs[0]
            moved = min(instruction.outputs[0].bytes, instruction.outputs[1].bytes)
            return moved * (operands[0].main + target.main)
        if opcode.endswith("-start") or opcode == "send":  # its outputs hold its operands too
            return max(written, sum(operand.traffic for operand in operands))
        if opcode == "fusion":
            return self._moved_by_fusion(instruction, [known[name].outputs for name in instruction.operands])
        return written + sum(operand.traffic for operand in operands)

    def _moved_by_fusion(self, fusion: Instruction, operands: list[tuple[Buffer, ...]]) -> int:
        computation = fusion.attribute("calls")
        inside = self.computations[computation]
        total, updated = 0, set()
        for instruction in inside.values():
            if instruction.opcode == "dynamic-update-slice":
                updated.add(instruction.outputs[0].dims)
                update = inside[instruction.operands[1]].outputs[0]
                if any(output.main and output.dims == instruction.outputs[0].dims for output in fusion.outputs):
                    total += update.bytes
        for output in fusion.outputs:
            if not (updated and output.elements in {math.prod(dims) for dims in updated}):
                total += output.traffic
        for parameter in (i for i in inside.values() if i.opcode == "parameter"):
            buffers = operands[int(parameter.attributes)]
            part = self._read_in_parts(computation, parameter.name)
            total += sum(buffer.traffic for buffer in buffers) if part is None else part * buffers[0].main
        return total

    def _read_in_parts(self, computation: str, name: str) -> int | None:
        """Bytes that a fused computation reads of a value by slices, in fusions within it too, or updates in place;
        None if it reads all of it."""
        total, readers = 0, self._readers(computation, name)
        if any(user.opcode == "dynamic-update-slice" and user.operands[0] == known for user, known in readers):
            return 0
        for user, known in readers:
            if user.opcode in ("dynamic-slice", "slice") and user.operands[0] == known:
                total += user.outputs[0].bytes
                continue
            if user.opcode != "fusion":
                return None
            within = self.computations[user.attribute("calls")].values()
            parameters = {int(i.attributes): i.name for i in within if i.opcode == "parameter"}
            for place in (place for place, operand in enumerate(user.operands) if operand == known):
                part = self._read_in_parts(user.attribute("calls"), parameters[place])
                if part is None:
                    return None
                total += part
        return total if readers else None

    def _readers(self, computation: str, name: str) -> list[tuple[Instruction, str]]:
        """Who reads a value, through bitcasts and fusions that are one, and under which name."""
        found = []
        for user in self._users[computation][name]:
            same = user.opcode == "bitcast" or (user.opcode == "fusion" and ALIAS in user.attributes)
            found += self._readers(computation, user.name) if same else [(user, name)]
        return found

    @cached_property
    def _users(self) -> dict[str, dict[str, list[Instruction]]]:
        """Who reads a value directly, by computation and name."""
        users = {computation: defaultdict(list) for computation in self.computations}
        for computation, inside in self.computations.items():
            for instruction in inside.values():
                for operand in instruction.operands:
                    users[computation][operand].append(instruction)
        return users

    @property
    def flops(self) -> int:
        """Operations of a device's matrix products and convolutions, two a multiply-accumulate."""
        return sum(self.flops_by_precision.values())

    @cached_property
    def flops_by_precision(self) -> dict[str, int]:
        """Of them, those of numbers narrower than float32, and of float32 in JAX's default, high and highest precision:
        by "narrow", "default", "high" and "highest"."""
        total = defaultdict(int)
        for name, instruction, times in self.instructions():
            for precision, operations in self._products(name, instruction):
                total[precision] += times * operations
        return dict(total)

    @cached_property
    def kernel_flops(self) -> int:
        """Operations of attention kernels: what ours say of themselves, and cuDNN's from their shapes."""
        total = 0
        for name, instruction, times in self.instructions():
            if instruction.opcode != "custom-call":
                continue
            if said := re.search(r'"flops":"?(\d+)', instruction.attributes):
                total += times * int(said[1])
            elif found := re.search(r"__cudnn\$fmha(\w*)", instruction.attributes):
                queries = self.computations[name][instruction.operands[0]].outputs[0]  # (B, N, H, d)
                products = 5 if found[1].endswith("Backward") else 2
                total += times * 2 * products * queries.elements * queries.dims[1]
        return total

    def _products(self, computation: str, instruction: Instruction) -> Iterator[tuple[str, int]]:
        """(precision, operations) of what an instruction multiplies, within fusions in fusions."""
        if instruction.opcode == "fusion":
            called = instruction.attribute("calls")
            for inside in self.computations[called].values():
                yield from self._products(called, inside)
        elif instruction.opcode in ("dot", "convolution") or "__cudnn$conv" in instruction.attributes:
            known = self.computations[computation]
            left, right = (known[operand].outputs[0] for operand in instruction.operands[:2])
            told = re.search(r"operand_precision={(\w+)", instruction.attributes)
            precision = told[1] if told else "default"
            yield "narrow" if left.width < 4 else precision, _product(instruction, left, right)


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_BRANCHES = re.compile(r"branch_computations={.*?}|(?:true|false)_computation=%[\w.\-]+")
_BUFFER = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


def _instruction(root: str | None, name: str, rest: str) -> Instruction:
    end = _matching(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].strip()
    opcode, _, rest = rest.partition("(")
    if opcode == "fusion-start":  # of JAX 0.12 on GPUs; its shape is ((operands), outputs, context)
        opcode, shape = "fusion", shape[1 + _matching(shape[1:]) :].rpartition(",")[0]
    close = _matching("(" + rest) - 2
    inside, attributes = rest[:close], rest[close + 1 :].lstrip(", ")
    if opcode in ("constant", "parameter"):
        return Instruction(name, opcode, _buffers(shape), (), inside, bool(root))
    return Instruction(name, opcode, _buffers(shape), tuple(re.findall(r"%([\w.\-]+)", inside)), attributes, bool(root))


def _matching(text: str) -> int:
    """The place behind the bracket that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _buffers(shape: str) -> tuple[Buffer, ...]:
    found = []
    for dtype, dims, layout in _BUFFER.findall(re.sub(r"/\*.*?\*/", "", shape)):
        dims = tuple(int(d) for d in dims.split(",") if d)
        found.append(Buffer(dims, math.prod(dims) * BYTES.get(dtype, 0), not re.search(r"S\([1-9]", layout)))
    return tuple(found)


def _product(instruction: Instruction, left: Buffer, right: Buffer) -> int:
    outputs = instruction.outputs[0].elements
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
        return 2 * outputs * math.prod(left.dims[int(d)] for d in contracted.split(",") if d)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    result = instruction.outputs[0].dims
    products = result[labels[3].index("b")] * result[labels[3].index("f")] * right.dims[labels[2].index("i")]
    for axis in (letter for letter in labels[3] if letter.isdigit()):
        place = int(axis)
        window = {name: _numbers(instruction.attributes, name, place) for name in _WINDOW}
        low = window["pad"][0] if window["pad"] else 0
        (stride,), (spread,), (taps_apart,) = (window[name] or (1,) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        size = left.dims[labels[1].index(axis)]
        # Products with zeros, between and around the values, are none: XLA writes some pairs of products so.
        products *= sum(
            (place := o * stride + tap * taps_apart - low) % spread == 0 and 0 <= place // spread < size
            for o in range(result[labels[3].index(axis)])
            for tap in range(right.dims[labels[2].index(axis)])
        )
    return 2 * products


_WINDOW = ("pad", "stride", "lhs_dilate", "rhs_dilate")


def _numbers(attributes: str, name: str, axis: int) -> tuple[int, ...]:
    """What a window says of an axis: `pad=1_1x0_0` is (1, 1) of the first and (0, 0) of the second."""
    found = re.search(rf"window={{[^}}]*\b{name}=([\d_x\-]+)", attributes)
    return tuple(int(number) for number in found[1].split("x")[axis].split("_")) if found else ()
