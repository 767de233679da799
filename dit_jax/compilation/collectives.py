"""What the devices of a compiled program send each other, by the ring algorithms, and what of it leaves their hosts."""

import dataclasses
import re
from collections.abc import Iterator, Sequence

import numpy as np

from dit_jax.compilation.hlo import Buffer, Instruction, Program

BETWEEN_SLICES = "slice-to-slice"  # TPUs hand their hosts what these exchange, by the instruction `send`
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", BETWEEN_SLICES)


@dataclasses.dataclass
class Collective:
    """The operations of one kind, all runs of a program's together."""

    runs: int = 0
    bytes: float = 0.0
    """That each device sends."""
    outside: float = 0.0
    """Of them, those that leave its host, or its slice: at least so many, evenly shared by the devices of a host."""


def collectives(program: Program, hosts: Sequence[int] = ()) -> dict[str, Collective]:
    """By kind. hosts: which one each device is on, in the order of the program's devices; by default all on one."""
    found, seen = {kind: Collective() for kind in KINDS}, set()
    for name, times, fused in _with_fusions(program):
        for instruction in program.computations[name].values():
            kind = {"send": BETWEEN_SLICES}.get(instruction.opcode, instruction.opcode.removesuffix("-start"))
            if kind not in KINDS:
                continue
            if fused:  # several of them carry out one operation, and two operations may share a channel
                one = kind, *re.findall(r'channel_id=\d+|chain_id="\d+"', instruction.attributes)
                if one in seen:
                    continue
                seen.add(one)
            groups = _groups(instruction, program.devices)
            size = sum(output.bytes for output in _results(kind, instruction))
            if kind == "all-reduce" and _is_scattered(program, name, instruction):
                kind, size = "reduce-scatter", size / groups.shape[1]
            collective = found[kind]
            collective.runs += times
            collective.bytes += times * size * _ring_share(kind, groups.shape[1])
            collective.outside += times * size * _outside_share(kind, groups, hosts)
    return {kind: collective for kind, collective in found.items() if collective.runs}


def _results(kind: str, instruction: Instruction) -> tuple[Buffer, ...]:
    """What an operation gives a device."""
    results = instruction.outputs
    if kind == BETWEEN_SLICES:
        return results[:1]
    if instruction.opcode == "collective-permute-start":
        return results[1:2]
    if len(results) > len(instruction.operands):  # what starts one holds its operands too
        return results[len(results) // 2 :]
    return results


def _is_scattered(program: Program, computation: str, instruction: Instruction) -> bool:
    """Whether a sum over devices is one that each keeps its own part of: so TPUs write a reduce-scatter."""
    (result,) = (other for other in program.computations[computation].values() if other.root)
    return result.opcode == "dynamic-slice" and result.operands[0] == instruction.name


def _with_fusions(program: Program) -> Iterator[tuple[str, int, bool]]:
    """(computation, how often it runs, whether it is inside a fusion or an asynchronous operation)."""
    for name, times in program.runs:
        yield name, times, False
        for instruction in program.computations[name].values():
            if instruction.opcode == "fusion" or instruction.opcode.startswith("async-start"):
                called = instruction.attribute("calls")
                if called:
                    yield called, times, True


def _groups(instruction: Instruction, devices: int) -> np.ndarray:
    """Which devices talk to each other, (groups, devices of each): as a list, or as axes of a grid of all."""
    text = instruction.attributes
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,{}]*)\}\}", text):
        return np.array([group.split(",") for group in found[1].split("},{")], int)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\S+)", text):
        return _grid(found[3]).reshape(int(found[1]), int(found[2]))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S*)\))? \{([^}]*)\}", text):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        grid = (_grid(found[2]) if found[2] else np.arange(devices)).reshape(*sizes.values())
        along = [list(sizes).index(axis) for axis in re.findall(r"'(\w+)'", found[3])]
        last = np.moveaxis(grid, along, range(-len(along), 0))
        return last.reshape(-1, int(np.prod(last.shape[-len(along) :])))
    return np.arange(devices)[None]


def _grid(text: str) -> np.ndarray:
    """Devices counted through along the axes of a grid, which then are put into another order: `[2,8]T(1,0)`."""
    shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    shape = [int(size) for size in shape.split(",")]
    grid = np.arange(np.prod(shape)).reshape(shape)
    return grid.transpose([int(axis) for axis in order.split(",")]) if order else grid


def _ring_share(kind: str, devices: int) -> float:
    """Bytes that a device sends for each byte of the result."""
    return {
        "all-gather": (devices - 1) / devices,
        "all-reduce": 2 * (devices - 1) / devices,
        "reduce-scatter": devices - 1,
        "all-to-all": (devices - 1) / devices,
        "collective-permute": 1,
        BETWEEN_SLICES: 1,
    }[kind]


def _outside_share(kind: str, groups: np.ndarray, hosts: Sequence[int]) -> float:
    """Those of them that leave its host, where the devices of a group on one host share what leaves it."""
    if kind == BETWEEN_SLICES:
        return 1.0
    over = max(len(set(group)) for group in np.asarray(hosts)[groups].tolist()) if hosts else 1
    if over == 1:
        return 0.0
    sharing = groups.shape[1] // over if kind in ("all-gather", "all-reduce") else 1
    return _ring_share(kind, over) / sharing
