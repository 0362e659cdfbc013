"""Metrics as (sum, count): added up on the device, divided on the host only when they are logged.

Averages over steps and devices are then right for masked batches too: a step with few instances counts for little.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Pair = tuple[Float[Array, ""], Float[Array, ""]]
Metrics = Mapping[str, Pair]


def as_pairs(metrics: Mapping[str, tuple[Array | float, Array | float]]) -> dict[str, Pair]:
    """The same metrics as float32 scalars, by name in sorted order."""
    return {name: tuple(jnp.asarray(part, jnp.float32) for part in metrics[name]) for name in sorted(metrics)}  # type: ignore[misc]


def zeros(shapes: Metrics) -> dict[str, Pair]:
    """Empty totals for metrics of the given names."""
    return {name: (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)) for name in shapes}


def add(totals: Metrics, metrics: Metrics) -> dict[str, Pair]:
    """Totals with one more step; both must have the same names."""
    return jax.tree.map(jnp.add, dict(totals), dict(metrics))


def reduce(totals: Metrics) -> dict[str, float]:
    """sum / count as floats in one transfer; a metric that never counted is left out."""
    host = jax.device_get(dict(totals))
    return {name: float(total) / float(count) for name, (total, count) in host.items() if count > 0}


def non_finite(metrics: Metrics) -> list[str]:
    """Names of the metrics whose sum or count is NaN or infinite."""
    host = jax.device_get(dict(metrics))
    return [name for name, pair in host.items() if not all(jnp.isfinite(part) for part in pair)]
