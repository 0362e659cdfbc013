"""COCO mask average precision, computed by pycocotools over annotations that arrive image by image."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cast_jax.core.annotations import Category, Detections, Instances, encode_mask
from cast_jax.core.errors import DataError
from cast_jax.core.files import atomic_write, write_json
from cast_jax.evaluation.class_names import class_names

_AREAS = ("all", "small", "medium", "large")  # the order of COCOeval's areaRng


class MaskAPEvaluator:
    """Collects ground truth and detections as run-length masks, then scores them with ``COCOeval``.

    Differences from scoring COCO's own JSON, all of them consequences of :class:`Instances`:

    * An object's area is that of its mask (COCO's JSON gives the area of its polygon).
    * ``COCOeval`` looks for crowds among the annotations of one class. An ignore region has no class here, so it
      stands as a crowd for every class detected in its image: a detection is dropped where the share of its area
      inside the region reaches the IoU threshold. For a class without detections it would change nothing.
    * An object with an empty mask cannot be found and is not counted.

    Args:
      categories: the classes; ``labels`` are positions in it.
      max_detections: how many detections of one class and image count, best first. COCO's protocol says 100
        (``COCOeval.summarize`` works with no other value, so the means are taken here from its precision table).
    """

    def __init__(self, categories: Sequence[Category], max_detections: int = 100):
        if not categories:
            raise DataError("mask AP needs at least one category; an unlabelled source cannot be evaluated")
        if max_detections < 1:
            raise ValueError(f"max_detections must be at least 1, got {max_detections}")
        self.categories = tuple(categories)
        self.max_detections = max_detections
        self._images: dict[int | str, dict[str, int]] = {}
        self._truth: list[dict[str, Any]] = []
        self._detections: list[dict[str, Any]] = []
        self._evaluated: COCOeval | None = None

    def __len__(self) -> int:
        return len(self._images)

    def add(self, image_id: int | str, size: tuple[int, int], ground_truth: Instances, detections: Detections) -> None:
        """Adds one image of ``size`` (height, width); its masks are kept as RLEs only.

        Raises:
          DataError: the image was added before, or sizes, labels or scores do not fit.
        """
        self._check(image_id, size, ground_truth, detections)
        height, width = size
        image = len(self._images)
        self._images[image_id] = {"id": image, "height": height, "width": width}
        self._evaluated = None
        for mask, label in zip(ground_truth.masks, ground_truth.labels, strict=True):
            if mask.any():
                self._add_truth(image, int(label), encode_mask(mask), crowd=False)
        if ground_truth.ignore.any():
            region = encode_mask(ground_truth.ignore)
            for label in np.unique(detections.labels):
                self._add_truth(image, int(label), region, crowd=True)
        for rle, label, score in zip(detections.rles, detections.labels, detections.scores, strict=True):
            annotation = _annotation(len(self._detections) + 1, image, int(label), rle)
            self._detections.append(annotation | {"score": float(score)})

    def collected(self) -> dict[str, Any]:
        """What was added so far as JSON values, for :meth:`extend` of another process's evaluator."""
        return {"images": list(self._images.items()), "truth": self._truth, "detections": self._detections}

    def extend(self, collected: dict[str, Any]) -> None:
        """Adds the images that another evaluator :meth:`collected`, after its own.

        Raises:
          DataError: an image is here already.
        """
        first = len(self._images)
        for image_id, image in collected["images"]:
            self._require_new(image_id)
            self._images[image_id] = image | {"id": first + image["id"]}
        for known, more in ((self._truth, collected["truth"]), (self._detections, collected["detections"])):
            start = len(known)
            known += [item | {"id": start + item["id"], "image_id": first + item["image_id"]} for item in more]
        self._evaluated = None

    def results(self) -> dict[str, Any]:
        """Average precision in percent; ``None`` where there is no ground truth to find.

        Keys: ``mask_ap`` (mean over IoU 0.50:0.05:0.95), ``mask_ap50``, ``mask_ap75``,
        ``mask_ap_{small,medium,large}`` (areas below 32², 96², above), ``per_class`` (name → ``id``, ``instances``,
        ``ap``, ``ap50``), ``images``, ``instances``, ``detections``.
        """
        precision = self._precision()
        instances = [annotation["category_id"] for annotation in self._truth if not annotation["iscrowd"]]
        counts = np.bincount(np.asarray(instances, np.int64), minlength=len(self.categories))
        per_class = {
            name: {
                "id": self.categories[i].id,
                "instances": int(counts[i]),
                "ap": _percent(precision[:, :, i, 0]),
                "ap50": _percent(precision[0, :, i, 0]),
            }
            for i, name in enumerate(class_names(self.categories))
        }
        return {
            "mask_ap": _percent(precision[..., 0]),
            "mask_ap50": _percent(precision[0, ..., 0]),
            "mask_ap75": _percent(precision[5, ..., 0]),
            **{f"mask_ap_{area}": _percent(precision[..., i]) for i, area in enumerate(_AREAS) if i > 0},
            "per_class": per_class,
            "images": len(self._images),
            "instances": len(instances),
            "detections": len(self._detections),
        }

    def coco_results(self) -> list[dict[str, Any]]:
        """The detections in COCO's result format, with the dataset's own image and category ids."""
        image_ids = list(self._images)
        return [
            {
                "image_id": image_ids[detection["image_id"]],
                "category_id": self.categories[detection["category_id"]].id,
                "segmentation": detection["segmentation"],
                "score": detection["score"],
            }
            for detection in self._detections
        ]

    def write(self, folder: str | os.PathLike[str]) -> dict[str, Any]:
        """Writes ``coco_results.json``, ``per_class_ap.csv`` and ``pr_curve.png``; returns :meth:`results`."""
        folder, results = Path(folder), self.results()
        write_json(folder / "coco_results.json", self.coco_results())
        atomic_write(folder / "per_class_ap.csv", _per_class_csv(results["per_class"]))
        atomic_write(folder / "pr_curve.png", precision_recall_figure(self._precision()[..., 0]))
        return results

    def _check(
        self, image_id: int | str, size: tuple[int, int], ground_truth: Instances, detections: Detections
    ) -> None:
        self._require_new(image_id)
        sizes = {tuple(ground_truth.masks.shape[1:]), tuple(ground_truth.ignore.shape)}
        sizes |= {tuple(rle["size"]) for rle in detections.rles}
        if sizes != {tuple(size)}:
            raise DataError(f"image {image_id!r} is {tuple(size)} (height, width), its masks are {sorted(sizes)}")
        labels = np.concatenate([ground_truth.labels, detections.labels])
        if labels.size and not (labels.min() >= 0 and labels.max() < len(self.categories)):
            raise DataError(
                f"image {image_id!r}: labels {sorted(set(labels.tolist()))} must be positions in the "
                f"{len(self.categories)} categories"
            )
        if not np.isfinite(detections.scores).all():
            raise DataError(f"image {image_id!r}: a detection's score is not finite")

    def _require_new(self, image_id: int | str) -> None:
        if image_id in self._images:
            raise DataError(f"image {image_id!r} was added twice; image ids must be unique in a dataset")

    def _add_truth(self, image: int, label: int, rle: dict[str, Any], crowd: bool) -> None:
        annotation = _annotation(len(self._truth) + 1, image, label, rle)
        self._truth.append(annotation | {"iscrowd": int(crowd)})

    def _precision(self) -> Float[np.ndarray, "thresholds recalls classes areas"]:
        """COCOeval's interpolated precision; -1 where a class has no ground truth."""
        if self._evaluated is None:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress by print
                evaluation = COCOeval(self._index(self._truth), self._index(self._detections), "segm")
                evaluation.params.maxDets = [self.max_detections]
                evaluation.evaluate()
                evaluation.accumulate()
            self._evaluated = evaluation
        return self._evaluated.eval["precision"][..., 0]

    def _index(self, annotations: list[dict[str, Any]]) -> COCO:
        """A COCO object over copies of the annotations, since COCOeval writes into them."""
        coco = COCO()
        coco.dataset = {
            "images": list(self._images.values()),
            "categories": [{"id": i, "name": category.name} for i, category in enumerate(self.categories)],
            "annotations": [dict(annotation) for annotation in annotations],
        }
        coco.createIndex()
        return coco


def precision_recall_figure(precision: Float[np.ndarray, "thresholds recalls classes"]) -> bytes:
    """A PNG of precision against recall at IoU 0.50 and 0.75, the mean over the classes with ground truth (not -1)."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    known = precision[:, :, (precision[0] > -1).all(axis=0)]
    recall = np.linspace(0, 1, precision.shape[1])
    for threshold, index, colour in (("0.50", 0, "#2f6fde"), ("0.75", 5, "#e0662f")):
        if known.shape[2]:
            curve = known[index].mean(axis=-1)
            axes.plot(recall, curve, color=colour, lw=2, label=f"IoU {threshold}   AP {100 * curve.mean():.1f}")
            axes.fill_between(recall, curve, color=colour, alpha=0.10, lw=0)
    if known.shape[2]:
        axes.legend(loc="upper right", frameon=False)
    else:
        axes.text(0.5, 0.5, "no ground truth", ha="center", va="center", color="#808080")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title(
        f"Mask precision and recall, mean over {known.shape[2]} of {precision.shape[2]} classes",
        loc="left",
        fontsize=11,
    )
    axes.grid(color="#d8d8d8", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _annotation(annotation_id: int, image: int, label: int, rle: dict[str, Any]) -> dict[str, Any]:
    """One COCO annotation. Ids start at 1, because COCOeval reads a match with id 0 as no match."""
    return {
        "id": annotation_id,
        "image_id": image,
        "category_id": label,
        "segmentation": rle,
        "area": float(coco_mask.area(rle)),
    }


def _percent(precision: np.ndarray) -> float | None:
    """The mean in percent over what was measured (-1 marks classes without ground truth)."""
    measured = precision[precision > -1]
    return 100 * float(measured.mean()) if measured.size else None


def _per_class_csv(per_class: dict[str, dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["class", "id", "instances", "ap", "ap50"])
    for name, row in per_class.items():
        scores = ["n/a" if row[key] is None else f"{row[key]:.3f}" for key in ("ap", "ap50")]
        writer.writerow([name, row["id"], row["instances"], *scores])
    return buffer.getvalue()
