"""Generated street scenes in ADE20K's layout (the instance challenge's form), for runs without the data set."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np

from cast_jax.core.files import atomic_write
from cast_jax.data.sources.ade20k import CATEGORIES
from cast_jax.data.sources.cityscapes import CATEGORIES as STREET
from cast_jax.data.sources.cityscapes import Cityscapes

# What a street's classes are called among the 100.
_NAMES = {"rider": "person", "train": "van", "motorcycle": "minibike"}
_IDS = {category.name: category.id for category in CATEGORIES["instance100"]}


def write_as_ade20k(root: str | os.PathLike[str], scenes: str | os.PathLike[str]) -> None:
    """Writes the scenes in the folder ``scenes`` (Cityscapes' layout) as ADE20K into ``root``; what is there stays."""
    for split, theirs, short in (("train", "training", "train"), ("val", "validation", "val")):
        source = Cityscapes(scenes, split)
        for index in range(len(source)):
            stem = f"ADE_{short}_{index + 1:08d}"
            image_path = Path(root) / "images" / theirs / f"{stem}.jpg"
            label_path = Path(root) / "annotations_instance" / theirs / f"{stem}.png"
            if image_path.exists() and label_path.exists():
                continue
            instances = source.instances(index)
            blue_green_red = np.zeros((*instances.ignore.shape, 3), np.uint8)
            for number, (mask, label) in enumerate(zip(instances.masks, instances.labels, strict=True), 1):
                name = STREET[label].name
                blue_green_red[mask] = (0, number, _IDS[_NAMES.get(name, name)])
            atomic_write(label_path, _encoded(".png", blue_green_red))
            atomic_write(image_path, _encoded(".jpg", source.image(index)[..., ::-1]))


def _encoded(suffix: str, pixels: np.ndarray) -> bytes:
    return cv2.imencode(suffix, pixels)[1].tobytes()
