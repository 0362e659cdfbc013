"""Sampling and affine maps on arrays. Positions are (y, x) in pixels; pixel (0, 0) has its centre at (0.5, 0.5)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8


def unpack_masks(packed: UInt8[Array, "*batch height bytes"], width: int) -> Bool[Array, "*batch height width"]:
    """Undoes ``core.annotations.pack_masks`` on the device."""
    bits = (packed[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    return bits.reshape(*packed.shape[:-1], -1)[..., :width].astype(bool)


def mask_boxes(masks: Bool[Array, "*batch height width"]) -> Float[Array, "*batch 4"]:
    """(left, top, right, bottom) around each mask, as shares of the width and height; zeros around an empty one."""

    def extent(line: Bool[Array, "*batch pixels"]) -> tuple[Array, Array]:
        length = line.shape[-1]
        first, after = jnp.argmax(line, axis=-1), length - jnp.argmax(line[..., ::-1], axis=-1)
        some = jnp.any(line, axis=-1)
        return jnp.where(some, first / length, 0.0), jnp.where(some, after / length, 0.0)

    (left, right), (top, bottom) = extent(jnp.any(masks, axis=-2)), extent(jnp.any(masks, axis=-1))
    return jnp.stack([left, top, right, bottom], axis=-1).astype(jnp.float32)


def bilinear_sample(
    features: Float[Array, "height width channels"], positions: Float[Array, "points 2"]
) -> Float[Array, "points channels"]:
    """Reads a map at (y, x) positions in units of its own pixels; outside, the border value is repeated.

    Equals ``torch.nn.functional.grid_sample(padding_mode="border", align_corners=False)``; booleans become float32.
    """
    height, width, _ = features.shape
    limit = jnp.array([height - 1, width - 1], positions.dtype)
    position = jnp.clip(positions - 0.5, 0.0, limit)
    low = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, jnp.maximum(limit.astype(jnp.int32) - 1, 0))
    high = jnp.minimum(low + 1, limit.astype(jnp.int32))
    dtype = features.dtype if jnp.issubdtype(features.dtype, jnp.floating) else jnp.float32
    fraction = (position - low).astype(dtype)
    fy, fx = fraction[:, :1], fraction[:, 1:]
    flat = features.reshape(height * width, -1)
    read = lambda y, x: flat[y * width + x].astype(dtype)
    top = read(low[:, 0], low[:, 1]) * (1 - fx) + read(low[:, 0], high[:, 1]) * fx
    bottom = read(high[:, 0], low[:, 1]) * (1 - fx) + read(high[:, 0], high[:, 1]) * fx
    return top * (1 - fy) + bottom * fy


def pixel_centres(height: int, width: int) -> Float[Array, "pixels 2"]:
    """The (y, x) centres of a map's pixels, row by row."""
    y, x = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
    return jnp.stack([y.ravel(), x.ravel()], axis=-1).astype(jnp.float32)


def apply_affine(matrix: Float[Array, "2 3"], positions: Float[Array, "points 2"]) -> Float[Array, "points 2"]:
    """Maps (y, x) positions by ``matrix @ [y, x, 1]``, elementwise: a GPU's fast matrix product would lose pixels."""
    return positions[:, :1] * matrix[:, 0] + positions[:, 1:] * matrix[:, 1] + matrix[:, 2]


def inside_box(box: Float[Array, "4"], positions: Float[Array, "points 2"]) -> Bool[Array, "points"]:
    """Whether (y, x) positions lie in ``box`` = (top, left, bottom, right)."""
    return jnp.all((positions >= box[:2]) & (positions < box[2:]), axis=-1)


def scale_positions(
    positions: Float[Array, "points 2"], source: tuple[int, int], target: tuple[int, int]
) -> Float[Array, "points 2"]:
    """Carries positions of a (height, width) grid over to another grid of the same extent."""
    return positions * jnp.array([target[0] / source[0], target[1] / source[1]], positions.dtype)
