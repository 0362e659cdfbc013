"""The matching costs exactly what SciPy's costs, on every shape of problem that a batch can hold."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from cast_jax.losses.matching import match

SHAPES = ((6, 4), (4, 6), (5, 5))
run = jax.jit(match)


def check(cost: np.ndarray, valid: np.ndarray, atol: float = 1e-5) -> None:
    """One query an instance, as many as possible, none for padding, and SciPy's total."""
    query, matched = (np.asarray(x) for x in run(jnp.asarray(cost, jnp.float32), jnp.asarray(valid)))
    used = query[matched]
    assert len(set(used.tolist())) == len(used) == min(cost.shape[0], valid.sum())
    assert not matched[~valid].any()
    finite = np.nan_to_num(cost.astype(np.float64), nan=1e4, posinf=1e4, neginf=-1e4)
    rows, columns = linear_sum_assignment(finite[:, valid])
    total = finite[used, np.flatnonzero(matched)].sum()
    np.testing.assert_allclose(total, finite[:, valid][rows, columns].sum(), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_total_is_the_least(shape):
    rng = np.random.default_rng(0)
    for _ in range(30):
        check(rng.normal(0.0, 5.0, shape), np.ones(shape[1], bool))
        check(rng.normal(0.0, 5.0, shape), rng.random(shape[1]) < 0.6)


@pytest.mark.parametrize("shape", SHAPES)
def test_ties_still_give_one_query_each(shape):
    rng = np.random.default_rng(1)
    for _ in range(20):
        check(rng.integers(0, 3, shape), rng.random(shape[1]) < 0.8)
    check(np.zeros(shape), np.ones(shape[1], bool))


@pytest.mark.parametrize("shape", SHAPES)
def test_costs_that_are_not_finite_count_as_large(shape):
    rng = np.random.default_rng(2)
    for value in (np.nan, np.inf, -np.inf):
        cost = np.where(rng.random(shape) < 0.3, value, rng.normal(size=shape))
        check(cost, rng.random(shape[1]) < 0.8, atol=0.1)
    check(np.full(shape, np.nan), np.ones(shape[1], bool))


def test_small_differences_decide():
    """At the start of training the costs of all queries are nearly the same."""
    rng = np.random.default_rng(3)
    for _ in range(10):
        check(8.0 + 1e-4 * rng.normal(size=(6, 4)), np.array([True, True, True, False]))


@pytest.mark.parametrize("shape", SHAPES)
def test_no_instances(shape):
    _, matched = run(jnp.ones(shape), jnp.zeros(shape[1], bool))
    assert not matched.any()


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (100, 12)])
def test_instances_that_all_want_the_same_queries(shape):
    """Each claims its cheapest query first; here that is nearly always taken, and paths are long."""
    rng = np.random.default_rng(4)
    for noise in (0.0, 0.01, 0.3):
        cost = rng.normal(size=(shape[0], 1)) + noise * rng.normal(size=shape)
        check(cost, rng.random(shape[1]) < 0.7)


def test_many_at_once_are_matched_as_one_by_one():
    rng = np.random.default_rng(5)
    costs = jnp.asarray(rng.normal(size=(6, 20, 8)) + 3.0 * rng.normal(size=(6, 20, 1)), jnp.float32)
    valid = jnp.asarray(rng.random((6, 8)) < 0.7)
    together = jax.jit(jax.vmap(match))(costs, valid)
    for number in range(len(costs)):
        query, matched = run(costs[number], valid[number])
        np.testing.assert_array_equal(together[1][number], matched)
        np.testing.assert_array_equal(together[0][number][matched], query[matched])
