"""The store of pseudo-labels: a folder of JSON-lines shards, each written whole, and a manifest saying whose they are.

One line is one image::

    {"image_id": ..., "file_name": ..., "height": ..., "width": ...,
     "instances": [{"category_id": ..., "segmentation": RLE, "score": ..., "mask_quality": ...}, ...]}

``category_id`` is the dataset's own id. A run that was stopped continues at the first shard that is missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cast_jax.core.annotations import Category, Detections, suppress_duplicates
from cast_jax.core.errors import DataError
from cast_jax.core.files import atomic_write, read_json, write_json
from cast_jax.data.sources.base import Source, image_size, name_some

MANIFEST = "manifest.json"
STATISTICS = "stats.json"
logger = logging.getLogger(__name__)
_HINT = "delete it and run the pseudo_label step again"


def confident(found: Detections, threshold: float, max_iou: float) -> Detections:
    """The detections that become pseudo-labels, best first as they come; never the same mask of a class twice.

    Args:
      threshold: least score.
      max_iou: of two that overlap by more, the one with the lower score is dropped (1: only if repeated).
    """
    kept = np.flatnonzero(np.asarray(found.scores) >= np.float32(threshold))
    kept = kept[suppress_duplicates([found.rles[i] for i in kept], max_iou)]
    first = {(int(found.labels[i]), found.rles[i]["counts"]): i for i in reversed(kept)}
    kept = np.sort(np.fromiter(first.values(), np.int64, len(first)))
    return Detections(found.labels[kept], found.scores[kept], found.mask_quality[kept], [found.rles[i] for i in kept])


class Shard(NamedTuple):
    """A shard still to be written: its number, and the indices of its images in the source."""

    number: int
    indices: range


class PseudoLabelWriter:
    """Writes the pseudo-labels that one model gives a source, shard by shard.

    Args:
      folder: receives the shards; made if need be.
      source: the unlabelled images.
      categories: what the positions in :class:`Detections` mean.
      model_hash: names the weights that make the labels.
      threshold: instances with a lower score are dropped.
      max_iou: of two instances that overlap by more, the one with the lower score is dropped (1: only if repeated).
      shard_size: images a shard.
      pixels: names what the images show, whatever their files are called.

    Raises:
      DataError: the folder holds the labels of another model, threshold, pool or category list; says the difference.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        source: Source,
        categories: Sequence[Category],
        model_hash: str,
        threshold: float,
        max_iou: float = 1.0,
        shard_size: int = 256,
        pixels: str = "",
    ):
        if not len(source) or shard_size < 1 or not 0 <= threshold <= 1:
            raise DataError(
                f"{folder}: {len(source)} images, shard_size {shard_size}, threshold {threshold} make no store"
            )
        self.folder, self.source, self.categories = Path(folder), source, tuple(categories)
        names = [source.record(index).file_name for index in range(len(source))]
        manifest: dict[str, Any] = {
            "model_hash": model_hash,
            "threshold": float(threshold),
            "max_iou": float(max_iou),
            "shard_size": int(shard_size),
            "images": len(source),
            "images_hash": hashlib.sha256("\n".join(names).encode("utf-8", "surrogatepass")).hexdigest()[:16],
            "pixels_hash": pixels,
            "categories": [dataclasses.asdict(category) for category in self.categories],
        }
        path = self.folder / MANIFEST
        if path.exists():
            known = {"pixels_hash": pixels, **read_json(path)}  # which earlier stores lack
            different = [
                f"{key} {known.get(key)!r}, not {value!r}" for key, value in manifest.items() if known.get(key) != value
            ]
            if len(different) == 1 and known["pixels_hash"] != pixels:
                said = f"{self.folder}: the images show something else than when they were labelled"
                if not (self.folder / STATISTICS).exists():
                    raise DataError(f"{said}; delete the folder to label them all")
                logger.warning("%s; delete the folder to label them anew", said)
            elif different:
                raise DataError(f"{path}: has {'; '.join(different)}; delete the folder, or write to another one")
        else:
            write_json(path, manifest)
        self.manifest = manifest

    def pending_shards(self) -> list[Shard]:
        """The shards that no run has finished."""
        return [shard for shard in shards(self.manifest) if not (self.folder / shard_name(shard.number)).exists()]

    def shard(self, number: int) -> Shard:
        """The shard of this number."""
        return shards(self.manifest)[number]

    def write_shard(self, number: int, detections: Sequence[Detections]) -> None:
        """Writes shard ``number`` from the detections of its images, in their order.

        Raises:
          ValueError: there are not as many detections as images, or a mask's size is not its image's.
        """
        indices = self.shard(number).indices
        if len(detections) != len(indices):
            raise ValueError(f"shard {number} has {len(indices)} images, not {len(detections)}")
        lines = [json.dumps(self._line(index, found)) for index, found in zip(indices, detections, strict=True)]
        (self.folder / STATISTICS).unlink(missing_ok=True)  # of other shards
        atomic_write(self.folder / shard_name(number), "\n".join(lines) + "\n")

    def _line(self, index: int, found: Detections) -> dict[str, Any]:
        record = self.source.record(index)
        height, width = image_size(record.path)
        if wrong := [rle["size"] for rle in found.rles if list(rle["size"]) != [height, width]]:
            raise ValueError(f"{record.path}: masks of size {wrong[0]} do not fit an image of {[height, width]}")
        found = confident(found, self.manifest["threshold"], self.manifest["max_iou"])
        instances = [
            {
                "category_id": self.categories[label].id,
                "segmentation": rle,
                "score": float(score),
                "mask_quality": float(quality),
            }
            for label, rle, score, quality in zip(
                found.labels, found.rles, found.scores, found.mask_quality, strict=True
            )
        ]
        where = {"image_id": record.image_id, "file_name": record.file_name, "height": height, "width": width}
        return where | {"instances": instances}

    def finish(self) -> dict[str, Any]:
        """Checks the finished store and returns its statistics (``stats.json``), which it writes if need be."""
        if (path := self.folder / STATISTICS).exists():  # no shard was written since
            PseudoLabels.open(self.folder)
            return read_json(path)
        return write_statistics(self.folder)


def write_statistics(folder: Path) -> dict[str, Any]:
    """Checks a finished store and writes and returns its statistics (``stats.json``)."""
    store = _index(folder)
    per_class: Counter[int] = Counter()
    scores: list[float] = []
    empty = 0
    for line in store.lines():
        per_class.update(instance["category_id"] for instance in line["instances"])
        scores.extend(instance["score"] for instance in line["instances"])
        empty += not line["instances"]
    counts, edges = np.histogram(scores, bins=20, range=(0.0, 1.0))
    statistics = {
        "content_hash": store.content_hash,
        "images": len(store),
        "empty_images": empty,
        "instances": len(scores),
        "threshold": store.threshold,
        "instances_per_class": {category.name: per_class[category.id] for category in store.categories},
        "score_histogram": {"edges": np.round(edges, 2).tolist(), "counts": counts.tolist()},
    }
    write_json(folder / STATISTICS, statistics)
    return statistics


@dataclasses.dataclass(frozen=True)
class PseudoLabels:
    """A finished store, read one image at a time: only the places of the lines are held in memory.

    Attributes:
      folder: where the shards are.
      categories, threshold, model_hash: as they were written.
      content_hash: of all shards.
      reviewed: the hash of the JSON in which people corrected them (:mod:`cast_jax.data.review`), or empty.
      places: image id to (shard number, byte offset of its line).
    """

    folder: Path
    categories: tuple[Category, ...]
    threshold: float
    model_hash: str
    content_hash: str
    reviewed: str
    places: dict[int | str, tuple[int, int]]

    @staticmethod
    def open(folder: str | os.PathLike[str]) -> PseudoLabels:
        """Indexes and checks a store.

        Raises:
          DataError: there is none, a shard is missing, cut short, damaged or another than when the store was finished,
            or an image appears twice.
        """
        store = _index(Path(folder))
        finished = read_json(path, _HINT) if (path := store.folder / STATISTICS).exists() else {}
        if finished.get("content_hash", store.content_hash) != store.content_hash:  # which earlier stores lack
            raise DataError(f"{folder}: its shards are damaged, or others than {STATISTICS} was written for; {_HINT}")
        return store

    def identity(self) -> dict[str, str]:
        """What says which labels these are."""
        return {key: getattr(self, key) for key in ("model_hash", "content_hash", "reviewed")}

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.places

    def read(self, image_id: int | str) -> dict[str, Any]:
        """The line of one image. Raises :class:`DataError` if it has none."""
        if image_id not in self.places:
            raise DataError(
                f"{self.folder}: has no pseudo-labels for image {image_id!r}; run the pseudo_label step again"
            )
        number, offset = self.places[image_id]
        with open(self.folder / shard_name(number), "rb") as file:
            file.seek(offset)
            line = file.readline()
        try:
            found = json.loads(line)
        except ValueError:
            found = {}
        if found.get("image_id") != image_id:
            raise DataError(f"{file.name}: was replaced while it was read; run the same command again")
        return found

    def lines(self) -> Iterator[dict[str, Any]]:
        """All lines, in the order of the source, one at a time."""
        for number in range(max(number for number, _ in self.places.values()) + 1):
            for _, line in _read_lines(self.folder / shard_name(number)):
                yield line


def _index(folder: Path) -> PseudoLabels:
    """A store whose lines are all there and whole."""
    if not (folder / MANIFEST).exists():
        raise DataError(f"{folder}: holds no pseudo-labels ({MANIFEST} is missing); run the pseudo_label step first")
    manifest = read_json(folder / MANIFEST)
    wanted = shards(manifest)
    missing = [name for shard in wanted if not (folder / (name := shard_name(shard.number))).exists()]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {len(wanted)} shards are missing ({name_some(missing, 5)}); "
            "run the pseudo_label step again, it writes only these"
        )
    categories = tuple(Category(**category) for category in manifest["categories"])
    known = {category.id for category in categories}
    places: dict[int | str, tuple[int, int]] = {}
    digest = hashlib.sha256()
    for shard in wanted:
        path, lines = folder / shard_name(shard.number), 0
        digest.update(path.read_bytes())
        for offset, line in _read_lines(path):
            image_id, lines = line["image_id"], lines + 1
            if image_id in places:
                raise DataError(f"{path}: image {image_id!r} is labelled twice in this store; {_HINT}")
            if alien := {instance["category_id"] for instance in line["instances"]} - known:
                raise DataError(f"{path}: image {image_id!r} has unknown category ids {sorted(alien)}; {_HINT}")
            places[image_id] = (shard.number, offset)
        if lines != len(shard.indices):
            raise DataError(f"{path}: has {lines} images, not {len(shard.indices)}; {_HINT}")
    return PseudoLabels(
        folder,
        categories,
        manifest["threshold"],
        manifest["model_hash"],
        digest.hexdigest()[:16],
        manifest.get("reviewed", ""),
        places,
    )


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:05d}.jsonl"


def shards(manifest: dict[str, Any]) -> list[Shard]:
    """All shards of a store."""
    images, size = manifest["images"], manifest["shard_size"]
    starts = range(0, images, size)
    return [Shard(number, range(start, min(start + size, images))) for number, start in enumerate(starts)]


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The byte offset and the content of every line."""
    offset = 0
    with open(path, "rb") as file:
        for number, data in enumerate(file, 1):
            try:
                line = json.loads(data)
                line["image_id"], line["instances"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}, line {number}: is not a pseudo-label ({error!r}); {_HINT}") from error
            yield offset, line
            offset += len(data)
