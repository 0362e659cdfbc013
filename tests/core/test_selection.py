"""Counting and choosing along rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cast_jax.core.selection import nearest_to_zero, running_count, take_rows


@pytest.mark.parametrize("length", [1, 31, 64, 1000])
def test_running_count(length):
    flags = np.random.default_rng(0).random((3, length)) < 0.5
    np.testing.assert_array_equal(running_count(jnp.asarray(flags)), np.cumsum(flags, axis=1))


@pytest.mark.parametrize("count", [0, 1, 250, 1000])
def test_the_nearest_to_zero(count):
    """Those of a sort of the magnitudes as bfloat16 cuts them, ties in their order."""
    values = np.random.default_rng(1).normal(size=(4, 1000)).astype(np.float32)
    values[1], values[2, ::3], values[3, 7] = 0.5, 0.0, np.nan
    cut = np.abs(values).view(np.uint32) >> 16
    expected = np.sort(np.argsort(cut, axis=1, kind="stable")[:, :count], axis=1)
    found = jax.jit(nearest_to_zero, static_argnums=1)(values, count)
    np.testing.assert_array_equal(np.sort(found, axis=1), expected)


def test_rows_are_taken_apart():
    values = np.random.default_rng(2).normal(size=(3, 50)).astype(np.float32)
    where = np.random.default_rng(3).integers(0, 50, (3, 20))
    np.testing.assert_array_equal(take_rows(values, where), np.take_along_axis(values, where, axis=1))
    vectors = values.reshape(3, 25, 2)
    expected = np.take_along_axis(vectors, where[..., None] // 2, axis=1)
    np.testing.assert_array_equal(take_rows(vectors, where // 2), expected)
