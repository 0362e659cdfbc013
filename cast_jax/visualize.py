"""Pictures of instances for people: overlays, side-by-side comparisons and contact sheets."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

from cast_jax.core.annotations import Category, Detections, Instances, decode_mask, encode_mask
from cast_jax.core.files import atomic_write

Masks = Bool[np.ndarray, "n height width"] | Sequence[dict[str, Any]]

PALETTE = np.array(
    [  # vivid and far apart: neighbours in the list differ in hue and in lightness
        (255, 89, 94), (25, 178, 255), (255, 202, 58), (162, 89, 255), (80, 220, 100), (255, 119, 200),
        (0, 205, 190), (255, 140, 40), (120, 130, 255), (190, 235, 60), (225, 60, 150), (90, 200, 250),
        (230, 120, 90), (40, 170, 110), (205, 150, 255), (240, 230, 110), (60, 120, 230), (255, 165, 150),
        (150, 210, 150), (200, 80, 220),
    ],
    np.uint8,
)  # fmt: skip
_CANVAS = (24, 26, 30)
_TITLE = (235, 236, 238)
_GAP = 6


def overlay(
    image: UInt8[np.ndarray, "height width 3"],
    masks: Masks,
    labels: Sequence[int] | np.ndarray,
    scores: Sequence[float] | np.ndarray | None = None,
    categories: Sequence[Category] = (),
    *,
    ignore: Bool[np.ndarray, "height width"] | None = None,
    colours: Sequence[int] | np.ndarray | None = None,
    long_side: int | None = None,
    opacity: float = 0.45,
) -> UInt8[np.ndarray, "new_height new_width 3"]:
    """Draws instances over an image: translucent fill, outline, class name with score.

    Every instance has its own colour. Large ones are painted first, so small ones stay visible. A name stands on its
    instance if it hides little of it, else above or below; of two that would collide the larger instance's is written.

    Args:
      image: RGB.
      masks: bool masks, or RLEs (decoded one at a time), at the image's resolution.
      labels: positions in ``categories``. Without categories nothing is written; with a single one, scores only.
      scores: in [0, 1], shown after the name; ``None`` for ground truth.
      ignore: pixels that are not scored, drawn hatched.
      colours: each instance's position in ``PALETTE`` (taken cyclically); by default its own position.
      long_side: pixels of the longer side of the result; ``None`` keeps the image's size. Outlines and text have the
        size of the result, so a small image is legible when enlarged.
      opacity: of the fill, in [0, 1].
    """
    canvas = _resize(image, long_side)
    height, width = canvas.shape[:2]
    if ignore is not None and ignore.any():
        canvas = _hatch(canvas, _resize_mask(ignore, height, width))
    at_size = ((k, _mask_at(masks[k], height, width)) for k in range(len(labels)))
    visible = sorted(((k, mask) for k, mask in at_size if mask.any()), key=lambda item: -int(item[1].sum()))
    palette = PALETTE[np.asarray(range(len(labels)) if colours is None else colours, np.int64) % len(PALETTE)]
    thickness = max(1, round(max(height, width) / 500))
    for k, mask in visible:
        canvas[mask] = np.rint((1 - opacity) * canvas[mask] + opacity * palette[k])
    for k, mask in visible:
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, contours, -1, palette[k].tolist(), thickness, cv2.LINE_AA)
    return _draw_names(canvas, visible, palette, _names(labels, scores, categories))


def side_by_side(
    image: UInt8[np.ndarray, "height width 3"],
    truth: Instances | None,
    detections: Detections,
    categories: Sequence[Category],
    *,
    threshold: float = 0.3,
    long_side: int = 720,
) -> UInt8[np.ndarray, "new_height new_width 3"]:
    """The image, its ground truth (unless ``None``) and the detections with score ≥ ``threshold``, titled.

    A detection has the colour of the object that it overlaps most (IoU ≥ 0.5); strangers have colours of their own.
    """
    kept = np.flatnonzero(np.asarray(detections.scores) >= threshold)
    rles = [detections.rles[k] for k in kept]
    panels = [("image", _resize(image, long_side))]
    colours = None
    if truth is not None:
        drawn = overlay(image, truth.masks, truth.labels, None, categories, ignore=truth.ignore, long_side=long_side)
        panels.append((f"ground truth · {len(truth)}", drawn))
        colours = _matching_colours(truth, rles)
    drawn = overlay(
        image, rles, detections.labels[kept], detections.scores[kept], categories, colours=colours, long_side=long_side
    )
    panels.append((f"prediction · {len(kept)}", drawn))
    return _join([_titled(panel, title) for title, panel in panels], columns=len(panels))


def contact_sheet(
    images: Sequence[UInt8[np.ndarray, "_h _w 3"]], columns: int = 4, max_side: int = 480
) -> UInt8[np.ndarray, "height width 3"]:
    """A grid of images, row by row, each shrunk (never enlarged) so that its longer side is at most ``max_side``."""
    if not images:
        raise ValueError("a contact sheet needs at least one image")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    cells = [_resize(image, min(max_side, max(image.shape[:2]))) for image in images]
    return _join(cells, min(columns, len(cells)))


def save_image(path: str | os.PathLike[str], image: UInt8[np.ndarray, "height width 3"]) -> None:
    """Writes an RGB image atomically, as JPEG (quality 90) or PNG by the path's suffix."""
    suffix = Path(path).suffix.lower()
    parameters = {".jpg": [cv2.IMWRITE_JPEG_QUALITY, 90], ".jpeg": [cv2.IMWRITE_JPEG_QUALITY, 90], ".png": []}
    if suffix not in parameters:
        raise ValueError(f"{path}: an image is saved as one of {sorted(parameters)}, not {suffix!r}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{path}: expected uint8 [height, width, 3], got {image.dtype} {list(image.shape)}")
    _, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), parameters[suffix])
    atomic_write(path, data.tobytes())


def _mask_at(mask: np.ndarray | dict[str, Any], height: int, width: int) -> Bool[np.ndarray, "height width"]:
    return _resize_mask(decode_mask(mask) if isinstance(mask, dict) else mask, height, width)


def _resize_mask(mask: np.ndarray, height: int, width: int) -> Bool[np.ndarray, "height width"]:
    if mask.shape == (height, width):
        return mask
    # Linear on 0/255, cut at one half: smooth outlines when a small image is enlarged.
    return cv2.resize(mask.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_LINEAR) >= 128


def _resize(image: np.ndarray, long_side: int | None) -> np.ndarray:
    """A copy whose longer side is ``long_side``."""
    if long_side is None or long_side == max(image.shape[:2]):
        return image.copy()
    scale = long_side / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def _hatch(canvas: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Greys the region and lays diagonal stripes over it."""
    rows, columns = np.indices(region.shape)
    grey = canvas.mean(axis=2)
    hatched = np.where((rows + columns) % 14 < 3, 0.4 * grey + 120, 0.6 * grey + 30)
    return np.where(region[..., None], hatched[..., None], canvas).astype(np.uint8)


def _names(
    labels: Sequence[int] | np.ndarray, scores: Sequence[float] | np.ndarray | None, categories: Sequence[Category]
) -> list[str]:
    """What to write on each instance: the name where there is more than one class, and the score if there is one."""
    names = [categories[int(label)].name if len(categories) > 1 else "" for label in labels]
    numbers = [f"{float(score):.2f}" for score in scores] if scores is not None and categories else [""] * len(names)
    return [f"{name} {number}".strip() for name, number in zip(names, numbers, strict=True)]


def _matching_colours(truth: Instances, rles: list[dict[str, Any]]) -> list[int]:
    """For each detection, the position of the object that it overlaps by IoU ≥ 0.5, else a position past them all."""
    if not rles or not len(truth):
        return list(range(len(rles)))
    ious = coco_mask.iou(rles, [encode_mask(mask) for mask in truth.masks], [0] * len(truth))
    return [int(row.argmax()) if row.max() >= 0.5 else len(truth) + k for k, row in enumerate(ious)]


def _draw_names(
    canvas: np.ndarray, visible: list[tuple[int, np.ndarray]], palette: np.ndarray, names: list[str]
) -> np.ndarray:
    """Names in rounded boxes of the instance's colour, the largest instances' first."""
    height, width = canvas.shape[:2]
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    font = _font(int(np.clip(max(height, width) / 55, 10, 24)))
    pad, taken = 3, np.zeros((height, width), bool)
    for k, mask in visible:
        left, top, right, bottom = draw.textbbox((0, 0), names[k], font=font)
        box_width, box_height = math.ceil(right - left) + 2 * pad, math.ceil(bottom - top) + 2 * pad
        if not names[k] or box_width > width or box_height > height:
            continue
        y, x = _name_position(mask, box_height, box_width)
        place = (slice(y, y + box_height), slice(x, x + box_width))
        if taken[place].any():
            continue
        taken[place] = True
        corners = (x, y, x + box_width - 1, y + box_height - 1)
        draw.rounded_rectangle(corners, radius=3, fill=tuple(palette[k].tolist()))
        ink = (15, 15, 15) if palette[k] @ (0.299, 0.587, 0.114) > 135 else (255, 255, 255)  # ITU-R 601 luma
        draw.text((x + pad - left, y + pad - top), names[k], font=font, fill=ink)
    return np.asarray(picture).copy()


def _name_position(mask: np.ndarray, box_height: int, box_width: int) -> tuple[int, int]:
    """The top left corner (y, x) of a name's box: on the instance if it hides little of it, else above, else below."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if mask.sum() >= 4 * box_height * box_width:
        y, x = _innermost(mask)
        y -= box_height // 2
    else:
        x = int(columns[0] + columns[-1]) // 2
        y = int(rows[0]) - box_height - 2
        y = y if y >= 0 else int(rows[-1]) + 3
    limit_y, limit_x = mask.shape[0] - box_height, mask.shape[1] - box_width
    return min(max(y, 0), limit_y), min(max(x - box_width // 2, 0), limit_x)


def _innermost(mask: np.ndarray) -> tuple[int, int]:
    """The pixel (y, x) farthest from the mask's outline: unlike the centroid, it lies on the object."""
    padded = np.pad(mask.astype(np.uint8), 1)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), mask.shape)
    return int(y), int(x)


def _titled(panel: np.ndarray, title: str) -> np.ndarray:
    """The panel under a dark bar with its title."""
    size = int(np.clip(max(panel.shape[:2]) / 45, 11, 24))
    bar = Image.new("RGB", (panel.shape[1], 2 * size), _CANVAS)
    ImageDraw.Draw(bar).text((size // 2, size), title, font=_font(size), fill=_TITLE, anchor="lm")
    return np.concatenate([np.asarray(bar), panel])


def _join(cells: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Cells in a grid on a dark canvas, each in the middle of its place."""
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    widths = [max(row[i].shape[1] for row in rows if i < len(row)) for i in range(columns)]
    heights = [max(cell.shape[0] for cell in row) for row in rows]
    shape = (sum(heights) + _GAP * (len(rows) + 1), sum(widths) + _GAP * (columns + 1), 3)
    canvas = np.full(shape, _CANVAS, np.uint8)
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            y = _GAP * (r + 1) + sum(heights[:r]) + (heights[r] - cell.shape[0]) // 2
            x = _GAP * (c + 1) + sum(widths[:c]) + (widths[c] - cell.shape[1]) // 2
            canvas[y : y + cell.shape[0], x : x + cell.shape[1]] = cell
    return canvas


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's own font has no letters beyond ASCII.
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
