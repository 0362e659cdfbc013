"""Averages weigh by count, over steps and for metrics that some steps do not have."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from cast_jax.core import metrics


def test_means_weigh_each_step_by_its_count():
    totals = metrics.as_pairs({"loss/mask": (6.0, 3), "rate": (0.0, 0)})
    totals = metrics.add(totals, metrics.as_pairs({"loss/mask": (10.0, 1), "rate": (0.0, 0)}))
    assert metrics.reduce(totals) == {"loss/mask": 4.0}


def test_adding_metrics_of_other_names_is_an_error():
    with pytest.raises(ValueError, match="rate"):
        metrics.add(metrics.as_pairs({"loss": (1.0, 1)}), metrics.as_pairs({"rate": (1.0, 1)}))


def test_non_finite_metrics_are_named():
    pairs = metrics.as_pairs({"a": (jnp.nan, 1.0), "b": (1.0, 1.0), "c": (-jnp.inf, 2.0), "d": (0.0, 0.0)})
    assert metrics.non_finite(pairs) == ["a", "c"]
