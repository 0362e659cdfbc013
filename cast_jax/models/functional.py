"""A flax.nnx module as a pure function of a plain parameter tree, so that plain JAX transforms apply.

The tree is a nested dict with string keys (``encoder/blocks/each/norm1/scale``, of all blocks in a stack), which is
what checkpoints, regex rules and exports see.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray

from cast_jax.core.rules import named_leaves, unnamed
from cast_jax.models.keys import Keys

Params = dict[str, Any]


class Functional:
    """Splits a module once; ``apply`` merges it again inside the caller's transform."""

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        """``build`` makes the module from its random streams; it must hold no state but parameters."""
        self._init = jax.jit(lambda key: _to_tree(nnx.split(build(Keys(key).as_rngs()))[1]))
        module = nnx.eval_shape(lambda: build(Keys(jax.random.key(0)).as_rngs()))
        self.graphdef, self._state = nnx.split(module)
        self._arguments = frozenset(inspect.signature(module).parameters)

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh float32 parameters, compiled as one program."""
        return self._init(key)

    def abstract(self) -> Params:
        """Shapes and dtypes of the parameters, without allocating any."""
        return _to_tree(self._state)

    def takes(self, argument: str) -> bool:
        """Whether the module is called with an argument of this name."""
        return argument in self._arguments

    def apply(self, params: Params, *args: Any, key: PRNGKeyArray | None = None, **kwargs: Any) -> Any:
        """Calls the module; ``key`` feeds dropout (None: deterministic)."""
        module = nnx.merge(self.graphdef, self._to_state(params))
        return module(*args, rngs=None if key is None else nnx.Rngs(dropout=key), **kwargs)  # type: ignore[operator]

    def _to_state(self, params: Params) -> nnx.State:
        leaves = {path: variable.replace(_lookup(params, path)) for path, variable in nnx.to_flat_state(self._state)}
        return nnx.from_flat_state(leaves)


def fill_in(params: Params, init: Callable[[PRNGKeyArray], Params], key: PRNGKeyArray) -> Params:
    """``params`` with those drawn that are only described (``jax.ShapeDtypeStruct``): what ``init`` makes of ``key``.

    Nothing else is drawn: a large model takes its seconds, and memory beside the weights that are there.
    """
    leaves = named_leaves(params)
    lacking = {name for name, leaf in leaves.items() if isinstance(leaf, jax.ShapeDtypeStruct)}
    if not lacking:
        return params
    draw = lambda key: {name: leaf for name, leaf in named_leaves(init(key)).items() if name in lacking}
    # Optimising a program that runs once would only pay for large models, and round otherwise in the last bit.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return unnamed(leaves | jax.jit(draw, compiler_options=options)(key), like=params)


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
