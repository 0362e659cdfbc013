"""A flax.nnx module as a pure function of a plain parameter tree, so that plain JAX transforms apply.

The tree is a nested dict with string keys (``encoder/blocks/0/norm1/scale``), which is what checkpoints, regex rules
and exports see.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray

Params = dict[str, Any]


class Functional:
    """Splits a module once; ``apply`` merges it again inside the caller's transform."""

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        """``build`` makes the module from its random streams; it must hold no state but parameters."""
        self._init = jax.jit(lambda key: _to_tree(nnx.split(build(_keys(key)))[1]))
        self.graphdef, self._state = nnx.split(nnx.eval_shape(lambda: build(_keys(jax.random.key(0)))))

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh float32 parameters, compiled as one program."""
        return self._init(key)

    def abstract(self) -> Params:
        """Shapes and dtypes of the parameters, without allocating any."""
        return _to_tree(self._state)

    def apply(self, params: Params, *args: Any, key: PRNGKeyArray | None = None, **kwargs: Any) -> Any:
        """Calls the module; ``key`` feeds dropout (None: deterministic)."""
        module = nnx.merge(self.graphdef, self._to_state(params))
        return module(*args, rngs=None if key is None else nnx.Rngs(dropout=key), **kwargs)  # type: ignore[operator]

    def _to_state(self, params: Params) -> nnx.State:
        leaves = {path: variable.replace(_lookup(params, path)) for path, variable in nnx.to_flat_state(self._state)}
        return nnx.from_flat_state(leaves)


class _Keys:
    """The keys of ``nnx.Rngs(params=key)``, which counts in an array: at each parameter JAX then looks through all that
    was traced before, which takes minutes for a large model."""

    def __init__(self, key: PRNGKeyArray):
        self._key, self._count = key, 0

    def params(self) -> PRNGKeyArray:
        self._count += 1
        return jax.random.fold_in(self._key, self._count - 1)


def _keys(key: PRNGKeyArray) -> nnx.Rngs:
    return typing.cast(nnx.Rngs, _Keys(key))  # modules only ask for ``params()``


def count_parameters(params: Params) -> int:
    """Number of scalars in a parameter tree (abstract or real)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _lookup(params: Params, path: tuple[Any, ...]) -> Any:
    for part in path:
        params = params[str(part)]
    return params


def _to_tree(state: nnx.State) -> Params:
    tree: Params = {}
    for path, variable in nnx.to_flat_state(state):
        *parents, name = (str(part) for part in path)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = variable.get_value()
    return tree
