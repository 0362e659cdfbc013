"""How good are pseudo-labels? Measured against truth that training never sees."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from pycocotools import mask as coco_mask

from cast_jax.core.annotations import Category, Detections, Instances, encode_mask
from cast_jax.evaluation.class_names import class_names

SCORE_EDGES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclasses.dataclass
class _Tally:
    """Counts over detections: how many, how many of them right; sums of their scores and of the right ones' IoU."""

    detections: int = 0
    correct: int = 0
    iou_sum: float = 0.0
    score_sum: float = 0.0

    def add(self, score: float, iou: float | None) -> None:
        self.detections += 1
        self.score_sum += score
        if iou is not None:
            self.correct += 1
            self.iou_sum += iou

    def report(self, truth: int) -> dict[str, Any]:
        return {
            "detections": self.detections,
            "precision": _ratio(self.correct, self.detections),
            "recall": _ratio(self.correct, truth),
            "mean_iou": _ratio(self.iou_sum, self.correct),
            "mean_score": _ratio(self.score_sum, self.detections),
        }


def tenths_from(threshold: float) -> tuple[float, ...]:
    """Score edges: ``threshold`` and every tenth above it."""
    low = min(threshold, 0.999)  # scores of 1 only are a bin too
    return (low, *(tenth / 10 for tenth in range(1, 11) if tenth / 10 > low))


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
      ``mean_score``, ``truth_per_image``, ``detections_per_image``; ``by_score``, a list of bins (``from``, ``to`` and
      the same measures; ``recall`` is the share of all objects that this bin found, so the bins' recalls add up to the
      whole); ``by_class``, name → the same measures with ``truth`` and the class's own ``by_score``; and
      ``calibration_error``, the mean distance of a bin's precision from its mean score, weighted by its detections
      (Naeini et al., AAAI 2015). A ratio over nothing is ``None``.
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
    cells: dict[tuple[int, int], _Tally] = defaultdict(_Tally)
    for truth, detections in pairs:
        images += 1
        truth_counts += np.bincount(truth.labels, minlength=len(categories))
        kept = np.flatnonzero(detections.scores >= edges[0])
        for index, iou in _match(truth, detections, kept, iou_threshold):
            score, label = float(detections.scores[index]), int(detections.labels[index])
            score_bin = int(np.searchsorted(edges[1:-1], detections.scores[index], side="right"))
            for tally in (whole, bins[score_bin], classes[label], cells[label, score_bin]):
                tally.add(score, iou)
    objects = int(truth_counts.sum())
    spans = [{"from": float(low), "to": float(high)} for low, high in itertools.pairwise(score_edges)]
    by_score = [span | bins[i].report(objects) for i, span in enumerate(spans)]
    return {
        "images": images,
        "truth": objects,
        **whole.report(objects),
        "truth_per_image": _ratio(objects, images),
        "detections_per_image": _ratio(whole.detections, images),
        "calibration_error": _ratio(
            sum(abs(tally.correct - tally.score_sum) for tally in bins.values()), whole.detections
        ),
        "by_score": by_score,
        "by_class": {
            name: {
                "truth": (count := int(truth_counts[label])),
                **classes[label].report(count),
                "by_score": [span | cells[label, i].report(count) for i, span in enumerate(spans)],
            }
            for label, name in enumerate(class_names(categories))
        },
    }


def calibration_figure(report: dict[str, Any]) -> bytes:
    """A PNG of an :func:`audit`: each bin's precision over its mean score, and how many detections and finds it has."""
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    bins = [entry for entry in report["by_score"] if entry["detections"]]
    above.plot((0, 1), (0, 1), color="#808080", lw=1, ls="--", label="calibrated")
    scores, precisions = ([entry[key] for entry in bins] for key in ("mean_score", "precision"))
    above.plot(scores, precisions, color="#2f6fde", lw=2, marker="o", label="precision")
    finds = [(entry["mean_score"], entry["mean_iou"]) for entry in bins if entry["mean_iou"] is not None]
    above.plot(*zip(*finds, strict=True) if finds else ((), ()), color="#e0662f", lw=2, marker="s", label="mask IoU")
    error = report["calibration_error"]
    above.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="precision at IoU 0.5, mask IoU of finds")
    said = "no detections" if error is None else f"calibration error {error:.3f}"
    above.set_title(f"Pseudo-labels of {report['images']} hidden images: {said}", loc="left", fontsize=11)
    above.legend(loc="upper left", frameon=False)
    edges = [(entry["from"], entry["to"] - entry["from"]) for entry in report["by_score"]]
    counts = [entry["detections"] for entry in report["by_score"]]
    lefts, widths = zip(*edges, strict=True)
    below.bar(lefts, counts, widths, align="edge", color="#2f6fde", alpha=0.35, edgecolor="white")
    below.set(xlabel="score", ylabel="detections")
    for axes in (above, below):
        axes.grid(color="#d8d8d8", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


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
