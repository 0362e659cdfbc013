"""What a compiled program says of itself: its memory, its work, and what its devices send each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cast_jax.core.hlo import CONTROL, Instruction, read

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def added_up(measure: Callable[[Any], Mapping[str, Any]], programs: Iterable[Any]) -> dict[str, Any]:
    """What ``measure`` finds of each of several programs, added up by name."""
    found: Counter[str] = Counter()
    for program in programs:
        found.update(measure(program))
    return dict(found)


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
    found = read(program)
    runs_others = lambda one: one.opcode in CONTROL and "xla_cpu_small_call" not in one.line  # that is one kernel
    return found.name, {
        one.name: None if runs_others(one) else one.origin for part in found.computations.values() for one in part
    }


def collective_bytes(program: Any) -> dict[str, int]:
    """Bytes of the results of a program's collective operations on each device, by operation.

    Operations inside loops count as often as the loop turns; where the program does not say how often, once.
    """

    def sent(instruction: Instruction) -> dict[str, int]:
        name = instruction.opcode.removesuffix("-start")
        if name not in COLLECTIVES:
            return {}
        return {name: sum(array.bytes for array in instruction.results)}

    return read(program).total(sent, followed=lambda _: True)


def launches(program: Any) -> dict[str, int]:
    """How many kernels a GPU's program launches (or libraries' functions it calls), by operation name ("" for none).

    Those inside loops count as often as the loop turns, once where the program does not say how often; those of all
    branches count.
    """
    launched = lambda instruction: {instruction.origin: 1} if instruction.launched else {}
    return read(program).total(launched, followed=lambda instruction: instruction.opcode in CONTROL)
