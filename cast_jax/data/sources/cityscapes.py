"""Cityscapes in its official layout, and anything written in it (the generated street scenes).

``leftImg8bit/<split>/<city>/<city>_<seq>_<frame>_leftImg8bit.png`` with
``gtFine/<split>/<city>/<city>_<seq>_<frame>_gtFine_instanceIds.png``: 16 bits, a pixel of 1000 or more is
class * 1000 + k, a smaller one is a class id. See github.com/mcordts/cityscapesScripts, helpers/labels.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from cast_jax.core.annotations import Category, Instances
from cast_jax.core.errors import DataError
from cast_jax.data.sources.base import (
    ImageRecord,
    image_size,
    name_some,
    read_image,
    read_label_map,
)
from cast_jax.data.splits import choose_images

CATEGORIES = (
    Category(24, "person"),
    Category(25, "rider"),
    Category(26, "car"),
    Category(27, "truck"),
    Category(28, "bus"),
    Category(31, "train"),
    Category(32, "motorcycle"),
    Category(33, "bicycle"),
)
"""The evaluated classes, with their official ids."""

_POSITIONS = {category.id: position for position, category in enumerate(CATEGORIES)}
_UNSCORED = (29, 30)  # caravan and trailer: they have instances, but the benchmark does not score them
_IMAGE_SUFFIX = "_leftImg8bit.png"
_LABEL_SUFFIX = "_gtFine_instanceIds.png"
_ANNOTATIONS = ("instanceIds.png", "labelIds.png", "labelTrainIds.png", "polygons.json", "color.png")
SUFFIXES = (_IMAGE_SUFFIX, *(f"_gtFine_{name}" for name in _ANNOTATIONS))
"""What file names have after an image's id, also in lists of annotations, or of images with theirs."""


class Cityscapes:
    """One split of a Cityscapes folder.

    Args:
      root: the folder that holds ``leftImg8bit`` and ``gtFine``.
      split: its sub-folder: "train", "val", "train_extra", ...
      images: which images, in this order: ids ``<city>_<seq>_<frame>``, or a text file with one a line. The
        literature's split files (``<city>_<seq>_<frame>_gtFine_instanceIds.png`` a line) are understood. All, sorted,
        when ``None``.
      labelled: ``False`` for the unlabelled pool: no annotation is looked for, and ``categories`` is empty.

    Raises:
      DataError: the folder has no images, a listed image is missing or listed twice, or an annotation is missing.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        images: str | os.PathLike[str] | Sequence[str] | None = None,
        labelled: bool = True,
    ):
        self.root = Path(root)
        self.split = split
        self.labelled = labelled
        stems = _stems(self.root / "leftImg8bit" / split, _IMAGE_SUFFIX)
        if not stems:
            raise DataError(
                f"{self.root / 'leftImg8bit' / split}: no images named <city>/*{_IMAGE_SUFFIX}; "
                "unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip side by side, or mend root and split"
            )
        self._stems = stems if images is None else choose_images(images, set(stems), SUFFIXES)
        if labelled:
            known = set(_stems(self.root / "gtFine" / split, _LABEL_SUFFIX))
            missing = [stem for stem in self._stems if stem not in known]
            if missing:
                raise DataError(
                    f"{self.root / 'gtFine' / split}: no *{_LABEL_SUFFIX} for {len(missing)} images: "
                    f"{name_some(missing)}; unpack gtFine_trainvaltest.zip, or use labelled=False"
                )

    @property
    def categories(self) -> tuple[Category, ...]:
        """The eight evaluated classes; ``()`` when unlabelled."""
        return CATEGORIES if self.labelled else ()

    def __len__(self) -> int:
        return len(self._stems)

    def record(self, index: int) -> ImageRecord:
        """The stem ``<city>_<seq>_<frame>`` and the file of image ``index``."""
        stem = self._stems[index]
        file_name = f"leftImg8bit/{self.split}/{_city(stem)}/{stem}{_IMAGE_SUFFIX}"
        label_file = f"gtFine/{self.split}/{_city(stem)}/{stem}{_LABEL_SUFFIX}"
        return ImageRecord(stem, self.root / file_name, file_name, self.root / label_file if self.labelled else None)

    def image(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        """Image ``index``, RGB."""
        return read_image(self.record(index).path)

    def instances(self, index: int) -> Instances:
        """The scored instances of image ``index``; groups, caravans and trailers become ``ignore``.

        Raises:
          DataError: unlabelled, an unreadable annotation, another size than the image's, a class without instances.
        """
        record = self.record(index)
        if (path := record.annotation) is None:
            raise DataError(f"{record.path}: this Cityscapes source is unlabelled; open it with labelled=True")
        ids = _read_ids(path)
        if ids.shape != (size := image_size(record.path)):
            raise DataError(f"{path}: the annotation is {ids.shape} pixels (height, width), its image {size}")
        return instances_from_ids(ids, str(path))


def instances_from_ids(ids: np.ndarray, where: str) -> Instances:
    """Splits a map of instance ids, uint16 ``[height, width]``, into the scored instances and the ignored pixels.

    Raises:
      DataError: an id of 1000 or more whose class is not one of Cityscapes' ten with instances; names ``where``.
    """
    present = (np.flatnonzero(np.bincount(ids.reshape(-1), minlength=1000)[1000:]) + 1000).tolist()
    scored = [value for value in present if value // 1000 in _POSITIONS]
    unknown = [value for value in present if value // 1000 not in (*_POSITIONS, *_UNSCORED)]
    if unknown:
        raise DataError(f"{where}: instance ids {name_some(unknown)} are of no class with instances (24 to 33)")
    return Instances(
        masks=ids == np.asarray(scored, ids.dtype)[:, None, None],
        labels=np.asarray([_POSITIONS[value // 1000] for value in scored], np.int32),
        # A bare id of a class with instances marks a group that nobody could separate.
        ignore=np.isin(ids // 1000, _UNSCORED) | ((ids >= CATEGORIES[0].id) & (ids <= CATEGORIES[-1].id)),
        scores=np.ones(len(scored), np.float32),
    )


def _read_ids(path: Path) -> np.ndarray:
    mode, ids = read_label_map(path)
    if not mode.startswith("I"):
        raise DataError(
            f"{path}: instance ids are 16-bit grey, this image is {mode!r}; is it a labelIds or color image?"
        )
    return ids.astype(np.uint16)


def _stems(folder: Path, suffix: str) -> list[str]:
    return sorted(path.name.removesuffix(suffix) for path in folder.glob(f"*/*{suffix}"))


def _city(stem: str) -> str:
    return stem.rsplit("_", 2)[0]
