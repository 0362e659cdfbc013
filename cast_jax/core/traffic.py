"""What the kernels of a compiled program read and write, by the sizes of what they are given and give."""

from __future__ import annotations

from typing import Any

from cast_jax.core.hlo import CONTROL, Instruction, read

# Opcodes that pass every element on, and those that read some elements of their first operand.
_PASS, _SLICE = ("bitcast", "reshape", "convert", "copy", "transpose"), ("slice", "dynamic-slice", "gather")


def traffic(program: Any) -> dict[str, int]:
    """Bytes that a device's kernels read and write, by operation name ("" for none), counted as ``launches`` are.

    What a kernel reads twice, or finds in a cache, is not known. Of arrays that are sliced, gathered from, or changed
    in place only that part counts; workspaces of libraries do not.
    """
    found = read(program)
    of_fusion = {name: _fused_bytes(body) for name, body in found.computations.items()}
    by_name = {one.name: one for body in found.computations.values() for one in body}

    def moved(one: Instruction) -> dict[str, int]:
        if not one.launched:
            return {}
        if one.opcode == "fusion":
            return {one.origin: sum(of_fusion[name] for name, _ in one.called())}
        if one.opcode in _SLICE:
            return {one.origin: 2 * _bytes(one)}
        if updates := _updates(one):
            return {one.origin: 2 * sum(_bytes(by_name[name]) for name in updates)}
        return {one.origin: sum(_bytes(by_name[name]) for name in one.operands if name in by_name) + _bytes(one)}

    return found.total(moved, followed=lambda one: one.opcode in CONTROL)


def _bytes(one: Instruction) -> int:
    workspace = ("s8", "u8") if one.opcode == "custom-call" and len(one.arrays) > 1 else ()
    return sum(array.bytes for array in one.results if array.dtype not in workspace)


def _updates(one: Instruction) -> tuple[str, ...]:
    """The operands that take the place of parts of others; none of most instructions."""
    if one.opcode == "dynamic-update-slice":
        return one.operands[1:2]
    return one.operands[-len(one.arrays) :] if one.opcode == "scatter" else ()


def _fused_bytes(body: list[Instruction]) -> int:
    """What a fusion of these instructions reads of its parameters and writes of its results."""
    by_name = {one.name: one for one in body}
    users: dict[str, list[Instruction]] = {}
    for one in body:
        for operand in one.operands:
            users.setdefault(operand, []).append(one)

    def through(one: Instruction, opcodes: tuple[str, ...]) -> Instruction:
        """Where it comes from, if such instructions only passed it on."""
        while one.opcode in opcodes and one.operands[0] in by_name:
            one = by_name[one.operands[0]]
        return one

    roots = [one for one in body if one.root]
    parts = [by_name[name] for root in roots if root.opcode == "tuple" for name in root.operands if name in by_name]
    results = [through(one, ("bitcast",)) for one in parts or roots]
    in_place = {
        one.name for one in results if _updates(one) and through(by_name[one.operands[0]], _PASS).opcode == "parameter"
    }

    def read_of(one: Instruction) -> int:
        """How many of its elements are read."""
        elements = sum(array.elements for array in one.arrays)
        if one in results:
            return elements
        some = 0
        for user in users.get(one.name, ()):
            first = user.operands[0] == one.name
            if user.opcode in _PASS:
                some += read_of(user)
            elif first and user.opcode in _SLICE:
                some += sum(array.elements for array in user.arrays)
            elif not (first and user.name in in_place):
                return elements
        return min(some, elements)

    parameters = [one for one in body if one.opcode == "parameter"]
    return sum(read_of(one) * one.arrays[0].itemsize for one in parameters if one.arrays) + sum(
        sum(_bytes(by_name[name]) for name in _updates(one)) if one.name in in_place else _bytes(one) for one in results
    )
