"""Loops over flagged rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cast_jax.core.loops import over_flagged


def seen(flagged, together: int, **options) -> tuple[list[int], int]:
    """The real rows in the order in which they came, and how many turns that took."""

    @jax.jit
    def run(flagged):
        def note(rows, real, state):
            order, turns = state
            place = turns * together + jnp.arange(together)
            return order.at[place].set(jnp.where(real, rows, -1), mode="drop"), turns + 1

        state = (jnp.full(2 * len(flagged) + together, -1), jnp.zeros((), jnp.int32))
        return over_flagged(flagged, note, state, together, **options)

    order, turns = run(jnp.asarray(flagged))
    return [int(row) for row in order if row >= 0], int(turns)


@pytest.mark.parametrize(("together", "turns"), [(1, 3), (2, 2), (4, 1)])
def test_flagged_rows_come_once_and_in_order(together, turns):
    assert seen([False, True, True, False, False, True], together) == ([1, 2, 5], turns)


def test_nothing_is_done_where_nothing_is_flagged():
    assert seen([False] * 4, 2) == ([], 0)


def test_devices_turn_as_often_as_the_one_with_most():
    """The turns beyond one's own rows hold none that are real."""
    assert seen([True, False, True, False], 2, most=lambda count: count + 3) == ([0, 2], 3)


def test_all_rows():
    flagged = np.ones(5, bool)
    assert seen(flagged, 3) == ([0, 1, 2, 3, 4], 2)
