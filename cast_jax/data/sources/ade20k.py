"""ADE20K's 100 instance classes, in either form in which they are published.

The instance challenge's: ``images/<split>/<stem>.jpg`` with ``annotations_instance/<split>/<stem>.png``, whose red is
the class (1 to 100) and green the instance (0: none). And ADE20K 2021's: ``images/ADE/<split>/…/<stem>.jpg`` with
``<stem>_seg.png`` beside it, whose class in the full set is red // 10 * 256 + green and whose instance is blue.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int, UInt8

from cast_jax.core.annotations import Category, Instances
from cast_jax.core.errors import DataError
from cast_jax.data.sources.ade20k_classes import ROWS
from cast_jax.data.sources.base import (
    ImageRecord,
    image_size,
    name_some,
    read_image,
    read_label_map,
)
from cast_jax.data.splits import choose_images

CATEGORIES = {
    "instance100": tuple(Category(instance, name) for instance, _, _, name in ROWS),
    "sceneparse150": tuple(Category(scene - 1, name) for _, scene, _, name in ROWS),
}
"""The classes under both conventions of ids: 1 to 100, or SceneParse150's less one (7 to 149, as in Mask2Former)."""

CategoryIds = Literal["instance100", "sceneparse150"]

# From a class of the full set to 1 + the position in CATEGORIES; 0 for what has no instances.
_FULL_TO_LABEL = np.zeros(26 * 256, np.uint8)
for _row in ROWS:
    _FULL_TO_LABEL[list(_row[2])] = _row[0]


class Ade20k:
    """One split of an ADE20K folder; an image's id is its stem, ``ADE_train_00000001``.

    Args:
      root: the unpacked folder: ``ADEChallengeData2016`` with ``annotations_instance`` in it, or ``ADE20K_2021_17_01``.
      split: "training" or "validation".
      images: which images, in this order: stems or a text file with one a line; all, sorted, when ``None``.
      labelled: ``False`` for the unlabelled pool: no annotation is looked for, and ``categories`` is empty.
      category_ids: which ids the categories carry; see :data:`CATEGORIES`.

    Raises:
      DataError: neither form is there, a listed image is missing or listed twice, or an annotation is missing.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        images: str | os.PathLike[str] | Sequence[str] | None = None,
        labelled: bool = True,
        category_ids: CategoryIds = "instance100",
    ):
        if category_ids not in CATEGORIES:
            raise DataError(f"category_ids {category_ids!r} is unknown; known: {', '.join(CATEGORIES)}")
        self.root, self.split, self.labelled = Path(root), split, labelled
        self._known_categories = CATEGORIES[category_ids]
        full, challenge = self.root / "images" / "ADE" / split, self.root / "images" / split
        self._full = full.is_dir()
        pattern = full.rglob("*.jpg") if self._full else challenge.glob("*.jpg")
        paths = {path.stem: path for path in pattern if path.is_file()}
        if not paths:
            raise DataError(
                f"{self.root}: no images in images/{split}/*.jpg nor in images/ADE/{split}/; give root as unpacked: "
                "ADEChallengeData2016 with annotations_instance in it, or ADE20K_2021_17_01"
            )
        stems = sorted(paths) if images is None else choose_images(images, set(paths), (".png", ".jpg", "_seg"))
        self._paths = [paths[stem] for stem in stems]
        if labelled and (missing := [path.stem for path in self._paths if not self._label_path(path).is_file()]):
            example = self._label_path(self._paths[0]).relative_to(self.root)
            raise DataError(
                f"{self.root}: no annotations ({example.parent}/*{'_seg' * self._full}.png) for {len(missing)} images: "
                f"{name_some(missing)}; unpack the instance annotations, or use labelled=False"
            )

    @property
    def categories(self) -> tuple[Category, ...]:
        """The 100 classes; ``()`` when unlabelled."""
        return self._known_categories if self.labelled else ()

    def __len__(self) -> int:
        return len(self._paths)

    def record(self, index: int) -> ImageRecord:
        """The stem and the file of image ``index``."""
        path = self._paths[index]
        label_path = self._label_path(path) if self.labelled else None
        return ImageRecord(path.stem, path, path.relative_to(self.root).as_posix(), label_path)

    def image(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        """Image ``index``, RGB."""
        return read_image(self._paths[index])

    def _label_path(self, path: Path) -> Path:
        if self._full:
            return path.with_name(f"{path.stem}_seg.png")
        return self.root / "annotations_instance" / self.split / f"{path.stem}.png"

    def instances(self, index: int) -> Instances:
        """The instances of image ``index``; pixels of a class that belong to no instance become ``ignore`` (chosen).

        Raises:
          DataError: unlabelled, an unreadable annotation, another size than the image's, an unknown class.
        """
        labels, ids = self._maps(index)
        height, width = labels.shape
        codes = labels.astype(np.uint16) * 256 + ids
        present = np.flatnonzero(np.bincount(codes.reshape(-1), minlength=1))
        present = present[(present >= 256) & (present % 256 > 0)]
        masks = codes == present.astype(np.uint16)[:, None, None]
        return Instances(
            masks=masks.reshape(-1, height, width),
            labels=(present // 256 - 1).astype(np.int32),
            ignore=(labels > 0) & (ids == 0),
            scores=np.ones(len(present), np.float32),
        )

    def classes(self, index: int) -> list[int]:
        """The labels that image ``index`` has instances of, sorted; quicker than its masks. Raises as those do."""
        labels, ids = self._maps(index)
        return (np.flatnonzero(np.bincount(labels[ids > 0], minlength=1)[1:])).tolist()

    def _maps(self, index: int) -> tuple[Int[np.ndarray, "height width"], Int[np.ndarray, "height width"]]:
        """Each pixel's class as 1 + label (0: none of the 100), and the number of its instance (0: none)."""
        image_path = self._paths[index]
        path = self._label_path(image_path)
        if not self.labelled:
            raise DataError(f"{image_path}: this ADE20K source is unlabelled; open it with labelled=True")
        mode, pixels = read_label_map(path)
        if mode != "RGB":
            raise DataError(f"{path}: holds {mode!r} pixels, not class and instance in RGB; is it semantic?")
        if pixels.shape[:2] != (size := image_size(image_path)):
            raise DataError(f"{path}: the annotation is {pixels.shape[:2]} pixels (height, width), its image {size}")
        red, green, blue = np.moveaxis(pixels, -1, 0)
        if self._full:
            return _FULL_TO_LABEL[red.astype(np.uint16) // 10 * 256 + green], blue
        if red.max() > len(ROWS):
            raise DataError(f"{path}: class {red.max()} is unknown; the instance challenge has 1 to {len(ROWS)}")
        return red, green
