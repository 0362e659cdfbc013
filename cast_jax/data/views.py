"""Weak and strong views of an image, with the geometry between them recorded (method, section 3).

Weak: flip and resize. Strong: a random resized crop of the weak view, with other colours. Each view is one affine map
from the original image, which is therefore resampled once for each view; its masks follow the same map.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, UInt8

from cast_jax.core.annotations import Instances, pack_masks
from cast_jax.core.config import check_choices, check_ranges
from cast_jax.core.errors import UserError
from cast_jax.data.photometric import PhotometricConfig, distort, require_range
from cast_jax.data.resample import (
    PixelBox,
    mask_region,
    pixels_inside,
    scaling,
    transform_box,
    translation,
    warp_image,
    warp_region,
)

View = dict[str, np.ndarray]
Group = dict[str, Any]
Matrix = Float[np.ndarray, "3 3"]
Box = Float[np.ndarray, "4"]

VIEW_NAMES = ("weak", "strong")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewConfig(PhotometricConfig):
    """What the views look like; the colours of the strong one are :class:`PhotometricConfig`'s fields.

    Attributes:
      image_size: (height, width) of every view, in pixels.
      max_instances: slots for instances in a view; of an image with more, the largest are kept.
      min_area: an instance with fewer pixels than this in a view is absent from that view.
      fit: scale 1 is the largest image that fits "inside" the canvas, or the smallest that can "cover" it.
      scale: the weak view's size relative to ``fit`` is drawn from this range; the aspect ratio is kept. What exceeds
        the canvas is cropped at random, what falls short is padded at random.
      flip_horizontal, flip_vertical: probabilities. A vertical flip suits microscopy and aerial images only.
      rotate90: also turn the image by 0, 90, 180 or 270 degrees, equally often.
      crop_area: the strong view shows a share of the canvas drawn from this range.
      crop_ratio: the crop's height / width, relative to the canvas's, is drawn (log-uniformly) from this range.
    """

    image_size: tuple[int, int]
    max_instances: int
    min_area: int = 16
    fit: Literal["inside", "cover"] = "inside"
    scale: tuple[float, float] = (0.5, 2.0)
    flip_horizontal: float = 0.5
    flip_vertical: float = 0.0
    rotate90: bool = False
    crop_area: tuple[float, float] = (0.25, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.image_size) != 2:
            raise UserError(f"image_size is {self.image_size}; it must be (height, width) in pixels")
        check_ranges(self, image_size="[1, 32767)", max_instances="[1, inf)", min_area="[1, inf)")  # OpenCV's limit
        check_ranges(self, flip_horizontal="[0, 1]", flip_vertical="[0, 1]")
        check_choices(self, fit=("inside", "cover"))
        require_range("scale", self.scale)
        require_range("crop_ratio", self.crop_ratio)
        require_range("crop_area", self.crop_area)
        if self.crop_area[1] > 1:
            raise UserError(f"crop_area is {self.crop_area}; a crop cannot show more than the share 1")
        if not self.crop_ratio[0] <= 1 <= self.crop_ratio[1]:
            raise UserError(f"crop_ratio is {self.crop_ratio}; the range must contain 1, the canvas's ratio")


def make_views(
    image: UInt8[np.ndarray, "height width 3"],
    instances: Instances,
    rng: np.random.Generator,
    config: ViewConfig,
    names: Sequence[str] = VIEW_NAMES,
) -> Group:
    """The views ``names`` of one image: a group as a batch holds them, without the batch axis.

    Besides the views, a group has ``instances_cut`` (int32: how many visible instances found no slot) and, if it has
    both views, ``strong_to_weak`` (float32 ``[2, 3]``), which maps (y, x) positions of the strong view to the weak
    view's. An instance has the same slot in both. A view's geometry and pixels do not depend on which others are
    asked for.

    Raises:
      UserError: a name that is neither "weak" nor "strong", or no name.
    """
    if not names or not set(names) <= set(VIEW_NAMES):
        raise UserError(f"data.views is {tuple(names)}; choose one or both of {VIEW_NAMES}")
    weak, weak_box = _weak_geometry((image.shape[0], image.shape[1]), rng, config)
    strong_to_weak, strong_box = _strong_geometry(weak_box, rng, config)
    geometry = {"weak": (weak, weak_box), "strong": (np.linalg.inv(strong_to_weak) @ weak, strong_box)}

    regions = [mask_region(mask) for mask in instances.masks]
    landed = {}
    for name in names:
        matrix, box = geometry[name]
        inside = pixels_inside(box)
        landed[name] = [warp_region(region, matrix, inside) for region in regions]
    areas = {name: np.array([np.count_nonzero(part) for _, part in landed[name]], np.int64) for name in names}
    chosen, cut = _choose_slots(np.stack([areas[name] for name in names]), config)

    group: Group = {"instances_cut": np.int32(cut)}
    for name in names:
        matrix, box = geometry[name]
        inside = pixels_inside(box)
        group[name] = {
            "image": warp_image(image, matrix, config.image_size, inside),
            "valid_box": box,
            "ignore": _ignored(instances, matrix, inside, config),
            **_fill_slots(instances, chosen, landed[name], areas[name], config),
        }
    if "strong" in group:
        real = pixels_inside(strong_box).slices  # colours move, padding stays zero
        strong = group["strong"]["image"]
        strong[real] = distort(strong[real], rng, config)
    if len(set(names)) == 2:
        group["strong_to_weak"] = strong_to_weak[:2].astype(np.float32)
    return group


def eval_view(
    image: UInt8[np.ndarray, "height width 3"], image_size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "canvas_height canvas_width 3"], Float[np.ndarray, "4"], Float[np.ndarray, "2 3"]]:
    """The whole image in the top left corner of the canvas, as large as it fits, aspect ratio kept.

    Returns:
      The canvas, the valid box (top, left, bottom, right), whole pixels, and the map from the image's (y, x) positions
      to the canvas's. To carry a mask back, crop the valid box out of it and resize that to the image's size.
    """
    size = (image.shape[0], image.shape[1])
    height, width = _scaled_size(size, image_size, "inside", 1.0)
    box = np.array([0, 0, height, width], np.float32)
    matrix = scaling(height / size[0], width / size[1])
    return warp_image(image, matrix, image_size, pixels_inside(box)), box, matrix[:2].astype(np.float32)


def needed_size(size: tuple[int, int], config: ViewConfig) -> tuple[int, int]:
    """The (height, width) at which an image is as large as the largest weak view needs it; never more than ``size``."""
    turned = [size, size[::-1]] if config.rotate90 else [size]
    fit = min if config.fit == "inside" else max
    factors = [fit(config.image_size[0] / height, config.image_size[1] / width) for height, width in turned]
    factor = min(config.scale[1] * max(factors), 1.0)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _scaled_size(size: tuple[int, int], canvas: tuple[int, int], fit: str, scale: float) -> tuple[int, int]:
    """(height, width) of an image of ``size`` at ``scale`` relative to its fit to the canvas, at least one pixel."""
    ratios = (canvas[0] / size[0], canvas[1] / size[1])
    factor = scale * (min(ratios) if fit == "inside" else max(ratios))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _weak_geometry(size: tuple[int, int], rng: np.random.Generator, config: ViewConfig) -> tuple[Matrix, Box]:
    """The map from the image to the weak view, and the view's valid box (whole pixels)."""
    flips = rng.random(2) < (config.flip_vertical, config.flip_horizontal)
    turns = int(rng.integers(4)) * config.rotate90
    scale = rng.uniform(*config.scale)

    matrix = np.eye(3)
    for axis in np.flatnonzero(flips):
        matrix[axis, axis], matrix[axis, 2] = -1.0, size[axis]
    for _ in range(turns):  # counter-clockwise: (y, x) → (width - x, y), as numpy.rot90
        matrix = np.array([[0.0, -1.0, size[1]], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]) @ matrix
        size = (size[1], size[0])
    resized = _scaled_size(size, config.image_size, config.fit, scale)
    slack = np.subtract(config.image_size, resized)
    # Whole pixels, so that the border between image and padding never runs through a pixel.
    offset = rng.integers(np.minimum(slack, 0), np.maximum(slack, 0), endpoint=True)
    matrix = translation(*offset) @ scaling(resized[0] / size[0], resized[1] / size[1]) @ matrix
    low, high = np.maximum(offset, 0), np.minimum(offset + resized, config.image_size)
    return matrix, np.concatenate([low, high]).astype(np.float32)


def _strong_geometry(weak_box: Box, rng: np.random.Generator, config: ViewConfig) -> tuple[Matrix, Box]:
    """The map from the strong view to the weak view, and the strong view's valid box.

    The crop never leaves the weak canvas; along each axis it lies within the weak view's real pixels where they are
    long enough, and spans them all where they are not.
    """
    canvas = np.array(config.image_size, np.float64)
    area = rng.uniform(*config.crop_area)
    # A more extreme ratio would not fit the canvas at this area.
    low, high = np.clip(np.log(config.crop_ratio), np.log(area), -np.log(area))
    ratio = np.exp(low + rng.random() * (high - low))
    crop = np.minimum(np.sqrt([area * ratio, area / ratio]), 1.0) * canvas
    first, last = weak_box[:2], weak_box[2:] - crop
    low, high = np.maximum(np.minimum(first, last), 0), np.minimum(np.maximum(first, last), canvas - crop)
    offset = low + rng.random(2) * (high - low)
    strong_to_weak = translation(*offset) @ scaling(*(crop / canvas))
    box = transform_box(np.linalg.inv(strong_to_weak), weak_box)
    # As float32 already, so that the device finds the same pixels inside as are drawn here.
    return strong_to_weak, np.clip(box, 0.0, np.tile(canvas, 2)).astype(np.float32)


def _choose_slots(areas: Int[np.ndarray, "views n"], config: ViewConfig) -> tuple[Int[np.ndarray, "kept"], int]:
    """The instances to keep, in their own order: seen in some view, the largest first to stay; and how many are cut."""
    largest = areas.max(axis=0, initial=0)
    by_size = np.argsort(-largest, kind="stable")
    seen = by_size[largest[by_size] >= config.min_area]
    return np.sort(seen[: config.max_instances]), max(0, len(seen) - config.max_instances)


def _fill_slots(
    instances: Instances,
    chosen: Int[np.ndarray, "kept"],
    landed: list[tuple[PixelBox, np.ndarray]],
    areas: Int[np.ndarray, "n"],
    config: ViewConfig,
) -> View:
    """The per-instance arrays of a view, padded to ``max_instances``."""
    height, width = config.image_size
    masks = np.zeros((config.max_instances, height, -(-width // 8)), np.uint8)
    labels = np.zeros(config.max_instances, np.int32)
    scores = np.zeros(config.max_instances, np.float32)
    valid = np.zeros(config.max_instances, bool)
    labels[: len(chosen)] = instances.labels[chosen]
    scores[: len(chosen)] = instances.scores[chosen]
    valid[: len(chosen)] = areas[chosen] >= config.min_area
    for slot in np.flatnonzero(valid):
        window, part = landed[chosen[slot]]
        first, odd = divmod(window.left, 8)  # packing all of the canvas would take most of the time of a view
        bits = pack_masks(np.pad(part, ((0, 0), (odd, 0))))
        masks[slot, window.top : window.bottom, first : first + bits.shape[1]] = bits
    return {"masks": masks, "labels": labels, "instance_valid": valid, "scores": scores}


def _ignored(
    instances: Instances, matrix: Matrix, inside: PixelBox, config: ViewConfig
) -> UInt8[np.ndarray, "height bytes"]:
    window, part = warp_region(mask_region(instances.ignore), matrix, inside)
    ignored = np.zeros(config.image_size, bool)
    ignored[window.slices] = part
    return pack_masks(ignored)
