"""Settings from mappings: typed, nested, strict; and what differs between two configurations."""

from __future__ import annotations

import dataclasses

import pytest

from cast_jax.core.config import build, differences, to_json
from cast_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    rules: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = dataclasses.field(default_factory=Inner)
    maybe: Inner | None = None
    names: tuple[str, ...] = ("a",)
    table: dict[str, int] = dataclasses.field(default_factory=dict)


def test_nested_settings_and_defaults():
    assert build(Outer, {"steps": 3}, "config") == Outer(3)
    values = {"steps": 3, "inner": {"rules": [["x", 1.0], ["y", 2.0]]}, "maybe": {"rate": 0.5}, "names": ["b", "c"]}
    built = build(Outer, values, "config")
    assert built == Outer(3, Inner(rules=(("x", 1.0), ("y", 2.0))), Inner(0.5), ("b", "c"))
    assert hash(built.inner)  # lists became tuples all the way down
    assert build(Outer, {"steps": 3, "maybe": None}, "config").maybe is None
    assert build(Outer, {"steps": 3, "inner": Inner(0.7)}, "config").inner.rate == 0.7
    assert build(Outer, {"steps": 3, "table": {"a": 1}}, "config").table == {"a": 1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 3, "stesp": 4}, "config: unknown key stesp; known: steps, inner, maybe, names, table"),
        ({"steps": 3, "inner": {"rat": 1}}, r"config\.inner: unknown key rat; known: rate, rules"),
        ({"steps": 3, "maybe": {"rat": 1}}, r"config\.maybe: unknown key rat; known: rate, rules"),
        ({}, "config: .*missing 1 required positional argument: 'steps'"),
    ],
)
def test_faults_name_their_place(values, message):
    with pytest.raises(UserError, match=message):
        build(Outer, values, "config")


def test_differences_are_listed_leaf_by_leaf():
    old = {"a": 1, "b": {"c": [1, 2], "d": None, "gone": 3}, "same": {"x": 1}}
    new = {"a": 1, "b": {"c": [1, 3], "d": 0}, "same": {"x": 1}, "new": True}
    assert differences(old, old) == []
    assert differences(old, new) == [
        "config.b.c: [1, 2] -> [1, 3]",
        "config.b.d: None -> 0",
        "config.b.gone: 3 -> '(absent)'",
        "config.new: '(absent)' -> True",
    ]
    assert differences({"a": {"b": 1}}, {"a": 2}) == ["config.a: {'b': 1} -> 2"]


def test_stored_configurations_compare_equal():
    config = {"size": (64, 128), "rules": ((".*", 1.0),), "none": None, 3: "number"}
    stored = to_json(config)
    assert stored == {"size": [64, 128], "rules": [[".*", 1.0]], "none": None, "3": "number"}
    assert differences(stored, to_json(config)) == []
    with pytest.raises(TypeError):
        to_json({"object": object()})
