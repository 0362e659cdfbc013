"""Declarative conversion: regular expressions over source keys say which parameter each tensor fills, and how.

Strict on both sides: every source key is mapped or ignored by a rule, every parameter is filled exactly once, shapes
are equal. All that is wrong is found before anything is read or written, and told in one error.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cast_jax.convert.sources import Checkpoint
from cast_jax.core.errors import UserError
from cast_jax.core.files import atomic_file
from cast_jax.core.rules import nearest

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

# How a PyTorch tensor becomes one of ours (design/porting.md).
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "same": lambda array: array,
    "linear": lambda weight: weight.transpose(1, 0),  # [out, in]
    "convolution": lambda weight: weight.transpose(2, 3, 1, 0),  # OIHW to HWIO
    "pointwise": lambda weight: _unit(_unit(weight, 3), 2).transpose(1, 0),  # a 1x1 convolution as a linear layer
    "expansion": lambda weight: weight.transpose(2, 3, 0, 1),  # ConvTranspose2d with stride = kernel size: no flip
    "unbatched": lambda array: _unit(array, 0),  # tokens with a leading axis of one
    "token": lambda array: _unit(_unit(array, 0), 0),  # one, with two leading axes of one
    "map": lambda array: _unit(array, 0).transpose(1, 2, 0),  # 1CHW to HWC
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Source keys that ``source`` matches whole fill ``target`` (which may use its groups) in ``layout``.

    Several targets share the tensor in equal parts along its first axis; none means that it is ignored.
    """

    source: str
    target: str | tuple[str, ...] = ()
    layout: str = "same"

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,) if isinstance(self.target, str) else self.target


def ignore(*patterns: str) -> tuple[Rule, ...]:
    """Rules for source keys that belong to parts that are left out."""
    return tuple(Rule(pattern) for pattern in patterns)


def affine(source: str, target: str, layout: str, weight: str = "kernel") -> tuple[Rule, Rule]:
    """Rules for a layer's ``weight`` and ``bias``."""
    return Rule(rf"{source}\.weight", f"{target}/{weight}", layout), Rule(rf"{source}\.bias", f"{target}/bias")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a parameter comes from: part ``part`` of ``parts`` of the source tensor ``key``, in ``layout``."""

    key: str
    part: int
    parts: int
    layout: str

    def slice(self, array: np.ndarray) -> np.ndarray:
        """The part, still in the source's layout; ValueError if the tensor has not that many equal parts."""
        return np.split(array, self.parts)[self.part] if self.parts > 1 else array

    def convert(self, array: np.ndarray) -> np.ndarray:
        """The parameter; ValueError if the tensor has not the axes that the layout is about."""
        return LAYOUTS[self.layout](self.slice(array))


@dataclasses.dataclass
class Placement:
    """Where the rules put the source's keys, before any model is looked at."""

    origins: dict[str, list[Origin]]
    unmatched: list[str]

    def shape(self, target: str, shapes: Shapes) -> Shape | None:
        """The shape that a parameter would have; None if the tensor cannot take its layout."""
        origin = self.origins[target][0]
        try:  # on a single broadcast number: nothing is allocated
            return origin.convert(np.broadcast_to(np.float32(0), shapes[origin.key])).shape
        except (ValueError, IndexError):
            return None


def place(keys: Iterable[str], rules: Sequence[Rule]) -> Placement:
    """Applies the first rule that matches each key."""
    compiled = [(re.compile(rule.source), rule) for rule in rules]
    placement = Placement({}, [])
    for key in keys:
        found = next(((match, rule) for pattern, rule in compiled if (match := pattern.fullmatch(key))), None)
        if found is None:
            placement.unmatched.append(key)
            continue
        match, rule = found
        for part, target in enumerate(rule.targets):
            origin = Origin(key, part, len(rule.targets), rule.layout)
            placement.origins.setdefault(match.expand(target), []).append(origin)
    return placement


def placed_shapes(placement: Placement, shapes: Shapes) -> dict[str, Shape | None]:
    """The shape that each parameter would have (see :meth:`Placement.shape`)."""
    return {target: placement.shape(target, shapes) for target in placement.origins}


def likeness(given: Mapping[str, Shape | None], wanted: Shapes) -> float:
    """The share of parameters that have the same name and shape, of those in either; 1 is a perfect fit."""
    return len(given.items() & wanted.items()) / max(len(given.keys() | wanted.keys()), 1)


def plan(
    checkpoint: Checkpoint,
    rules: Sequence[Rule],
    wanted: Shapes,
    model: str,
    relatives: Callable[[], Mapping[str, float]] = dict,
) -> dict[str, Origin]:
    """The origin of every parameter in ``wanted`` (name to shape), in its order.

    ``relatives`` says how much the file is like (:func:`likeness`) other models, by name; called only for an error, to
    recognise what it is instead.

    Raises:
      UserError: listing everything missing, unexpected, mis-shaped, filled twice or not of floats, and which model it
        is instead.
    """
    placement = place(checkpoint.shapes, rules)
    given = placed_shapes(placement, checkpoint.shapes)
    missing = [name for name in wanted if name not in given]
    beyond = [name for name in given if name not in wanted]
    unexpected = dict.fromkeys([*placement.unmatched, *(placement.origins[name][0].key for name in beyond)])
    origin = {name: origins[0] for name, origins in placement.origins.items()}
    no_float = lambda key: not re.fullmatch(r"b?f(loat)?\d+", checkpoint.dtypes[key].lower())
    faults = {
        "missing": _told(missing, lambda name: f"{name:<48} {nearest(name, unexpected)}"),
        "unexpected": _told(
            [*placement.unmatched, *beyond],
            lambda name: (
                f"{origin[name].key:<48} would be {name}, which {model} lacks"
                if name in given
                else f"{name:<48} {nearest(name, wanted)}"
            ),
        ),
        "no floats": _told(
            [origin[name].key for name in given if no_float(origin[name].key)],
            lambda key: f"{key:<48} {checkpoint.dtypes[key]}; dequantise it first",
        ),
        "mis-shaped": _told(
            [name for name, shape in wanted.items() if name in given and given[name] != shape],
            lambda name: (
                f"{name:<48} {given[name] or 'impossible'} from {origin[name].key} "
                f"{checkpoint.shapes[origin[name].key]}, not {wanted[name]}"
            ),
        ),
        "filled twice": _told(
            [name for name, origins in placement.origins.items() if len(origins) > 1],
            lambda name: f"{name:<48} by {', '.join(origin.key for origin in placement.origins[name])}",
        ),
    }
    if any(faults.values()):
        lines = _recognised(likeness(given, wanted), relatives(), model)
        lines += [f"its config.json says model_type {kind!r}" for kind in [checkpoint.config.get("model_type")] if kind]
        lines += [f"{kind:<13}{line}" for kind, told in faults.items() for line in told]
        raise UserError(f"{checkpoint.path}: these weights do not make a {model}:\n  " + "\n  ".join(lines))
    return {name: origin[name] for name in wanted}


def converted(checkpoint: Checkpoint, plan: Mapping[str, Origin]) -> Iterator[np.ndarray]:
    """The parameters one after the other, float32; reads a source tensor when it is needed and keeps none.

    Raises:
      UserError: a value is not finite.
    """
    for origin in plan.values():
        array = np.ascontiguousarray(origin.convert(checkpoint.read(origin.key)), np.float32)
        if not np.isfinite(array).all():
            dtype = checkpoint.dtypes[origin.key]
            raise UserError(
                f"{checkpoint.path}: {origin.key} ({dtype}) has values that are not finite: the training diverged, or "
                "they were too large for their type when they were saved"
            )
        yield array


def write_tensors(path: Path, shapes: Shapes, arrays: Iterable[np.ndarray], before: Callable[[], None]) -> None:
    """Writes a safetensors file of float32, tensor by tensor, atomically; ``before`` runs just before it appears.

    The format (https://github.com/huggingface/safetensors#format) is the header's length, a JSON header with every
    tensor's place, and the tensors' bytes; its own library only writes what is whole in memory.
    """
    header: dict[str, object] = {"__metadata__": {"format": "cast_jax"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            file.write(array.astype("<f4", copy=False).data)
        assert file.tell() == 8 + len(text) + end, "the arrays are not those of the header"
        file.flush()
        os.fsync(file.fileno())  # a full disk shows here, before anything of the old content has gone
        before()


def _unit(array: np.ndarray, axis: int) -> np.ndarray:
    return np.squeeze(array, axis)  # ValueError where the axis is longer than one


def _recognised(own: float, others: Mapping[str, float], model: str) -> list[str]:
    """The model that the weights would fit better, if there is one."""
    best = max(others, key=lambda name: others[name], default=model)
    found = best != model and others[best] > max(own, 0.5)
    return [f"by its shapes this is a {best}; you asked for {model}"] if found else []


def _told(names: Sequence[str], line: Callable[[str], str], limit: int = 12) -> list[str]:
    """A line for each of the first names; only of those, since looking for what is nearest takes its time."""
    return [line(name) for name in names[:limit]] + (
        [f"... and {len(names) - limit} more"] if len(names) > limit else []
    )
