"""The vocabulary that sources, pseudo-labels and evaluation share: categories, instances, run-length masks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


@dataclasses.dataclass(frozen=True)
class Category:
    """One class. ``id`` is the dataset's own (sparse) id and is what every output carries; models use the position."""

    id: int
    name: str


@dataclasses.dataclass(frozen=True)
class Instances:
    """The instances of one image, at the image's own resolution.

    Attributes:
      masks: bool ``[n, height, width]``; instances may overlap.
      labels: int32 ``[n]``, positions in the source's ``categories``.
      ignore: bool ``[height, width]``, pixels that are neither object nor background error (crowds, groups).
      scores: float32 ``[n]``, confidence in [0, 1]; 1 for ground truth.
      without_pixels: the ids of annotations that are left out, since they cover no pixel.
    """

    masks: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    scores: np.ndarray
    without_pixels: tuple[int | str, ...] = ()

    @staticmethod
    def empty(height: int, width: int) -> Instances:
        """No instances in an image of this size (a valid annotation)."""
        return Instances(
            masks=np.zeros((0, height, width), bool),
            labels=np.zeros((0,), np.int32),
            ignore=np.zeros((height, width), bool),
            scores=np.zeros((0,), np.float32),
        )

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Detections:
    """What a segmenter found in one image, at the image's own resolution, best first.

    Attributes:
      labels: int32 ``[n]``, positions in ``categories``.
      scores: float32 ``[n]`` in [0, 1]: class probability times mask quality.
      mask_quality: float32 ``[n]`` in [0, 1]: mean foreground probability inside the mask.
      rles: ``n`` masks as :func:`encode_mask` makes them.
    """

    labels: np.ndarray
    scores: np.ndarray
    mask_quality: np.ndarray
    rles: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.labels)


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encodes a bool mask ``[height, width]`` as COCO's compressed RLE, JSON-ready (``counts`` is a str)."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def suppress_duplicates(rles: list[dict[str, Any]], max_iou: float) -> list[int]:
    """Greedy mask NMS: the positions that overlap no kept one before them by more than ``max_iou``.

    ``rles`` come best first. Classes play no part: one object called by two names is two labels for one thing.
    """
    kept: list[int] = []
    overlaps = coco_mask.iou(rles, rles, [0] * len(rles)) if rles else np.zeros((0, 0))
    for position in range(len(rles)):
        if not kept or overlaps[position, kept].max() <= max_iou:
            kept.append(position)
    return kept


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """Decodes a compressed or uncompressed COCO RLE to a bool mask ``[height, width]``."""
    if isinstance(rle["counts"], list):
        rle = coco_mask.frPyObjects(rle, *rle["size"])
    return coco_mask.decode(rle).astype(bool)


def pack_masks(masks: np.ndarray) -> np.ndarray:
    """Packs bool masks ``[..., width]`` into bits, ``uint8 [..., ceil(width / 8)]``, for the trip to the device."""
    return np.packbits(masks, axis=-1, bitorder="little")
