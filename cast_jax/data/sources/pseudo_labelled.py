"""Unlabelled images with the labels that a model gave them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from cast_jax.core.annotations import Category, Instances, decode_mask
from cast_jax.core.errors import DataError
from cast_jax.data.pseudo_labels import PseudoLabels
from cast_jax.data.sources.base import ImageRecord, Source, image_size, name_some
from cast_jax.data.sources.coco import require_same_categories


class PseudoLabelled:
    """``source`` with the instances of ``store`` whose score is at least ``threshold``.

    Args:
      source: the unlabelled images; each must be in the store.
      store: the pseudo-labels.
      categories: those of the labelled set; the store's must be the same, labels are positions in these.
      threshold: by default the store's own.

    Raises:
      DataError: other categories, images that the store lacks, or a threshold below the one it was written with.
    """

    def __init__(
        self, source: Source, store: PseudoLabels, categories: Sequence[Category], threshold: float | None = None
    ):
        require_same_categories(categories, store.categories, str(store.folder))
        if threshold is not None and threshold < store.threshold:
            raise DataError(
                f"{store.folder}: instances below {store.threshold} were not kept, a threshold of {threshold} "
                "cannot be met; raise it, or run the pseudo_label step again with it"
            )
        missing = [image_id for i in range(len(source)) if (image_id := source.record(i).image_id) not in store]
        if missing:
            raise DataError(
                f"{store.folder}: lacks the pseudo-labels of {len(missing)} of {len(source)} images "
                f"({name_some(missing)}); run the pseudo_label step on this source"
            )
        self.source, self.store = source, store
        self.threshold = store.threshold if threshold is None else threshold
        self._categories = tuple(categories)
        self._positions = {category.id: position for position, category in enumerate(self._categories)}

    @property
    def categories(self) -> tuple[Category, ...]:
        """The labelled set's categories."""
        return self._categories

    def __len__(self) -> int:
        return len(self.source)

    def record(self, index: int) -> ImageRecord:
        """The name and the file of image ``index``."""
        return self.source.record(index)

    def image(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        """Image ``index``, RGB."""
        return self.source.image(index)

    def instances(self, index: int) -> Instances:
        """The pseudo-labels of image ``index``, with their scores.

        Raises:
          DataError: they were made on an image of another size.
        """
        record = self.record(index)
        line = self.store.read(record.image_id)
        height, width = line["height"], line["width"]
        if (size := image_size(record.path)) != (height, width):
            raise DataError(
                f"{record.path}: is {size} pixels (height, width), but was {(height, width)} when {self.store.folder} "
                "was written; run the pseudo_label step again"
            )
        kept = [found for found in line["instances"] if found["score"] >= np.float32(self.threshold)]
        if not kept:
            return Instances.empty(height, width)
        return Instances(
            masks=np.stack([decode_mask(found["segmentation"]) for found in kept]),
            labels=np.asarray([self._positions[found["category_id"]] for found in kept], np.int32),
            ignore=np.zeros((height, width), bool),
            scores=np.asarray([found["score"] for found in kept], np.float32),
        )
