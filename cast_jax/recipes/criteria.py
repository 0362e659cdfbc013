"""L_sup and L_pl of one view, by what the segmenter predicts: the student's criterion, or the two networks' own."""

from __future__ import annotations

import dataclasses
import functools

from jaxtyping import Array, Float, PRNGKeyArray

from cast_jax.losses.detection import DetectionConfig, detection_loss
from cast_jax.losses.set_criterion import CriterionConfig, Metrics, Targets, prompted_mask_loss, set_criterion
from cast_jax.models.segmenter import Prediction
from cast_jax.models.teacher.grounded_sam2 import GroundedPrediction


@dataclasses.dataclass(frozen=True)
class Criteria:
    """Settings of the terms: of masks (and, of the student, classes), and of a detector's boxes."""

    masks: CriterionConfig
    boxes: DetectionConfig


@functools.singledispatch
def view_loss(
    prediction: Prediction,
    key: PRNGKeyArray,
    targets: Targets,
    criteria: Criteria,
    instances: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a view's predictions and its terms; see ``set_criterion`` for ``instances``."""
    layers = (*prediction.aux, (prediction.mask_logits, prediction.class_logits))
    return set_criterion(key, layers, targets, criteria.masks, instances)


@view_loss.register
def _(
    prediction: GroundedPrediction,
    key: PRNGKeyArray,
    targets: Targets,
    criteria: Criteria,
    instances: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Boxes teach the detector; masks prompted with the instances' boxes teach SAM 2."""
    assert prediction.prompted is not None, "the model must be given the instances' boxes"
    detected = [(found.token_logits, found.boxes, found.class_map) for found in prediction.detections]
    of_boxes, terms = detection_loss(detected, targets, criteria.boxes, instances)
    of_masks, others = prompted_mask_loss(key, *prediction.prompted, targets, criteria.masks, instances)
    return of_boxes + of_masks, terms | others
