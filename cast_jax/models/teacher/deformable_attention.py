"""Multi-scale deformable attention (Zhu et al., 2021): every query reads a few positions of every map, by gathers.

A query's reads are ``4 * levels * points`` weighted rows of one table, since a bilinear read is four of them. They are
added up in float32, on a CPU tap by tap, elsewhere all at once, since there every kernel costs some microseconds.
Queries go through in chunks that are computed again in the gradient, so that memory does not grow with their number.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cast_jax.core import target
from cast_jax.models.layers import Linear
from cast_jax.models.teacher.chunks import in_chunks

UNROLL = 4  # taps that share a pass over the sum: the corners of one bilinear read


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Levels:
    """The maps whose positions lie one after the other, row by row, fine to coarse.

    Attributes:
      sizes: (rows, columns) of each map.
      valid: ``[batch, positions]``, False on padding.
      counts: ``[batch, levels, 2]``, the valid columns and rows of each map.
    """

    valid: Bool[Array, "batch positions"]
    counts: Float[Array, "batch levels 2"]
    sizes: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})

    @property
    def ratios(self) -> Float[Array, "batch levels 2"]:
        """The valid part of each map's width and height."""
        return self.counts / jnp.array([(columns, rows) for rows, columns in self.sizes], jnp.float32)

    def centres(self) -> Float[Array, "batch positions 2"]:
        """The (x, y) of every position, where 1 is the end of the valid part of its map."""
        grids = []
        for level, (rows, columns) in enumerate(self.sizes):
            y, x = jnp.meshgrid(jnp.arange(rows) + 0.5, jnp.arange(columns) + 0.5, indexing="ij")
            grids.append(jnp.stack([x.ravel(), y.ravel()], axis=-1) / self.counts[:, None, level])
        return jnp.concatenate(grids, axis=1)


def levels_of(masks: list[Bool[Array, "batch _rows _columns"]]) -> Levels:
    """The levels of maps whose padding, where ``masks`` are False, is at the bottom and right."""
    counts = [jnp.stack([mask[:, 0].sum(axis=1), mask[:, :, 0].sum(axis=1)], axis=-1) for mask in masks]
    valid = jnp.concatenate([mask.reshape(len(mask), -1) for mask in masks], axis=1)
    sizes = tuple((mask.shape[1], mask.shape[2]) for mask in masks)
    return Levels(valid, jnp.stack(counts, axis=1).astype(jnp.float32), sizes)


class DeformableAttention(nnx.Module):
    """Attention whose queries say themselves where they look, relative to reference points or boxes."""

    def __init__(self, features: int, num_heads: int, num_levels: int, num_points: int, *, dtype, rngs: nnx.Rngs):
        taps = num_heads * num_levels * num_points
        zeros = nnx.initializers.zeros_init()
        around = lambda *_: jnp.asarray(_first_offsets(num_heads, num_levels, num_points))
        # Positions to a fraction of a pixel need float32, whatever the features are.
        exact = {"dtype": jnp.float32, "kernel_init": zeros, "rngs": rngs}
        self.offsets = Linear(features, 2 * taps, bias_init=around, **exact)
        self.weights = Linear(features, taps, **exact)
        xavier = nnx.initializers.xavier_uniform()
        self.value = Linear(features, features, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.out = Linear(features, features, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points

    def __call__(
        self,
        queries: Float[Array, "batch queries features"],
        references: Float[Array, "batch queries levels coordinates"],
        maps: Float[Array, "batch positions features"],
        levels: Levels,
    ) -> Float[Array, "batch queries features"]:
        """Attends.

        Args:
          queries: with their position encoding.
          references: (x, y) points, around which offsets are in pixels of each map, or (x, y, width, height) boxes,
            around whose centres they are in half their size by the number of points; each in [0, 1] of a whole map.
          maps: the features of all levels, one after the other; padding reads as zero.
          levels: the maps' sizes and padding.
        """
        table = jnp.where(levels.valid[..., None], self.value(maps), 0.0)
        table = table.reshape(*table.shape[:2], self.num_heads, -1)

        def read(queries: Array, references: Array) -> Array:
            locations = self._locations(queries, references, levels.sizes)
            weights = self.weights(queries).reshape(*queries.shape[:2], self.num_heads, -1)
            weights = jax.nn.softmax(weights, axis=-1).reshape(locations.shape[:-1])
            return sample(table, levels.sizes, locations, weights).reshape(queries.shape).astype(maps.dtype)

        return self.out(in_chunks(read, queries, references)[:, : queries.shape[1]])

    def _locations(self, queries: Array, references: Array, sizes: tuple[tuple[int, int], ...]) -> Array:
        shape = (*queries.shape[:2], self.num_heads, self.num_levels, self.num_points, 2)
        offsets = self.offsets(queries).reshape(shape)
        references = references[:, :, None, :, None]
        if references.shape[-1] == 2:
            return references + offsets / jnp.array([(columns, rows) for rows, columns in sizes])[:, None]
        return references[..., :2] + offsets / self.num_points * references[..., 2:] * 0.5


def sample(
    table: Float[Array, "batch positions heads features"],
    sizes: tuple[tuple[int, int], ...],
    locations: Float[Array, "batch queries heads levels points 2"],
    weights: Float[Array, "batch queries heads levels points"],
) -> Float[Array, "batch queries heads features"]:
    """The weighted sum of bilinear reads at (x, y) in [0, 1] of each map, which is zero outside; in float32.

    Equals the sum over levels of ``torch.nn.functional.grid_sample(align_corners=False)``.
    """
    batch, positions, heads, features = table.shape
    size = jnp.array([(columns, rows) for rows, columns in sizes], jnp.int32)[:, None]
    start = jnp.array(np.cumsum([0, *(rows * columns for rows, columns in sizes[:-1])]), jnp.int32)[:, None]
    pixels = locations * size - 0.5
    low = jax.lax.stop_gradient(jnp.floor(pixels))
    fraction = pixels - low
    rows_read, weights_read = [], []
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        corner = low.astype(jnp.int32) + jnp.array([dx, dy])
        inside = jnp.all((corner >= 0) & (corner < size), axis=-1)
        corner = jnp.clip(corner, 0, size - 1)
        position = start + corner[..., 1] * size[..., 0] + corner[..., 0]
        rows_read.append(position * heads + jnp.arange(heads)[:, None, None])
        x, y = (fraction[..., axis] if d else 1.0 - fraction[..., axis] for axis, d in enumerate((dx, dy)))
        weights_read.append(jnp.where(inside, x * y * weights, 0.0))

    def taps_first(values: list[Array]) -> Array:
        return jnp.stack(values).transpose(4, 5, 0, 1, 2, 3).reshape(-1, *values[0].shape[:3])

    flat = table.reshape(batch, positions * heads, features)
    return _weighted_rows(flat, taps_first(rows_read), taps_first(weights_read))


@jax.custom_vjp
def _weighted_rows(
    table: Float[Array, "batch rows features"],
    rows: Int[Array, "taps batch queries heads"],
    weights: Float[Array, "taps batch queries heads"],
) -> Float[Array, "batch queries heads features"]:
    """``sum over taps: weights * table[rows]``. Differentiated by JAX, every tap would make a whole table of zeros."""
    if target.backend() != "cpu":
        return jnp.sum(weights[..., None] * _take(table, rows, axis=1), axis=0)

    def add(total: Array, tap: tuple[Array, Array]) -> tuple[Array, None]:
        row, weight = tap
        return total + weight[..., None] * _take(table, row), None

    empty = jnp.zeros((*rows.shape[1:], table.shape[-1]), jnp.float32)
    return jax.lax.scan(add, empty, (rows, weights), unroll=UNROLL)[0]


def _weighted_rows_forward(table: Array, rows: Array, weights: Array):
    return _weighted_rows(table, rows, weights), (table, rows, weights)


def _weighted_rows_backward(residuals: tuple[Array, Array, Array], gradient: Array):
    table, rows, weights = residuals

    def add(total: Array, tap: tuple[Array, Array], axis: int = 0) -> tuple[Array, Array]:
        row, weight = tap
        scatter = lambda table, row, update: table.at[row].add(update, mode="promise_in_bounds")
        total = jax.vmap(scatter, in_axes=(0, axis, axis))(total, row, weight[..., None] * gradient)
        return total, jnp.sum(_take(table, row, axis) * gradient, axis=-1)

    empty = jnp.zeros(table.shape, jnp.float32)
    if target.backend() != "cpu":
        to_table, to_weights = add(empty, (rows, weights), axis=1)
    else:
        to_table, to_weights = jax.lax.scan(add, empty, (rows, weights))
    return to_table.astype(table.dtype), None, to_weights


_weighted_rows.defvjp(_weighted_rows_forward, _weighted_rows_backward)


def _take(
    table: Float[Array, "batch rows features"], rows: Int[Array, "*_taps batch queries heads"], axis: int = 0
) -> Float[Array, "*_taps batch queries heads features"]:
    """Rows in float32; batched along ``axis``, not flattened over the batch, whose images may lie on other devices."""
    read = lambda table, row: table.at[row].get(mode="promise_in_bounds")
    return jax.vmap(read, in_axes=(0, axis), out_axes=axis)(table, rows).astype(jnp.float32)


def _first_offsets(num_heads: int, num_levels: int, num_points: int) -> Float[np.ndarray, "offsets"]:
    """Where an untrained layer looks: each head in a direction of its own, each point a pixel further."""
    angle = 2 * math.pi * np.arange(num_heads) / num_heads
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    direction /= np.abs(direction).max(axis=-1, keepdims=True)
    steps = np.arange(1, num_points + 1)[:, None]
    offsets = np.broadcast_to(direction[:, None, None] * steps, (num_heads, num_levels, num_points, 2))
    return offsets.ravel().astype(np.float32)
