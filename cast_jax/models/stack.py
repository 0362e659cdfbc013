"""Equal layers that follow one another, as one layer whose parameters have an axis of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Layer = TypeVar("Layer", bound=nnx.Module)


class Stack(nnx.Module, Generic[Layer]):
    """``count`` layers that ``make`` makes, which differ in nothing but their parameters.

    The parameters are ``[count, ...]`` arrays named ``<stack>/each/...``. A loop over them is traced and compiled once,
    not ``count`` times, and the optimiser meets as many arrays as one layer has.
    """

    def __init__(self, make: Callable[[], Layer], count: int):
        graphs, states = zip(*(nnx.split(make()) for _ in range(count)), strict=True)
        self.each: Layer = nnx.merge(graphs[0], jax.tree.map(lambda *arrays: jnp.stack(arrays), *states))
        self.count = count

    def scan(
        self,
        body: Callable[[list[Layer], Any, list[Any]], tuple[Any, list[Any]]],
        carry: Any,
        given: Any = None,
        *,
        layers: int | None = None,
        together: int = 1,
    ) -> tuple[Any, Any]:
        """``carry, results = body([layer, ...], carry, [given, ...])`` for ``together`` layers at a time, in turn.

        ``given`` is a tree of ``[layers, ...]`` arrays, of which the body sees one for each of its layers, and for each
        it returns one result; the last turn may have fewer layers. ``layers``: run only the first.

        Returns:
          The last carry, and the results of all layers: a tree of ``[layers, ...]`` arrays.
        """
        count = self.count if layers is None else layers
        turns = count // together
        graph, parameters = nnx.split(self.each)

        def turn(carry: Any, each: list[Any]) -> tuple[Any, list[Any]]:
            # Slices of what a loop is given would be kept for the gradient, so each layer's part is given by itself.
            return body([nnx.merge(graph, parameters) for parameters, _ in each], carry, [given for _, given in each])

        def part(index: Any) -> Any:
            return jax.tree.map(lambda array: array[index], (parameters, given))

        carry, results = jax.lax.scan(
            turn, carry, [part(slice(first, turns * together, together)) for first in range(together)]
        )
        join = lambda *arrays: jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])
        results = jax.tree.map(join, *results)
        if count % together:
            carry, rest = turn(carry, [part(number) for number in range(turns * together, count)])
            results = jax.tree.map(lambda array, *more: jnp.concatenate([array, jnp.stack(more)]), results, *rest)
        return carry, results
