"""What a compiled program says of itself: its memory, its work, and what its devices send each other."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")

_INSTRUCTION = re.compile(rf"= (?P<shape>.*?) (?P<name>{'|'.join(COLLECTIVES)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")


def memory_bytes(program: Any) -> int | None:
    """Arguments, results and temporaries on each device, where the backend says; donated arrays count once."""
    memory = program.memory_analysis()
    if memory is None:
        return None
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(used + memory.temp_size_in_bytes)


def collective_bytes(program: Any) -> dict[str, int]:
    """Bytes of the results of a program's collective operations on each device, by operation.

    Operations inside loops count once, however often the loop turns.
    """
    found: Counter[str] = Counter()
    for line in program.as_text().splitlines():
        if match := _INSTRUCTION.search(line):
            arrays = [_bytes(*array) for array in _ARRAY.findall(match["shape"])]
            # What is started asynchronously names its operands beside its results.
            found[match["name"]] += sum(arrays[len(arrays) // 2 :] if match["start"] else arrays)
    return dict(found)


def _bytes(kind: str, bits: str, shape: str) -> int:
    size = int(np.prod([int(length) for length in shape.split(",") if length], dtype=np.int64))
    return size * max(int(bits or 8) // 8, 1) if kind != "pred" else size
