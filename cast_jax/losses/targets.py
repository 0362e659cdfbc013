"""What predicted instances are compared with."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cast_jax.core.resize import resize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """Padded ground truth or pseudo-labels.

    Attributes:
      masks: ``[batch, instances, height, width]`` at the input's resolution.
      labels: class positions.
      valid: False on padding.
      class_weights, mask_weights: factors on each instance's class terms, and on those of its mask or box (1 = plain).
      background_weights: factors on each image's lessons that there is no object.
      ignore: pixels that are neither object nor background error.
    """

    masks: Bool[Array, "batch instances height width"]
    labels: Int[Array, "batch instances"]
    valid: Bool[Array, "batch instances"]
    class_weights: Float[Array, "batch instances"]
    mask_weights: Float[Array, "batch instances"]
    background_weights: Float[Array, "batch"]
    ignore: Bool[Array, "batch height width"]


def shrink(maps: Bool[Array, "*batch height width"], size: tuple[int, int]) -> Float[Array, "*batch h w"]:
    """Which share of each pixel masks cover at ``size``, the resolution of the mask logits."""
    height, width = maps.shape[-2:]
    if height % size[0] == 0 and width % size[1] == 0:  # the mean of whole squares costs a fraction of a resize
        rows, columns = height // size[0], width // size[1]
        # Every so many-th row, then column, added up: on a CPU 20 times as fast as a mean over axes of squares.
        lines = functools.reduce(jnp.add, [maps[..., row::rows, :].astype(jnp.float32) for row in range(rows)])
        return functools.reduce(jnp.add, [lines[..., column::columns] for column in range(columns)]) / (rows * columns)
    flat = maps.reshape(-1, height, width, 1).astype(jnp.float32)
    return resize(flat, size, antialias=True).reshape(*maps.shape[:-2], *size)
