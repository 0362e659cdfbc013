"""Weighted draws with replacement by inversion of a two-level cumulative sum."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Cumulative(NamedTuple):
    """Cumulative weights over blocks, and inside each block: draws look at two rows of about √n numbers."""

    blocks: Float[Array, "*batch blocks"]
    inner: Float[Array, "*batch blocks size"]

    @property
    def total(self) -> Float[Array, "*batch"]:
        """The sum of the weights."""
        return self.blocks[..., -1]


def _increasing_sum(weights: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    # A parallel sum may round differently from one position to the next. A weight of zero must not move the running
    # sum at all, or a forbidden item could be drawn: only positive weights may raise it.
    running = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    return jax.lax.cummax(running, axis=running.ndim - 1)


def cumulate(weights: Float[Array, "*batch n"]) -> Cumulative:
    """Prepares draws with probability proportional to ``weights`` (finite, ≥ 0) along the last axis."""
    n = weights.shape[-1]
    size = max(math.isqrt(max(n - 1, 0)) + 1, 1)
    blocks = -(-n // size)
    pad = [(0, 0)] * (weights.ndim - 1) + [(0, blocks * size - n)]
    inner = _increasing_sum(jnp.pad(weights, pad).reshape(*weights.shape[:-1], blocks, size))
    return Cumulative(_increasing_sum(inner[..., -1]), inner)


def pick(cumulative: Cumulative, uniform: Float[Array, "2 draws"]) -> Int[Array, "draws"]:
    """One draw for each pair of numbers uniform in [0, 1), from one distribution; position 0 if all weights are zero.

    Each level spends its own uniform number, so the resolution does not suffer from many items: 2⁻²³ of a block's
    weight, instead of 2⁻²³ of everything.
    """
    total = cumulative.blocks[-1]
    block = jnp.sum(cumulative.blocks <= uniform[0][:, None] * total, axis=-1)
    rows = cumulative.inner[jnp.minimum(block, cumulative.blocks.shape[0] - 1)]
    inside = jnp.sum(rows <= uniform[1][:, None] * rows[:, -1:], axis=-1)
    return jnp.where(total > 0, block * cumulative.inner.shape[-1] + inside, 0).astype(jnp.int32)
