"""What a compiled program says of itself: its memory, its work, and what its devices send each other."""

from __future__ import annotations

from typing import Any

from cast_jax.core.hlo import CONTROL, Instruction, read

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")

# Instructions that pass an array on as it is, within a fusion.
_SAME = ("bitcast", "reshape", "convert", "copy", "transpose")

# Instructions that read only some of their first operand, and those that change some of it in place.
_READ_SOME, _CHANGE_SOME = ("slice", "dynamic-slice", "gather"), {"dynamic-update-slice": 1, "scatter": -1}


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
    runs_others = lambda one: one.kind in CONTROL and "xla_cpu_small_call" not in one.line  # that is one kernel
    return found.name, {
        one.name: None if runs_others(one) else one.origin for part in found.computations.values() for one in part
    }


def collective_bytes(program: Any) -> dict[str, int]:
    """Bytes of the results of a program's collective operations on each device, by operation.

    Operations inside loops count as often as the loop turns; where the program does not say how often, once.
    """

    def sent(instruction: Instruction) -> dict[str, int]:
        name = instruction.kind.removesuffix("-start")
        if name not in COLLECTIVES:
            return {}
        # What is started asynchronously names its operands beside its results.
        arrays = instruction.arrays
        return {name: sum(arrays[len(arrays) // 2 :] if name != instruction.kind else arrays)}

    return read(program).total(sent, followed=lambda _: True)


def launches(program: Any) -> dict[str, int]:
    """How many kernels a GPU's program launches (or libraries' functions it calls), by operation name ("" for none).

    Those inside loops count as often as the loop turns, once where the program does not say how often; those of all
    branches count.
    """
    launched = lambda instruction: {instruction.origin: 1} if instruction.launched else {}
    return read(program).total(launched, followed=lambda instruction: instruction.kind in CONTROL)


def traffic(program: Any) -> dict[str, int]:
    """Bytes that a device's kernels read and write, by operation name ("" for none), counted as ``launches`` are.

    By the sizes of their operands and results: what a kernel reads again, or finds in a cache, is not known. Of arrays
    that are sliced, gathered from, or changed in place only that part counts.
    """
    found = read(program)
    of_fusion = {name: _fused_bytes(part) for name, part in found.computations.items()}
    arrays = {one.name: sum(one.arrays) for part in found.computations.values() for one in part}

    def moved(instruction: Instruction) -> dict[str, int]:
        if not instruction.launched:
            return {}
        if instruction.kind == "fusion":
            return {instruction.origin: sum(of_fusion[name] for name, _ in instruction.called())}
        return {instruction.origin: _bytes_of(instruction, [arrays.get(name, 0) for name in instruction.operands])}

    return found.total(moved, followed=lambda instruction: instruction.kind in CONTROL)


def _bytes_of(instruction: Instruction, operands: list[int]) -> int:
    """What an instruction by itself reads and writes."""
    if instruction.kind in _READ_SOME:
        return 2 * sum(instruction.arrays)
    if instruction.kind in _CHANGE_SOME:
        return 2 * operands[_CHANGE_SOME[instruction.kind]]
    return sum(operands) + sum(instruction.arrays)


def _fused_bytes(body: list[Instruction]) -> int:
    """What a fusion of these instructions reads of its parameters and writes of its results."""
    by_name = {one.name: one for one in body}
    users: dict[str, list[Instruction]] = {}
    for one in body:
        for operand in one.operands:
            users.setdefault(operand, []).append(one)

    def read_of(parameter: str) -> int:
        """The bytes that are read of it, or of what it is passed on as."""
        size = sum(by_name[parameter].arrays)
        some = 0
        for user in users.get(parameter, ()):
            first = user.operands[0] == parameter
            if user.kind in _SAME:
                some += read_of(user.name)
            elif first and user.kind in _READ_SOME:
                some += sum(user.arrays)
            elif not (first and user.kind in _CHANGE_SOME):
                return size
        return min(some, size)

    def written(one: Instruction) -> int:
        if one.kind == "tuple":
            return sum(written(by_name[name]) for name in one.operands if name in by_name)
        if one.kind in _CHANGE_SOME:
            return sum(by_name[one.operands[_CHANGE_SOME[one.kind]]].arrays)
        if one.kind == "bitcast" and one.operands and by_name[one.operands[0]].kind in _CHANGE_SOME:
            return written(by_name[one.operands[0]])
        return sum(one.arrays)

    reads = sum(read_of(one.name) for one in body if one.kind == "parameter")
    return reads + sum(written(one) for one in body if one.root)
