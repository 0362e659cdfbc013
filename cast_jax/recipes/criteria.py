"""L_sup and L_pl of each view, by what the segmenter predicts: the student's criterion, or the two networks' own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxtyping import Array, Float, PRNGKeyArray

from cast_jax.core.sharding import join_batches, split_batches
from cast_jax.losses.detection import DetectionConfig, detection_loss
from cast_jax.losses.set_criterion import (
    CriterionConfig,
    Metrics,
    Targets,
    point_keys,
    prompted_mask_loss,
    set_loss,
    set_terms,
)
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
    predictions: Sequence[Prediction],
    keys: Sequence[PRNGKeyArray],
    targets: Sequence[Targets],
    criteria: Criteria,
    instances: Sequence[Instances],
) -> list[Loss]:
    """The loss and the terms of each view; all predictions are of one segmenter. See ``set_loss`` for ``instances``."""
    views = list(zip(predictions, keys, targets, instances, strict=True))
    if isinstance(predictions[0], GroundedPrediction):
        return [_of_detector_and_masks(*view, criteria) for view in views]
    layers = [found.layers for found in predictions]
    assert layers[0] is not None
    _, number, queries, _ = layers[0].embeddings.shape
    points = [point_keys(key, len(target.labels), number) for _, key, target, _ in views]
    # All views of all images at once: one program to compile.
    together = set_terms(join_batches(points), join_batches(layers), join_batches(targets), criteria.masks)
    terms = split_batches(together, [len(target.labels) for target in targets])
    return [
        set_loss(of_view, target.valid, queries, criteria.masks, count)
        for of_view, (_, _, target, count) in zip(terms, views, strict=True)
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
