"""Regular expressions over parameter paths such as ``encoder/blocks/each/attention/query/kernel``.

A table is a sequence of (pattern, value); the first pattern that matches the whole path decides. Strict on both sides:
a path without a rule and a rule without a path are errors, since both are how a typing mistake looks.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from cast_jax.core.errors import UserError

Value = TypeVar("Value")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path, ``{"encoder/norm/bias": leaf, ...}``, in the pytree's own order."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def unnamed(leaves: dict[str, Any], like: Any) -> Any:
    """Inverse of :func:`named_leaves`: puts leaves, in any order, back into the structure of ``like``."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in named_leaves(like)])


EACH = "each"
"""The part of a path that stands for all layers of a stack (``models.stack``): the array's first axis numbers them."""


def is_stacked(name: str) -> bool:
    """Whether a path is that of all layers of a stack, ``blocks/each/bias``."""
    return f"/{EACH}/" in f"/{name}"


def layer_names(name: str, shape: Sequence[int]) -> list[str]:
    """The layers' own paths: of ``blocks/each/bias``, [12, 384], ``blocks/0/bias`` to ``blocks/11/bias``.

    A path that is not of a stack is the only one.
    """
    if not is_stacked(name):
        return [name]
    before, _, after = f"/{name}".partition(f"/{EACH}/")
    return [f"{before}/{layer}/{after}"[1:] for layer in range(shape[0])]


def layer_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of arrays by name, of a stack's each layer's own; those follow one another."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        found |= dict.fromkeys(layer_names(name, shape), shape[1:] if is_stacked(name) else shape)
    return found


def match_rules(rules: Sequence[tuple[str, Value]], names: Iterable[str], table: str) -> dict[str, Value]:
    """The value of the first rule that matches each name; ``table`` is the config field, for the message.

    Raises :class:`UserError` for names without a rule, rules that match no name, and patterns that are not valid.
    """
    names = list(names)
    patterns = [(_compile(pattern, table), value) for pattern, value in rules]
    found = {name: value for name in names for pattern, value in reversed(patterns) if pattern.fullmatch(name)}
    missing = [name for name in names if name not in found]
    faults = []
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        faults.append(f"no rule matches {shown}; add one, or end the table with ('.*', ...)")
    for pattern, _ in patterns:
        if not any(pattern.fullmatch(name) for name in names):
            faults.append(f"rule {pattern.pattern!r} matches no parameter; {nearest(pattern.pattern, names)}")
    if faults:
        raise UserError(f"{table}: " + "; ".join(faults))
    return found


def match_any(patterns: Sequence[str], names: Iterable[str], table: str, strict: bool = True) -> set[str]:
    """The names that at least one pattern matches; where ``strict``, each pattern must match something."""
    names = list(names)
    if strict:
        match_rules([*((pattern, True) for pattern in patterns), (".*", False)], names, table)
    compiled = [_compile(pattern, table) for pattern in patterns]
    return {name for name in names if any(pattern.fullmatch(name) for pattern in compiled)}


def nearest(wanted: str, known: Iterable[str]) -> str:
    """'nearest names: a, b' for an error message about a name or pattern that does not exist."""
    close = difflib.get_close_matches(wanted.replace(".*", "").replace("\\", ""), list(known), n=3, cutoff=0.0)
    return "nearest names: " + (", ".join(close) or "none")


def _compile(pattern: str, table: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{table}: {pattern!r} is not a regular expression ({error})") from error
