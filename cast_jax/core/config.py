"""From configuration mappings to typed settings within their ranges, with errors that name the key."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from typing import Any, Literal, TypeVar

from cast_jax.core.errors import UserError

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Makes the dataclass ``cls`` from a (nested) mapping; lists become tuples, absent keys keep their defaults.

    The faults that ``cls`` itself finds in its values begin with the field's name.

    Raises:
      UserError: an unknown or missing key, a value of another type than the field's hint, or one that ``cls`` refuses;
        names ``where.key``.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise UserError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(fields)}")
    required = [name for name, field in fields.items() if field.default is field.default_factory is MISSING]
    if missing := [name for name in required if name not in values]:
        raise UserError(f"{where}: missing key {', '.join(missing)}")
    hints = typing.get_type_hints(cls)
    made = {name: _typed(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return cls(**made)
    except ValueError as error:
        raise UserError(f"{where}.{error}") from error


def check_ranges(settings: Any, **intervals: str) -> None:
    """Holds fields of ``settings`` (numbers, or tuples of them) against intervals such as ``"[0, 1)"``; None passes.

    Raises:
      UserError: one lies outside, or is NaN; names the field and its interval.
    """
    for name, interval in intervals.items():
        value = getattr(settings, name)
        low, high = map(float, interval[1:-1].split(","))
        for number in value if isinstance(value, tuple) else (value,):
            if number is None or low < number < high:
                continue
            if not ((number == low and interval[0] == "[") or (number == high and interval[-1] == "]")):
                raise UserError(f"{name} is {value!r}; it must lie in {interval}")


def check_choices(settings: Any, **choices: Iterable[Any]) -> None:
    """Holds fields of ``settings`` (one choice, or a tuple of them) against what is known.

    Raises:
      UserError: naming the field and the known choices.
    """
    for name, known in choices.items():
        value, known = getattr(settings, name), tuple(known)
        for choice in value if isinstance(value, tuple) else (value,):
            if choice not in known:
                raise UserError(f"{name} {choice!r} is unknown; known: {', '.join(map(str, filter(None, known)))}")


def to_json(config: Any) -> Any:
    """A configuration as plain JSON values (tuples become lists), for storing and comparing."""
    return json.loads(json.dumps(_plain(config)))


def differences(old: Any, new: Any, where: str = "config") -> list[str]:
    """Every leaf in which two configurations differ, as ``config.a.b: 1 -> 2``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            line
            for key in keys
            for line in differences(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{where}.{key}")
        ]
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _typed(hint: Any, value: Any, where: str) -> Any:
    """``value`` with tuples for lists and dataclasses for mappings, as ``hint`` asks."""
    if isinstance(value, Mapping):
        for option in _options(hint):
            if dataclasses.is_dataclass(option):
                return build(option, value, where)  # type: ignore[arg-type]
            if issubclass(typing.get_origin(option) or type(None), Mapping):
                inner = typing.get_args(option)[1]
                return {key: _typed(inner, item, f"{where}.{key}") for key, item in value.items()}
    value = _tuples(value)
    if not _fits(hint, value):
        wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise UserError(f"{where} is {value!r}; it must be of type {wanted}")
    return value


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _fits(hint: Any, value: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType):
        return any(_fits(option, value) for option in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple and isinstance(value, tuple):
        hints = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return len(hints) == len(value) and all(map(_fits, hints, value))
    if isinstance(value, bool):  # which Python counts among the integers
        return hint is bool
    return isinstance(value, int | float if hint is float else origin or hint)
