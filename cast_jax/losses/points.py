"""Points of the unit square at which masks are compared, 16 + 16 bits of a word each.

Pairs of floats would take twice the memory, and a random number for each coordinate.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from cast_jax.core.geometry import sample_each
from cast_jax.core.selection import nearest_to_zero, take_rows
from cast_jax.losses.config import CriterionConfig


def uniform_points(key: PRNGKeyArray, shape: tuple[int, ...]) -> UInt32[Array, "*shape"]:
    """Points drawn anywhere in the square."""
    return jax.random.bits(key, shape, jnp.uint32)


def uncertain_points(
    key: PRNGKeyArray, logits: Float[Array, "maps h w"], config: CriterionConfig
) -> UInt32[Array, "maps points"]:
    """PointRend's importance sampling: most uncertain of an oversampled uniform set, topped up uniformly."""
    assert config.num_points is not None
    num_candidates = int(config.num_points * config.oversample)
    num_uncertain = int(config.num_points * config.importance)
    drawn = uniform_points(key, (logits.shape[0], num_candidates + config.num_points - num_uncertain))
    candidates, uniform = jnp.split(drawn, [num_candidates], axis=1)
    best = nearest_to_zero(read_at(candidates, logits), num_uncertain)
    return jnp.concatenate([take_rows(candidates, best), uniform], axis=1)


def positions(points: UInt32[Array, "*shape"], size: tuple[int, ...]) -> tuple[Array, Array]:
    """The points' (y, x) on a map of ``size``, in its pixels."""
    height, width = size
    y, x = (points >> 16).astype(jnp.float32), (points & 0xFFFF).astype(jnp.float32)
    return y * (height / 2.0**16), x * (width / 2.0**16)


def read_at(points: UInt32[Array, "maps points"], maps: Float[Array, "maps h w"]) -> Float[Array, "maps points"]:
    """Reads each map at its own points, between pixels by their distance."""
    return sample_each(maps, *positions(points, maps.shape[1:]))
