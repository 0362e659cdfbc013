"""Equal layers that follow one another, as one layer whose parameters have an axis of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from cast_jax.core.sharding import gathered
from cast_jax.models.keys import Keys

Layer = TypeVar("Layer", bound=nnx.Module)


class Stack(nnx.Module, Generic[Layer]):
    """``count`` layers that ``make`` makes, which differ in nothing but their parameters.

    The parameters are ``[count, ...]`` arrays named ``<stack>/each/...``. A loop over them is traced and compiled once,
    not ``count`` times, and the optimiser meets as many arrays as one layer has.
    """

    def __init__(self, make: Callable[..., Layer], count: int, *, rngs: nnx.Rngs):
        """``make(rngs=...)`` makes a layer; each from the keys that it would have if they were made in turn."""
        keys, draws = Keys.of(rngs), 0

        def described() -> Layer:
            nonlocal draws
            own = Keys(keys.key[...])
            layer = make(rngs=own.as_rngs())
            draws = own.drawn
            return layer

        graph, _ = nnx.split(nnx.eval_shape(described))
        parameters = jax.vmap(lambda number: nnx.split(make(rngs=keys.later(number * draws).as_rngs()))[1])
        # The name is ``core.rules.EACH``, by which rules and conversion know stacks.
        self.each: Layer = nnx.merge(graph, parameters(jnp.arange(count)))
        keys.drawn += count * draws
        self.count = count

    def scan(
        self,
        body: Callable[[list[Layer], Any, list[Any]], tuple[Any, list[Any]]],
        carry: Any,
        given: Any = None,
        *,
        layers: int | None = None,
        together: int = 1,
        unrolled: bool = False,
    ) -> tuple[Any, Any]:
        """``carry, results = body([layer, ...], carry, [given, ...])`` for ``together`` layers at a time, in turn.

        ``given`` is a tree of ``[layers, ...]`` arrays, of which the body sees one for each of its layers, and for each
        it returns one result; the last turn may have fewer layers. ``layers``: run only so many, at most ``count``.
        ``unrolled``: compile every turn by itself; nothing is then copied into and out of arrays of all turns.

        Returns:
          The last carry, and the results of all layers: a tree of ``[layers, ...]`` arrays.
        """
        count = self.count if layers is None else layers
        parameters = self.parameters

        def turn(carry: Any, each: list[Any]) -> tuple[Any, list[Any]]:
            # Slices of what a loop is given would be kept for the gradient, so each layer's part is given by itself.
            return body([self.layer(parameters) for parameters, _ in each], carry, [given for _, given in each])

        def part(index: Any) -> Any:
            return jax.tree.map(lambda array: array[index], (parameters, given))

        looped = count // together * together if count >= 2 * together else 0
        if unrolled or jax.config.jax_debug_nans:  # type: ignore[attr-defined]
            looped = 0  # of a loop only itself could be named
        results = []
        if looped:
            every = [part(slice(first, looped, together)) for first in range(together)]
            carry, found = jax.lax.scan(turn, carry, every)
            join = lambda *arrays: jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])
            results.append(jax.tree.map(join, *found))
        for first in range(looped, count, together):  # a single turn, or a last one with fewer layers
            carry, found = turn(carry, [part(number) for number in range(first, min(first + together, count))])
            results.append(jax.tree.map(lambda *arrays: jnp.stack(arrays), *found))
        return carry, jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *results)

    @property
    def parameters(self) -> nnx.State:
        """Those of all layers, ``[count, ...]``."""
        return nnx.split(self.each)[1]

    def layer(self, parameters: nnx.State) -> Layer:
        """A layer with one layer's part of :attr:`parameters`."""
        return nnx.merge(nnx.split(self.each)[0], gathered(parameters))
