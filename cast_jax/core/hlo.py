"""The text of a compiled program: its computations, their instructions, and how often each runs."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# Instructions that run others, which a trace lists by themselves.
CONTROL = ("while", "conditional", "call")

# Instructions that only name what is there.
_NO_OPS = (
    *("parameter", "constant", "bitcast", "get-tuple-element", "tuple"),
    *("after-all", "add-dependency", "opt-barrier", "partition-id", "replica-id"),
)

_INSTRUCTION = re.compile(
    r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[\w-]+)\((?P<operands>[^)]*)"
)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)")
_CONDITION = re.compile(r"\bcondition=%?[\w.-]+")
_ORIGIN = re.compile(r'metadata=\{[^}]*op_name="([^"]*)"')
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")


class HloArray(NamedTuple):
    """Its type, such as "f32", its elements, and the bytes of each."""

    dtype: str
    elements: int
    itemsize: int

    @property
    def bytes(self) -> int:
        """Of all elements."""
        return self.elements * self.itemsize


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    """The names of the instructions whose results it takes."""
    root: bool
    line: str

    @property
    def origin(self) -> str:
        """The name of the operation that it was made from; "" if XLA made it by itself."""
        found = _ORIGIN.search(self.line)
        return found[1] if found else ""

    @property
    def arrays(self) -> list[HloArray]:
        """The array that is its result, or those of the tuple."""
        return [_array(*array) for array in _ARRAY.findall(self.shape)]

    @property
    def results(self) -> list[HloArray]:
        """``arrays`` without those that only name what it was given, as of what is started and awaited later."""
        arrays = self.arrays
        return arrays[len(arrays) // 2 :] if self.opcode.endswith("-start") else arrays

    @property
    def launched(self) -> bool:
        """Whether it does something itself, and neither runs other instructions nor only names what is there."""
        return self.opcode not in (*CONTROL, *_NO_OPS) and not self.opcode.endswith("-done")

    def called(self) -> list[tuple[str, int]]:
        """The computations that it runs, and how often; once where the program does not say."""
        turns = _TURNS.search(self.line)
        text = _CONDITION.sub("", self.line) if turns else self.line
        return [
            (name, int(turns[1]) if turns else 1)
            for called in _CALLED.findall(text)
            for name in re.findall(r"[\w.-]+", called)
        ]


class Program(NamedTuple):
    """A compiled program."""

    name: str
    computations: dict[str, list[Instruction]]
    entry: str

    def total(
        self, measure: Callable[[Instruction], Mapping[str, int]], followed: Callable[[Instruction], bool]
    ) -> dict[str, int]:
        """What ``measure`` finds in all instructions, and of what ``followed`` ones call as often as it runs."""

        @functools.cache
        def of(computation: str) -> Counter[str]:
            found: Counter[str] = Counter()
            for instruction in self.computations.get(computation, ()):
                found.update(measure(instruction))
                for name, times in instruction.called() if followed(instruction) else ():
                    found.update({key: times * amount for key, amount in of(name).items()})
            return found

        return dict(of(self.entry))


def read(program: Any) -> Program:
    """Reads the text of what ``jax.stages.Lowered.compile`` returns."""
    text = program.as_text()
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    entry = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header["name"]] = []
            entry = header["name"] if header["entry"] else entry
        elif found := _INSTRUCTION.match(line):
            operands = tuple(re.findall(r"%([\w.-]+)", found["operands"]))
            current.append(
                Instruction(found["name"], found["opcode"], found["shape"], operands, bool(found["root"]), line)
            )
    name = text.removeprefix("HloModule ").split(",", 1)[0].split()[0]
    return Program(name, computations, entry)


def _array(kind: str, bits: str, shape: str) -> HloArray:
    elements = math.prod(int(length) for length in shape.split(",") if length)
    return HloArray(kind + bits, elements, 1 if kind == "pred" else max(int(bits or 8) // 8, 1))
