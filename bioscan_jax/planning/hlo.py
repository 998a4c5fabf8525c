"""Reads the HLO text of a compiled program: which data moves between devices, and how often loops run."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computations?)=(?:\{([^}]*)\}|([%\w.\-]+))")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")


@dataclass(frozen=True)
class Collective:
    """One exchange between devices, even if it spans several instructions."""

    kind: str
    dtype: str
    bytes: int
    """Bytes of its result on one device, per execution."""
    in_loop: bool


@dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    text: str


def collectives(text: str) -> list[Collective]:
    """Lists the exchanges of a program, in the order of its text.

    An asynchronous one occurs several times, in each computation that overlaps with it; its channel identifies it.
    """
    computations = _computations(text)
    looped = _inside_loops(computations)
    found: dict[str, Collective] = {}
    for computation, instructions in computations.items():
        for one in instructions:
            kind = one.opcode.removesuffix("-start").removeprefix("ragged-")
            if kind not in KINDS:
                continue
            result = _elements(one.type)[1] if one.opcode.endswith("-start") and kind != "all-reduce" else one.type
            channel = _CHANNEL.search(one.text)
            key = channel.group(1) if channel else f"{computation}/{one.name}"
            size, inside = _bytes(result), computation in looped
            if key in found:
                size, inside = max(size, found[key].bytes), inside or found[key].in_loop
            found[key] = Collective(kind, _dtypes(result), size, inside)
    return list(found.values())


def trip_counts(text: str) -> list[int | None]:
    """Returns the iterations of each while loop; None where the text does not state them.

    A loop made by `lax.scan` counts from 0 up to the one constant in its condition.
    """
    computations = _computations(text)
    return [
        _trip_count(one, computations)
        for instructions in computations.values()
        for one in instructions
        if one.opcode == "while"
    ]


def _computations(text: str) -> dict[str, list[_Instruction]]:
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header.group(1), [])
        elif found := _INSTRUCTION.match(line):
            current.append(_Instruction(found.group(1), found.group(2), found.group(3), line))
    return computations


def _called(instruction: _Instruction) -> Iterator[str]:
    for several, one in _CALLED.findall(instruction.text):
        yield from (name.lstrip("%") for name in (several or one).split(", "))


def _reached(first: list[str], computations: dict[str, list[_Instruction]]) -> set[str]:
    reached, waiting = set(), list(first)
    while waiting:
        name = waiting.pop()
        if name in computations and name not in reached:
            reached.add(name)
            waiting += [called for one in computations[name] for called in _called(one)]
    return reached


def _inside_loops(computations: dict[str, list[_Instruction]]) -> set[str]:
    loops = [one for instructions in computations.values() for one in instructions if one.opcode == "while"]
    return _reached([called for loop in loops for called in _called(loop)], computations)


def _trip_count(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int | None:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(known.group(1))
    condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.text)
    assert condition is not None
    inside = [one for name in _reached([condition.group(1)], computations) for one in computations[name]]
    limits = [found.group(1) for one in inside if (found := re.search(r" constant\((\d+)\)", one.text))]
    below = any(one.opcode == "compare" and "direction=LT" in one.text for one in inside)
    return int(limits[0]) if len(limits) == 1 and below else None


def _elements(kind: str) -> list[str]:
    """Splits a tuple's type into its element types; another type is returned as the only element."""
    if not kind.startswith("("):
        return [kind]
    parts, depth, start = [], 0, 1
    for place, character in enumerate(kind):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or depth == 0:
            parts.append(kind[start:place].strip())
            start = place + 1
    return parts


def _bytes(kind: str) -> int:
    total = 0
    for dtype, bits, shape in _ARRAY.findall(kind):
        width = {"pred": 8, "bf16": 16}.get(dtype) or int(bits)
        total += math.prod(int(size) for size in shape.split(",") if size) * width // 8
    return total


def _dtypes(kind: str) -> str:
    return ", ".join(dict.fromkeys(dtype for dtype, _, _ in _ARRAY.findall(kind)))
