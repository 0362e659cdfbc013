"""Pseudo-labels for people to correct: out as one COCO JSON that annotation tools open, and back into the store."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from cast_jax.core.annotations import Category, decode_mask
from cast_jax.core.errors import DataError
from cast_jax.core.files import LOCK, atomic_write, only_writer, read_json, write_json
from cast_jax.data.pseudo_labels import MANIFEST, PseudoLabels, shard_name, shards, write_statistics
from cast_jax.data.sources.base import name_some
from cast_jax.data.sources.coco import Coco, encode_segmentation, read_annotations

logger = logging.getLogger(__name__)
_POLYGON_IOU = 0.9  # a polygon that shows less of its mask is no help to anybody
_FINER = 4  # parts of a pixel's side


def export_labels(folder: str | os.PathLike[str], polygons: bool = False) -> dict[str, Any]:
    """A store as a COCO JSON: its ``file_name`` s, categories and ids; ``score`` and ``mask_quality`` an annotation.

    Args:
      folder: a finished store.
      polygons: outlines instead of run lengths, for tools that cannot edit those, where an outline keeps an IoU of 0.9
        with its mask (not for masks with holes or a pixel wide).
    """
    store = PseudoLabels.open(folder)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, line in enumerate(tqdm(store.lines(), "exporting", len(store), unit="image", disable=None), 1):
        images.append({"id": number, **{key: line[key] for key in ("file_name", "height", "width")}})
        for instance in line["instances"]:
            rle = instance["segmentation"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "iscrowd": 0,
                    "area": int(coco_mask.area(rle)),
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    **instance,
                    "segmentation": (_outlines(rle) if polygons else None) or rle,
                }
            )
    categories = [{"id": category.id, "name": category.name} for category in store.categories]
    info = {"description": f"instances found by model {store.model_hash}, content {store.content_hash}"}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def import_labels(folder: str | os.PathLike[str], reviewed: str | os.PathLike[str]) -> dict[str, Any]:
    """Replaces a store's labels by those of an edited export; its own stay beside it as ``<folder>.before_review``.

    Images are known by their ``file_name``, categories by their name: tools number them anew. Every annotation is an
    instance (tools call run lengths crowds); one without ``score`` and ``mask_quality`` is a person's, and gets 1.

    Args:
      folder: the store.
      reviewed: the JSON; its hash is kept in the store's manifest as ``reviewed``.

    Returns:
      The new statistics (``stats.json``).

    Raises:
      DataError: the JSON is no COCO JSON, or has other images or sizes than the store, or instances of categories
        that it does not know; nothing is changed.
      UserError: a run is at work on these labels.
    """
    folder, reviewed = Path(folder), Path(reviewed)
    run = folder.resolve().parents[1] if folder.resolve().parent.name == "pseudo_labels" else folder
    finish_import(folder)
    # A step that trains on these labels reads them as it goes; where nothing ever ran there is nobody to keep out.
    with only_writer(run) if (run / LOCK).exists() else contextlib.nullcontext():
        return _import_labels(folder, reviewed)


def _import_labels(folder: Path, reviewed: Path) -> dict[str, Any]:
    store = PseudoLabels.open(folder)
    source = Coco(reviewed, images=folder)  # finds everything that is wrong with a JSON
    content = read_annotations(reviewed)
    used = {entry["category_id"] for entry in content["annotations"]}
    category_ids = _category_ids(reviewed, [known for known in source.categories if known.id in used], store.categories)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    lines = {line["file_name"]: line for line in store.lines()}
    for problem, files in (
        ("lacks", sorted(lines.keys() - set(names.values()))),
        ("has unknown", sorted(set(names.values()) - lines.keys())),
    ):
        if files:
            raise DataError(
                f"{reviewed}: {problem} images: {name_some(files)}; all of the export's must be there, and no "
                "others, by their file_name (folders too)"
            )
    for image in content["images"]:
        if (size := (image["height"], image["width"])) != (wanted := _size(lines[image["file_name"]])):
            raise DataError(f"{reviewed}: {image['file_name']} is {size} pixels (height, width), in {folder} {wanted}")
    instances: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for number, entry in enumerate(content["annotations"]):
        name = names[entry["image_id"]]
        instances[name].append(
            {
                "category_id": category_ids[entry["category_id"]],
                "segmentation": encode_segmentation(entry["segmentation"], *_size(lines[name])),
                **{key: _share(entry, key, f"{reviewed}: annotations[{number}]") for key in ("score", "mask_quality")},
            }
        )
    new = _beside(folder, "importing")
    shutil.rmtree(new, ignore_errors=True)
    manifest = read_json(folder / MANIFEST)
    for shard in shards(manifest):
        texts = [
            json.dumps({**lines_of, "instances": instances[lines_of["file_name"]]})
            for lines_of in list(lines.values())[shard.indices.start : shard.indices.stop]
        ]
        atomic_write(new / shard_name(shard.number), "\n".join(texts) + "\n")
    digest = hashlib.sha256(reviewed.read_bytes()).hexdigest()[:16]
    write_json(new / MANIFEST, {**manifest, "reviewed": digest})
    statistics = write_statistics(new)
    folder.rename(_beside(folder, "replaced"))
    finish_import(folder)
    return statistics


def _category_ids(reviewed: Path, found: Sequence[Category], known: Sequence[Category]) -> dict[int, int]:
    """The store's ids of the JSON's categories, by name."""
    ids = {category.name: category.id for category in known}
    if unknown := [category.name for category in found if category.name not in ids]:
        raise DataError(
            f"{reviewed}: has unknown categories: {name_some(unknown, 20)}; they must keep the run's names "
            f"(the ids need not stay): {name_some(list(ids), 20)}"
        )
    if changed := [f"{each.name} {each.id} -> {ids[each.name]}" for each in found if each.id != ids[each.name]]:
        logger.info("%s numbers categories anew: %s", reviewed, name_some(changed, 20))
    return {category.id: ids[category.name] for category in found}


def finish_import(folder: Path) -> None:
    """Puts the imported labels in their place, also where :func:`import_labels` was stopped while it did."""
    new, before, replaced = (_beside(folder, what) for what in ("importing", "before_review", "replaced"))
    if not replaced.exists():
        return
    if new.exists() and not folder.exists():
        new.rename(folder)
    if before.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(before)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f"{folder.name}.{what}")


def _size(line: dict[str, Any]) -> tuple[int, int]:
    return line["height"], line["width"]


def _share(entry: dict[str, Any], key: str, where: str) -> float:
    value = entry.get(key, 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise DataError(f"{where}.{key} is {value!r}; it must lie between 0 and 1, or be left out for 1")
    return float(value)


def _outlines(rle: dict[str, Any]) -> list[list[float]] | None:
    """The mask's outlines as COCO polygons (x, y in pixels), or ``None`` where they do not show it well."""
    mask = decode_mask(rle)
    left, top, width, height = coco_mask.toBbox(rle).astype(int).tolist()
    if not width:
        return None
    # Contours run through the centres of the outermost pixels, so the pixels are made smaller first.
    finer = np.kron(mask[top : top + height, left : left + width], np.ones((_FINER, _FINER), np.uint8))
    offset = (left * _FINER, top * _FINER)
    contours, _ = cv2.findContours(finer, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=offset)
    simpler = [cv2.approxPolyDP(contour, _FINER / 2, True) for contour in contours]
    polygons = [((contour.reshape(-1) + 0.5) / _FINER).round(2).tolist() for contour in simpler if len(contour) >= 3]
    if not polygons:
        return None
    shown = coco_mask.merge(coco_mask.frPyObjects(polygons, *mask.shape))
    return polygons if coco_mask.iou([rle], [shown], [0])[0, 0] >= _POLYGON_IOU else None
