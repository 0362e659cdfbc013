"""Cityscapes' own instance AP: predictions in its format, scored by its ``cityscapesscripts``.

Its definition differs from COCO's (``coco_map``) in what follows, each tested on a case worked by hand:

* A match needs an IoU *above* the threshold, COCO's one at least as high.
* Every match above 0.5 is unique, so nothing is assigned greedily by score: of two detections of one object the lower
  one is false, whatever their IoUs.
* AP is the area under the measured points with half a step to either side, not under an interpolated envelope read at
  101 recalls; and no detection is left out, where COCO counts 100 a class and image.
* Objects under 100 pixels are ignored. A detection that matches nothing is dropped where more than the threshold's
  share of it lies on void, groups or such small objects of its class.
* Caravans and trailers are void here only as groups; a detection on one is false. The source ignores both.
* Scores are written with six decimals, and detections of one score make one point of the curve.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import math
import os
import types
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from cast_jax.core.annotations import Category, Detections, decode_mask
from cast_jax.core.errors import DataError, UserError
from cast_jax.core.files import atomic_write, write_json

logger = logging.getLogger(__name__)

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


def official_scorer_installed() -> bool:
    """Whether :func:`official_ap` can be used: ``pip install 'cast_jax[cityscapes]'``."""
    return importlib.util.find_spec("cityscapesscripts") is not None


def official_ap(folder: str | os.PathLike[str], label_paths: Mapping[str, Path]) -> dict[str, Any]:
    """The official instance AP of the predictions that :func:`write_predictions` left in ``folder``, in percent.

    Takes seconds an image of the full size; images are shared out over threads.

    Args:
      folder: with a text for every image.
      label_paths: each image's stem and its ``_gtFine_instanceIds.png``.

    Returns:
      ``ap`` (mean over IoU 0.50:0.05:0.95 and classes), ``ap50``, ``per_class`` (name to ``ap`` and ``ap50``); ``None``
      for a class without an object, which the means leave out.

    Raises:
      UserError: ``cityscapesscripts`` is not installed.
      DataError: an image has no prediction text.
    """
    if not official_scorer_installed():
        raise UserError("the official Cityscapes AP needs cityscapesscripts: pip install 'cast_jax[cityscapes]'")
    scorer = _scorer()
    folder = Path(folder).resolve()
    texts = {str(path.resolve()): str(folder / f"{stem}_pred.txt") for stem, path in label_paths.items()}
    if missing := [text for text in texts.values() if not Path(text).is_file()]:
        raise DataError(f"{folder}: no predictions for {len(missing)} images, the first is {Path(missing[0]).name}")
    args = copy.copy(scorer.args)
    args.quiet, args.predictionPath = True, str(folder)
    scorer.setInstanceLabels(args)

    def matched(item: tuple[str, str]) -> dict[str, Any]:
        labels, text = item
        objects = scorer.instances2dict([labels], False)
        return scorer.matchGtWithPreds([text], [labels], objects, args)

    matches: dict[str, Any] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for match in tqdm(pool.map(matched, texts.items()), "official AP", len(texts), unit="image", disable=None):
            matches.update(match)
    by_class = 100 * scorer.evaluateMatches(matches, args)[0]  # [classes, overlaps]
    known = by_class[~np.isnan(by_class).any(axis=1)]
    return {
        "ap": _number(known.mean() if len(known) else math.nan),
        "ap50": _number(known[:, 0].mean() if len(known) else math.nan),
        "per_class": {
            name: {"ap": _number(row.mean()), "ap50": _number(row[0])}
            for name, row in zip(args.instLabels, by_class, strict=True)
        },
    }


def write_official_ap(folder: Path, label_paths: Mapping[str, Path], path: Path) -> dict[str, float]:
    """Writes :func:`official_ap` to ``path``, and returns what the log shows of it; without the scorer only warns."""
    if not official_scorer_installed():
        logger.warning("%s is not scored: pip install 'cast_jax[cityscapes]' and evaluate again", folder)
        return {}
    results = official_ap(folder, label_paths)
    write_json(path, results)
    return {f"cityscapes_{key}": results[key] for key in ("ap", "ap50") if results[key] is not None}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _scorer() -> Any:
    scorer: Any = importlib.import_module("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")
    if not hasattr(np, "in1d"):  # removed in NumPy 2.4, which version 2.3.0 of the scorer does not know yet
        scorer.np = types.SimpleNamespace(**vars(np), in1d=np.isin)
    return scorer
