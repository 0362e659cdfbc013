"""Sampling and affine maps on arrays. Positions are (y, x) in pixels; pixel (0, 0) has its centre at (0.5, 0.5)."""

from __future__ import annotations

import functools

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
    height, width, channels = features.shape
    y, x = positions[:, 0], positions[:, 1]
    first, steps, fy, fx = _corners(height, width, y, x)
    return _sample(steps, jnp.reshape(features, (height * width, channels)), first, fy[:, None], fx[:, None])


def sample_each(
    maps: Float[Array, "maps height width"], y: Float[Array, "maps points"], x: Float[Array, "maps points"]
) -> Float[Array, "maps points"]:
    """As :func:`bilinear_sample`, each map at its own positions."""
    number, height, width = maps.shape
    first, steps, fy, fx = _corners(height, width, y, x)
    first = first + jnp.arange(number, dtype=jnp.uint32)[:, None] * (height * width)
    return _sample(steps, jnp.ravel(maps), first, fy, fx)


def _corners(height: int, width: int, y: Array, x: Array) -> tuple[Array, tuple[int, ...], Array, Array]:
    """The number (row by row) of the pixel up and left of each position, the steps from it to the four around the
    position, and how far on (y, x) the position lies.
    """

    def along(position: Array, length: int) -> tuple[Array, Array]:
        position = jnp.clip(position - 0.5, 0.0, length - 1.0)
        low = jnp.minimum(position.astype(jnp.int32), max(length - 2, 0))
        return low, position - low

    (low_y, fy), (low_x, fx) = along(y, height), along(x, width)
    right, down = min(1, width - 1), width * min(1, height - 1)
    first = (low_y * width + low_x).astype(jnp.uint32)  # a signed one might count from the end, which costs a choice
    return first, (0, right, down, down + right), fy, fx


def _read(steps: tuple[int, ...], flat: Array, first: Array, fy: Array, fx: Array) -> Array:
    dtype = flat.dtype if jnp.issubdtype(flat.dtype, jnp.floating) else jnp.float32
    fy, fx = fy.astype(dtype), fx.astype(dtype)
    corners = (jnp.asarray(flat).at[first + step].get(mode="clip").astype(dtype) for step in steps)
    top_left, top_right, bottom_left, bottom_right = corners
    top, bottom = top_left * (1 - fx) + top_right * fx, bottom_left * (1 - fx) + bottom_right * fx
    return top * (1 - fy) + bottom * fy


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sample(steps: tuple[int, ...], flat: Array, first: Array, fy: Array, fx: Array) -> Array:
    """With a gradient that adds all four corners to one map: XLA would make a map of each, and add those up."""
    return _read(steps, flat, first, fy, fx)


def _sample_backward(steps: tuple[int, ...], given: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    flat, first, fy, fx = given
    to_fractions = jax.vjp(lambda *fractions: _read(steps, flat, first, *fractions), fy, fx)[1](gradient)
    if not jnp.issubdtype(flat.dtype, jnp.floating):
        return None, None, *to_fractions
    weights = [y * x for y in (1 - fy, fy) for x in (1 - fx, fx)]
    to_flat = jnp.zeros_like(flat)
    for step, weight in zip(steps, weights, strict=True):
        to_flat = to_flat.at[first + step].add((weight * gradient).astype(flat.dtype), mode="drop")
    return to_flat, None, *to_fractions


_sample.defvjp(lambda steps, *given: (_read(steps, *given), given), _sample_backward)


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
