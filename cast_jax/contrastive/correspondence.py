"""Reads the weak view's features at the positions that the strong view shows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from cast_jax.core.geometry import apply_affine, bilinear_sample, inside_box, pixel_centres, scale_positions
from cast_jax.core.sharding import over_images


def correspond(
    features_weak: PyTree[Float[Array, "batch height width _channels"]],
    strong_to_weak: Float[Array, "batch 2 3"],
    valid_box_strong: Float[Array, "batch 4"],
    image_size: tuple[int, int],
    *,
    valid_box_weak: Float[Array, "batch 4"] | None = None,
    strong_grid: tuple[int, int] | None = None,
) -> tuple[PyTree[Float[Array, "batch pixels _channels"]], Bool[Array, "batch pixels"]]:
    """The weak view's features at every feature pixel of the strong view, row by row, and which of them are real.

    A strong pixel's centre is carried to the image, through the recorded affine map to the weak image, and down to the
    weak feature grid, where the features are read bilinearly. A pixel is valid when its centre lies in the strong
    view's real part and its counterpart in the weak view's (the whole canvas unless ``valid_box_weak`` is given).

    Args:
        features_weak: one map or several of one size, each by itself: what needs no gradient then costs none.
        strong_to_weak: maps (y, x) positions, in pixels of the input image, from the strong view to the weak one.
        valid_box_strong: (top, left, bottom, right) of the real pixels, in pixels of the input image.
        image_size: (height, width) of the input image, common to both views.
        strong_grid: (height, width) of the strong view's features; the weak view's by default.
    """
    weak_grid = jax.tree.leaves(features_weak)[0].shape[1:3]
    grid = weak_grid if strong_grid is None else strong_grid
    boxes_weak = valid_box_weak
    if boxes_weak is None:
        boxes_weak = jnp.broadcast_to(jnp.array([0, 0, *image_size], jnp.float32), valid_box_strong.shape)

    def read(features, affine, box_strong, box_weak):
        in_weak, valid = counterparts(affine, box_strong, box_weak, image_size, grid)
        # Border values stand in where there is no counterpart; a non-finite position must not reach the gather.
        position = scale_positions(jnp.where(valid[:, None], in_weak, 0.0), image_size, weak_grid)
        return jax.tree.map(lambda one: bilinear_sample(one, position), features), valid

    return over_images(read, features_weak, strong_to_weak, valid_box_strong, boxes_weak)


def counterparts(
    strong_to_weak: Float[Array, "2 3"],
    box_strong: Float[Array, "4"],
    box_weak: Float[Array, "4"],
    image_size: tuple[int, int],
    grid: tuple[int, int],
) -> tuple[Float[Array, "pixels 2"], Bool[Array, "pixels"]]:
    """Where the centres of a strong view's ``grid`` lie in the weak view, in its pixels, and which are real in both."""
    in_strong = scale_positions(pixel_centres(*grid), grid, image_size)
    in_weak = apply_affine(strong_to_weak, in_strong)
    canvas = jnp.array([0, 0, *image_size], jnp.float32)
    return in_weak, inside_box(box_strong, in_strong) & inside_box(box_weak, in_weak) & inside_box(canvas, in_weak)
