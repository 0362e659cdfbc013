"""Some images of a source, in a chosen order, with or without their labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from cast_jax.core.annotations import Category, Instances
from cast_jax.core.errors import DataError
from cast_jax.data.sources.base import ImageRecord, Source


class Subset:
    """The images ``indices`` of ``source``, in that order, as a source of their own.

    Raises:
      DataError: an index that the source does not have.
    """

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        self.source = source
        self.indices = np.asarray(indices, np.int64).reshape(-1)
        outside = self.indices[(self.indices < 0) | (self.indices >= len(source))]
        if len(outside):
            raise DataError(f"indices {outside[:10].tolist()} are outside the source, which has {len(source)} images")

    @property
    def categories(self) -> tuple[Category, ...]:
        """The source's categories."""
        return self.source.categories

    def __len__(self) -> int:
        return len(self.indices)

    def record(self, index: int) -> ImageRecord:
        """The name and the file of the ``index``-th chosen image."""
        return self.source.record(int(self.indices[index]))

    def image(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        """The ``index``-th chosen image, RGB."""
        return self.source.image(int(self.indices[index]))

    def instances(self, index: int) -> Instances:
        """The instances of the ``index``-th chosen image."""
        return self.source.instances(int(self.indices[index]))


class Unlabelled(Subset):
    """The images ``indices`` of a labelled ``source`` without their labels."""

    @property
    def categories(self) -> tuple[Category, ...]:
        """None: the images are unlabelled."""
        return ()

    def instances(self, index: int) -> Instances:
        """Raises :class:`DataError`: the labels are out of reach."""
        raise DataError(f"{self.record(index).path}: is in the unlabelled pool")
