from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_jax.contrastive.cumulative import cumulate, pick


def test_inversion_worked_by_hand():
    # Blocks of two: (1, 0), (3, 4). The first number chooses the block, the second the place inside.
    cumulative = cumulate(jnp.array([[1.0, 0.0, 3.0, 4.0]]))
    first, second = np.meshgrid([0.0, 0.124, 0.126, 0.99], [0.0, 0.42, 0.43, 0.99], indexing="ij")
    found = pick(cumulative, jnp.array([first.ravel(), second.ravel()])).reshape(4, 4)
    np.testing.assert_array_equal(found, [[0, 0, 0, 0], [0, 0, 0, 0], [2, 2, 3, 3], [2, 2, 3, 3]])
    assert cumulative.total == 8


_pick = jax.jit(lambda weights, uniform: pick(cumulate(weights[None]), uniform))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0.0, 1.0), st.integers(-20, 20))
def test_zero_weights_are_never_drawn(seed, share, scale):
    rng = np.random.default_rng(seed)
    weights = rng.random(150) * (rng.random(150) < share) * 10.0**scale
    weights[rng.integers(150)] = 10.0**scale
    edges = np.array([0.0, 0.5, 1 - 2**-23, *rng.random(61)], np.float32)
    uniform = np.stack([x.ravel() for x in np.meshgrid(edges, edges)])
    found = np.asarray(_pick(jnp.asarray(weights, jnp.float32), jnp.asarray(uniform)))
    assert np.all(weights[found] > 0)


def test_all_zero_weights_give_position_zero():
    cumulative = cumulate(jnp.zeros((1, 10)))
    assert cumulative.total == 0
    np.testing.assert_array_equal(pick(cumulative, jax.random.uniform(jax.random.key(0), (2, 5))), 0)


def test_each_draw_from_the_distribution_that_it_names():
    cumulative = cumulate(jnp.eye(5))
    which = jnp.array([4, 0, 3, 3, 1])
    np.testing.assert_array_equal(pick(cumulative, jax.random.uniform(jax.random.key(0), (2, 5)), which), which)
