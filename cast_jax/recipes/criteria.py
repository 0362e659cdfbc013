"""L_sup and L_pl of each view, by what the segmenter predicts: the student's criterion, or the two networks' own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from cast_jax.core.sharding import join_batches, split_batches
from cast_jax.losses.config import CriterionConfig
from cast_jax.losses.detection import DetectionConfig, detection_loss
from cast_jax.losses.set_criterion import Metrics, point_keys, prompted_mask_loss, set_loss, set_terms
from cast_jax.losses.targets import Targets
from cast_jax.models.segmenter import Prediction
from cast_jax.models.teacher.grounded_sam2 import GroundedPrediction

Instances = Float[Array, ""] | None
Loss = tuple[Float[Array, ""], Metrics]


@dataclasses.dataclass(frozen=True)
class Criteria:
    """Settings of the terms: of masks (and, of the student, classes), and of a detector's boxes."""

    masks: CriterionConfig
    boxes: DetectionConfig


def view_losses(
    prediction: Prediction,
    key: PRNGKeyArray,
    targets: Sequence[Targets],
    criteria: Criteria,
    instances: Sequence[Instances],
) -> list[Loss]:
    """The loss and the terms of each view, by what is predicted of all views' images, joined as ``join_batches`` does.

    See ``set_loss`` for ``instances``.
    """
    sizes = [len(target.labels) for target in targets]
    if isinstance(prediction, GroundedPrediction):
        views = zip(
            split_batches(prediction, sizes), jax.random.split(key, len(sizes)), targets, instances, strict=True
        )
        return [_of_detector_and_masks(*view, criteria) for view in views]
    layers = prediction.layers
    assert layers is not None
    images, number, queries, _ = layers.embeddings.shape
    # All views of all images at once: one program to compile.
    joined = join_batches(targets)
    keys = point_keys(key, images, number, joined.valid.shape[1])
    together = set_terms(keys, layers, joined, criteria.masks)
    terms = split_batches(together, sizes)
    return [
        set_loss(of_view, target.valid, queries, criteria.masks, count)
        for of_view, target, count in zip(terms, targets, instances, strict=True)
    ]


def _of_detector_and_masks(
    prediction: Prediction, key: PRNGKeyArray, targets: Targets, instances: Instances, criteria: Criteria
) -> Loss:
    """Boxes teach the detector; masks prompted with the instances' boxes teach SAM 2."""
    assert isinstance(prediction, GroundedPrediction)
    assert prediction.prompted is not None, "the model must be given the instances' boxes"
    detected = [(found.token_logits, found.boxes, found.class_map) for found in prediction.detections]
    of_boxes, terms = detection_loss(detected, targets, criteria.boxes, instances)
    of_masks, others = prompted_mask_loss(key, *prediction.prompted, targets, criteria.masks, instances)
    return of_boxes + of_masks, terms | others
