"""Loops that turn only as often as there is something to do, which the compiled program does not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from cast_jax.core.selection import take

State = TypeVar("State")


def over_flagged(
    flagged: Bool[Array, "rows"],
    body: Callable[[Int[Array, "together"], Bool[Array, "together"], State], State],
    state: State,
    together: int = 1,
    most: Callable[[Array], Array] = lambda count: count,
) -> State:
    """``state = body(rows, real, state)`` over the flagged rows in order, ``together`` of them at a time.

    Of the last turn some may not be ``real``; they stand for rows that were there or are not flagged. Devices that
    must turn equally often give ``most``, which makes the largest count of theirs.
    """
    order = jnp.argsort(~flagged, stable=True)
    count = jnp.sum(flagged)
    turns = most(count)

    def step(carry: tuple[Array, State]) -> tuple[Array, State]:
        turn, state = carry
        position = turn * together + jnp.arange(together)
        rows = take(order, jnp.minimum(position, order.shape[0] - 1))
        return turn + 1, body(rows, position < count, state)

    def loop(state: State) -> State:
        return jax.lax.while_loop(lambda carry: carry[0] * together < turns, step, (jnp.zeros((), jnp.int32), state))[1]

    # Compilers take what does not change out of a loop, which may be a pass over everything that it reads.
    return jax.lax.cond(turns > 0, loop, lambda state: state, state)
