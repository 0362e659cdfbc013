"""Images of noise with boxes for instances: of the right shapes where only the cost of a step is asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from cast_jax.core.annotations import Category, Instances
from cast_jax.data.sources.base import ImageRecord


@dataclasses.dataclass(frozen=True)
class StandIn:
    """``length`` images of ``image_size`` (height, width), each with ``count`` instances in boxes a quarter as long."""

    categories: tuple[Category, ...]
    image_size: tuple[int, int]
    count: int
    length: int = 16

    def __len__(self) -> int:
        return self.length

    def record(self, index: int) -> ImageRecord:
        """A name; there is no file."""
        return ImageRecord(index, Path(str(index)), str(index))

    def image(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        """Noise."""
        return np.random.default_rng(index).integers(0, 256, (*self.image_size, 3), np.uint8)

    def instances(self, index: int) -> Instances:
        """Boxes at random places."""
        rng, (height, width) = np.random.default_rng(index), self.image_size
        masks = np.zeros((self.count, height, width), bool)
        for mask in masks:
            top, left = rng.integers(0, 1 + 3 * height // 4), rng.integers(0, 1 + 3 * width // 4)
            mask[top : top + height // 4, left : left + width // 4] = True
        empty = Instances.empty(height, width)
        labels = rng.integers(0, len(self.categories), self.count, np.int32)
        return dataclasses.replace(empty, masks=masks, labels=labels, scores=np.ones(self.count, np.float32))
