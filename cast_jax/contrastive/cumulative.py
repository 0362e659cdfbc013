"""Weighted draws with replacement by inversion of a two-level cumulative sum."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


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


def draw(key: PRNGKeyArray, cumulative: Cumulative, count: int) -> Int[Array, "count"]:
    """``count`` independent draws from one (unbatched) distribution; position 0 if all weights are zero.

    Each level spends its own uniform number, so the resolution does not suffer from many items: 2⁻²³ of a block's
    weight, instead of 2⁻²³ of everything.
    """
    uniform = jax.random.uniform(key, (2, count, 1))
    size = cumulative.inner.shape[-1]
    block = jnp.sum(cumulative.blocks <= uniform[0] * cumulative.blocks[-1], axis=-1)
    block = jnp.minimum(block, cumulative.blocks.shape[0] - 1)
    rows = cumulative.inner[block]
    inside = jnp.sum(rows <= uniform[1] * rows[:, -1:], axis=-1)
    found = block * size + jnp.minimum(inside, size - 1)
    return jnp.where(cumulative.blocks[-1] > 0, found, 0).astype(jnp.int32)
