"""From configuration mappings to typed settings, with errors that name the key."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from cast_jax.core.errors import UserError

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Makes the dataclass ``cls`` from a (nested) mapping; lists become tuples, absent keys keep their defaults.

    Raises:
      UserError: a key that ``cls`` does not have, naming ``where`` and the known keys, or a missing one.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise UserError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(fields)}")
    hints = typing.get_type_hints(cls)
    made = {}
    for name, value in values.items():
        inner = _dataclass_of(hints[name])
        if inner is not None and isinstance(value, Mapping):
            made[name] = build(inner, value, f"{where}.{name}")
        else:
            made[name] = _tuples(value)
    try:
        return cls(**made)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from error


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


def _dataclass_of(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        return next((inner for option in typing.get_args(hint) if (inner := _dataclass_of(option))), None)
    return hint if dataclasses.is_dataclass(hint) else None
