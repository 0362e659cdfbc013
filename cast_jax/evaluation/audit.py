"""How good are pseudo-labels? Measured against truth that training never sees."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from pycocotools import mask as coco_mask

from cast_jax.core.annotations import Category, Detections, Instances, encode_mask
from cast_jax.evaluation.class_names import class_names

SCORE_EDGES = (0.3, 0.5, 0.7, 0.9, 1.0)


@dataclasses.dataclass
class _Tally:
    """Counts over detections: how many, how many of them right, and the sum of the right ones' IoU."""

    detections: int = 0
    correct: int = 0
    iou_sum: float = 0.0

    def add(self, iou: float | None) -> None:
        self.detections += 1
        if iou is not None:
            self.correct += 1
            self.iou_sum += iou

    def report(self, truth: int) -> dict[str, Any]:
        return {
            "detections": self.detections,
            "precision": _ratio(self.correct, self.detections),
            "recall": _ratio(self.correct, truth),
            "mean_iou": _ratio(self.iou_sum, self.correct),
        }


def audit(
    pairs: Iterable[tuple[Instances, Detections]],
    categories: Sequence[Category],
    *,
    iou_threshold: float = 0.5,
    score_edges: Sequence[float] = SCORE_EDGES,
) -> dict[str, Any]:
    """Scores pseudo-labels against the truth of the same images.

    In each image and class the detections, best score first, each take the free object that they overlap most, if the
    IoU reaches the threshold. An unmatched detection that lies with at least that share of its area in the ignore
    region does not count. Detections under ``score_edges[0]`` are not pseudo-labels and are left out.

    Args:
      pairs: the truth and the detections of each image, at the same resolution; consumed one by one.
      categories: the classes that both label by position.
      iou_threshold: least IoU of a match, in (0, 1].
      score_edges: increasing; bin i holds scores in ``[edge i, edge i+1)``, the last one its upper edge too.

    Returns:
      JSON-ready: ``images``, ``truth`` (objects), ``detections``, ``precision``, ``recall``, ``mean_iou`` (of matches),
      ``truth_per_image``, ``detections_per_image``; ``by_score``, a list of bins (``from``, ``to`` and the same
      measures; ``recall`` is the share of all objects that this bin found, so the bins' recalls add up to the whole);
      ``by_class``, name → the same measures and ``truth``. A ratio over nothing is ``None``.
    """
    edges = np.asarray(score_edges, np.float32)  # as the scores are: 0.7 must not fall under the edge 0.7
    if len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(f"score_edges must be at least two increasing numbers, got {tuple(score_edges)}")
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in (0, 1], got {iou_threshold}")
    images = 0
    truth_counts = np.zeros(len(categories), np.int64)
    whole = _Tally()
    bins: dict[int, _Tally] = defaultdict(_Tally)
    classes: dict[int, _Tally] = defaultdict(_Tally)
    for truth, detections in pairs:
        images += 1
        truth_counts += np.bincount(truth.labels, minlength=len(categories))
        kept = np.flatnonzero(detections.scores >= edges[0])
        for index, iou in _match(truth, detections, kept, iou_threshold):
            score_bin = int(np.searchsorted(edges[1:-1], detections.scores[index], side="right"))
            for tally in (whole, bins[score_bin], classes[int(detections.labels[index])]):
                tally.add(iou)
    objects = int(truth_counts.sum())
    return {
        "images": images,
        "truth": objects,
        **whole.report(objects),
        "truth_per_image": _ratio(objects, images),
        "detections_per_image": _ratio(whole.detections, images),
        "by_score": [
            {"from": float(low), "to": float(high), **bins[i].report(objects)}
            for i, (low, high) in enumerate(itertools.pairwise(score_edges))
        ],
        "by_class": {
            name: {"truth": int(truth_counts[i]), **classes[i].report(int(truth_counts[i]))}
            for i, name in enumerate(class_names(categories))
        },
    }


def _match(
    truth: Instances, detections: Detections, kept: np.ndarray, threshold: float
) -> list[tuple[int, float | None]]:
    """(detection, IoU of its match or None) for the ``kept`` detections that count, best score first."""
    kept = kept[np.argsort(-detections.scores[kept], kind="stable")]
    rles = [detections.rles[i] for i in kept]
    ious = _overlaps(rles, [encode_mask(mask) for mask in truth.masks], crowd=False)
    ignored = _overlaps(rles, [encode_mask(truth.ignore)], crowd=True)[:, 0]
    free = np.ones(len(truth), bool)
    matches: list[tuple[int, float | None]] = []
    for row, index in enumerate(kept):
        candidates = np.where(free & (truth.labels == detections.labels[index]), ious[row], -1.0)
        best = int(candidates.argmax()) if len(truth) else -1
        if best >= 0 and candidates[best] >= threshold:
            free[best] = False
            matches.append((int(index), float(candidates[best])))
        elif ignored[row] < threshold:
            matches.append((int(index), None))
    return matches


def _overlaps(
    rles: list[dict[str, Any]], others: list[dict[str, Any]], crowd: bool
) -> Float[np.ndarray, "detections others"]:
    """IoU of every pair, or for crowds the share of the detection's area that lies inside."""
    if not rles or not others:
        return np.zeros((len(rles), len(others)))
    return np.asarray(coco_mask.iou(rles, others, [int(crowd)] * len(others)))


def _ratio(numerator: float, denominator: int) -> float | None:
    return numerator / denominator if denominator else None
