"""Images and masks under an affine map, with one set of conventions for both.

Positions are (y, x) in pixels and pixel (0, 0) has its centre at (0.5, 0.5), as everywhere in this project. OpenCV
writes (x, y) and puts that centre at (0, 0); only :func:`warp` knows about it. Maps are float64 3x3 matrices on
(y, x, 1).
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8


class Region(NamedTuple):
    """A mask's bounding box cut out of it: most masks are far smaller than their image."""

    top: int
    left: int
    pixels: UInt8[np.ndarray, "height width"]  # 0 or 255
    zeros_beyond: tuple[int, int, int, int]  # (top, left, bottom, right): 1, or 0 where the image ends


class PixelBox(NamedTuple):
    """Whole pixels: rows ``top:bottom`` and columns ``left:right``."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """For indexing ``[height, width, ...]`` arrays."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


def scaling(y: float, x: float) -> Float[np.ndarray, "3 3"]:
    """The map (y, x) → (y · ``y``, x · ``x``)."""
    return np.diag([y, x, 1.0])


def translation(y: float, x: float) -> Float[np.ndarray, "3 3"]:
    """The map (y, x) → (y + ``y``, x + ``x``)."""
    return np.array([[1.0, 0.0, y], [0.0, 1.0, x], [0.0, 0.0, 1.0]])


def transform_box(matrix: Float[np.ndarray, "3 3"], box: Float[np.ndarray, "4"]) -> Float[np.ndarray, "4"]:
    """The (top, left, bottom, right) of a box's image; exact for maps made of flips, quarter turns and scales."""
    corners = box.reshape(2, 2) @ matrix[:2, :2].T + matrix[:2, 2]
    return np.concatenate([corners.min(axis=0), corners.max(axis=0)])


def pixels_inside(box: Float[np.ndarray, "4"]) -> PixelBox:
    """The pixels whose centre lies in ``box``, bounds as in ``core.geometry.inside_box``."""
    return PixelBox(*np.ceil(box - 0.5).astype(int).tolist())


def warp(
    array: UInt8[np.ndarray, "height width *channels"],
    matrix: Float[np.ndarray, "3 3"],
    window: PixelBox,
    origin: tuple[int, int] = (0, 0),
    zeros_beyond: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> UInt8[np.ndarray, "window_height window_width *channels"]:
    """Resamples an array so that its position p appears at ``matrix @ p``.

    Bilinear, which reads every pixel of an axis that shrinks by less than two; one that shrinks more is first halved as
    often as it can be, by averages of neighbours: OpenCV does that in a tenth of the time of other factors.

    Args:
      window: the part of the canvas to make.
      origin: (y, x) of the array's first pixel, when the array was cut out of the image that ``matrix`` speaks of.
      zeros_beyond: for (top, left, bottom, right), 1 if zeros lie beyond that side, 0 if its edge is repeated.
    """
    # Plain floats: this runs for every mask, where small NumPy calls would cost more than the pixels.
    (yy, yx, y0), (xy, xx, x0) = matrix[:2].tolist()
    y0 += yy * origin[0] + yx * origin[1] - window.top
    x0 += xy * origin[0] + xx * origin[1] - window.left
    height, width = array.shape[:2]
    rows, columns = _shrunk(height, math.hypot(yy, xy)), _shrunk(width, math.hypot(yx, xx))
    if (rows, columns) != (height, width):
        array = cv2.resize(array, (columns, rows), interpolation=cv2.INTER_AREA)
        yy, xy, yx, xx = yy * height / rows, xy * height / rows, yx * width / columns, xx * width / columns
    if any(zeros_beyond):
        top, left, bottom, right = zeros_beyond
        array = cv2.copyMakeBorder(array, top, bottom, left, right, cv2.BORDER_CONSTANT, value=0)
    # The inverse map, rows and columns swapped to (x, y), between centres at whole numbers.
    area = yy * xx - yx * xy
    x_back, y_back = (-xy / area, yy / area), (xx / area, -yx / area)
    back_xy = np.array(
        [
            (x_back[1], x_back[0], x_back[0] * (0.5 - y0) + x_back[1] * (0.5 - x0) + zeros_beyond[1] - 0.5),
            (y_back[1], y_back[0], y_back[0] * (0.5 - y0) + y_back[1] * (0.5 - x0) + zeros_beyond[0] - 0.5),
        ]
    )
    size = (window.right - window.left, window.bottom - window.top)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(array, back_xy, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _shrunk(side: int, scale: float) -> int:
    """The length of a side halved until ``scale`` is more than a half of what remains to be done."""
    return max(1, round(side * 2.0 ** math.ceil(math.log2(scale)))) if scale <= 0.5 else side


def warp_image(
    image: UInt8[np.ndarray, "height width 3"],
    matrix: Float[np.ndarray, "3 3"],
    size: tuple[int, int],
    inside: PixelBox,
) -> UInt8[np.ndarray, "out_height out_width 3"]:
    """Draws an image on a canvas of zeros, and only on the pixels ``inside``; edges are repeated, never darkened."""
    canvas = np.zeros((*size, 3), np.uint8)
    canvas[inside.slices] = warp(image, matrix, inside)
    return canvas


def mask_region(mask: Bool[np.ndarray, "height width"]) -> Region:
    """Cuts a mask's bounding box out; an empty mask gives a region without pixels."""
    bits = np.ascontiguousarray(mask).view(np.uint8)
    left, top, width, height = cv2.boundingRect(bits)
    pixels = bits[top : top + height, left : left + width] * np.uint8(255)
    # At the image's own border a mask goes on as the image does, or the corners of a full mask would be rounded off.
    beyond = (int(top > 0), int(left > 0), int(top + height < mask.shape[0]), int(left + width < mask.shape[1]))
    return Region(top, left, pixels, beyond)


def warp_region(
    region: Region, matrix: Float[np.ndarray, "3 3"], inside: PixelBox
) -> tuple[PixelBox, Bool[np.ndarray, "part_height part_width"]]:
    """Where a mask lands on a canvas: the part of the canvas it can touch, and the mask there.

    A canvas pixel belongs to the mask when at least half of the bilinear weight at its centre does. Pixels that are not
    ``inside`` never belong to it.
    """
    height, width = region.pixels.shape
    (yy, yx, y0), (xy, xx, x0) = matrix[:2].tolist()
    ends = (region.top, region.top + height), (region.left, region.left + width)
    y_ends = [yy * y + yx * x + y0 for y, x in itertools.product(*ends)]
    x_ends = [xy * y + xx * x + x0 for y, x in itertools.product(*ends)]
    top, left = max(math.floor(min(y_ends)), inside.top), max(math.floor(min(x_ends)), inside.left)
    bottom, right = min(math.ceil(max(y_ends)), inside.bottom), min(math.ceil(max(x_ends)), inside.right)
    window = PixelBox(top, left, max(top, bottom), max(left, right))
    size = (window.bottom - window.top, window.right - window.left)
    if 0 in size or 0 in (height, width):
        return window, np.zeros(size, bool)
    return window, warp(region.pixels, matrix, window, (region.top, region.left), region.zeros_beyond) >= 128
