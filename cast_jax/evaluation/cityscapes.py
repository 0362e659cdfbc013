"""Cityscapes' instance format, for scoring by ``cityscapesscripts``, and its rule for small objects.

Groups ("cargroup" and the like) need nothing here: the source puts them into ``Instances.ignore``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from cast_jax.core.annotations import Category, Detections, Instances, decode_mask
from cast_jax.core.errors import DataError
from cast_jax.core.files import atomic_write

LABEL_IDS = {
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "caravan": 29,
    "trailer": 30,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}


def write_predictions(
    folder: str | os.PathLike[str], stem: str, detections: Detections, categories: Sequence[Category]
) -> Path:
    """Writes one image's ``<stem>_pred.txt`` and its masks; returns the text file's path.

    A line of the text is ``masks/<stem>_<k>.png <label id> <score>``, the mask's path relative to the text, its object
    pixels 255. The scorer finds the text by its start, ``<city>_<sequence>_<frame>``, and requires one for every
    image, so an image without detections leaves an empty text.

    Args:
      folder: the prediction folder of the whole validation set.
      stem: ``<city>_<sequence>_<frame>``, with or without a suffix.
      detections: at the image's own resolution.
      categories: named as Cityscapes names them.

    Raises:
      DataError: a category that is not an instance class of Cityscapes.
    """
    folder = Path(folder)
    unknown = sorted({category.name for category in categories} - set(LABEL_IDS))
    if unknown:
        raise DataError(f"not instance classes of Cityscapes: {unknown}; known: {sorted(LABEL_IDS)}")
    lines = []
    for k, (rle, label, score) in enumerate(zip(detections.rles, detections.labels, detections.scores, strict=True)):
        name = f"masks/{stem}_{k:03d}.png"
        _, png = cv2.imencode(".png", decode_mask(rle).astype(np.uint8) * 255)
        atomic_write(folder / name, png.tobytes())
        lines.append(f"{name} {LABEL_IDS[categories[label].name]} {score:.6f}\n")
    # The text goes last: whoever sees it finds every mask that it names.
    path = folder / f"{stem}_pred.txt"
    atomic_write(path, "".join(lines))
    return path


def ignore_small(instances: Instances, min_area: int = 100) -> Instances:
    """Moves the instances under ``min_area`` pixels into the ignore region, as the official Cityscapes AP does."""
    keep = instances.masks.sum(axis=(1, 2)) >= min_area
    return dataclasses.replace(
        instances,
        masks=instances.masks[keep],
        labels=instances.labels[keep],
        scores=instances.scores[keep],
        ignore=instances.ignore | instances.masks[~keep].any(axis=0),
    )
