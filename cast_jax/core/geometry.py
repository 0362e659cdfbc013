"""Sampling and affine maps on arrays. Positions are (y, x) in pixels; pixel (0, 0) has its centre at (0.5, 0.5)."""

from __future__ import annotations

from typing import Any

import jax
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
    floating = jnp.issubdtype(features.dtype, jnp.floating)
    return _sample(features, positions) if floating else _read_corners(features, positions)


def _corners(features: Array, positions: Array, dtype: Any) -> tuple[Array, Array]:
    """The four pixels around each position, numbered row by row, and how far on (y, x) it lies: ``[_, points]``."""
    height, width, _ = features.shape
    limit = jnp.array([height - 1, width - 1])
    position = jnp.clip(positions - 0.5, 0.0, limit.astype(positions.dtype))
    low = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, jnp.maximum(limit - 1, 0))
    fraction = (position - low).astype(dtype)
    (y0, x0), (y1, x1) = low.T, jnp.minimum(low + 1, limit).T
    return jnp.stack([y * width + x for y in (y0, y1) for x in (x0, x1)]), fraction.T


def _read_corners(features: Array, positions: Array) -> Array:
    dtype = features.dtype if jnp.issubdtype(features.dtype, jnp.floating) else jnp.float32
    pixels, fraction = _corners(features, positions, dtype)
    flat, (fy, fx) = features.reshape(-1, features.shape[-1]), fraction[..., None]
    top_left, top_right, bottom_left, bottom_right = (flat[pixel].astype(dtype) for pixel in pixels)
    top, bottom = top_left * (1 - fx) + top_right * fx, bottom_left * (1 - fx) + bottom_right * fx
    return top * (1 - fy) + bottom * fy


@jax.custom_vjp
def _sample(features: Array, positions: Array) -> Array:
    """With a gradient that adds up all four corners at once: XLA would do so one after the other, through memory."""
    return _read_corners(features, positions)


def _sample_backward(given: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    features, positions = given
    pixels, (fy, fx) = _corners(features, positions, gradient.dtype)
    weights = jnp.stack([y * x for y in (1 - fy, fy) for x in (1 - fx, fx)])
    to_flat = jnp.zeros((features.shape[0] * features.shape[1], features.shape[2]), gradient.dtype)
    to_flat = to_flat.at[pixels].add(weights[..., None] * gradient)
    to_positions = jax.vjp(lambda positions: _read_corners(features, positions), positions)[1](gradient)[0]
    return to_flat.reshape(features.shape), to_positions


_sample.defvjp(lambda *given: (_read_corners(*given), given), _sample_backward)


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
