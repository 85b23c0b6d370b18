"""Reads the text of a compiled program: bytes to memory and between chips, and the compiler's estimate of cycles."""

import math
import re
from typing import NamedTuple

import jax
from jaxlib import _hlo, _jax  # type: ignore[attr-defined]  # Compiled.cost_analysis is public but takes no text

_BYTES = {"pred": 1, "bf16": 2, "token": 0} | {
    f"{kind}{bits}": math.ceil(bits / 8) for kind in "fsuc" for bits in (2, 4, 8, 16, 32, 64, 128)
}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|true_computation|false_computation)=%?([\w.-]+)")
_CALL = re.compile(r" call\(.*to_apply=%?([\w.-]+)")  # in other operations to_apply is a function of one element
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (?P<shape>.+?) (?P<opcode>[\w-]+)\(")
_COLLECTIVE = re.compile(
    r"(?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?"
)
# {{0,1},{2,3}}; [groups,size]<=...; mesh['axis_0'=2,'axis_1'=8] {'axis_1'}, or a part of an axis: {'axis_1':(1)4}
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\][^{]*\{([^}]*)\})")
_AXIS = re.compile(r"'(\w+)'(?:=|:\(\d+\))?(\d*)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
# The TPU's compiler starts a collective in one fusion. The collective advances in other fusions, which compute and have
# the first of these names, and ends in a fusion with the second. All these fusions contain the collective again.
_ADVANCES, _ENDS = "async_collective_fusion", 'custom_call_target="AsyncCollectiveDone"'


class Text(NamedTuple):
    """The costs of one run of a program, read from its text.

    Attributes:
        collectives: number of collectives by kind, and the bytes that each chip sends for them.
        background_bytes: bytes of the collectives that advance while the chip computes.
        estimated_cycles: cycles of one core, summed over all operations; None if the text has no estimates.
    """

    collectives: dict[str, tuple[int, int]]
    background_bytes: int
    estimated_cycles: int | None


def read(text: str) -> Text:
    """Sums the costs of the instructions of an optimised HLO module. Instructions of a loop count in each iteration.

    On a ring of n chips, each chip sends (n - 1) / n of the bytes that are gathered, scattered or exchanged, and twice
    as much for an all-reduce.

    Raises:
        ValueError: a loop with collectives has an unknown number of iterations.
    """
    computations, entry = _computations(text)
    advancing = _advancing(computations)
    collectives: dict[str, tuple[int, int]] = {}
    background, cycles, estimated = 0, 0, False

    def visit(name: str, times: int | None, asynchronous: bool = False) -> None:
        """Adds the costs of a computation that runs `times` times; None if this number is not known."""
        nonlocal background, cycles, estimated
        repeats = name.startswith(_ADVANCES) or any(_ENDS in line for line in computations[name])
        for line in computations[name]:
            if found := _CYCLES.search(line):
                estimated = True
                cycles += (1 if times is None else times) * int(found[1])
            instruction = _INSTRUCTION.match(line)
            if instruction and instruction["opcode"] in ("async-update", "async-done"):
                continue  # the async-start has called the computation
            if not repeats and instruction and (collective := _collective(instruction, line, name)):
                if times is None:
                    raise ValueError(f"{collective.kind} in a loop of unknown length: {line.strip()[:200]}")
                count, size = collectives.get(collective.kind, (0, 0))
                collectives[collective.kind] = (count + times, size + times * collective.sent)
                if asynchronous or collective.started or _channel(line) in advancing:
                    background += times * collective.sent
            if loop := _WHILE.search(line):
                trips = _trips(computations[loop[1]])
                visit(loop[2], None if trips is None or times is None else times * trips, asynchronous)
            else:
                for called in _called(line):
                    visit(called, times, asynchronous or " async-start(" in line)

    visit(entry, 1)
    return Text(dict(sorted(collectives.items())), background, cycles if estimated else None)


def bytes_accessed(text: str) -> int:
    """Returns the bytes that the operations of an optimised HLO module read and write, as XLA counts them.

    XLA counts the body of a loop once. It also counts bytes that stay in a chip's vector memory.
    """
    analysis = _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, _hlo.hlo_module_from_text(text))
    return int(analysis["bytes accessed"])


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation by its name, and the name of the computation that runs first."""
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif line == "}":
            current = None
        elif current is not None:
            current.append(line)
    if not entry:
        raise ValueError("the compiled program's text has no ENTRY computation")
    return computations, entry


def _advancing(computations: dict[str, list[str]]) -> set[str]:
    """Returns the channels of the collectives that advance inside fusions that compute."""
    inside = (line for name, lines in computations.items() if name.startswith(_ADVANCES) for line in lines)
    return {channel for line in inside if (channel := _channel(line))}


def _channel(line: str) -> str | None:
    found = _CHANNEL.search(line)
    return found[1] if found else None


def _called(line: str) -> list[str]:
    names = _CALLED.findall(line) + _CALL.findall(line)
    for branches in _BRANCHES.findall(line):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    return names


class _Collective(NamedTuple):
    """One collective: its kind, the bytes that a chip sends, and True if it has a start and runs in the background."""

    kind: str
    sent: int
    started: bool


def _collective(instruction: re.Match[str], line: str, computation: str) -> _Collective | None:
    """Returns the collective in an instruction of a computation, or None if it is another operation."""
    if (opcode := _COLLECTIVE.fullmatch(instruction["opcode"])) is None:
        return None
    kind, started = opcode["kind"], opcode["start"] is not None
    waits = '"is_sync":true' in line  # of the GPU's compiler: nothing is computed between start and end
    sent = _sent(kind, started, instruction["shape"], line)
    if computation.startswith("all-reduce-scatter"):  # the TPU's compiler fuses an all-reduce with its slice
        return _Collective("reduce-scatter", sent // 2, started)
    return _Collective(kind, sent, started and not waits)


def _sent(kind: str, asynchronous: bool, shape: str, line: str) -> int:
    """Returns the bytes that one chip sends, from the shape of a collective's result."""
    sizes = [
        math.prod(int(side) for side in sides.split(",") if side) * _BYTES[dtype]
        for dtype, sides in _ARRAY.findall(shape)
        if dtype in _BYTES
    ]
    if kind == "collective-permute":
        return sizes[0]
    if (n := _group_size(line)) is None:
        raise ValueError(f"{kind} without replica groups: {line.strip()[:200]}")
    whole = sum(sizes)
    if kind == "all-gather" and asynchronous:
        whole = whole * n // (n + 1)  # the shape has the operands, each a part of n, and the results
    if kind == "reduce-scatter":
        whole *= n  # the result is one of n parts
    return whole * (n - 1) // n * (2 if kind == "all-reduce" else 1)


def _group_size(line: str) -> int | None:
    """Returns the number of chips in a group of a collective."""
    if (groups := _GROUPS.search(line)) is None:
        return None
    listed, size, mesh, axes = groups.groups()
    if listed:
        return len(listed.split(","))
    if size:
        return int(size)
    sizes = {name: int(length) for name, length in _AXIS.findall(mesh)}
    return math.prod(int(part) if part else sizes[name] for name, part in _AXIS.findall(axes))


def _trips(condition: list[str]) -> int | None:
    """Returns the number of iterations of a loop whose counter, from 0, is compared with a constant; None otherwise.

    All loops of JAX with a known length have this form.
    """
    limits = {int(limit) for line in condition for limit in _LIMIT.findall(line)}
    below = sum("direction=LT" in line for line in condition)
    return limits.pop() if len(limits) == 1 and below == 1 else None
