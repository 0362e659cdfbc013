"""COCO's instance annotations: the JSON is read here, its masks by ``pycocotools.mask``.

Format: https://cocodataset.org/#format-data (polygons in several parts, run lengths compressed or not, crowds).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from pycocotools import mask as coco_mask

from cast_jax.core.annotations import Category, Instances, decode_mask, encode_mask
from cast_jax.core.errors import DataError
from cast_jax.data.sources.base import ImageRecord, check_relative, image_size, name_some, orientation, read_image

MAX_OVERHANG = 2.0
"""Pixels that a polygon's vertex may lie outside its image (COCO's own do, by rounding); it is cut at the border."""

_KEPT = {"id", "image_id", "category_id", "segmentation", "iscrowd", "bbox", "file_name", "height", "width", "name"}
_KEPT |= {"score", "mask_quality"}  # of pseudo-labels
_ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_LOG = logging.getLogger(__name__)


class Coco:
    """The images of one COCO JSON, in its order.

    Category ids may be sparse: labels are positions in the categories sorted by id. An ``iscrowd`` annotation becomes
    ``ignore`` (less the pixels of instances). Annotations that cover no pixel are left out, and named.

    Args:
      annotations: the JSON file.
      images: the folder of images; by default the folder beside the JSON with its name (``val.json``: ``val/``).
      categories: what the JSON's categories must be, ids and names (those of the labelled set, for the val set).
      on_fault: "error" refuses annotations of an unknown image or category, with an id that is there already, or whose
        segmentation is none; "skip" leaves them out.

    Attributes:
      faults: what is wrong with each annotation that was left out.
      copies: the ids of annotations that repeat another's image, category and segmentation.
      boxes_outside: the ids of annotations whose ``bbox`` (which nothing here reads) leaves its image.

    Raises:
      DataError: a malformed JSON (names the key and the entry), faulty annotations (lists ten), other categories than
        asked for, or no folder.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str],
        images: str | os.PathLike[str] | None = None,
        categories: Sequence[Category] | None = None,
        on_fault: str = "error",
    ):
        self.annotations = Path(annotations)
        content = read_annotations(self.annotations)
        self._categories = _read_categories(content, self.annotations)
        if categories is not None:
            require_same_categories(tuple(categories), self._categories, str(self.annotations))
        self.root = Path(images) if images is not None else self.annotations.with_suffix("")
        if not self.root.is_dir():
            raise DataError(
                f"{self.root}: no such folder with the images of {self.annotations}; name it: --config.data."
                "labelled_images or --config.data.val_images of a run, --labelled-images or --val-images of "
                "check_data.py, --images of make_splits.py"
            )
        self._read_images(content["images"])
        self._read_annotations(content["annotations"], on_fault)

    def _read_images(self, entries: list[dict[str, Any]]) -> None:
        where = str(self.annotations)
        self._ids: list[int | str] = [
            _field(entry, "id", where, "images", i, (int, str)) for i, entry in enumerate(entries)
        ]
        if len(set(self._ids)) < len(self._ids):
            raise DataError(f"{where}: images[].id is not unique: {name_some(_repeated(self._ids))}")
        names = [_field(entry, "file_name", where, "images", i, str) for i, entry in enumerate(entries)]
        self._names = [check_relative(name, f"{where}: images[].file_name") for name in names]
        sizes = [
            [_field(entry, key, where, "images", i, int) for key in ("height", "width")]
            for i, entry in enumerate(entries)
        ]
        for i, size in enumerate(sizes):
            if not all(1 <= side < 2**31 for side in size):
                raise DataError(f"{where}: images[{i}] has height, width {size}; they must be its size in pixels")
        self._sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
        if not self._ids:
            raise DataError(f"{where}: images is empty")

    def _read_annotations(self, entries: list[dict[str, Any]], on_fault: str) -> None:
        positions = {category.id: position for position, category in enumerate(self._categories)}
        image_of = {image_id: index for index, image_id in enumerate(self._ids)}
        by_image: list[list[tuple[int | str, int, bool, Any]]] = [[] for _ in self._ids]
        seen: set[str] = set()
        contents: set[bytes] = set()
        faults, outside, copies = [], [], []
        for i, entry in enumerate(entries):
            name = entry.get("id", f"number {i}")
            try:
                index, label, shape = self._read_annotation(entry, name, i, image_of, positions)
                if repr(name) in seen:
                    raise DataError(f"{self.annotations}: annotations[{i}].id {name!r} is not unique")
            except DataError as fault:
                faults.append(str(fault))
                continue
            seen.add(repr(name))
            by_image[index].append((name, label, bool(entry.get("iscrowd", 0)), shape))
            content = _digest(index, label, shape)
            copies += [name] if content in contents else []
            contents.add(content)
            if _leaves(entry.get("bbox"), *map(int, self._sizes[index])):
                outside.append(name)
        self._by_image = [tuple(of_image) for of_image in by_image]
        self.faults, self.boxes_outside, self.copies = tuple(faults), tuple(outside), tuple(copies)
        if faults and on_fault != "skip":
            listed = "\n  ".join(faults[:10])
            raise DataError(
                f"{self.annotations}: {len(faults)} of {len(entries)} annotations are faulty:\n  {listed}\n"
                "mend them, or leave them out (in a run: --config.data.on_unreadable=skip)"
            )
        if faults:
            _LOG.warning("%d faulty annotations are left out: %s", len(faults), name_some(faults, 3))

    def _read_annotation(
        self, entry: dict[str, Any], name: Any, number: int, image_of: dict[int | str, int], positions: dict[int, int]
    ) -> tuple[int, int, list[np.ndarray] | dict[str, Any]]:
        """(image index, label, segmentation) of an annotation, or a :class:`DataError` that says what is wrong."""
        where = str(self.annotations)
        image_id = _field(entry, "image_id", where, "annotations", number, (int, str))
        category_id = _field(entry, "category_id", where, "annotations", number, int)
        if image_id not in image_of:
            hint = _other_type(image_id, image_of)
            raise DataError(f"{where}: annotation {name} has image_id {image_id!r}, which is not in images{hint}")
        if category_id not in positions:
            raise DataError(f"{where}: annotation {name} has category_id {category_id}, which is not in categories")
        if (crowd := entry.get("iscrowd", 0)) not in (0, 1):
            raise DataError(f"{where}: annotation {name} has iscrowd {crowd!r}; it must be 0 or 1")
        index = image_of[image_id]
        try:
            shape = _checked(entry.get("segmentation"), *map(int, self._sizes[index]))
        except ValueError as error:
            raise DataError(f"{where}: annotation {name} of image {image_id}: segmentation {error}") from None
        return index, positions[category_id], shape

    @property
    def categories(self) -> tuple[Category, ...]:
        """The JSON's categories, sorted by id."""
        return self._categories

    def __len__(self) -> int:
        return len(self._ids)

    def record(self, index: int) -> ImageRecord:
        """The JSON's id and file name of image ``index``."""
        return ImageRecord(self._ids[index], self.root / self._names[index], self._names[index])

    def image(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        """Image ``index``, RGB."""
        return read_image(self.record(index).path)

    def instances(self, index: int) -> Instances:
        """The instances of image ``index``; none is valid.

        Raises:
          DataError: the image file's size is not the JSON's.
        """
        height, width = self._size(index)
        labels, masks, without_pixels, ignore = [], [], [], np.zeros((height, width), bool)
        for name, label, is_crowd, shape in self._by_image[index]:
            mask = _rasterise(shape, height, width)
            if not mask.any():
                without_pixels.append(name)
            elif is_crowd:
                ignore |= mask
            else:
                labels.append(label)
                masks.append(mask)
        stacked = np.stack(masks) if masks else np.zeros((0, height, width), bool)
        return Instances(
            masks=stacked,
            labels=np.asarray(labels, np.int32),
            ignore=ignore & ~stacked.any(axis=0),
            scores=np.ones(len(labels), np.float32),
            without_pixels=tuple(without_pixels),
        )

    def _size(self, index: int) -> tuple[int, int]:
        """The JSON's (height, width) of image ``index``, which must be its file's."""
        record, (height, width) = self.record(index), map(int, self._sizes[index])
        if (size := image_size(record.path)) == (height, width):
            return size
        hint = ""
        if size == (width, height) and (turned := orientation(record.path)) in _ON_ITS_SIDE:
            hint = (
                f"; the file has the EXIF orientation {turned}, which is not applied: turn its pixels (exiftran -ai "
                "FILE for a JPEG, or Pillow's ImageOps.exif_transpose), or annotate them as stored"
            )
        raise DataError(
            f"{record.path}: is {size} pixels (height, width), but {self.annotations} says {(height, width)} "
            f"for image {record.image_id}{hint}"
        )


def cover_no_pixel(names: Sequence[str]) -> str:
    """A warning of annotations that cover no pixel."""
    return (
        f"{len(names)} annotations cover no pixel and are left out (polygons are in pixels, not in shares of the "
        f"image's sides): {name_some(names, 3)}"
    )


def require_same_categories(expected: Sequence[Category], found: Sequence[Category], where: str) -> None:
    """Raises :class:`DataError`, listing every difference by id and name, unless the categories are the same set."""
    wanted = {category.id: category.name for category in expected}
    given = {category.id: category.name for category in found}
    differences = [f"{i} {wanted[i]!r} is missing" for i in sorted(wanted.keys() - given.keys())]
    differences += [f"{i} {given[i]!r} is not in the labelled set" for i in sorted(given.keys() - wanted.keys())]
    both = sorted(wanted.keys() & given.keys())
    differences += [f"{i} is {given[i]!r}, not {wanted[i]!r}" for i in both if given[i] != wanted[i]]
    if differences:
        raise DataError(
            f"{where}: categories differ from the labelled set's: {name_some(differences, 20)}; make the two files' "
            '"categories" the same (a category may be listed without annotations)'
        )


def read_annotations(path: Path) -> dict[str, Any]:
    """A COCO JSON's lists, with the keys of their entries that anything here reads; polygons as arrays.

    Raises:
      DataError: it is missing, not JSON, or lacks a list.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file, object_hook=_compact)
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not valid JSON ({error})") from error
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{path}: needs a list of objects under the key {key!r} (COCO instance annotations)")
    return content


def _compact(entry: dict[str, Any]) -> dict[str, Any]:
    """Keeps what is used while the JSON is parsed: a vertex then costs 16 bytes instead of 64."""
    if isinstance(parts := entry.get("segmentation"), list):
        with contextlib.suppress(TypeError, ValueError):  # _checked refuses it, with its place
            entry["segmentation"] = [np.asarray(part, np.float64) for part in parts]
    elif "counts" in entry or "images" in entry:
        return entry
    return {key: value for key, value in entry.items() if key in _KEPT}


def _read_categories(content: dict[str, Any], path: Path) -> tuple[Category, ...]:
    categories = [
        Category(
            _field(entry, "id", str(path), "categories", i, int), _field(entry, "name", str(path), "categories", i, str)
        )
        for i, entry in enumerate(content["categories"])
    ]
    if not categories:
        raise DataError(f"{path}: categories is empty")
    for key in ("id", "name"):
        if repeated := _repeated([getattr(category, key) for category in categories]):
            raise DataError(f"{path}: categories[].{key} is not unique: {name_some(repeated)}")
    return tuple(sorted(categories, key=lambda category: category.id))


def _field(entry: dict[str, Any], key: str, path: str, group: str, number: int, kind: type | tuple[type, ...]) -> Any:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, kind):
        problem = "is missing" if key not in entry else f"is {value!r}"
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{path}: {group}[{number}].{key} {problem}; it must be {kinds} (entry id {entry.get('id')!r})")
    return value


def _other_type(image_id: int | str, known: Container[int | str]) -> str:
    """A hint where an unknown id is known as a string instead of a number, or as a number instead of a string."""
    if isinstance(image_id, int) and str(image_id) in known:
        return f" as a number, but as the string {str(image_id)!r}: write ids as numbers in both, or as strings in both"
    if isinstance(image_id, str) and image_id.isdecimal() and len(image_id) < 20 and int(image_id) in known:
        return f" as a string, but as the number {int(image_id)}: write ids as numbers in both, or as strings in both"
    return ""


def _repeated(values: Sequence[Any]) -> list[Any]:
    seen: set[Any] = set()
    return [value for value in values if value in seen or seen.add(value)]  # type: ignore[func-returns-value]


def _checked(segmentation: Any, height: int, width: int) -> list[np.ndarray] | dict[str, Any]:
    """A segmentation as it is kept: polygon parts, or a compressed run-length code. Raises ValueError otherwise."""
    if isinstance(segmentation, dict):
        counts, size = segmentation.get("counts"), segmentation.get("size")
        if not isinstance(counts, str | list) or size != [height, width]:
            raise ValueError(f"needs counts and the size of its image, {[height, width]}; its size is {size}")
        runs = _run_lengths(counts) if isinstance(counts, str) else counts
        if not all(type(run) is int and run >= 0 for run in runs) or sum(runs) != height * width:
            raise ValueError(f"has counts that are not run lengths with the sum {height * width}")
        if isinstance(counts, str):
            return {"size": size, "counts": counts}
        return coco_mask.frPyObjects({"size": size, "counts": counts}, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("is missing or empty; give polygons or a run-length code")
    for part in segmentation:
        if not isinstance(part, np.ndarray) or part.ndim != 1 or len(part) < 6 or len(part) % 2:
            raise ValueError("has a polygon that is not a flat list x, y, x, y, ... of three points or more")
        points = part.reshape(-1, 2)
        if not np.all((points >= -MAX_OVERHANG) & (points <= np.array([width, height]) + MAX_OVERHANG)):
            raise ValueError(f"has vertices more than {MAX_OVERHANG:g} pixels outside its image of {height} x {width}")
    return segmentation


def _digest(index: int, label: int, shape: list[np.ndarray] | dict[str, Any]) -> bytes:
    """Of what one annotation says; copies have the same."""
    content = hashlib.blake2b(f"{index} {label} ".encode(), digest_size=16)
    for part in shape if isinstance(shape, list) else [shape["counts"]]:
        content.update(part if isinstance(part, bytes) else str(part).encode() if isinstance(part, str) else part.data)
    return content.digest()


def _leaves(box: Any, height: int, width: int) -> bool:
    """Whether a ``bbox`` (x, y, width, height) leaves its image by more than rounding; what is none does not."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
        return False
    x, y, wide, high = box
    return min(x, y) < -MAX_OVERHANG or x + wide > width + MAX_OVERHANG or y + high > height + MAX_OVERHANG


def _run_lengths(counts: str) -> list[int]:
    """Expands COCO's compressed counts: 5 bits a character, signed differences to the run before the last (maskApi.c).

    pycocotools decodes a code that is cut short without complaint. What is no such code becomes a run of -1.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64:
            return [-1]
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return [-1] if shift else runs


def encode_segmentation(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """A segmentation of :func:`read_annotations` as a compressed run-length code, ready for JSON.

    Raises:
      ValueError: it is none, or does not fit the image.
    """
    return encode_mask(_rasterise(_checked(segmentation, height, width), height, width))


def _rasterise(shape: list[np.ndarray] | dict[str, Any], height: int, width: int) -> Bool[np.ndarray, "height width"]:
    if isinstance(shape, dict):
        return decode_mask(shape)
    parts = coco_mask.frPyObjects([part.tolist() for part in shape], height, width)
    return coco_mask.decode(coco_mask.merge(parts)).astype(bool)
