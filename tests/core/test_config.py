"""Settings from mappings: typed, nested, strict; and what differs between two configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import pytest

from cast_jax.core.config import build, check_choices, check_ranges, differences, to_json
from cast_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    rules: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        check_ranges(self, rate="[0, 1)")


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = dataclasses.field(default_factory=Inner)
    maybe: Inner | None = None
    names: tuple[str, ...] = ("a",)
    table: dict[str, int] = dataclasses.field(default_factory=dict)
    mode: Literal["on", "off"] = "on"
    all: Mapping[str, Inner] = dataclasses.field(default_factory=dict)


def test_nested_settings_and_defaults():
    assert build(Outer, {"steps": 3}, "config") == Outer(3)
    values = {"steps": 3, "inner": {"rules": [["x", 1.0], ["y", 2.0]]}, "maybe": {"rate": 0.5}, "names": ["b", "c"]}
    built = build(Outer, values, "config")
    assert built == Outer(3, Inner(rules=(("x", 1.0), ("y", 2.0))), Inner(0.5), ("b", "c"))
    assert hash(built.inner)  # lists became tuples all the way down
    assert build(Outer, {"steps": 3, "maybe": None}, "config").maybe is None
    assert build(Outer, {"steps": 3, "inner": Inner(0.7)}, "config").inner.rate == 0.7
    assert build(Outer, {"steps": 3, "table": {"a": 1}}, "config").table == {"a": 1}
    assert build(Outer, {"steps": 3, "all": {"a": {"rate": 0}}}, "config").all == {"a": Inner(0)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 3, "stesp": 4}, "config: unknown key stesp; known: steps, inner, maybe, names, table, mode, all"),
        ({"steps": 3, "inner": {"rat": 1}}, r"config\.inner: unknown key rat; known: rate, rules"),
        ({"steps": 3, "maybe": {"rat": 1}}, r"config\.maybe: unknown key rat; known: rate, rules"),
        ({}, "config: missing key steps$"),
        ({"steps": "3"}, "config.steps is '3'; it must be of type int$"),
        ({"steps": 3.0}, "config.steps is 3.0; it must be of type int$"),
        ({"steps": True}, "config.steps is True; it must be of type int$"),
        ({"steps": None}, "config.steps is None; it must be of type int$"),
        ({"steps": 3, "inner": 4}, "config.inner is 4; it must be of type Inner$"),
        ({"steps": 3, "inner": {"rate": False}}, r"config\.inner\.rate is False; it must be of type float$"),
        ({"steps": 3, "inner": {"rate": 2}}, r"config\.inner\.rate is 2; it must lie in \[0, 1\)$"),
        ({"steps": 3, "inner": {"rules": [["x", "1"]]}}, r"config\.inner\.rules is \(\('x', '1'\),\); it must be of "),
        ({"steps": 3, "inner": {"rules": [["x"]]}}, r"config\.inner\.rules is \(\('x',\),\)"),
        ({"steps": 3, "names": "b"}, r"config\.names is 'b'; it must be of type tuple\[str, \.\.\.\]$"),
        ({"steps": 3, "maybe": 1}, r"config\.maybe is 1; it must be of type "),
        ({"steps": 3, "table": {"a": "b"}}, r"config\.table\.a is 'b'; it must be of type int$"),
        ({"steps": 3, "mode": "slow"}, r"config\.mode is 'slow'; it must be of type Literal\['on', 'off'\]$"),
        ({"steps": 3, "all": {"x": {"rat": 1}}}, r"config\.all\.x: unknown key rat"),
    ],
)
def test_faults_name_their_place(values, message):
    with pytest.raises(UserError, match=message):
        build(Outer, values, "config")


@dataclasses.dataclass
class Numbers:
    half_open: float | None = 0.0
    closed: tuple[float, ...] = (1, 2)
    choice: str = "a"

    def __post_init__(self) -> None:
        check_ranges(self, half_open="[0, inf)", closed="[1, 2]")
        check_choices(self, choice=("a", "b"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"half_open": -1e-9}, r"half_open is -1e-09; it must lie in \[0, inf\)"),
        ({"half_open": float("inf")}, "half_open is inf"),
        ({"half_open": float("nan")}, "half_open is nan"),
        ({"closed": (1, 2.5)}, r"closed is \(1, 2\.5\); it must lie in \[1, 2\]"),
        ({"choice": "c"}, "choice 'c' is unknown; known: a, b"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    assert Numbers(None, (1.5,), "b")
    with pytest.raises(UserError, match=f"^{message}"):
        Numbers(**values)


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
