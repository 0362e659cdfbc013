"""Weighted draws with replacement by inversion of a two-level cumulative sum."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cast_jax.core.selection import take


class Cumulative(NamedTuple):
    """Running sums of weights over blocks, and inside each block: draws look at two rows of about √n numbers.

    Where a weight is zero there is -inf instead, so that no threshold falls on it.
    """

    blocks: Float[Array, "*batch blocks"]
    inner: Float[Array, "*batch blocks size"]

    @property
    def total(self) -> Float[Array, "*batch"]:
        """The sum of the weights."""
        return total_of(self.blocks)


def running_sum(weights: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """The sums up to and with each of a few weights; -inf where a weight is zero."""
    ones = np.triu(np.ones((weights.shape[-1],) * 2, weights.dtype))
    return jnp.where(weights > 0, jnp.matmul(weights, ones, precision=jax.lax.Precision.HIGHEST), -jnp.inf)


def total_of(running: Float[Array, "*batch n"]) -> Float[Array, "*batch"]:
    """The sum of all weights, from their running sums."""
    # The largest, not the last: rounding differs from one position to the next, and the last weight may be zero.
    return jnp.maximum(jnp.max(running, axis=-1), 0.0)


def cumulate(weights: Float[Array, "*batch n"]) -> Cumulative:
    """Prepares draws with probability proportional to ``weights`` (finite, ≥ 0) along the last axis."""
    n = weights.shape[-1]
    size = math.isqrt(n - 1) + 1
    blocks = -(-n // size)
    pad = [(0, 0)] * (weights.ndim - 1) + [(0, blocks * size - n)]
    inner = running_sum(jnp.pad(weights, pad).reshape(*weights.shape[:-1], blocks, size))
    return Cumulative(running_sum(total_of(inner)), inner)


def first_above(running: Float[Array, "*draws n"], uniform: Float[Array, "*draws"]) -> Int[Array, "*draws"]:
    """Inverts running sums (with -inf where a weight is zero): the first that exceeds ``uniform`` times the total."""
    above = running > (uniform * total_of(running))[..., None]
    return jnp.min(jnp.where(above, jnp.arange(running.shape[-1]), running.shape[-1] - 1), axis=-1)


def pick(
    cumulative: Cumulative, uniform: Float[Array, "2 draws"], which: Int[Array, "draws"] | int = 0
) -> Int[Array, "draws"]:
    """One draw for each pair of numbers uniform in [0, 1), from the ``which``-th distribution (of one batch dimension).

    Position 0 where all weights are zero. Each level spends its own uniform number, so the resolution does not suffer
    from many items: 2⁻²³ of a block's weight, instead of 2⁻²³ of everything.
    """
    which = jnp.broadcast_to(which, uniform.shape[1:])
    distributions, blocks, size = cumulative.inner.shape
    block = first_above(take(cumulative.blocks, which), uniform[0])
    inner = take(cumulative.inner.reshape(distributions * blocks, size), which * blocks + block)
    found = block * size + first_above(inner, uniform[1])
    return jnp.where(take(cumulative.total, which) > 0, found, 0).astype(jnp.int32)
