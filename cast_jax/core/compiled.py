"""What a compiled program says of itself: its memory, its work, and what its devices send each other."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")

# Instructions that run others, which a trace lists by themselves.
_CONTROL = ("while", "conditional", "call")

# Instructions that only name what is there.
_NOTHING = (
    *("parameter", "constant", "bitcast", "get-tuple-element", "tuple"),
    *("after-all", "add-dependency", "opt-barrier", "partition-id", "replica-id"),
)

_COLLECTIVE = re.compile(rf"= (?P<shape>.*?) (?P<name>{'|'.join(COLLECTIVES)})(?P<start>-start)?\(")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?:\(.*?\)|\S+) (?P<kind>[\w-]+)\(")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)")
_ORIGIN = re.compile(r'metadata=\{[^}]*op_name="([^"]*)"')
_CONDITION = re.compile(r"\bcondition=%?[\w.-]+")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")


def memory_bytes(program: Any) -> int | None:
    """Arguments, results and temporaries on each device, where the backend says; donated arrays count once."""
    memory = program.memory_analysis()
    if memory is None:
        return None
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(used + memory.temp_size_in_bytes)


def cost_analysis(program: Any) -> dict[str, float]:
    """XLA's count of operations and of bytes read and written on each device; bodies of loops count once."""
    costs = program.cost_analysis() or {}
    names = {"flops": "flops", "bytes": "bytes accessed", "transcendentals": "transcendentals"}
    return {name: float(costs[key]) for name, key in names.items() if key in costs}


def instructions(program: Any) -> tuple[str, dict[str, str | None]]:
    """The program's name, and of each instruction the name of the operation that it was made from.

    Instructions that run others (loops) have None, those that XLA made by itself (copies) "".
    """
    text = program.as_text()
    found: dict[str, str | None] = {}
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            origin = _ORIGIN.search(line)
            runs_others = match["kind"] in _CONTROL and "xla_cpu_small_call" not in line  # that is one kernel
            found[match["name"]] = None if runs_others else origin[1] if origin else ""
    return text.removeprefix("HloModule ").split(",", 1)[0].split()[0], found


def collective_bytes(program: Any) -> dict[str, int]:
    """Bytes of the results of a program's collective operations on each device, by operation.

    Operations inside loops count as often as the loop turns; where the program does not say how often, once.
    """

    def sent(line: str) -> dict[str, int]:
        if not (match := _COLLECTIVE.search(line)):
            return {}
        arrays = [_bytes(*array) for array in _ARRAY.findall(match["shape"])]
        # What is started asynchronously names its operands beside its results.
        return {match["name"]: sum(arrays[len(arrays) // 2 :] if match["start"] else arrays)}

    return _total(program, sent, followed=lambda kind: True)


def launches(program: Any) -> dict[str, int]:
    """How many kernels a GPU's program launches (or libraries' functions it calls), by operation name ("" for none).

    Those inside loops count as often as the loop turns, once where the program does not say how often; those of all
    branches count.
    """

    def launched(line: str) -> dict[str, int]:
        match = _INSTRUCTION.match(line)
        if match is None or match["kind"] in (*_CONTROL, *_NOTHING) or match["kind"].endswith("-done"):
            return {}
        origin = _ORIGIN.search(line)
        return {origin[1] if origin else "": 1}

    return _total(program, launched, followed=lambda kind: kind in _CONTROL)


def _total(
    program: Any, measure: Callable[[str], Mapping[str, int]], followed: Callable[[str], bool]
) -> dict[str, int]:
    """What ``measure`` finds in the instructions of a program, and of what instructions of ``followed`` kinds call."""
    own: dict[str, Counter[str]] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    computation = entry = ""
    for line in program.as_text().splitlines():
        if header := _COMPUTATION.match(line):
            computation = header["name"]
            entry = computation if header["entry"] else entry
            own[computation], calls[computation] = Counter(), []
        if not computation:
            continue
        own[computation].update(measure(line))
        match = _INSTRUCTION.match(line)
        if match is None or not followed(match["kind"]):
            continue
        turns = _TURNS.search(line)
        for called in _CALLED.findall(_CONDITION.sub("", line) if turns else line):
            calls[computation] += [(name, int(turns[1]) if turns else 1) for name in re.findall(r"[\w.-]+", called)]

    @functools.cache
    def total(computation: str) -> Counter[str]:
        found = Counter(own[computation])
        for name, times in calls[computation]:
            found.update({operation: times * amount for operation, amount in total(name).items()})
        return found

    return dict(total(entry))


def _bytes(kind: str, bits: str, shape: str) -> int:
    size = int(np.prod([int(length) for length in shape.split(",") if length], dtype=np.int64))
    return size * max(int(bits or 8) // 8, 1) if kind != "pred" else size
